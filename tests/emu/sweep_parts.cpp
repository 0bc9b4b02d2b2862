// Rows whose columns are split into parts, each in memory of its own, as of several processes:
// their statistics, and what the parts make of all of them, against double on whole rows.
#include <algorithm>
#include <cstdio>
#include <limits>

#include "../../cpp/plan.h"
#include "../../cuda/launch.h"
#include "parts.hpp"

namespace sweep {
namespace {

// What of a call is the same in both passes.
template <class Norm>
void describe_rows(const Case& c, Norm& norm, Part& part) {
  norm.statistic = c.statistic;
  norm.rows = c.rows;
  norm.n = c.n;
  int64_t left = c.rows;
  for (int d = 0; d < c.peeled; ++d, left /= 2) norm.outer_size[norm.outer_dims++] = 2;
  if (c.rows != 1) norm.outer_size[norm.outer_dims++] = left;
  const auto affine = [&](Rows& from) {
    return Affine{from.data(), from.dtype, from.row_stride, 1, c.heads};
  };
  if (c.weight) norm.weight = affine(part.weight);
  if (c.bias) norm.bias = affine(part.bias);
  norm.options.weight_offset = c.weight ? c.offset : 0.f;
  norm.options.round_before_weight = c.round_before_weight;
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
  norm.options.eps = c.eps;
  norm.options.clamp_inf = c.clamp_inf;
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

void check_untouched(const Case& c, Rows& t, const char* what, int64_t rows) {
  if (!is_untouched_outside(t, rows, c.n)) report(c, what, 0, 0, 0, 0);
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
      check_untouched(c, part.grad_x, "memory outside grad_x", c.wants_rows ? c.rows : 0);
      check_untouched(c, part.grad_weight, "memory outside grad_weight",
                      c.wants_weight ? c.heads : 0);
      check_untouched(c, part.grad_bias, "memory outside grad_bias", c.wants_bias ? c.heads : 0);
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
  for (Part& part : parts) check_untouched(c, part.y, "memory outside y", c.rows);
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
