// The CPU kernels have the same bits on every processor, system and compiler: those of this digest.
//
//   test_cpu_bits      all instruction sets that run here
//   test_cpu_bits -v   with the digest of each kind of call
#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../cpp/cpu/row_norm.h"

namespace {

using namespace normkit;

constexpr uint64_t kExpected = 0xa3ef3885091eced6;
constexpr int64_t kRows = 21;

struct Digest {
  uint64_t value = 0xcbf29ce484222325;
  void add(const void* data, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i)
      value = (value ^ static_cast<const unsigned char*>(data)[i]) * 0x100000001b3;
  }
};

// By integers alone, since distributions and conversions are the library's.
struct Random {
  uint64_t state;
  uint32_t next() {
    state = state * 6364136223846793005 + 1442695040888963407;
    return static_cast<uint32_t>(state >> 32);
  }
};

// Numbers from 2^-5 to 2^3, of both signs.
std::vector<char> numbers(DType dtype, int64_t count, uint64_t seed) {
  Random random{seed};
  std::vector<char> bytes(count * item_size(dtype));
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = random.next(), sign = random.next() & 1, power = random.next() % 8;
    const uint32_t wide = sign << 31 | (122 + power) << 23 | bits >> 9;
    const uint16_t bfloat = static_cast<uint16_t>(wide >> 16);
    const uint16_t half = static_cast<uint16_t>(sign << 15 | (10 + power) << 10 | bits >> 22);
    if (dtype == DType::kFloat32)
      std::memcpy(&bytes[i * 4], &wide, 4);
    else
      std::memcpy(&bytes[i * 2], dtype == DType::kFloat16 ? &half : &bfloat, 2);
  }
  return bytes;
}

struct Matrix {
  DType dtype;
  int64_t n;
  std::vector<char> bytes;
  Matrix(DType dtype, int64_t n, uint64_t seed)
      : dtype(dtype), n(n), bytes(numbers(dtype, kRows * n, seed)) {}
  RowsOf rows() {
    RowsOf of{};
    of.data = bytes.data();
    of.dtype = dtype;
    of.stride[0] = n * item_size(dtype);
    return of;
  }
  Affine affine() const { return {bytes.data(), dtype, 0, 1, 1}; }
  void add_to(Digest& digest) const { digest.add(bytes.data(), bytes.size()); }
};

struct Kind {
  Statistic statistic;
  DType x, other;
  bool adds, flag;
};

void add_call(const Kind& kind, int64_t n, Digest& digest) {
  Matrix x(kind.x, n, 1), residual(kind.other, n, 2), weight(kind.other, n, 3);
  Matrix bias(kind.x, n, 4), y(kind.flag ? kind.x : kind.other, n, 5), sum(kind.other, n, 6);
  std::vector<float> rstd(kRows), mean(kRows);
  RowNorm norm{};
  norm.statistic = kind.statistic;
  norm.rows = norm.outer_size[0] = kRows;
  norm.n = n;
  norm.outer_dims = 1;
  norm.x = x.rows();
  norm.out = y.rows();
  if (kind.adds) norm.residual = residual.rows(), norm.residual_out = sum.rows();
  norm.weight = weight.affine();
  norm.bias = bias.affine();
  norm.options = {1e-6f, kind.flag ? 1.f : 0.f, kind.flag, !kind.flag, kind.flag, !kind.flag};
  norm.rstd = rstd.data();
  const bool layer = kind.statistic == Statistic::kLayer;
  if (layer) norm.mean = mean.data();
  cpu::row_norm(norm);
  y.add_to(digest);
  if (kind.adds) sum.add_to(digest);
  digest.add(rstd.data(), kRows * sizeof(float));
  if (layer) digest.add(mean.data(), kRows * sizeof(float));

  if (kind.adds) return;
  Matrix grad_x(kind.x, n, 7), grad_y(y.dtype, n, 8);
  Matrix grad_weight(weight.dtype, n, 9), grad_bias(bias.dtype, n, 10);
  RowNormBackward backward{};
  backward.statistic = kind.statistic;
  backward.rows = backward.outer_size[0] = kRows;
  backward.n = n;
  backward.outer_dims = 1;
  backward.x = norm.x;
  backward.grad_y = grad_y.rows();
  backward.grad_x = grad_x.rows();
  backward.weight = norm.weight;
  backward.bias = norm.bias;
  backward.rstd = rstd.data();
  backward.mean = norm.mean;
  backward.grad_weight = grad_weight.bytes.data();
  backward.grad_bias = grad_bias.bytes.data();
  backward.options = norm.options;
  backward.normalised = kind.x;
  cpu::row_norm_backward(backward);
  for (const Matrix* made : {&grad_x, &grad_weight, &grad_bias}) made->add_to(digest);
}

uint64_t digest_of_all(bool tells) {
  constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  Digest all;
  for (const Statistic statistic : {Statistic::kRms, Statistic::kLayer})
    for (const DType x : kDTypes)
      for (const DType other : kDTypes)
        for (const bool adds : {false, true})
          for (const bool flag : {false, true}) {
            Digest digest;
            for (const int64_t n : {1, 7, 31, 64, 96, 127, 1000, 1025, 4096, 5003})
              add_call({statistic, x, other, adds, flag}, n, digest);
            if (tells)
              std::printf("statistic %d, x %d, other %d, adds %d, flag %d: %016llx\n",
                          int(statistic), int(x), int(other), adds, flag,
                          static_cast<unsigned long long>(digest.value));
            all.add(&digest.value, sizeof(digest.value));
          }
  return all.value;
}

}  // namespace

int main(int count, char** arguments) {
  const bool tells = count > 1 && !std::strcmp(arguments[1], "-v");
  bool same = true;
  for (const char* const* name = cpu::instruction_sets(); *name; ++name) {
    cpu::use_instruction_set(*name);
    const uint64_t digest = digest_of_all(tells);
    same = same && digest == kExpected;
    std::printf("%s: %016llx%s\n", *name, static_cast<unsigned long long>(digest),
                digest == kExpected ? "" : ", not the one expected");
  }
  return !same;
}
