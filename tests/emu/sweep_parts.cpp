// Rows whose columns are split into parts, each in memory of its own, as of several processes:
// their statistics, and what the parts make of all of them, against double on whole rows.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <deque>
#include <limits>
#include <string>

#include "../../cpp/plan.h"
#include "../../cuda/launch.h"
#include "sweep.hpp"

namespace sweep {
namespace {

struct Case {
  Statistic statistic;
  DType x, other;  // other: of weight, bias and y, and of grad_x where it is another than x's
  int64_t parts, rows, n, heads, pad, shift;
  int peeled;  // dimensions of size 2 before the last
  bool weight, bias, wants_weight, wants_bias, wants_rows, round_before_weight, clamp_inf;
  float offset, eps, around;
  uint64_t seed;
};

std::string name(const Case& c) {
  const auto n = [](int64_t v) { return " " + std::to_string(v); };
  return "parts" + n(c.parts) + " of statistic" + n(int(c.statistic)) + " dtypes" + n(int(c.x)) +
         n(int(c.other)) + " rows" + n(c.rows) + " n" + n(c.n) + " heads" + n(c.heads) + " pad" +
         n(c.pad) + " shift" + n(c.shift) + " peeled" + n(c.peeled) + " weight" + n(c.weight) +
         n(c.wants_weight) + " bias" + n(c.bias) + n(c.wants_bias) + " wants rows" +
         n(c.wants_rows) + " round_before_weight" + n(c.round_before_weight) + " clamp_inf" +
         n(c.clamp_inf) + " seed" + n(static_cast<int64_t>(c.seed));
}

void report(const Case& c, const char* what, int64_t row, int64_t column, double got, double want) {
  sweep::report(name(c), what, row, column, got, want);
}

// The memory of one process.
struct Part {
  Rows x, y, grad_y, grad_x, weight, bias, grad_weight, grad_bias;
  Guarded statistics, rstd, mean;

