// The forward row norm: one family for every op, statistic, dtype and length of row.
#pragma once
#include "../cpp/plan.h"
#include "reduce.cuh"
#include "rows.cuh"
#include "split.cuh"

// Variants for benchmarks/tune.py.
#ifndef NORMKIT_TUNE_HOIST_WEIGHT
#define NORMKIT_TUNE_HOIST_WEIGHT 0
#endif
#ifndef NORMKIT_TUNE_EARLY_TRIGGER
#define NORMKIT_TUNE_EARLY_TRIGGER 0
#endif

namespace normkit::cuda {

struct RowNormArgs : Grid {
  LaunchRows x, residual, out, residual_out;
  LaunchAffine weight, bias;
  float *rstd, *mean;  // a value for each row of the launch, or null
  int log2_lanes, groups;
  int64_t n;
  NormOptions options;  // but for weight_offset, which is as launch_offset() makes it
  DType normalised;     // what round_before_weight and round_rstd round to
  SplitArgs split;
};

using Kernel = void (*)(RowNormArgs);

template <class T>
__device__ __forceinline__ bool is_half(const RowNormArgs& a) {
  return (std::is_same_v<T, Coded> ? a.x.dtype : kDType<T>) == DType::kFloat16;
}

// What is normalised: x, or the sum x + residual, which is also what residual_out gets.
template <class T, class Access, bool kAdds>
__device__ __forceinline__ void add_residual(const RowNormArgs& a, Floats<Access::kSize>& x,
                                             Floats<Access::kSize>& residual) {
#pragma unroll
  for (int i = 0; i < Access::kSize; ++i) {
    float v = x.v[i];
    if (is_half<T>(a) && a.options.clamp_inf) v = clamp_half(v);
    if constexpr (kAdds) {
      const float sum = v + residual.v[i];
      residual.v[i] = Access::rounded(a.residual.dtype, sum);
      const bool rounds = Access::kWhole || a.options.round_sum;
      v = rounds ? residual.v[i] : sum;
      if (rounds && a.options.clamp_inf && a.residual.dtype == DType::kFloat16) v = clamp_half(v);
    }
    x.v[i] = v;
  }
}

// The statistic of a pack: the sum of x, or of (x - mean)^2.
template <bool kSquares, class Access, class Index>
__device__ __forceinline__ Sums<Access::kSize / 4> sums_of(const Floats<Access::kSize>& x,
                                                           float mean, Index column, Index end) {
  // Columns behind the end are zeros, and would count as mean squared.  Unless it is told to
  // forget, the compiler keeps what it knows of each column from the loads, and spills.
  int count = end - column < Access::kSize ? static_cast<int>(end - column) : Access::kSize;
  if constexpr (kSquares && !Access::kWhole) keep(count);
  Sums<Access::kSize / 4> sums{};
#pragma unroll
  for (int i = 0; i < Access::kSize; ++i) {
    float& sum = sums.quad[i / 4];
    const float v = x.v[i] - mean;
    if (!kSquares)
      sum += x.v[i];
    else if (count > (Access::kWhole ? 0 : i))
      sum = fmaf(v, v, sum);
  }
  return sums;
}

__device__ __forceinline__ float reciprocal_deviation(float squares, int64_t n, float eps) {
  return inverse_square_root(squares / static_cast<float>(n) + eps);
}

// As it multiplies.  Where one dtype is known, the branch is a loop of one turn or none, which
// stays one: for a select after the square root, ptxas takes up to 20 registers more (95 for 75
// with four packs of bfloat16).
template <class Access>
__device__ __forceinline__ float rstd_of(const RowNormArgs& a, float squares, int64_t n) {
  float rstd = reciprocal_deviation(squares, n, a.options.eps);
  if constexpr (Access::kWhole) {
#pragma unroll 1
    for (int turn = 0; turn < a.options.round_rstd; ++turn)
      rstd = Access::rounded(a.normalised, rstd);
  } else if (a.options.round_rstd) {
    rstd = Access::rounded(a.normalised, rstd);
  }
  return rstd;
}

// For the backward pass.
template <Statistic kStatistic>
__device__ __forceinline__ void save(const RowNormArgs& a, uint32_t row, float mean, float rstd) {
  if (a.rstd) a.rstd[row] = rstd;
  if (kStatistic == Statistic::kLayer && a.mean) a.mean[row] = mean;
}

// x becomes y.
template <class T, class Access>
__device__ __forceinline__ void apply(const RowNormArgs& a, Floats<Access::kSize>& x, float mean,
                                      float rstd, const Floats<Access::kSize>& weight,
                                      const Floats<Access::kSize>& bias) {
#pragma unroll
  for (int i = 0; i < Access::kSize; ++i) {
    float v = (x.v[i] - mean) * rstd;
    if (a.options.round_before_weight) v = Access::rounded(a.normalised, v);
    const float w = a.weight.data ? weight.v[i] + a.options.weight_offset : 1.f;
    x.v[i] = a.bias.data ? fmaf(v, w, bias.v[i]) : v * w;
  }
}

// Rows that stay in registers: `groups` groups of lanes a block, kRows rows a group, kPacks packs a
// lane.  With kCluster, the blocks of a cluster share one row.
template <class T, Statistic kStatistic, bool kAdds, class Access, int kPacks, int kRows,
          bool kCluster>
__global__ void __launch_bounds__(kPacks >= kMaxPacks ? kMostLanes : kMaxLanes, 1)
    row_norm_kernel(RowNormArgs a) {
  constexpr int kSize = Access::kSize;
  using Pack = typename Access::Pack;
  constexpr int kQuads = kSize / 4;
  using Storage = SumStorage<kQuads, kCluster>;
  NORMKIT_SHARED(Storage, sum_storage);
  NORMKIT_SHARED(Storage, squares_storage);

  const int lanes = 1 << a.log2_lanes;
  const int lane = threadIdx.x & (lanes - 1), group = threadIdx.x >> a.log2_lanes;
  const int blocks = kCluster ? static_cast<int>(cluster_size()) : 1;
  const int rank = kCluster ? static_cast<int>(cluster_rank()) : 0;
  const uint32_t block = kCluster ? blockIdx.x / blocks : blockIdx.x;
  const int end = static_cast<int>(a.n);
  const auto column = [&](int pack) { return ((pack * blocks + rank) * lanes + lane) * kSize; };
  const auto sum_of_row = [&](Sums<kQuads> v, Storage& storage) {
    if constexpr (kCluster) v = sum_of_peers(v, storage);
    return sum_of_group(v, lanes, storage);
  };

  const auto row = [&](int r) { return (block * kRows + r) * a.groups + group; };
  uint32_t rows[kRows];
  int live[kRows];  // where the row ends; rows behind the last have no columns
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    rows[r] = row(r);
    live[r] = rows[r] < a.rows ? end : 0;
    if (rows[r] >= a.rows) rows[r] = 0;
  }
  RowAt out[kRows], residual_out[kRows], weight_row[kRows], bias_row[kRows];
  Pack x[kRows][kPacks], weight[kRows][kPacks], bias[kRows][kPacks];
  // All of a row's loads are in flight before the first is used.  As float32 there is no room for
  // x and residual beside each other.
  constexpr bool kAddsLate = kAdds && Access::kWhole;
  Pack residual[kAddsLate ? kRows : 1][kAddsLate ? kPacks : 1];
  const auto add = [&](int r, int p, const Pack& addend) {
    Floats<kSize> v = Access::floats(x[r][p]), added = Access::floats(addend);
    add_residual<T, Access, kAdds>(a, v, added);
    if constexpr (kAdds) Access::store(residual_out[r], column(p), live[r], added);
    x[r][p] = Access::pack(v);
  };
  // In flight with x, not after it: a weight that is asked for after the reduction costs a tenth to
  // a third of a small kernel's time.  Where registers are short it waits for x, but no longer.
  constexpr bool kWeightEarly = Access::kWhole ? kPacks * (kAdds ? 2 : 1) <= 8 : kPacks == 1;
  constexpr bool kWeightBeforeSum = Access::kWhole && !kWeightEarly && !kCluster;
  constexpr bool kBiasEarly = kWeightEarly && kPacks <= 2;
  const auto load_weight = [&](int r, int p) {
    weight[r][p] = a.weight.data ? Access::load(weight_row[r], column(p), live[r]) : Pack{};
  };
  const auto load_bias = [&](int r, int p) {
    bias[r][p] = a.bias.data ? Access::load(bias_row[r], column(p), live[r]) : Pack{};
  };

#if NORMKIT_TUNE_HOIST_WEIGHT
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    weight_row[r] = Place(a, rows[r]).of(a.weight);
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
      if constexpr (kWeightEarly) load_weight(r, p);
  }
