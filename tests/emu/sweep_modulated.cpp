// Modulated norms on the emulation, held against the norm of the same kernels in float32, to which
// double does the rest: which row of gate, scale and shift a row of x takes, in launches that begin
// anywhere, and where what is rounded.
#include "../../cuda/launch.h"
#include "sweep.hpp"

namespace sweep {
namespace {

struct Case {
  Statistic statistic;
  bool adds, gate, scale, shift, weight, bias, round_each, in_place, clamp_inf;
  DType x, other;  // other: of gate, scale and shift; all else is of x
  int64_t inner, groups, turns, n, pad, offset;
  uint64_t seed;
  int64_t rows() const { return inner * groups * turns; }
};

std::string name(const Case& c) {
  const auto n = [](int64_t v) { return " " + std::to_string(v); };
  return "modulated, statistic" + n(int(c.statistic)) + " adds" + n(c.adds) + " gate" + n(c.gate) +
         " scale" + n(c.scale) + " shift" + n(c.shift) + " weight" + n(c.weight) + " bias" +
         n(c.bias) + " round_each" + n(c.round_each) + " in place" + n(c.in_place) + " clamp_inf" +
         n(c.clamp_inf) + " dtypes" + n(int(c.x)) + n(int(c.other)) + " inner" + n(c.inner) +
         " groups" + n(c.groups) + " turns" + n(c.turns) + " n" + n(c.n) + " pad" + n(c.pad) +
         " offset" + n(c.offset) + " seed" + n(static_cast<int64_t>(c.seed));
}

RowsOf rows_of(Rows& t) { return {t.data(), t.dtype, {t.row_stride}}; }

void run(const Case& c) {
  std::mt19937_64 random(c.seed);
  emu::seed(c.seed);
  const int64_t rows = c.rows(), n = c.n;
  const auto made = [&](DType dtype, int64_t count, float around) {
    Rows t(dtype, count, n, c.pad, c.offset);
    fill(t, count, n, random, around);
    return t;
  };
  Rows x = made(c.x, rows, 0.7f), residual = made(c.x, rows, -0.2f);
  Rows gate = made(c.other, c.groups, 0.8f), scale = made(c.other, c.groups, 0.2f);
  Rows shift = made(c.other, c.groups, 0.4f), weight = made(c.x, 1, 1.5f),
       bias = made(c.x, 1, 0.3f);
  if (c.clamp_inf && c.x == DType::kFloat16) write(c.x, x.at(0, n / 2), 1e30f);
  Rows x_before = x, residual_before = residual;
  const bool wide = c.round_each && promoted(c.x, c.other) == DType::kFloat32;
  const DType of_out = wide ? DType::kFloat32 : c.x;
  Rows out(of_out, rows, n, c.pad, c.offset), sums(c.x, rows, n, c.pad, c.offset);

  RowNorm norm{};
  norm.statistic = c.statistic;
  norm.rows = rows;
  norm.n = n;
  norm.outer_dims = 1;
  norm.outer_size[0] = rows;
  const bool in_place = c.in_place && of_out == c.x;
  norm.x = rows_of(x);
  norm.out = in_place ? norm.x : rows_of(out);
  if (c.adds) {
    norm.residual = rows_of(residual);
    norm.residual_out = in_place ? norm.residual : rows_of(sums);
  }
  if (c.weight) norm.weight = {weight.data(), c.x, 0, 1, 1};
  if (c.bias) norm.bias = {bias.data(), c.x, 0, 1, 1};
  const auto map = [&](Rows& t) {
    return Affine{t.data(), c.other, c.groups > 1 ? t.row_stride : 0, c.groups > 1 ? c.inner : 1,
                  c.groups};
  };
  if (c.gate) norm.modulation.gate = map(gate);
  if (c.scale) norm.modulation.scale = map(scale);
  if (c.shift) norm.modulation.shift = map(shift);
  norm.modulation.round_each = c.round_each;
  norm.options.eps = 1e-6f;
  norm.options.round_sum = true;
  norm.options.clamp_inf = c.clamp_inf;
  cuda::row_norm(norm, 0, nullptr);
  Rows& y = in_place ? x : out;
  Rows& sum = in_place ? residual : sums;

  // What is normalised, and the norm of it alone, as float32 or as round_each rounds it.
  Rows h = x_before;
  if (c.adds)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < n; ++i) {
        double v = read(c.x, x_before.at(r, i));
        if (c.clamp_inf && c.x == DType::kFloat16) v = std::clamp(v, -65504.0, 65504.0);
        if (c.gate) {
          v = static_cast<float>(v * read(c.other, gate.at(r / c.inner % c.groups, i)));
          if (c.round_each) v = rounded(promoted(c.x, c.other), v);
        }
        v = static_cast<float>(v + read(c.x, residual_before.at(r, i)));
        write(c.x, h.at(r, i), static_cast<float>(v));
        if (read(c.x, h.at(r, i)) != read(c.x, sum.at(r, i)))
          report(name(c), "residual_out", r, i, read(c.x, sum.at(r, i)), v);
      }
  const DType of_norm = c.round_each ? c.x : DType::kFloat32;
  Rows alone(of_norm, rows, n, 0, 0);
  RowNorm plain = norm;
  plain.modulation = {};
  plain.residual = plain.residual_out = {};
  plain.x = rows_of(h);
  plain.out = rows_of(alone);
  cuda::row_norm(plain, 0, nullptr);

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t group = r / c.inner % c.groups;
    for (int64_t i = 0; i < n; ++i) {
      double v = read(of_norm, alone.at(r, i)), size = std::abs(v);
      DType dtype = of_norm;
      const auto round = [&] {
        if (c.round_each) v = rounded(dtype, static_cast<float>(v));
      };
      if (c.scale) {
        double factor = static_cast<float>(1 + read(c.other, scale.at(group, i)));
        if (c.round_each) factor = rounded(c.other, factor);
        v = v * factor, size *= std::abs(factor);
        dtype = promoted(dtype, c.other);
        round();
      }
      if (c.shift) {
        v += read(c.other, shift.at(group, i));
        size += std::abs(read(c.other, shift.at(group, i)));
        dtype = promoted(dtype, c.other);
        round();
      }
      const double got = read(of_out, y.at(r, i));
      const double bound =
          c.round_each ? 0 : std::ldexp(8 * size, -24) + half_ulp(of_out, v) * (1 + 0x1p-9);
      const bool right = std::isnan(v) ? std::isnan(got) : std::abs(got - v) <= bound || got == v;
      if (!right) report(name(c), "y", r, i, got, v);
    }
  }
}