  explicit Part(const Case& c)
      : x(c.x, c.rows, c.n, c.pad, c.shift),
        y(c.other, c.rows, c.n, c.pad, c.shift),
        grad_y(c.other, c.rows, c.n, c.pad, c.shift),
        grad_x(c.x, c.rows, c.n, c.pad, c.shift),
        weight(c.other, c.heads, c.n, 0, c.shift),
        bias(c.other, c.heads, c.n, 0, c.shift),
        grad_weight(c.other, c.heads, c.n, 0, 0),
        grad_bias(c.other, c.heads, c.n, 0, 0),
        statistics(planes_of(c.statistic) * c.rows),
        rstd(c.rows),
        mean(c.rows) {}
};

// What of a call is the same in both passes.
template <class Norm>
void describe_rows(const Case& c, Norm& norm, Part& part) {
  norm.statistic = c.statistic;
  norm.rows = c.rows;
  norm.n = c.n;
  norm.heads = c.heads;
  int64_t left = c.rows;
  for (int d = 0; d < c.peeled; ++d, left /= 2) norm.outer_size[norm.outer_dims++] = 2;
  if (c.rows != 1) norm.outer_size[norm.outer_dims++] = left;
  const auto affine = [&](Rows& from) {
    return Affine{from.data(), from.dtype, c.heads > 1 ? from.row_stride : 0};
  };
  if (c.weight) norm.weight = affine(part.weight);
  if (c.bias) norm.bias = affine(part.bias);
  norm.weight_offset = c.weight ? c.offset : 0.f;
  norm.round_before_weight = c.round_before_weight;
}

template <class Norm>
RowsOf rows_of(const Norm& norm, Rows& from) {
  RowsOf to{from.data(), from.dtype, {}};
  for (int d = 0; d < norm.outer_dims; ++d) {
    to.stride[d] = from.row_stride;
    for (int e = d + 1; e < norm.outer_dims; ++e) to.stride[d] *= norm.outer_size[e];
  }
  return to;
}

RowNorm forward_of(const Case& c, Part& part) {
  RowNorm norm{};
  describe_rows(c, norm, part);
  norm.x = rows_of(norm, part.x);
  norm.eps = c.eps;
  norm.clamp_inf = c.clamp_inf;
  return norm;
}

RowNormBackward backward_of(const Case& c, Part& part) {
  RowNormBackward norm{};
  describe_rows(c, norm, part);
  norm.x = rows_of(norm, part.x);
  norm.grad_y = rows_of(norm, part.grad_y);
  norm.rstd = part.rstd.data();
  if (c.statistic == Statistic::kLayer) norm.mean = part.mean.data();
  norm.normalised = c.x;
  return norm;
}

using Parts = std::deque<Part>;

// As a collective brings them: statistics of part 0, of part 1, ...
std::vector<float> gather(const Case& c, Parts& parts) {
  std::vector<float> all;
  for (Part& part : parts) {
    if (!part.statistics.is_intact()) report(c, "memory outside the statistics", 0, 0, 0, 0);
    const float* from = part.statistics.data();
    all.insert(all.end(), from, from + planes_of(c.statistic) * c.rows);
  }
  return all;
}

Split statistics_of(const Case& c, Part& part) {
  return {Step::kStatistics, part.statistics.data(), nullptr, 1, c.rows};
}

Split with(const Case& c, const std::vector<float>& gathered) {
  return {Step::kApply, nullptr, gathered.data(), c.parts, c.rows};
}

void run_forward(const Case& c, Parts& parts) {
  for (Part& part : parts) {
    RowNorm norm = forward_of(c, part);
    norm.split = statistics_of(c, part);
    cuda::row_norm(norm, 0, nullptr);
  }
  const std::vector<float> gathered = gather(c, parts);
  for (Part& part : parts) {
    RowNorm norm = forward_of(c, part);
    norm.split = with(c, gathered);
    norm.out = rows_of(norm, part.y);
    norm.rstd = part.rstd.data();
    if (c.statistic == Statistic::kLayer) norm.mean = part.mean.data();
    cuda::row_norm(norm, 0, nullptr);
    if (!part.rstd.is_intact() || !part.mean.is_intact())
      report(c, "memory outside rstd or mean", 0, 0, 0, 0);
  }
}

void run_backward(const RowNormBackward& norm) {
  const int64_t bytes = cuda::backward_workspace(norm, 0);
  std::vector<float> workspace(bytes / sizeof(float), std::numeric_limits<float>::quiet_NaN());
  cuda::row_norm_backward(norm, 0, nullptr, workspace.data());
}

void run_backward(const Case& c, Parts& parts) {
  for (Part& part : parts) {
    RowNormBackward norm = backward_of(c, part);
    norm.split = statistics_of(c, part);
    run_backward(norm);
  }
  const std::vector<float> gathered = gather(c, parts);
  for (Part& part : parts) {
    RowNormBackward norm = backward_of(c, part);
    norm.split = with(c, gathered);
    if (c.wants_rows) norm.grad_x = rows_of(norm, part.grad_x);
    if (c.wants_weight) norm.grad_weight = part.grad_weight.data();
    if (c.wants_bias) norm.grad_bias = part.grad_bias.data();
    run_backward(norm);
  }
}

// Whole rows in double.
struct Oracle {
  const Case& c;
  Parts& parts;
  bool layer = c.statistic == Statistic::kLayer;
  double total = static_cast<double>(c.n * c.parts);

  double x(int64_t p, int64_t r, int64_t i) const {
    const double v = read(c.x, parts[p].x.at(r, i));
    return c.clamp_inf && c.x == DType::kFloat16 ? std::clamp(v, -65504.0, 65504.0) : v;
  }
  double weight(int64_t p, int64_t r, int64_t i) const {
    if (!c.weight) return 1;
    return read(c.other, parts[p].weight.at(r % c.heads, i)) + double{c.offset};
  }
  double bias(int64_t p, int64_t r, int64_t i) const {
    return c.bias ? read(c.other, parts[p].bias.at(r % c.heads, i)) : 0;
  }
  // f(part, column) for each column of a row.
  template <class F>
  void columns(const F& f) const {
    for (int64_t p = 0; p < c.parts; ++p)
      for (int64_t i = 0; i < c.n; ++i) f(p, i);
  }

  struct Row {
    double mean = 0, about = 0, rstd = 0;
  };
  Row statistics(int64_t r) const {
    Row row;
    double squares = 0;
    columns([&](int64_t p, int64_t i) {
      if (layer) row.mean += x(p, r, i) / total, row.about += std::abs(x(p, r, i)) / total;
    });
    columns([&](int64_t p, int64_t i) { squares += std::pow(x(p, r, i) - row.mean, 2); });
    row.rstd = 1 / std::sqrt(squares / total + c.eps);
    return row;
  }

