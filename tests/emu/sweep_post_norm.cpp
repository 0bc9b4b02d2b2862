// Norms in front of a sum on the emulation, held bit for bit against the unfused formula: the norm
// of the same kernels by itself, the sum in C++, and the norm of that.
#include "../../cuda/launch.h"
#include "sweep.hpp"

namespace sweep {
namespace {

struct Case {
  Statistic statistic;
  bool has_next, weight, bias, next_weight, next_bias, round_norm, in_place, round_rstd,
      round_before_weight, clamp_inf;
  DType x, residual, weights;
  float alpha, beta, offset_of_weight;
  int64_t rows, n, pad, offset;
  uint64_t seed;
};

std::string name(const Case& c) {
  const auto n = [](int64_t v) { return " " + std::to_string(v); };
  return "post-norm, statistic" + n(int(c.statistic)) + " next" + n(c.has_next) + " weights" +
         n(c.weight) + n(c.bias) + n(c.next_weight) + n(c.next_bias) + " round_norm" +
         n(c.round_norm) + " in place" + n(c.in_place) + " round_rstd" + n(c.round_rstd) +
         " round_before_weight" + n(c.round_before_weight) + " clamp_inf" + n(c.clamp_inf) +
         " dtypes" + n(int(c.x)) + n(int(c.residual)) + n(int(c.weights)) + " alpha " +
         std::to_string(c.alpha) + " beta " + std::to_string(c.beta) + " offset of weight " +
         std::to_string(c.offset_of_weight) + " rows" + n(c.rows) + " n" + n(c.n) + " pad" +
         n(c.pad) + " offset" + n(c.offset) + " seed" + n(static_cast<int64_t>(c.seed));
}

RowsOf rows_of(Rows& t) { return {t.data(), t.dtype, {t.row_stride}}; }

// NaN of any sign is NaN.
bool same(float a, float b) {
  return (std::isnan(a) && std::isnan(b)) || std::memcmp(&a, &b, sizeof a) == 0;
}

void expect(const Case& c, const char* what, Rows& got, Rows& want) {
  for (int64_t r = 0; r < c.rows; ++r)
    for (int64_t i = 0; i < c.n; ++i) {
      const float mine = read(got.dtype, got.at(r, i)), right = read(want.dtype, want.at(r, i));
      if (!same(mine, right)) report(name(c), what, r, i, mine, right);
    }
}

void run(const Case& c) {
  std::mt19937_64 random(c.seed);
  emu::seed(c.seed);
  const auto made = [&](DType dtype, int64_t count, float around) {
    Rows t(dtype, count, c.n, c.pad, c.offset);
    fill(t, count, c.n, random, around);
    return t;
  };
  Rows x = made(c.x, c.rows, 0.7f), residual = made(c.residual, c.rows, -0.2f);
  Rows weight = made(c.weights, 1, 1.5f), bias = made(c.weights, 1, 0.3f);
  Rows next_weight = made(c.weights, 1, 0.8f), next_bias = made(c.weights, 1, -0.4f);
  if (c.clamp_inf && c.x == DType::kFloat16) write(c.x, x.at(0, c.n / 2), 1e30f);
  if (c.clamp_inf && c.residual == DType::kFloat16)
    write(c.residual, residual.at(c.rows - 1, c.n / 2), -1e30f);
  Rows x_before = x, residual_before = residual;
  Rows out(c.x, c.rows, c.n, c.pad, c.offset), sums(c.residual, c.rows, c.n, c.pad, c.offset);

  RowNorm norm{};
  norm.statistic = c.statistic;
  norm.rows = c.rows;
  norm.n = c.n;
  norm.outer_dims = 1;
  norm.outer_size[0] = c.rows;
  norm.options.eps = 0.25f;
  norm.options.clamp_inf = c.clamp_inf;
  norm.options.round_rstd = c.round_rstd;
  norm.options.round_before_weight = c.round_before_weight;
  const auto map = [&](Rows& t, bool given) {
    return given ? Affine{t.data(), c.weights, 0, 1, 1} : Affine{};
  };
  RowNorm first = norm, second = norm;  // the norms by themselves
  norm.options.round_sum = true;
  norm.x = rows_of(x);
  norm.residual = rows_of(residual);
  norm.residual_out = c.in_place ? norm.residual : rows_of(sums);
  if (c.has_next) norm.out = c.in_place ? norm.x : rows_of(out);
  norm.weight = map(next_weight, c.next_weight);
  norm.bias = map(next_bias, c.next_bias);
  norm.options.weight_offset = c.next_weight ? c.offset_of_weight : 0.f;
  norm.before = {true,
                 map(weight, c.weight),
                 map(bias, c.bias),
                 1e-3f,
                 c.weight ? c.offset_of_weight : 0.f,
                 c.alpha,
                 c.beta,
                 c.round_norm};
  cuda::row_norm(norm, 0, nullptr);
  Rows& h = c.in_place ? residual : sums;
  Rows& y = c.in_place ? x : out;

  const DType of_norm = c.round_norm ? c.x : DType::kFloat32;
  Rows n(of_norm, c.rows, c.n, 0, 0), h_right(c.residual, c.rows, c.n, 0, 0);
  first.x = rows_of(x_before);
  first.out = rows_of(n);
  first.weight = norm.before.weight;
  first.bias = norm.before.bias;
  first.options.eps = norm.before.eps;
  first.options.weight_offset = norm.before.weight_offset;
  cuda::row_norm(first, 0, nullptr);
  const auto product = [&](DType dtype, float factor, float v) {
    const float made = factor * v;
    return c.round_norm && factor != 1.f ? static_cast<float>(rounded(dtype, made)) : made;
  };
  for (int64_t r = 0; r < c.rows; ++r)
    for (int64_t i = 0; i < c.n; ++i) {
      const float kept = product(c.residual, c.alpha, read(c.residual, residual_before.at(r, i)));
      write(c.residual, h_right.at(r, i), kept + product(c.x, c.beta, read(of_norm, n.at(r, i))));
    }
  expect(c, "the sum", h, h_right);
  if (!c.has_next) return;
  Rows y_right(c.x, c.rows, c.n, 0, 0);
  second.x = rows_of(h_right);
  second.out = rows_of(y_right);
  second.weight = norm.weight;
  second.bias = norm.bias;
  second.options.weight_offset = norm.options.weight_offset;
  cuda::row_norm(second, 0, nullptr);
  expect(c, "y", y, y_right);
}

struct Sweep {
  std::mt19937_64 random;
  uint64_t share, of, count = 0;

