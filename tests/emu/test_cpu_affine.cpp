// The affine map of the CPU kernels: row r of x takes row r / inner % groups of weight and bias.
// Nothing in Python makes an inner but 1 yet.
//
// Held against the same call with a row of weight and bias for each row of x, bit for bit; the
// gradients of weight and bias against sums over those of that call.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "../../cpp/cpu/row_norm.h"

namespace {

using namespace normkit;

// Rows of n elements, float32 or the upper halves of them.
struct Matrix {
  DType dtype;
  int64_t rows, n;
  std::vector<char> memory;

  Matrix(DType dtype, int64_t rows, int64_t n)
      : dtype(dtype), rows(rows), n(n), memory(rows * n * item_size(dtype)) {}
  int64_t row_bytes() const { return n * item_size(dtype); }
  char* row(int64_t r) { return memory.data() + r * row_bytes(); }
  float at(int64_t r, int64_t c) {
    float value = 0.f;
    const int64_t size = item_size(dtype);
    std::memcpy(reinterpret_cast<char*>(&value) + 4 - size, row(r) + c * size, size);
    return value;
  }
  void fill(std::mt19937& random) {
    std::normal_distribution<float> normal(0.25f, 1.f);
    const int64_t size = item_size(dtype);
    for (int64_t i = 0; i < rows * n; ++i) {
      const float value = normal(random);
      std::memcpy(row(0) + i * size, reinterpret_cast<const char*>(&value) + 4 - size, size);
    }
  }
  RowsOf as_rows() {
    RowsOf rows_of{};
    rows_of.data = row(0);
    rows_of.dtype = dtype;
    rows_of.stride[0] = row_bytes();
    return rows_of;
  }
  Affine as_affine(int64_t inner) {
    return {row(0), dtype, row_bytes(), rows > 1 ? inner : 1, rows};
  }
  // A row for each row of x.
  Matrix spread(int64_t inner, int64_t to) {
    Matrix each(dtype, to, n);
    for (int64_t r = 0; r < to; ++r) std::memcpy(each.row(r), row(r / inner % rows), row_bytes());
    return each;
  }
};

struct Case {
  DType dtype;
  int64_t inner, weight_groups, bias_groups, turns, n;  // bias_groups 0: no bias
  float offset;
};

int checks = 0, failures = 0;

void expect(bool holds, const char* what, const Case& c) {
  ++checks;
  if (holds) return;
  ++failures;
  std::printf("FAILED: %s, inner %d, groups %d and %d, %d turns of n %d, offset %g, dtype %d\n",
              what, int(c.inner), int(c.weight_groups), int(c.bias_groups), int(c.turns), int(c.n),
              c.offset, int(c.dtype));
}

// Whether `of_groups` has in each of its rows the sum of those of `of_rows` that are of its group.
bool adds_up(Matrix& of_groups, Matrix& of_rows, int64_t inner) {
  // Each summand was rounded to be stored, and the sum once more.
  const double unit = of_rows.dtype == DType::kFloat32 ? 1e-5 : 1e-2;
  for (int64_t group = 0; group < of_groups.rows; ++group)
    for (int64_t column = 0; column < of_rows.n; ++column) {
      double sum = 0, size = 0;
      for (int64_t r = 0; r < of_rows.rows; ++r) {
        if (r / inner % of_groups.rows != group) continue;
        sum += of_rows.at(r, column);
        size += std::abs(of_rows.at(r, column));
      }
      if (!(std::abs(sum - of_groups.at(group, column)) <= unit * size)) return false;
    }
  return true;
}

void test(const Case& c, std::mt19937& random) {
  const int64_t groups = std::max(c.weight_groups, c.bias_groups);
  const int64_t rows = c.inner * groups * c.turns;
  Matrix x(c.dtype, rows, c.n), grad_y(c.dtype, rows, c.n), weight(c.dtype, c.weight_groups, c.n),
      bias(c.dtype, c.bias_groups, c.n);
  for (Matrix* m : {&x, &grad_y, &weight, &bias}) m->fill(random);
  Matrix weights = weight.spread(c.inner, rows);
  Matrix biases = c.bias_groups ? bias.spread(c.inner, rows) : bias;
  Matrix y(c.dtype, rows, c.n), expected_y = y, grad_x = y, expected_grad_x = y;
  std::vector<float> rstd(rows), mean(rows);

  RowNorm norm{};
  norm.statistic = Statistic::kLayer;
  norm.rows = norm.outer_size[0] = rows;
  norm.n = c.n;
  norm.outer_dims = 1;
  norm.x = x.as_rows();
  norm.out = y.as_rows();
  norm.options.eps = 1e-6f;
  norm.options.weight_offset = c.offset;
  norm.rstd = rstd.data();
  norm.mean = mean.data();
  norm.weight = weight.as_affine(c.inner);
  if (c.bias_groups) norm.bias = bias.as_affine(c.inner);
  cpu::row_norm(norm);
  RowNorm each = norm;
  each.out = expected_y.as_rows();
  each.weight = weights.as_affine(1);
  if (c.bias_groups) each.bias = biases.as_affine(1);
  cpu::row_norm(each);
  expect(y.memory == expected_y.memory, "y", c);

  Matrix grad_weight = weight, grad_bias = bias, grad_weights = weights, grad_biases = biases;
  RowNormBackward backward{};
  backward.statistic = norm.statistic;
  backward.rows = backward.outer_size[0] = rows;
  backward.n = c.n;
  backward.outer_dims = 1;
  backward.x = norm.x;
  backward.grad_y = grad_y.as_rows();
  backward.grad_x = grad_x.as_rows();
  backward.rstd = rstd.data();
  backward.mean = mean.data();
  backward.options = norm.options;
  backward.normalised = c.dtype;
  backward.weight = norm.weight;
  backward.bias = norm.bias;
  backward.grad_weight = grad_weight.row(0);
  if (c.bias_groups) backward.grad_bias = grad_bias.row(0);
  cpu::row_norm_backward(backward);
  RowNormBackward each_backward = backward;
  each_backward.grad_x = expected_grad_x.as_rows();
  each_backward.weight = each.weight;
  each_backward.bias = each.bias;
  each_backward.grad_weight = grad_weights.row(0);
  if (c.bias_groups) each_backward.grad_bias = grad_biases.row(0);
  cpu::row_norm_backward(each_backward);
  expect(grad_x.memory == expected_grad_x.memory, "the gradient of x", c);
  expect(adds_up(grad_weight, grad_weights, c.inner), "the gradient of weight", c);
  if (c.bias_groups) expect(adds_up(grad_bias, grad_biases, c.inner), "the gradient of bias", c);
}

}  // namespace

int main() {
  if (!cpu::instruction_set()) {
    std::puts("skipped: the processor has none of AVX2 and NEON");
    return 0;
  }
  std::mt19937 random(1);
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16})
    for (const int64_t inner : {1, 2, 7})
      for (const int64_t groups : {1, 2, 5})
        for (const int64_t turns : {1, 3})
          for (const int64_t n : {5, 64, 200})
            for (const float offset : {0.f, 1.f}) {
              test({dtype, inner, groups, groups, turns, n, offset}, random);
              test({dtype, inner, groups, 0, turns, n, offset}, random);
              test({dtype, inner, groups, 1, turns, n, offset}, random);
              test({dtype, inner, 1, groups, turns, n, offset}, random);
            }
  std::printf("%d checks, %d failures\n", checks, failures);
  return failures != 0;
}
