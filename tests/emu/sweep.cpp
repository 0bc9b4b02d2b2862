// Every plan that cpp/plan.h can return, run on the emulation against double: what the sanitizers
// look at, and what the mutants have to get past.  Usage: sweep SEED [SHARE OF
// [forward|backward|parts|modulated|gated|post_norm|rotation]]
#include "sweep.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "../../cpp/plan.h"
#include "../../cuda/launch.h"

namespace {

using namespace normkit;
using namespace sweep;

struct Case {
  Statistic statistic;
  bool adds;
  DType x, other;  // other: of weight, bias, residual and out
  int64_t rows, n, heads, pad, shift;
  bool weight, bias, in_place, round_before_weight, round_sum, clamp_inf, saves;
  float offset, eps;
  uint64_t seed;
  bool of_sum, eps_outside, round_weight;
  bool constant;  // every x of one value, so that errors of a sum all fall to one side
};

std::string name(const Case& c) {
  const auto n = [](int64_t v) { return " " + std::to_string(v); };
  return "statistic" + n(int(c.statistic)) + " adds" + n(c.adds) + " dtypes" + n(int(c.x)) +
         n(int(c.other)) + " rows" + n(c.rows) + " n" + n(c.n) + " heads" + n(c.heads) + " pad" +
         n(c.pad) + " shift" + n(c.shift) + " weight" + n(c.weight) + " bias" + n(c.bias) +
         " in place" + n(c.in_place) + " round_before_weight" + n(c.round_before_weight) +
         " of_sum" + n(c.of_sum) + " eps_outside" + n(c.eps_outside) + " round_weight" +
         n(c.round_weight) + " round_sum" + n(c.round_sum) + " clamp_inf" + n(c.clamp_inf) +
         " saves" + n(c.saves) + " offset" + n(c.offset != 0.f) + " seed" +
         n(static_cast<int64_t>(c.seed));
}

std::set<std::string> plans;

void report(const Case& c, const char* what, int64_t row, int64_t column, double got, double want) {
  sweep::report(name(c), what, row, column, got, want);
}

void run(const Case& c) {
  std::mt19937_64 random(c.seed);
  emu::seed(c.seed);
  Rows x(c.x, c.rows, c.n, c.pad, c.shift), residual(c.other, c.rows, c.n, c.pad, c.shift);
  Rows weight(c.other, c.heads, c.n, 0, c.shift), bias(c.other, c.heads, c.n, 0, c.shift);
  // Next to 65504 the mean of a row is not known to within the bound.
  fill(x, c.rows, c.n, random, 0.7f);
  if (c.clamp_inf && c.x == DType::kFloat16 && c.statistic == Statistic::kRms && c.rows > 0)
    write(c.x, x.at(0, c.n / 2), -std::numeric_limits<float>::infinity());
  // A NaN in a row of its own, which only that row may show.
  if (c.clamp_inf && c.rows > 1)
    write(c.x, x.at(c.rows - 1, c.n / 3), std::numeric_limits<float>::quiet_NaN());
  if (c.constant)
    for (int64_t i = 0; i < c.rows * c.n; ++i) write(c.x, x.at(i / c.n, i % c.n), 0.7f);
  fill(residual, c.rows, c.n, random, -0.2f);
  fill(weight, c.heads, c.n, random, 1.5f);
  fill(bias, c.heads, c.n, random, 0.4f);
  Rows x_before = x, residual_before = residual;
  Rows out(c.other, c.rows, c.n, c.pad, c.shift), residual_out = residual;

  RowNorm norm{};
  norm.statistic = c.statistic;
  norm.rows = c.rows;
  norm.n = c.n;
  norm.outer_dims = c.rows == 1 ? 0 : 1;
  norm.outer_size[0] = c.rows;
  const auto rows = [](Rows& t) { return RowsOf{t.data(), t.dtype, {t.row_stride}}; };
  norm.x = rows(x);
  const bool in_place = c.in_place && c.x == c.other;
  norm.out = in_place ? norm.x : rows(out);
  if (c.adds) {
    norm.residual = rows(residual);
    norm.residual_out = c.in_place ? norm.residual : rows(residual_out);
  }
  if (c.weight) norm.weight = {weight.data(), weight.dtype, weight.row_stride, 1, c.heads};
  if (c.bias) norm.bias = {bias.data(), bias.dtype, bias.row_stride, 1, c.heads};
  norm.options.eps = c.eps;
  norm.options.weight_offset = c.weight ? c.offset : 0.f;
  norm.options.round_before_weight = c.round_before_weight;
  norm.options.round_sum = c.round_sum;
  norm.options.clamp_inf = c.clamp_inf;
  norm.options.of_sum = c.of_sum;
  norm.options.eps_outside = c.eps_outside;
  norm.options.round_weight = c.round_weight;
  const bool layer = c.statistic == Statistic::kLayer;
  Guarded rstds(c.rows), means(c.rows);
  if (c.saves) {
    norm.rstd = rstds.data();
    if (layer) norm.mean = means.data();
  }
  plans.insert(cuda::describe(norm, 0));
  cuda::row_norm(norm, 0, nullptr);

  for (Guarded* values : {&rstds, &means})
    if (!values->is_intact()) report(c, "memory outside rstd or mean", 0, 0, 0, 0);
  Rows& y = in_place ? x : out;
  Rows& sums = c.in_place ? residual : residual_out;
  std::vector<double> v(c.n);
  for (int64_t r = 0; r < c.rows; ++r) {
    double sum = 0, magnitude = 0, squares = 0;
    for (int64_t i = 0; i < c.n; ++i) {
      const auto clamped = [&](double value, DType dtype) {
        return c.clamp_inf && dtype == DType::kFloat16 ? std::clamp(value, -65504.0, 65504.0)
                                                       : value;
      };
      v[i] = clamped(read(c.x, x_before.at(r, i)), c.x);
      if (c.adds) {
        v[i] = static_cast<float>(v[i] + read(c.other, residual_before.at(r, i)));
        const double stored = rounded(c.other, v[i]);
        const double got = read(c.other, sums.at(r, i));
        if (got != stored && !(std::isnan(got) && std::isnan(stored)))
          report(c, "residual_out", r, i, got, stored);
        if (c.round_sum) v[i] = clamped(stored, c.other);
      }
      sum += v[i];
      magnitude += std::abs(v[i]);
    }
    const double mean = layer ? sum / c.n : 0;
    const double about = layer ? magnitude / c.n : 0;
    for (int64_t i = 0; i < c.n; ++i) squares += (v[i] - mean) * (v[i] - mean);
    const double statistic = c.of_sum ? squares : squares / c.n;
    const double root = std::sqrt(c.eps_outside ? statistic : statistic + c.eps);
    const double rstd = 1 / (c.eps_outside && root < c.eps ? c.eps : root);
    if (c.saves) {
      const auto check = [&](const char* what, double got, double want, double bound) {
        if (!(std::abs(got - want) <= bound) && !(std::isnan(got) && std::isnan(want)))
          report(c, what, r, 0, got, want);
      };
      check("rstd", rstds.data()[r], rstd, std::ldexp(4 * rstd * (1 + about * rstd), -24));
      if (layer) check("mean", means.data()[r], mean, std::ldexp(4 * about, -24));
    }
    const DType normalised = c.adds && c.round_sum ? c.other : c.x;
    for (int64_t i = 0; i < c.n; ++i) {
      double w = c.weight
                     ? read(c.other, weight.at(r % c.heads, i)) + double{norm.options.weight_offset}
                     : 1;
      if (c.round_weight) w = rounded(c.other, w);
      const double b = c.bias ? read(c.other, bias.at(r % c.heads, i)) : 0;
      const double xhat = (v[i] - mean) * rstd, size = (std::abs(v[i]) + about) * rstd;
      // The sum of weight and offset is a rounding more.
      const double roundings = norm.options.weight_offset != 0.f ? 5 : 4;
      const double bound = std::ldexp(roundings * (size * std::abs(w) + std::abs(b)), -24);
      double low = xhat, high = xhat;
      if (c.round_before_weight) {
        // Next to the middle of two values it may fall to either.
        low = rounded(normalised, xhat - std::ldexp(4 * size, -24));
        high = rounded(normalised, xhat + std::ldexp(4 * size, -24));
      }
      if (w < 0) std::swap(low, high);
      low = low * w + b, high = high * w + b;
      const double got = read(y.dtype, y.at(r, i)), slack = 1 + std::ldexp(1, -9);
      const bool right = std::isnan(xhat)
                             ? std::isnan(got)
                             : low - bound - half_ulp(y.dtype, low) * slack <= got &&
                                   got <= high + bound + half_ulp(y.dtype, high) * slack;
      if (!right) report(c, "y", r, i, got, xhat * w + b);
    }
  }
}

// y as float32 of rows first, first + 1, ... of a matrix whose values every dtype holds, and which
// spread so widely that another order of additions would show.
std::vector<float> float32_of(Statistic statistic, DType dtype, int64_t first, int64_t rows,
                              int64_t n, int64_t shift, int64_t stride = 0) {
  Rows x(dtype, stride ? 0 : rows, n, 0, shift);
  std::vector<float> y(rows * n);
  RowNorm norm{};
  norm.statistic = statistic;
  norm.rows = rows;
  norm.n = n;
  norm.outer_dims = 1;
  norm.outer_size[0] = rows;
  norm.options.eps = 1e-6f;
  norm.x = {x.data(), dtype, {x.row_stride}};
  norm.out = {reinterpret_cast<char*>(y.data()), DType::kFloat32, {n * 4}};
  size_t mapped = 0;
  if (stride) {
    mapped = static_cast<size_t>(stride * rows);
    void* at = mmap(nullptr, mapped, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) std::perror("mmap"), std::exit(2);
    norm.x = norm.out = {static_cast<char*>(at), dtype, {stride}};
  }
  for (int64_t r = 0; r < rows; ++r) {
    std::mt19937_64 random(first + r);
    for (int64_t i = 0; i < n; ++i) {
      const float size = std::ldexp(128.f + random() % 128, static_cast<int>(random() % 12) - 10);
      write(dtype, norm.x.data + r * norm.x.stride[0] + i * item_size(dtype),
            random() % 2 ? size : -size);
    }
  }
  plans.insert(cuda::describe(norm, 0));
  cuda::row_norm(norm, 0, nullptr);
  if (stride) {
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(y.data() + r * n, norm.out.data + r * stride, n * sizeof(float));
    munmap(norm.out.data, mapped);
  }
  return y;
}

// A row's bits follow neither the rows beside it, nor its dtype, nor where it lies.
void same_bits(bool clusters) {
  for (const Statistic statistic : {Statistic::kRms, Statistic::kLayer})
    for (const int64_t n : {20, 64, 256, 1000, 1024, 4096, 8192, 16384, 20000, 40960}) {
      const int64_t rows = n <= 64 ? 140 : 5, last = rows - 1;
      const auto check = [&](const char* what, int64_t from, const std::vector<float>& want,
                             const std::vector<float>& got) {
        if (!std::memcmp(want.data() + from * n, got.data(), got.size() * sizeof(float))) return;
        std::fprintf(stderr, "statistic %d n %lld: the bits follow %s\n", int(statistic),
                     static_cast<long long>(n), what);
        ++failures;
      };
      normkit_emulate_device(1, clusters);
      const std::vector<float> batch = float32_of(statistic, DType::kFloat32, 0, rows, n, 0);
      const auto half = float32_of(statistic, DType::kFloat16, 0, rows, n, 0);
      check("the dtype", 0, batch, half);
      check("the alignment", 0, batch, float32_of(statistic, DType::kFloat32, 0, rows, n, 1));
      normkit_emulate_device(64, clusters);
      check("the batch", last, batch, float32_of(statistic, DType::kFloat32, last, 1, n, 0));
      check("the batch or dtype", 0, batch, float32_of(statistic, DType::kBFloat16, 0, 1, n, 0));
      if (n == 64)
        check("the stride", 0, batch,
              float32_of(statistic, DType::kFloat32, 0, 3, n, 0, int64_t{3} << 30));
    }
}

// n on both sides of every threshold of plan.h.
const std::vector<int64_t> kSizes = {
    1,    2,    7,    8,    9,    16,   31,   32,   64,   65,   96,   128,   136,  192,
    224,  256,  257,  264,  384,  448,  512,  520,  896,  1000, 1024, 1032,  1536, 1792,
    2048, 2560, 2880, 3072, 3584, 4096, 4100, 5120, 7168, 8192, 8200, 16384, 16392};
const std::vector<int64_t> kLongSizes = {
    10240, 12288, 14336, 16383, 16384,  16400,  18432,  24576,  28672,  32768,  32776, 40961,
    57344, 65536, 65544, 98304, 114688, 131072, 131080, 200000, 262144, 262152, 300001};

struct Sweep {
  std::mt19937_64 random;
  uint64_t share, of, count = 0;
  bool clusters = true;

