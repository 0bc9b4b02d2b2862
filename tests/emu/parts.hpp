// A case of the sweep of split rows, the memory of each process, and what double says of whole
// rows.
#pragma once
#include <cmath>
#include <deque>
#include <string>
#include <vector>

#include "../../cpp/norm_args.h"
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

using Parts = std::deque<Part>;

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

}  // namespace
}  // namespace sweep
