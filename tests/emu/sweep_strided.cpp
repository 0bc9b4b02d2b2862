// Norms of strided columns on the emulation, bit for bit those of the same rows where they are
// dense: which row and column of which tensor, what is done to them, and the order of their sums.
#include "../../cuda/launch.h"
#include "sweep.hpp"

namespace sweep {
namespace {

struct Case {
  Statistic statistic;
  NormOptions options;
  bool x_is_strided, out_is_strided, in_place, weight, bias;
  DType x, out, affine;
  int64_t images, pixels, n, pad, offset;
  uint64_t seed;
  int64_t rows() const { return images * pixels; }
};

std::string name(const Case& c) {
  const auto n = [](int64_t v) { return " " + std::to_string(v); };
  return "strided, statistic" + n(int(c.statistic)) + " x" + n(c.x_is_strided) + " out" +
         n(c.out_is_strided) + " in place" + n(c.in_place) + " weight" + n(c.weight) + " bias" +
         n(c.bias) + " dtypes" + n(int(c.x)) + n(int(c.out)) + n(int(c.affine)) + " of_sum" +
         n(c.options.of_sum) + " eps_outside" + n(c.options.eps_outside) + " images" + n(c.images) +
         " pixels" + n(c.pixels) + " n" + n(c.n) + " pad" + n(c.pad) + " offset" + n(c.offset) +
         " seed" + n(static_cast<int64_t>(c.seed));
}

// Images whose channels lie one after the other, or whose pixels do, in memory that ends where they
// end.
struct Images {
  std::vector<char> memory;
  RowsOf rows;
  const Case& c;

  Images(const Case& of, DType dtype, bool strided) : c(of) {
    const int64_t item = item_size(dtype);
    rows.dtype = dtype;
    rows.stride[1] = strided ? item : (c.n + c.pad) * item;
    if (strided) rows.column_stride = (c.pixels + c.pad) * item;
    rows.stride[0] = strided ? c.n * rows.column_stride : c.pixels * rows.stride[1];
    const int64_t last = offset_of(c.rows() - 1, c.n - 1);
    memory.assign(c.offset * item + last + item, kUntouchedByte);
    rows.data = memory.data() + c.offset * item;
  }
  Images(const Images&) = delete;

  int64_t offset_of(int64_t row, int64_t column) const {
    const int64_t step = rows.column_stride ? rows.column_stride : item_size(rows.dtype);
    return row / c.pixels * rows.stride[0] + row % c.pixels * rows.stride[1] + column * step;
  }
  char* at(int64_t row, int64_t column) { return rows.data + offset_of(row, column); }