  // As it comes, and for one dtype also plainly: 16 bytes at a time, and as many rows as there are.
  void add(Statistic statistic, bool adds, DType x, DType other, int64_t rows, int64_t n) {
    run_one(statistic, adds, x, other, rows, n, false);
    if (x == other) run_one(statistic, adds, x, other, rows, n, true);
  }

  void run_one(Statistic statistic, bool adds, DType x, DType other, int64_t rows, int64_t n,
               bool plain) {
    if (count++ % of != share) return;
    const auto chance = [&](int one_in) { return random() % one_in == 0; };
    const bool awkward = !plain && chance(3);
    // As few processors as make the case's rows many, or few.
    normkit_emulate_device(!plain && chance(3) ? 64 : 1, clusters);
    Case c{};
    c.statistic = statistic;
    c.adds = adds;
    c.x = x;
    c.other = other;
    c.rows = rows;
    c.n = n;
    c.heads = chance(3) ? 3 : 1;
    c.pad = awkward ? static_cast<int64_t>(random() % 9) : chance(2) ? 8 : 0;
    c.shift = awkward ? static_cast<int64_t>(random() % 5) : 0;
    c.weight = !chance(4);
    c.bias = chance(2);
    c.in_place = chance(2);
    c.round_before_weight = chance(4);
    c.round_sum = plain || !chance(3);
    c.clamp_inf = chance(3);
    c.saves = !chance(3);
    c.offset = chance(3) ? 1.f : 0.f;
    c.eps = chance(2) ? 0.3f : 1e-6f;
    c.seed = random();
    run(c);
    if (c.weight && c.seed % 4 == 1) {
      c.round_weight = true;
      c.offset = 1.f;
      return run(c);
    }
    if (statistic != Statistic::kRms || adds || c.seed % 4 != 0) return;
    c.of_sum = true;
    c.eps_outside = c.seed % 8 == 0;
    // About as long as half of the rows.
    if (c.eps_outside && c.eps > 0.1f) c.eps = 1.22f * std::sqrt(static_cast<float>(n));
    run(c);
  }
};

// In words, of all that a call can lead to.
std::set<std::string> every_plan() {
  std::set<std::string> found;
  for (const bool clusters : {true, false})
    for (const int64_t rows : {int64_t{1}, int64_t{1} << 20})
      for (const DType x : {DType::kFloat32, DType::kBFloat16})
        for (int64_t n = 1; n < 1 << 19; n += n < 4096 ? 1 : 60) {
          normkit_emulate_device(64, clusters);
          RowNorm norm{};
          norm.rows = rows;
          norm.n = n;
          norm.outer_dims = 1;
          norm.outer_size[0] = rows;
          norm.x = norm.out = {reinterpret_cast<char*>(16), x, {n * item_size(x)}};
          found.insert(cuda::describe(norm, 0));
          norm.out = {reinterpret_cast<char*>(16), DType::kFloat32, {n * 4}};
          norm.weight = {reinterpret_cast<char*>(16), DType::kBFloat16, n * 2, 1, 1};
          found.insert(cuda::describe(norm, 0));
          norm.out.data += 1;  // unaligned
          found.insert(cuda::describe(norm, 0));
        }
  return found;
}

void sweep_forward(Sweep& forward) {
  if (forward.share == 0) {
    same_bits(true);
    same_bits(false);
    if (failures) return;
    Case c{};
    c.rows = c.heads = 1;
    c.n = 2000003;
    c.eps = 1e-6f;
    c.constant = true;
    run(c);
  }
  const DType dtypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  for (const bool clusters : {true, false}) {
    forward.clusters = clusters;
    for (const Statistic statistic : {Statistic::kRms, Statistic::kLayer})
      for (const bool adds : {false, true})
        for (const DType x : dtypes)
          for (const DType other : dtypes) {
            if (clusters)
              for (const int64_t n : kSizes) {
                if (n > 7 && n % 7 == 0 && x != other)
                  continue;  // for seven packs, of one dtype only
                // Few rows, and enough to fill the device of one processor where that is cheap.
                forward.add(statistic, adds, x, other, n == 7 ? 0 : n % 2 ? 3 : 1, n);
                forward.add(statistic, adds, x, other,
                            n <= 32                           ? 2100
                            : n == 96 || n == 192 || n == 224 ? 67
                            : n <= 264                        ? 300
                            : n <= 520                        ? 67
                                                              : 9,
                            n);
              }
            for (const int64_t n : kLongSizes) {
              if (!clusters && n > 20000 && n < 131072) continue;  // one plan for all of them
              if (x == other || n == 18432) forward.add(statistic, adds, x, other, 1, n);
            }
          }
  }
  if (forward.of == 1)
    for (const std::string& plan : every_plan())
      if (!plans.count(plan) && ++failures)
        std::fprintf(stderr, "this plan was not run: %s\n", plan.c_str());
}

}  // namespace