  void check_forward(int64_t r) const {
    const Row row = statistics(r);
    const auto check = [&](const char* what, double got, double want, double bound) {
      if (!(std::abs(got - want) <= bound) && !(std::isnan(got) && std::isnan(want)))
        report(c, what, r, 0, got, want);
    };
    const double error = std::ldexp(4, -24);
    for (Part& part : parts) {
      check("rstd", part.rstd.data()[r], row.rstd, error * row.rstd * (1 + row.about * row.rstd));
      if (layer) check("mean", part.mean.data()[r], row.mean, error * row.about);
    }
    columns([&](int64_t p, int64_t i) {
      const double w = weight(p, r, i), b = bias(p, r, i);
      const double xhat = (x(p, r, i) - row.mean) * row.rstd;
      const double size = (std::abs(x(p, r, i)) + row.about) * row.rstd;
      double low = xhat, high = xhat;
      if (c.round_before_weight) {
        // Next to the middle of two values it may fall to either.
        low = rounded(c.x, xhat - error * size), high = rounded(c.x, xhat + error * size);
      }
      if (w < 0) std::swap(low, high);
      low = low * w + b, high = high * w + b;
      const double bound = error * (size * std::abs(w) + std::abs(b)),
                   slack = 1 + std::ldexp(1, -9);
      const double got = read(c.other, parts[p].y.at(r, i));
      const bool right = std::isnan(xhat)
                             ? std::isnan(got)
                             : low - bound - half_ulp(c.other, low) * slack <= got &&
                                   got <= high + bound + half_ulp(c.other, high) * slack;
      if (!right) report(c, "y", r, p * c.n + i, got, xhat * w + b);
    });
  }

  void save_statistics() const {
    for (int64_t r = 0; r < c.rows; ++r) {
      const Row row = statistics(r);
      for (Part& part : parts) {
        part.rstd.data()[r] = static_cast<float>(row.rstd);
        part.mean.data()[r] = static_cast<float>(row.mean);
      }
    }
  }

  struct Value {
    double value = 0, size = 0, slack = 0;  // the bound is 4 * 2^-24 * size + slack
  };
  void check(const char* what, Rows& t, int64_t row, int64_t column, const Value& v) const {
    const double got = read(t.dtype, t.at(row, column));
    const double bound = half_ulp(t.dtype, v.value) * (1 + std::ldexp(1, -9)) +
                         std::ldexp(4 * v.size, -24) + v.slack;
    if (!(std::abs(got - v.value) <= bound)) report(c, what, row, column, got, v.value);
  }

