// Every plan of the backward pass, run on the emulation against double, as sweep.cpp does it for
// the forward pass.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <set>
#include <string>

#include "../../cpp/plan.h"
#include "../../cuda/launch.h"
#include "sweep.hpp"

namespace sweep {
namespace {

struct Case {
  Statistic statistic;
  DType x, other;  // other: of the weights and, where they are not as x, of all gradients of rows
  int64_t rows, n, heads, pad, shift;
  int peeled;  // dimensions of size 2 before the last
  bool weight, bias, per_head_weight, per_head_bias, wants_weight, wants_bias, wants_rows;
  bool adds, residual, grad_residual, from_output, round_before_weight, of_sum;
  float offset, eps;
  uint64_t seed;
};

std::string name(const Case& c) {
  const auto n = [](int64_t v) { return " " + std::to_string(v); };
  return "backward of statistic" + n(int(c.statistic)) + " dtypes" + n(int(c.x)) + n(int(c.other)) +
         " rows" + n(c.rows) + " n" + n(c.n) + " heads" + n(c.heads) + " pad" + n(c.pad) +
         " shift" + n(c.shift) + " peeled" + n(c.peeled) + " weight" + n(c.weight) +
         n(c.per_head_weight) + n(c.wants_weight) + " bias" + n(c.bias) + n(c.per_head_bias) +
         n(c.wants_bias) + " wants rows" + n(c.wants_rows) + " adds" + n(c.adds) + " residual" +
         n(c.residual) + n(c.grad_residual) + " from output" + n(c.from_output) +
         " round_before_weight" + n(c.round_before_weight) + " of_sum" + n(c.of_sum) + " seed" +
         n(static_cast<int64_t>(c.seed));
}

std::set<std::string> plans;

void report(const Case& c, const char* what, int64_t row, int64_t column, double got, double want) {
  sweep::report(name(c), what, row, column, got, want);
}

// The memory of one call.
struct Tensors {
  Rows grad_y, grad_residual_out, x, residual, grad_x, grad_residual;
  Rows weight, bias, grad_weight, grad_bias;
  Guarded rstd, mean;

  explicit Tensors(const Case& c)
      : grad_y(rows(c, c.x)),
        grad_residual_out(rows(c, c.x)),
        x(rows(c, c.x)),
        residual(rows(c, c.other)),
        grad_x(rows(c, c.x)),
        grad_residual(rows(c, c.other)),
        weight(c.other, weight_rows(c), c.n, 0, c.shift),
        bias(c.other, bias_rows(c), c.n, 0, c.shift),
        grad_weight(c.other, weight_rows(c), c.n, 0, 0),
        grad_bias(c.other, bias_rows(c), c.n, 0, 0),
        rstd(c.rows),
        mean(c.rows) {}
  static Rows rows(const Case& c, DType type) { return Rows(type, c.rows, c.n, c.pad, c.shift); }
  static int64_t weight_rows(const Case& c) { return c.per_head_weight ? c.heads : 1; }
  static int64_t bias_rows(const Case& c) { return c.per_head_bias ? c.heads : 1; }
};

RowNormBackward job_of(const Case& c, Tensors& t) {
  RowNormBackward job{};
  job.statistic = c.statistic;
  job.from_output = c.from_output;
  job.rows = c.rows;
  job.n = c.n;
  int64_t left = c.rows;
  for (int d = 0; d < c.peeled; ++d, left /= 2) job.outer_size[job.outer_dims++] = 2;
  if (c.rows != 1) job.outer_size[job.outer_dims++] = left;
  const auto rows = [&](Rows& from) {
    RowsOf to{from.data(), from.dtype, {}};
    for (int d = 0; d < job.outer_dims; ++d) {
      to.stride[d] = from.row_stride;
      for (int e = d + 1; e < job.outer_dims; ++e) to.stride[d] *= job.outer_size[e];
    }
    return to;
  };
  job.grad_y = rows(t.grad_y);
  job.x = rows(t.x);
  if (c.adds) job.grad_residual_out = rows(t.grad_residual_out);
  if (c.residual) job.residual = rows(t.residual);
  if (c.wants_rows) job.grad_x = rows(t.grad_x);
  if (c.grad_residual) job.grad_residual = rows(t.grad_residual);
  const auto affine = [&](Rows& from, bool per_head) {
    return Affine{from.data(), from.dtype, from.row_stride, 1, per_head ? c.heads : 1};
  };
  if (c.weight) job.weight = affine(t.weight, c.per_head_weight);
  if (c.bias) job.bias = affine(t.bias, c.per_head_bias);
  if (c.wants_weight) job.grad_weight = t.grad_weight.data();
  if (c.wants_bias) job.grad_bias = t.grad_bias.data();
  job.rstd = t.rstd.data();
  if (c.statistic == Statistic::kLayer && !c.from_output) job.mean = t.mean.data();
  job.options.weight_offset = c.weight ? c.offset : 0.f;
  job.options.round_before_weight = c.round_before_weight;
  job.options.of_sum = c.of_sum;
  job.normalised = c.x;
  return job;
}

void run(const RowNormBackward& job, const Case& c) {
  const int64_t bytes = cuda::backward_workspace(job, 0);
  // NaN, and of just that size: what is read before it is written shows.
  std::vector<float> workspace(bytes / sizeof(float), std::numeric_limits<float>::quiet_NaN());
  if (!c.wants_weight && !c.wants_bias && bytes)
    report(c, "a workspace for nothing", 0, 0, static_cast<double>(bytes), 0);
  plans.insert(cuda::describe(job, 0));
  cuda::row_norm_backward(job, 0, nullptr, workspace.data());
}

// What the double oracle says of a call, and how far from it one may be.
struct Value {
  double value = 0, size = 0, slack = 0;  // the bound is 4 * 2^-24 * size + slack
};

void check(const Case& c, const char* what, Rows& t, int64_t row, int64_t column, const Value& v) {
  const double got = read(t.dtype, t.at(row, column));
  const double bound =
      half_ulp(t.dtype, v.value) * (1 + std::ldexp(1, -9)) + std::ldexp(4 * v.size, -24) + v.slack;
  if (!(std::abs(got - v.value) <= bound)) report(c, what, row, column, got, v.value);
}

struct Oracle {
  const Case& c;
  Tensors& t;
  bool layer = c.statistic == Statistic::kLayer;
  std::vector<Value> weight = std::vector<Value>(c.heads * c.n);
  std::vector<Value> bias = std::vector<Value>(c.heads * c.n);