int main(int argc, char** argv) {
  const auto argument = [&](int i, uint64_t otherwise) {
    return argc > i ? std::strtoull(argv[i], nullptr, 10) : otherwise;
  };
  const std::string pass = argc > 4 ? argv[4] : "";
  Sweep forward{std::mt19937_64(argument(1, 1)), argument(2, 0), argument(3, 1)};
  const auto wanted = [&](const char* name) { return pass.empty() || pass == name; };
  if (wanted("forward")) sweep_forward(forward);
  struct Other {
    const char* name;
    uint64_t (*sweep)(uint64_t seed, uint64_t share, uint64_t of);
  };
  const Other others[] = {{"backward", sweep_backward},   {"parts", sweep_parts},
                          {"modulated", sweep_modulated}, {"gated", sweep_gated},
                          {"post_norm", sweep_post_norm}, {"rotation", sweep_rotation},
                          {"strided", sweep_strided}};
  std::printf("%llu cases", static_cast<unsigned long long>(forward.count));
  for (const Other& other : others)
    if (wanted(other.name))
      std::printf(
          " + %llu %s",
          static_cast<unsigned long long>(other.sweep(argument(1, 1), forward.share, forward.of)),
          other.name);
  std::printf(", %zu plans, %d failures\n", plans.size(), failures);
  if (std::getenv("NORMKIT_SHOW_PLANS"))
    for (const std::string& plan : plans) std::printf("  %s\n", plan.c_str());
  return failures != 0;
}
