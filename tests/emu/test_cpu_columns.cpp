// The CPU kernels give rows of strided columns the bits of dense ones, in memory of exactly their
// size: for the sanitizers, which see what is read beside it.
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../../cpp/cpu/row_norm.h"

namespace {

using namespace normkit;

struct Rows {
  std::vector<char> bytes;
  RowsOf of{};
  int64_t rows, n;

  // Side by side, with a gap behind each column; or dense.
  Rows(DType dtype, int64_t rows, int64_t n, bool strided, int64_t gap) : rows(rows), n(n) {
    const int64_t item = item_size(dtype);
    of.dtype = dtype;
    of.stride[0] = strided ? item : n * item;
    of.column_stride = strided ? (rows + gap) * item : 0;
    bytes.resize((strided ? (n - 1) * (rows + gap) + rows : rows * n) * item);
    of.data = bytes.data();
  }
  char* at(int64_t r, int64_t c) {
    return of.data + r * of.stride[0] +
           c * (of.column_stride ? of.column_stride : item_size(of.dtype));
  }
};

RowNorm norm_of(const Rows& x, const Rows& y, const std::vector<float>& weight) {
  RowNorm norm{};
  norm.statistic = Statistic::kLayer;
  norm.rows = norm.outer_size[0] = x.rows;
  norm.n = x.n;
  norm.outer_dims = 1;
  norm.x = x.of;
  norm.out = y.of;
  norm.weight = {reinterpret_cast<const char*>(weight.data()), DType::kFloat32, 0, 1, 1};
  norm.options.eps = 1e-6f;
  return norm;
}

bool same(DType x_dtype, DType y_dtype, int64_t rows, int64_t n, int64_t gap, bool in_place) {
  std::mt19937 random(7);
  Rows x(x_dtype, rows, n, true, gap), dense_x(x_dtype, rows, n, false, 0);
  Rows y(y_dtype, rows, n, true, gap), dense_y(y_dtype, rows, n, false, 0);
  std::vector<float> weight(n);
  for (float& w : weight) w = 1.f + static_cast<float>(random() % 100);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < n; ++c) {
      // The upper half is a number around 1 in each dtype.
      const uint32_t bits = 0x3c000000u + (random() & 0x01ffffffu);
      const char* const from = reinterpret_cast<const char*>(&bits) + 4 - item_size(x_dtype);
      std::memcpy(x.at(r, c), from, item_size(x_dtype));
      std::memcpy(dense_x.at(r, c), from, item_size(x_dtype));
    }
  Rows& made = in_place ? x : y;
  cpu::row_norm(norm_of(x, made, weight));
  cpu::row_norm(norm_of(dense_x, dense_y, weight));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < n; ++c)
      if (std::memcmp(made.at(r, c), dense_y.at(r, c), item_size(y_dtype))) return false;
  return true;
}

}  // namespace

int main() {
  constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  int calls = 0, failures = 0;
  for (const DType x : kDTypes)
    for (const DType y : kDTypes)
      for (const int64_t rows : {1, 3, 4, 7, 8, 31, 64, 65, 130})
        for (const int64_t n : {2, 3, 4, 5, 8, 11, 64, 97, 1030})
          for (const int64_t gap : {0, 3})
            for (const bool in_place : {false, true}) {
              if (in_place && x != y) continue;
              ++calls;
              if (same(x, y, rows, n, gap, in_place)) continue;
              ++failures;
              std::printf("x %d, y %d, %d rows, n %d, gap %d, in place %d\n", int(x), int(y),
                          int(rows), int(n), int(gap), in_place);
            }
  std::printf("%d calls, %d failures\n", calls, failures);
  return failures != 0;
}