  double weight_at(int64_t r, int64_t i) const {
    const int64_t row = c.per_head_weight ? r % c.heads : 0;
    return c.weight ? read(c.other, t.weight.at(row, i)) + double{c.offset} : 1;
  }
  double bias_at(int64_t r, int64_t i) const {
    return c.bias ? read(c.other, t.bias.at(c.per_head_bias ? r % c.heads : 0, i)) : 0;
  }

  struct Row {
    std::vector<double> xhat, u;
    double mean, rstd;
  };

  Row statistics(int64_t r) const {
    Row row;
    row.xhat.resize(c.n);
    row.u.resize(c.n);
    std::vector<double>& s = row.xhat;
    double sum = 0, magnitude = 0, squares = 0;
    for (int64_t i = 0; i < c.n; ++i) {
      s[i] = read(c.x, t.x.at(r, i));
      if (c.residual) s[i] = static_cast<float>(s[i] + read(c.other, t.residual.at(r, i)));
      sum += s[i];
      magnitude += std::abs(s[i]);
    }
    row.mean = layer ? sum / c.n : 0;
    const double about = layer ? magnitude / c.n : 0;
    for (const double v : s) squares += (v - row.mean) * (v - row.mean);
    row.rstd = 1 / std::sqrt((c.of_sum ? squares : squares / c.n) + c.eps);
    for (int64_t i = 0; i < c.n; ++i) {
      row.u[i] = (std::abs(s[i]) + about) * row.rstd;
      s[i] = (s[i] - row.mean) * row.rstd;
      if (!c.from_output) continue;
      const double w = weight_at(r, i);
      s[i] = w == 0 ? 0 : (read(c.x, t.x.at(r, i)) - bias_at(r, i)) / w;
      row.u[i] = std::abs(s[i]);
    }
    return row;
  }

  void fill_statistics() {
    for (int64_t r = 0; r < c.rows; ++r) {
      const Row row = statistics(r);
      t.rstd.data()[r] = static_cast<float>(row.rstd);
      t.mean.data()[r] = static_cast<float>(row.mean);
    }
  }