  bool is_untouched_outside() {
    std::vector<bool> inside(memory.size());
    for (int64_t r = 0; r < c.rows(); ++r)
      for (int64_t i = 0; i < c.n; ++i)
        std::fill_n(inside.begin() + (at(r, i) - memory.data()), item_size(rows.dtype), true);
    for (size_t b = 0; b < memory.size(); ++b)
      if (!inside[b] && memory[b] != kUntouchedByte) return false;
    return true;
  }
};

void run(const Case& c) {
  std::mt19937_64 random(c.seed);
  emu::seed(c.seed);
  Images x(c, c.x, c.x_is_strided), out(c, c.out, c.out_is_strided);
  Images dense_x(c, c.x, false), dense_out(c, c.out, false);
  std::normal_distribution<float> normal(0.7f, 1.f);
  for (int64_t r = 0; r < c.rows(); ++r)
    for (int64_t i = 0; i < c.n; ++i) {
      write(c.x, x.at(r, i), i == c.n / 2 && r % 5 == 1 ? 1e30f : normal(random));
      std::copy_n(x.at(r, i), item_size(c.x), dense_x.at(r, i));
    }
  Rows weight(c.affine, c.pixels, c.n, 0, 0), bias(c.affine, c.pixels, c.n, 0, 0);
  fill(weight, c.pixels, c.n, random, 1.5f);
  fill(bias, c.pixels, c.n, random, 0.3f);

  RowNorm norm{};
  norm.statistic = c.statistic;
  norm.rows = c.rows();
  norm.n = c.n;
  norm.outer_dims = 2;
  norm.outer_size[0] = c.images;
  norm.outer_size[1] = c.pixels;
  norm.options = c.options;
  const auto map = [&](Rows& t) { return Affine{t.data(), c.affine, t.row_stride, 1, c.pixels}; };
  if (c.weight) norm.weight = map(weight);
  if (c.bias) norm.bias = map(bias);
  RowNorm plain = norm;
  norm.x = x.rows;
  norm.out = (c.in_place ? x : out).rows;
  plain.x = dense_x.rows;
  plain.out = dense_out.rows;
  Guarded rstd(c.rows()), mean(c.rows()), plain_rstd(c.rows()), plain_mean(c.rows());
  norm.rstd = rstd.data(), plain.rstd = plain_rstd.data();
  if (c.statistic == Statistic::kLayer) norm.mean = mean.data(), plain.mean = plain_mean.data();
  cuda::row_norm(norm, 0, nullptr);
  cuda::row_norm(plain, 0, nullptr);

  Images& y = c.in_place ? x : out;
  const auto differ = [](float a, float b) {
    return !(std::isnan(a) && std::isnan(b)) && std::memcmp(&a, &b, sizeof a);
  };
  for (int64_t r = 0; r < c.rows(); ++r) {
    for (int64_t i = 0; i < c.n; ++i) {
      const float got = read(c.out, y.at(r, i)), want = read(c.out, dense_out.at(r, i));
      if (differ(got, want)) report(name(c), "y", r, i, got, want);
    }
    if (differ(rstd.data()[r], plain_rstd.data()[r]))
      report(name(c), "rstd", r, 0, rstd.data()[r], plain_rstd.data()[r]);
    if (norm.mean && differ(mean.data()[r], plain_mean.data()[r]))
      report(name(c), "mean", r, 0, mean.data()[r], plain_mean.data()[r]);
  }
  if (!y.is_untouched_outside() || !rstd.is_intact() || !mean.is_intact())
    report(name(c), "memory outside of rows", 0, 0, 1, 0);
}

struct Sweep {
  std::mt19937_64 random;
  uint64_t share, of, count = 0;

  void add(Statistic statistic, DType x, DType out, int64_t n, int64_t images, int64_t pixels) {
    if (count++ % of != share) return;
    const auto chance = [&](int one_in) { return random() % one_in == 0; };
    normkit_emulate_device(chance(3) ? 64 : 1, chance(2));
    Case c{};
    c.statistic = statistic;
    c.x = x;
    c.out = out;
    c.affine = chance(2) ? x : out;
    c.n = n;
    c.images = images;
    c.pixels = pixels;
    c.in_place = x == out && chance(2);
    c.x_is_strided = !chance(4);
    c.out_is_strided = c.in_place ? c.x_is_strided : !c.x_is_strided || chance(2);
    c.weight = !chance(4);
    c.bias = chance(2);
    c.options.eps = chance(2) ? 1e-6f : 0.3f;
    c.options.weight_offset = c.weight && chance(2) ? 1.f : 0.f;
    c.options.round_before_weight = chance(3);
    c.options.round_rstd = chance(3);
    c.options.round_weight = chance(3);
    c.options.clamp_inf = chance(3);
    c.options.of_sum = statistic == Statistic::kRms && chance(3);
    c.options.eps_outside = c.options.of_sum && chance(2);
    c.pad = chance(2) ? 0 : static_cast<int64_t>(random() % 9);
    c.offset = chance(2) ? 0 : static_cast<int64_t>(random() % 5);
    c.seed = random();
    run(c);
  }
};

}  // namespace

uint64_t sweep_strided(uint64_t seed, uint64_t share, uint64_t of) {
  Sweep sweep{std::mt19937_64(seed), share, of};
  const DType dtypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  for (const Statistic statistic : {Statistic::kRms, Statistic::kLayer})
    for (const DType x : dtypes) {
      for (const DType out : dtypes)
        for (const int64_t n : {2, 5, 8, 9, 33, 96, 200, 520, 1030, 4100}) {
          sweep.add(statistic, x, out, n, 2, n < 600 ? 49 : 3);  // across launches
          sweep.add(statistic, x, out, n, n < 600 ? 5 : 1, 7);
        }
      for (const int64_t n : {9000, 17000, 131080}) sweep.add(statistic, x, x, n, 1, 2);
    }
  return sweep.count;
}

}  // namespace sweep