  void check_backward() const {
    const size_t sums = static_cast<size_t>(c.parts * c.heads * c.n);
    std::vector<Value> of_weight(sums), of_bias(sums);
    for (int64_t r = 0; r < c.rows; ++r) {
      const Row row = statistics(r);
      const auto xhat = [&](int64_t p, int64_t i) { return (x(p, r, i) - row.mean) * row.rstd; };
      const auto u = [&](int64_t p, int64_t i) {
        return (std::abs(x(p, r, i)) + row.about) * row.rstd;
      };
      double g_mean = 0, g_size = 0, gx_mean = 0, gx_size = 0;
      columns([&](int64_t p, int64_t i) {
        const double grad_y = read(c.other, parts[p].grad_y.at(r, i)), g = grad_y * weight(p, r, i);
        if (layer) g_mean += g / total, g_size += std::abs(g) / total;
        gx_mean += g * xhat(p, i) / total;
        gx_size += std::abs(g) * u(p, i) / total;
        const int64_t at = (p * c.heads + r % c.heads) * c.n + i;
        double forward = xhat(p, i);
        if (c.round_before_weight) {
          const double error = std::ldexp(4 * u(p, i), -24);
          const double step = rounded(c.x, forward + error) - rounded(c.x, forward - error);
          of_weight[at].slack += std::abs(grad_y) * step;
          forward = rounded(c.x, forward);
        }
        of_weight[at].value += grad_y * forward;
        of_weight[at].size += std::abs(grad_y) * u(p, i);
        of_bias[at].value += grad_y;
        of_bias[at].size += std::abs(grad_y);
      });
      if (!c.wants_rows) continue;
      columns([&](int64_t p, int64_t i) {
        const double g = read(c.other, parts[p].grad_y.at(r, i)) * weight(p, r, i);
        const double value = row.rstd * (g - g_mean - xhat(p, i) * gx_mean);
        // Twice what it handles, as docs/numerics.md has it: rstd, a float32, is in it three times.
        const double size = 2 * row.rstd * (std::abs(g) + g_size + u(p, i) * gx_size);
        check("grad_x", parts[p].grad_x, r, i, {value, size, 0});
      });
    }
    for (int64_t p = 0; p < c.parts; ++p)
      for (int64_t h = 0; h < c.heads; ++h)
        for (int64_t i = 0; i < c.n; ++i) {
          const int64_t at = (p * c.heads + h) * c.n + i;
          if (c.wants_weight) check("grad_weight", parts[p].grad_weight, h, i, of_weight[at]);
          if (c.wants_bias) check("grad_bias", parts[p].grad_bias, h, i, of_bias[at]);
        }
  }
};

// Bytes of what is written that are part of no row, and all of it if it is not wanted.
void check_untouched(const Case& c, Rows& t, const char* what, int64_t rows, bool wanted) {
  std::vector<bool> written(t.memory.size());
  for (int64_t r = 0; wanted && r < rows; ++r)
    std::fill_n(written.begin() + (t.at(r, 0) - t.memory.data()), c.n * item_size(t.dtype), true);
  for (size_t i = 0; i < written.size(); ++i)
    if (!written[i] && t.memory[i] != kUntouchedByte) return report(c, what, 0, 0, 0, 0);
}

// The rows of every part from seeds of their own, from row `first` on.
Parts parts_of(const Case& c, int64_t first) {
  Parts parts;
  for (int64_t p = 0; p < c.parts; ++p) {
    Part& part = parts.emplace_back(c);
    for (int64_t r = 0; r < c.rows; ++r) {
      std::mt19937_64 random(c.seed + 7919 * (first + r) + p);
      // Parts of different means, so that what lies between them counts.
      std::normal_distribution<float> normal(c.around + 0.5f * (p % 3), 1.f), gradient(0.8f, 1.f);
      for (int64_t i = 0; i < c.n; ++i) {
        write(c.x, part.x.at(r, i), normal(random));
        write(c.other, part.grad_y.at(r, i), gradient(random));
      }
    }
    std::mt19937_64 random(c.seed + p);
    fill(part.weight, c.heads, c.n, random, 1.5f);
    fill(part.bias, c.heads, c.n, random, 0.4f);
    for (Rows* out : {&part.y, &part.grad_x, &part.grad_weight, &part.grad_bias})
      std::fill(out->memory.begin(), out->memory.end(), kUntouchedByte);
  }
  return parts;
}

void run(const Case& c) {
  emu::seed(c.seed);
  Parts parts = parts_of(c, 0);
  const Oracle oracle{c, parts};
  if (c.wants_rows || c.wants_weight || c.wants_bias) {
    oracle.save_statistics();
    run_backward(c, parts);
    oracle.check_backward();
    for (Part& part : parts) {
      check_untouched(c, part.grad_x, "memory outside grad_x", c.rows, c.wants_rows);
      check_untouched(c, part.grad_weight, "memory outside grad_weight", c.heads, c.wants_weight);
      check_untouched(c, part.grad_bias, "memory outside grad_bias", c.heads, c.wants_bias);
    }
  }
  Part& last = parts.back();
  if (c.clamp_inf && c.x == DType::kFloat16 && c.statistic == Statistic::kRms && c.rows > 0)
    write(c.x, last.x.at(0, c.n / 2), -std::numeric_limits<float>::infinity());
  // A NaN in one part, which its row shows in all of them.
  if (c.clamp_inf && c.rows > 1)
    write(c.x, last.x.at(c.rows - 1, c.n / 3), std::numeric_limits<float>::quiet_NaN());
  run_forward(c, parts);
  for (int64_t r = 0; r < c.rows; ++r) oracle.check_forward(r);
  for (Part& part : parts) check_untouched(c, part.y, "memory outside y", c.rows, true);
}

// What is written of a row, forward and backward.
std::vector<char> bits_of(const Case& c, int64_t first, int64_t row) {
  Parts parts = parts_of(c, first);
  run_forward(c, parts);
  run_backward(c, parts);
  std::vector<char> bits;
  for (Part& part : parts) {
    for (Rows* t : {&part.y, &part.grad_x})
      bits.insert(bits.end(), t->at(row, 0), t->at(row, 0) + c.n * item_size(t->dtype));
    const auto* rstd = reinterpret_cast<const char*>(part.rstd.data() + row);
    bits.insert(bits.end(), rstd, rstd + sizeof(float));
  }
  return bits;
}

void same_bits() {
  for (const Statistic statistic : {Statistic::kRms, Statistic::kLayer})
    for (const DType x : {DType::kFloat32, DType::kBFloat16})
      for (const int64_t n : {20, 64, 1000, 4104}) {
        Case c{};
        c.statistic = statistic;
        c.x = c.other = x;
        c.parts = 3;
        c.rows = n <= 64 ? 140 : 5;
        c.n = n;
        c.heads = 1;
        c.weight = c.wants_rows = true;
        c.eps = 1e-6f;
        normkit_emulate_device(1, true);
        const std::vector<char> batch = bits_of(c, 0, c.rows - 1);
        const auto check = [&](const char* what, const std::vector<char>& got) {
          if (batch == got) return;
          std::fprintf(stderr, "%s: the bits follow %s\n", name(c).c_str(), what);
          ++failures;
        };
        Case other = c;
        other.shift = 1;
        check("the alignment", bits_of(other, 0, c.rows - 1));
        normkit_emulate_device(64, true);
        check("the device", bits_of(c, 0, c.rows - 1));
        other = c;
        other.rows = 1;
        check("the batch", bits_of(other, c.rows - 1, 0));
      }
}

// n on both sides of whole warps, of a block, and of what a block's threads take at once.
const std::vector<int64_t> kSizes = {1,   7,   8,    9,    64,   255,  256,
                                     257, 264, 1000, 2052, 4096, 4104, 9001};

struct Sweep {
  std::mt19937_64 random;
  uint64_t share, of, count = 0;