  void check_row(int64_t r) {
    const Row row = statistics(r);
    const double rstd = t.rstd.data()[r];
    double mean_g = 0, mean_abs_g = 0, mean_gx = 0, mean_gu = 0;
    for (int64_t i = 0; i < c.n; ++i) {
      const double grad_y = read(c.x, t.grad_y.at(r, i)), g = grad_y * weight_at(r, i);
      mean_g += g / c.n;
      mean_abs_g += std::abs(g) / c.n;
      mean_gx += g * row.xhat[i] / (c.of_sum ? 1 : c.n);
      mean_gu += std::abs(g) * row.u[i] / (c.of_sum ? 1 : c.n);
      const int64_t at = r % c.heads * c.n + i;
      double xhat = row.xhat[i];
      if (c.round_before_weight) {
        // Next to the middle of two values it may fall to either.
        const double error = std::ldexp(4 * row.u[i], -24);
        const double low = rounded(c.x, xhat - error), high = rounded(c.x, xhat + error);
        xhat = rounded(c.x, xhat);
        weight[at].slack += std::abs(grad_y) * (high - low);
      }
      weight[at].value += grad_y * xhat;
      weight[at].size += std::abs(grad_y) * row.u[i];
      bias[at].value += grad_y;
      bias[at].size += std::abs(grad_y);
    }
    if (!layer) mean_g = mean_abs_g = 0;
    for (int64_t i = 0; i < c.n; ++i) {
      const double g = read(c.x, t.grad_y.at(r, i)) * weight_at(r, i);
      const double added = c.adds ? read(c.x, t.grad_residual_out.at(r, i)) : 0;
      const Value v{rstd * (g - mean_g - row.xhat[i] * mean_gx) + added,
                    rstd * (std::abs(g) + mean_abs_g + row.u[i] * mean_gu) + std::abs(added), 0};
      if (c.wants_rows) check(c, "grad_x", t.grad_x, r, i, v);
      if (c.grad_residual) check(c, "grad_residual", t.grad_residual, r, i, v);
    }
  }

  void check_sums(const char* what, Rows& gradient, bool per_head, const std::vector<Value>& sums) {
    for (int64_t h = 0; h < (per_head ? c.heads : 1); ++h)
      for (int64_t i = 0; i < c.n; ++i) {
        Value v = sums[h * c.n + i];
        for (int64_t more = per_head ? c.heads : 1; more < c.heads; ++more) {
          const Value& of_head = sums[more * c.n + i];
          v.value += of_head.value, v.size += of_head.size, v.slack += of_head.slack;
        }
        check(c, what, gradient, h, i, v);
      }
  }
};

// All of it where it is not wanted.
void check_untouched(const Case& c, Rows& t, const char* what, int64_t rows, bool wanted) {
  if (!is_untouched_outside(t, wanted ? rows : 0, c.n)) report(c, what, 0, 0, 0, 0);
}

void run(const Case& c) {
  std::mt19937_64 random(c.seed);
  emu::seed(c.seed);
  Tensors t(c);
  // Gradients that lean to one side, so that the errors of their sums do too.
  fill(t.grad_y, c.rows, c.n, random, 0.8f);
  fill(t.grad_residual_out, c.rows, c.n, random, -0.3f);
  fill(t.x, c.rows, c.n, random, 0.7f);
  fill(t.residual, c.rows, c.n, random, -0.2f);
  fill(t.weight, t.weight_rows(c), c.n, random, 1.5f);
  fill(t.bias, t.bias_rows(c), c.n, random, 0.4f);
  if (c.from_output) write(c.other, t.weight.at(0, c.n / 2), -c.offset);
  for (Rows* out : {&t.grad_x, &t.grad_residual, &t.grad_weight, &t.grad_bias})
    std::fill(out->memory.begin(), out->memory.end(), kUntouchedByte);
  Oracle oracle{c, t};
  oracle.fill_statistics();
  const RowNormBackward job = job_of(c, t);
  run(job, c);

  check_untouched(c, t.grad_x, "memory outside grad_x", c.rows, c.wants_rows);
  check_untouched(c, t.grad_residual, "memory outside grad_residual", c.rows, c.grad_residual);
  check_untouched(c, t.grad_weight, "memory outside grad_weight", t.weight_rows(c), c.wants_weight);
  check_untouched(c, t.grad_bias, "memory outside grad_bias", t.bias_rows(c), c.wants_bias);
  for (int64_t r = 0; r < c.rows; ++r) oracle.check_row(r);
  if (c.wants_weight)
    oracle.check_sums("grad_weight", t.grad_weight, c.per_head_weight, oracle.weight);
  if (c.wants_bias) oracle.check_sums("grad_bias", t.grad_bias, c.per_head_bias, oracle.bias);

  if (c.seed % 4) return;
  const Tensors once = t;
  run(job, c);
  if (once.grad_x.memory != t.grad_x.memory || once.grad_weight.memory != t.grad_weight.memory ||
      once.grad_bias.memory != t.grad_bias.memory)
    report(c, "other bits the second time", 0, 0, 0, 0);
}

// grad_x, as rows first, first + 1, ... of a batch whose rows have seeds of their own.
std::vector<char> grad_x_of(Case c, int64_t first) {
  Tensors t(c);
  for (int64_t r = 0; r < c.rows; ++r) {
    std::mt19937_64 random(first + r);
    std::normal_distribution<float> normal(0.7f, 1.f);
    for (int64_t i = 0; i < c.n; ++i) {
      write(c.x, t.x.at(r, i), normal(random));
      write(c.x, t.grad_y.at(r, i), normal(random));
    }
  }
  std::mt19937_64 random(99);
  fill(t.weight, 1, c.n, random, 1.5f);
  Oracle{c, t}.fill_statistics();
  run(job_of(c, t), c);
  std::vector<char> rows;
  for (int64_t r = 0; r < c.rows; ++r)
    rows.insert(rows.end(), t.grad_x.at(r, 0), t.grad_x.at(r, 0) + c.n * item_size(c.x));
  return rows;
}

struct Sweep {
  std::mt19937_64 random;
  uint64_t share, of, count = 0;