#endif
  wait_for_previous_kernel();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const Place place(a, rows[r]);
    out[r] = place.of(a.out, a.dims);
    weight_row[r] = place.of(a.weight);
    bias_row[r] = place.of(a.bias);
    const RowAt x_row = place.of(a.x, a.dims);
    RowAt residual_row;
    if constexpr (kAdds) {
      residual_row = place.of(a.residual, a.dims);
      residual_out[r] = place.of(a.residual_out, a.dims);
    }
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      x[r][p] = Access::load_x(x_row, column(p), live[r]);
      if constexpr (kAddsLate)
        residual[r][p] = Access::load(residual_row, column(p), live[r]);
      else if constexpr (kAdds)
        add(r, p, Access::load(residual_row, column(p), live[r]));
    }
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if constexpr (kWeightEarly && !NORMKIT_TUNE_HOIST_WEIGHT) load_weight(r, p);
      if constexpr (kBiasEarly) load_bias(r, p);
    }
  }
#if NORMKIT_TUNE_EARLY_TRIGGER
  let_next_kernel_start();
#endif

  float sum[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    Sums<kQuads> of_pack[kPacks];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if constexpr (kAddsLate)
        add(r, p, residual[r][p]);
      else if (!kAdds && kDType<T> == DType::kFloat16 && a.options.clamp_inf)
        add(r, p, Pack{});
      const Floats<kSize> v = Access::floats(x[r][p]);
      of_pack[p] = sums_of<kStatistic == Statistic::kRms, Access>(v, 0.f, column(p), live[r]);
    }
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if constexpr (kWeightBeforeSum) load_weight(r, p);
      Access::stay_packed(x[r][p]);
    }
    sum[r] = sum_of_row(fold_packs(of_pack), sum_storage);
  }
  float mean[kRows] = {};
  if constexpr (kStatistic == Statistic::kLayer) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      mean[r] = sum[r] / static_cast<float>(a.n);
      Sums<kQuads> of_pack[kPacks];