  void add(Statistic statistic, DType x, DType other, int64_t rows, int64_t n) {
    if (count++ % of != share) return;
    const auto chance = [&](int one_in) { return random() % one_in == 0; };
    normkit_emulate_device(chance(3) ? 64 : 1, true);
    Case c{};
    c.statistic = statistic;
    c.x = x;
    c.other = other;
    c.parts = chance(4) ? 1 : chance(3) ? 8 : 2 + static_cast<int64_t>(random() % 2);
    c.n = n;
    c.heads = !chance(3) ? 1 : n <= 64 && chance(4) ? 70 : 3;
    c.rows = (rows + c.heads - 1) / c.heads * c.heads;
    if (c.rows > 1 && chance(3))
      for (int64_t left = c.rows / c.heads; left % 2 == 0 && c.peeled < 4; left /= 2) ++c.peeled;
    c.pad = chance(2) ? 8 : static_cast<int64_t>(random() % 9);
    c.shift = chance(2) ? 0 : static_cast<int64_t>(random() % 5);
    c.weight = !chance(4);
    c.bias = chance(2);
    if (!c.weight && !c.bias) c.heads = 1;
    c.wants_weight = c.weight && !chance(4);
    c.wants_bias = c.bias && !chance(3);
    c.wants_rows = !chance(6);
    c.round_before_weight = chance(4);
    c.clamp_inf = chance(3);
    c.offset = c.weight && chance(3) ? 1.f : 0.f;
    c.eps = chance(2) ? 0.3f : 1e-6f;
    c.around = x == DType::kFloat32 && chance(3) ? 1000.f : 0.7f;
    c.seed = random();
    run(c);
  }
};

}  // namespace

uint64_t sweep_parts(uint64_t seed, uint64_t share, uint64_t of) {
  Sweep sweep{std::mt19937_64(seed), share, of};
  if (share == 0) same_bits();
  if (failures) return 0;
  const DType dtypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  for (const Statistic statistic : {Statistic::kRms, Statistic::kLayer})
    for (const DType x : dtypes)
      for (const DType other : dtypes)
        for (const int64_t n : kSizes) {
          sweep.add(statistic, x, other, n == 7 ? 0 : n % 2 ? 3 : 1, n);
          sweep.add(statistic, x, other, n <= 9 ? 200 : n <= 264 ? 70 : 6, n);
        }
  return sweep.count;
}

}  // namespace sweep