  void add(Statistic statistic, DType x, DType other, int64_t rows, int64_t n) {
    run_one(statistic, x, other, rows, n, false);
    if (x == other) run_one(statistic, x, other, rows, n, true);
  }

  void run_one(Statistic statistic, DType x, DType other, int64_t rows, int64_t n, bool plain) {
    if (count++ % of != share) return;
    const auto chance = [&](int one_in) { return random() % one_in == 0; };
    const bool awkward = !plain && chance(3), usual = plain || chance(2);
    normkit_emulate_device(chance(3) ? 64 : 1, true);
    Case c{};
    c.statistic = statistic;
    c.x = x;
    c.other = other;
    c.n = n;
    // More heads than a launch of the emulation has rows, where that costs little.
    c.heads = !chance(3) ? 1 : n <= 64 && chance(4) ? 70 : 3;
    c.rows = (rows + c.heads - 1) / c.heads * c.heads;
    if (c.rows > 1 && chance(3))
      for (int64_t left = c.rows / c.heads; left % 2 == 0 && c.peeled < 4; left /= 2) ++c.peeled;
    c.pad = awkward ? static_cast<int64_t>(random() % 9) : chance(2) ? 8 : 0;
    c.shift = awkward ? static_cast<int64_t>(random() % 5) : 0;
    c.weight = !chance(4);
    c.bias = chance(2);
    c.per_head_weight = c.heads > 1 && c.weight;
    c.per_head_bias = c.heads > 1 && c.bias && !(c.weight && chance(2));
    if (c.per_head_bias && c.weight) c.per_head_weight = !chance(3);
    if (!c.per_head_weight && !c.per_head_bias) c.heads = 1;
    c.wants_weight = c.weight && !chance(5);
    c.wants_bias = c.bias && !chance(3);
    if (plain && statistic == Statistic::kRms) c.wants_bias = false;
    c.wants_rows = !chance(6);
    c.adds = chance(2);
    c.from_output = !usual && chance(3);
    c.residual = !usual && !c.from_output && chance(2);
    c.grad_residual = !usual && chance(2);
    c.round_before_weight = !c.from_output && chance(4);
    c.offset = c.weight && chance(3) ? 1.f : 0.f;
    c.eps = chance(2) ? 0.3f : 1e-6f;
    c.seed = random();
    run(c);
    if (statistic != Statistic::kRms || c.from_output || c.seed % 4 != 0) return;
    c.of_sum = true;
    run(c);
  }
};

// A row's gradient follows neither the rows beside it, nor where it lies.
void same_bits() {
  for (const Statistic statistic : {Statistic::kRms, Statistic::kLayer})
    for (const DType x : {DType::kFloat32, DType::kBFloat16})
      for (const int64_t n : {20, 64, 256, 1000, 1024, 4096, 8192, 8200}) {
        Case c{};
        c.statistic = statistic;
        c.x = c.other = x;
        c.rows = n <= 64 ? 140 : 5;
        c.n = n;
        c.heads = 1;
        c.weight = c.wants_weight = c.wants_rows = true;
        c.eps = 1e-6f;
        normkit_emulate_device(1, true);
        const std::vector<char> batch = grad_x_of(c, 0);
        const auto check = [&](const char* what, size_t from, const std::vector<char>& got) {
          if (!std::memcmp(batch.data() + from, got.data(), got.size())) return;
          std::fprintf(stderr, "%s: the bits follow %s\n", name(c).c_str(), what);
          ++failures;
        };
        Case other = c;
        other.shift = 1;
        check("the alignment", 0, grad_x_of(other, 0));
        other = c;
        other.wants_weight = false;
        other.rows = 1;
        normkit_emulate_device(64, true);
        check("the device", 0, grad_x_of(c, 0));
        check("the batch", batch.size() / c.rows * (c.rows - 1), grad_x_of(other, c.rows - 1));
      }
}

// Roundings of equal rows do not cancel, as those of random ones do.
void sums_of_equal_rows() {
  Case c{};
  c.statistic = Statistic::kLayer;
  c.x = c.other = DType::kFloat32;
  c.rows = 6000;
  c.n = 64;
  c.heads = 1;
  c.bias = c.wants_bias = true;
  c.eps = 1e-6f;
  Tensors t(c);
  std::mt19937_64 random(1);
  fill(t.x, c.rows, c.n, random, 1.f);
  for (int64_t r = 0; r < c.rows; ++r)
    for (int64_t i = 0; i < c.n; ++i) write(c.x, t.grad_y.at(r, i), 1.7f);
  Oracle{c, t}.fill_statistics();
  normkit_emulate_device(1, true);
  run(job_of(c, t), c);
  const double sum = static_cast<double>(c.rows) * static_cast<double>(1.7f);
  for (int64_t i = 0; i < c.n; ++i)
    check(c, "grad_bias of equal rows", t.grad_bias, 0, i, {sum, sum});
}

std::set<std::string> every_plan() {
  std::set<std::string> found;
  normkit_emulate_device(64, true);
  for (const DType x : {DType::kFloat32, DType::kBFloat16})
    for (int64_t n = 1; n < 1 << 15; ++n) {
      RowNormBackward job{};
      job.rows = job.outer_size[0] = 1 << 20;
      job.n = n;
      job.outer_dims = 1;
      job.x = job.grad_y = {reinterpret_cast<char*>(16), x, {n * item_size(x)}};
      found.insert(cuda::describe(job, 0));
      job.x.data += 1;  // unaligned
      found.insert(cuda::describe(job, 0));
    }
  return found;
}

// n on both sides of every threshold of backward_plan().
const std::vector<int64_t> kSizes = {1,    2,    7,    8,    9,    16,   31,   32,   64,   65,
                                     128,  136,  250,  256,  264,  512,  520,  1000, 1024, 1032,
                                     2048, 2052, 3072, 4096, 4100, 5120, 8192, 8200, 20000};

}  // namespace

uint64_t sweep_backward(uint64_t seed, uint64_t share, uint64_t of) {
  Sweep sweep{std::mt19937_64(seed), share, of};
  if (share == 0 && of < 8) same_bits(), sums_of_equal_rows();
  if (failures) return 0;
  const DType dtypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  for (const Statistic statistic : {Statistic::kRms, Statistic::kLayer})
    for (const DType x : dtypes)
      for (const DType other : dtypes)
        for (const int64_t n : kSizes) {
          sweep.add(statistic, x, other, n == 7 ? 0 : n % 2 ? 3 : 1, n);
          sweep.add(statistic, x, other, n <= 32 ? 400 : n <= 264 ? 140 : n <= 1024 ? 66 : 12, n);
        }
  if (of == 1)
    for (const std::string& plan : every_plan())
      if (!plans.count(plan) && ++failures)
        std::fprintf(stderr, "this plan of the backward pass was not run: %s\n", plan.c_str());
  if (std::getenv("NORMKIT_SHOW_PLANS"))
    for (const std::string& plan : plans) std::printf("  backward: %s\n", plan.c_str());
  return sweep.count;
}

}  // namespace sweep