#pragma unroll
      for (int p = 0; p < kPacks; ++p)
        of_pack[p] = sums_of<true, Access>(Access::floats(x[r][p]), mean[r], column(p), live[r]);
#pragma unroll
      for (int p = 0; p < kPacks; ++p) Access::stay_packed(x[r][p]);
      sum[r] = sum_of_row(fold_packs(of_pack), squares_storage);
    }
  }
#if !NORMKIT_TUNE_EARLY_TRIGGER
  let_next_kernel_start();
#endif
  if constexpr (kCluster) cluster_arrive();  // no peer's memory is read any more
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float rstd = rstd_of<Access>(a, sum[r], a.n);
    if (lane == 0 && rank == 0 && live[r]) save<kStatistic>(a, row(r), mean[r], rstd);
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if constexpr (!kWeightEarly && !kWeightBeforeSum) load_weight(r, p);
      if constexpr (!kBiasEarly) load_bias(r, p);
      Floats<kSize> v = Access::floats(x[r][p]);
      apply<T, Access>(a, v, mean[r], rstd, Access::floats(weight[r][p]),
                       Access::floats(bias[r][p]));
      Access::store(out[r], column(p), live[r], v);
    }
  }
  if constexpr (kCluster) cluster_wait();  // nobody reads ours: it may go
}