  void add(Statistic statistic, DType x, DType residual, int64_t n, int64_t rows) {
    const auto chance = [&](int one_in) { return random() % one_in == 0; };
    Case c{};
    c.statistic = statistic;
    c.x = x;
    c.residual = residual;
    c.weights = static_cast<DType>(random() % 3);
    c.rows = rows;
    c.n = n;
    c.has_next = !chance(3);
    c.weight = !chance(3);
    c.bias = chance(2);
    c.next_weight = !chance(3);
    c.next_bias = chance(2);
    c.round_norm = !chance(3);
    c.in_place = chance(2);
    c.round_rstd = chance(4);
    c.round_before_weight = chance(3);
    c.clamp_inf = chance(3);
    c.alpha = chance(2) ? 1.f : 0.7f;
    c.beta = chance(2) ? 1.f : -1.3f;
    c.offset_of_weight = chance(2) ? 1.f : 0.f;
    c.pad = chance(2) ? 8 : static_cast<int64_t>(random() % 9);
    c.offset = chance(2) ? 0 : static_cast<int64_t>(random() % 5);
    c.seed = random();
    const int processors = chance(3) ? 64 : 1;
    if (count++ % of != share) return;
    normkit_emulate_device(processors, true);
    run(c);
  }
};

}  // namespace

uint64_t sweep_post_norm(uint64_t seed, uint64_t share, uint64_t of) {
  Sweep sweep{std::mt19937_64(seed), share, of};
  const DType dtypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  for (const Statistic statistic : {Statistic::kRms, Statistic::kLayer})
    for (const DType x : dtypes)
      for (const DType residual : dtypes)
        for (const int64_t n : {1, 7, 64, 200, 1024, 4100, 20000}) {
          sweep.add(statistic, x, residual, n, n < 100 ? 150 : 3);  // in several launches
          if (n < 20000) sweep.add(statistic, x, residual, n, 2);
        }
  return sweep.count;
}

}  // namespace sweep