struct Sweep {
  std::mt19937_64 random;
  uint64_t share, of, count = 0;

  void add(Statistic statistic, DType x, DType other, int64_t n, int64_t inner, int64_t groups) {
    if (count++ % of != share) return;
    const auto chance = [&](int one_in) { return random() % one_in == 0; };
    normkit_emulate_device(chance(3) ? 64 : 1, true);
    Case c{};
    c.statistic = statistic;
    c.x = x;
    c.other = other;
    c.n = n;
    c.inner = inner;
    c.groups = groups;
    c.turns = 1 + chance(2);
    c.adds = chance(2);
    c.gate = c.adds && !chance(3);
    c.scale = !chance(5);
    c.shift = chance(2) || !c.scale;
    c.weight = chance(3);
    c.bias = chance(3);
    c.round_each = chance(2);
    c.in_place = chance(2);
    c.clamp_inf = chance(4);
    c.pad = chance(2) ? 8 : static_cast<int64_t>(random() % 9);
    c.offset = chance(2) ? 0 : static_cast<int64_t>(random() % 5);
    c.seed = random();
    run(c);
  }
};

}  // namespace

uint64_t sweep_modulated(uint64_t seed, uint64_t share, uint64_t of) {
  Sweep sweep{std::mt19937_64(seed), share, of};
  const DType dtypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  for (const Statistic statistic : {Statistic::kRms, Statistic::kLayer})
    for (const DType x : dtypes)
      for (const DType other : dtypes)
        for (const int64_t n : {1, 7, 64, 200, 1024, 4100}) {
          sweep.add(statistic, x, other, n, n < 100 ? 50 : 3, 3);  // inside of a launch, and across
          sweep.add(statistic, x, other, n, 1, n < 100 ? 90 : 5);
          sweep.add(statistic, x, other, n, 1, 1);
        }
  return sweep.count;
}

}  // namespace sweep