// Rows beyond every register: a block a row, which is read once for each statistic and once more.
// The sum with the residual is made anew each time and written last, so that outputs may be inputs.
// Packs are of eight columns for every dtype, so that the order of additions is the same.
// A step of a split norm takes rows of any length, and both statistics.
template <class T, Statistic kStatistic, bool kAdds, Step kStep = Step::kWhole>
__global__ void __launch_bounds__(kMostLanes) long_row_norm_kernel(RowNormArgs a) {
  constexpr int kSize = kLongPack, kQuads = kSize / 4;
  using Access = Any<T, kSize>;
  using Values = Floats<kSize>;
  using Storage = SumStorage<kQuads>;
  NORMKIT_SHARED(Storage, sum_storage);
  NORMKIT_SHARED(Storage, squares_storage);
  const int lanes = 1 << a.log2_lanes;
  const Place place(a, blockIdx.x);
  const RowAt x_row = place.of(a.x, a.dims);
  const RowAt residual_row = kAdds ? place.of(a.residual, a.dims) : RowAt{};
  const RowAt weight_row = place.of(a.weight), bias_row = place.of(a.bias);
  wait_for_previous_kernel();

  // f(column, what is normalised, what residual_out gets)
  const auto for_packs = [&](auto&& f) {
    for (int64_t column = int64_t{threadIdx.x} * kSize; column < a.n;
         column += int64_t{lanes} * kSize) {
      Values v = Access::load_x(x_row, column, a.n), added{};
      if constexpr (kAdds) added = Access::load(residual_row, column, a.n);
      add_residual<T, Access, kAdds>(a, v, added);
      f(column, v, added);
    }
  };
  float mean = 0.f, squares;
  if constexpr (kStep == Step::kApply) {
    mean = mean_of_parts(a.split, 1, blockIdx.x);
    squares = squares_of_parts(a.split, blockIdx.x, a.n, mean);
  } else {
    if constexpr (kStatistic == Statistic::kLayer)
      if (kStep == Step::kWhole || a.split.planes == 2) {
        LongSums<kQuads> sum;
        for_packs([&](int64_t column, const Values& v, const Values&) {
          sum.add(sums_of<false, Access>(v, 0.f, column, a.n));
        });
        mean = sum_of_group(sum.sum, lanes, sum_storage) / static_cast<float>(a.n);
      }
    LongSums<kQuads> sum;
    for_packs([&](int64_t column, const Values& v, const Values&) {
      sum.add(sums_of<true, Access>(v, mean, column, a.n));
    });
    squares = sum_of_group(sum.sum, lanes, squares_storage);
  }
  if constexpr (kStep == Step::kStatistics) {
    let_next_kernel_start();
    const float statistics[] = {squares, mean};
    if (threadIdx.x == 0) save_statistics(a.split, blockIdx.x, statistics);
  } else {
    const int64_t columns = kStep == Step::kApply ? a.n * a.split.parts : a.n;
    const float rstd = rstd_of<Access>(a, squares, columns);
    let_next_kernel_start();
    if (threadIdx.x == 0) save<kStatistic>(a, blockIdx.x, mean, rstd);
    for_packs([&](int64_t column, Values& v, const Values& added) {
      if constexpr (kAdds) Access::store(place.of(a.residual_out, a.dims), column, a.n, added);
      Values weight{}, bias{};
      if (a.weight.data) weight = Access::load(weight_row, column, a.n);
      if (a.bias.data) bias = Access::load(bias_row, column, a.n);
      apply<T, Access>(a, v, mean, rstd, weight, bias);
      Access::store(place.of(a.out, a.dims), column, a.n, v);
    });
  }
}

}  // namespace normkit::cuda
