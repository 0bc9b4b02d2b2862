// Gated norms on the emulation, held against the norm of the same kernels of what stands inside the
// gate, to which double does the rest: which row and column of z, on which side of the norm, and
// what is rounded.
#include "../../cuda/launch.h"
#include "sweep.hpp"

namespace sweep {
namespace {

struct Case {
  Statistic statistic;
  Activation activation;
  bool norm_first, round_norm, weight, bias, in_place, clamp_inf;
  DType x, z;
  int64_t outer, heads, n, pad, offset;
  uint64_t seed;
  int64_t rows() const { return outer * heads; }
};

std::string name(const Case& c) {
  const auto n = [](int64_t v) { return " " + std::to_string(v); };
  return "gated, statistic" + n(int(c.statistic)) + " activation" + n(int(c.activation)) +
         " norm_first" + n(c.norm_first) + " round_norm" + n(c.round_norm) + " weight" +
         n(c.weight) + " bias" + n(c.bias) + " in place" + n(c.in_place) + " clamp_inf" +
         n(c.clamp_inf) + " dtypes" + n(int(c.x)) + n(int(c.z)) + " outer" + n(c.outer) + " heads" +
         n(c.heads) + " n" + n(c.n) + " pad" + n(c.pad) + " offset" + n(c.offset) + " seed" +
         n(static_cast<int64_t>(c.seed));
}

double activated(Activation activation, double z) {
  return (activation == Activation::kSilu ? z : 1) / (1 + std::exp(-z));
}

void run(const Case& c) {
  std::mt19937_64 random(c.seed);
  emu::seed(c.seed);
  const int64_t rows = c.rows(), n = c.n;
  const auto made = [&](DType dtype, int64_t count, float around) {
    Rows t(dtype, count, n, c.pad, c.offset);
    fill(t, count, n, random, around);
    return t;
  };
  Rows x = made(c.x, rows, 0.7f), z = made(c.z, rows, 0.2f);
  Rows weight = made(c.x, c.heads, 1.5f), bias = made(c.x, c.heads, 0.3f);
  if (c.clamp_inf && c.x == DType::kFloat16) write(c.x, x.at(0, n / 2), 1e30f);
  Rows x_before = x, out(c.x, rows, n, c.pad, c.offset);

  // Rows of x lie as those of heads do, and rows of z head by head.
  RowNorm norm{};
  norm.statistic = c.statistic;
  norm.rows = rows;
  norm.n = n;
  norm.outer_dims = 2;
  norm.outer_size[0] = c.outer;
  norm.outer_size[1] = c.heads;
  const auto rows_of = [&](Rows& t) {
    return RowsOf{t.data(), t.dtype, {t.row_stride * c.heads, t.row_stride}};
  };
  const auto z_row = [&](int64_t row) { return row % c.heads * c.outer + row / c.heads; };
  norm.x = rows_of(x);
  norm.out = rows_of(c.in_place ? x : out);
  norm.gating.z = {z.data(), c.z, {z.row_stride, z.row_stride * c.outer}};
  norm.gating.activation = c.activation;
  norm.gating.norm_first = c.norm_first;
  norm.gating.round_norm = c.round_norm;
  const auto map = [&](Rows& t) { return Affine{t.data(), c.x, t.row_stride, 1, c.heads}; };
  if (c.weight) norm.weight = map(weight);
  if (c.bias) norm.bias = map(bias);
  norm.options.eps = 1e-6f;
  norm.options.clamp_inf = c.clamp_inf;
  cuda::row_norm(norm, 0, nullptr);
  Rows& y = c.in_place ? x : out;

  // What is normalised, in float32 where the gate comes first, and the norm of it alone.
  const auto gate = [&](int64_t r, int64_t i) {
    return activated(c.activation, read(c.z, z.at(z_row(r), i)));
  };
  Rows h(c.norm_first ? c.x : DType::kFloat32, rows, n, 0, 0);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < n; ++i) {
      double v = read(c.x, x_before.at(r, i));
      if (c.clamp_inf && c.x == DType::kFloat16) v = std::clamp(v, -65504.0, 65504.0);
      write(h.dtype, h.at(r, i), static_cast<float>(c.norm_first ? v : v * gate(r, i)));
    }
  const DType of_norm = c.norm_first && c.round_norm ? c.x : DType::kFloat32;
  Rows alone(of_norm, rows, n, 0, 0);
  RowNorm plain = norm;
  plain.gating.z.data = nullptr;
  plain.x = rows_of(h);
  plain.out = rows_of(alone);
  cuda::row_norm(plain, 0, nullptr);

  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < n; ++i) {
      double v = read(of_norm, alone.at(r, i));
      // A gate before the norm is off by some roundings, and so are the statistics; a mean, and a
      // bias, can leave less of them than went in.
      double size = std::abs(v) + (c.norm_first ? 0 : 16 + 4 * c.bias);
      if (c.norm_first) v *= gate(r, i), size = std::abs(v);
      const double got = read(c.x, y.at(r, i));
      const double bound = std::ldexp(16 * size, -24) + half_ulp(c.x, v) * (1 + 0x1p-9);
      const bool right = std::isnan(v) ? std::isnan(got) : std::abs(got - v) <= bound || got == v;
      if (!right) report(name(c), "y", r, i, got, v);
    }
}

struct Sweep {
  std::mt19937_64 random;
  uint64_t share, of, count = 0;

  void add(Statistic statistic, DType x, DType z, int64_t n, int64_t outer, int64_t heads) {
    if (count++ % of != share) return;
    const auto chance = [&](int one_in) { return random() % one_in == 0; };
    normkit_emulate_device(chance(3) ? 64 : 1, true);
    Case c{};
    c.statistic = statistic;
    c.activation = chance(2) ? Activation::kSilu : Activation::kSigmoid;
    c.x = x;
    c.z = z;
    c.n = n;
    c.outer = outer;
    c.heads = heads;
    c.norm_first = !chance(3);
    c.round_norm = chance(2);
    c.weight = !chance(4);
    c.bias = chance(3);
    c.in_place = chance(2);
    c.clamp_inf = chance(4);
    c.pad = chance(2) ? 8 : static_cast<int64_t>(random() % 9);
    c.offset = chance(2) ? 0 : static_cast<int64_t>(random() % 5);
    c.seed = random();
    run(c);
  }
};

}  // namespace

uint64_t sweep_gated(uint64_t seed, uint64_t share, uint64_t of) {
  Sweep sweep{std::mt19937_64(seed), share, of};
  const DType dtypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  for (const Statistic statistic : {Statistic::kRms, Statistic::kLayer})
    for (const DType x : dtypes)
      for (const DType z : dtypes)
        for (const int64_t n : {1, 7, 64, 200, 1024, 4100}) {
          sweep.add(statistic, x, z, n, n < 100 ? 50 : 3, 3);  // inside of a launch, and across
          sweep.add(statistic, x, z, n, n < 100 ? 90 : 5, 1);
        }
  return sweep.count;
}

}  // namespace sweep
