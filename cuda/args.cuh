// What a forward kernel is told.
#pragma once
#include "../cpp/plan.h"
#include "rows.cuh"
#include "split.cuh"

namespace normkit::cuda {

// What stands around the norm, in the words of Modulation; read by one kernel alone.
struct ModulationArgs {
  LaunchAffine gate, scale, shift;
  bool round_each;
  DType gated, product;  // what gate * x, and n * (1 + scale), are rounded to
};

struct GatingArgs {
  LaunchRows z;
  Activation activation;
  bool norm_first, round_norm;
};

struct RowNormArgs : Grid {
  LaunchRows x, residual, out, residual_out;
  LaunchAffine weight, bias;
  float *rstd, *mean;  // a value for each row of the launch, or null
  int log2_lanes, log2_cluster, groups;
  int turns;  // of a streamed row: packs that a lane takes, padded to a power of two; 0: any number
  int64_t n;
  float columns;  // of a whole row, of which n may be a part; 1 where squares are only added
  float inverse_columns;  // where it is exact, because columns is a power of two; else 0
  NormOptions options;    // but for weight_offset, which is as launch_offset() makes it
  DType normalised;       // what round_before_weight and round_rstd round to
  SplitArgs split;
  ModulationArgs modulation;
  GatingArgs gating;
};

using Kernel = void (*)(RowNormArgs);

// What stands in front of the sum, in the words of NormBefore; the rest is about the norm behind
// it.
struct PostNormArgs : RowNormArgs {
  LaunchAffine first_weight, first_bias;
  float first_eps, first_offset;  // the offset as launch_offset() makes it
  float alpha, beta;
  bool round_norm, scales, has_next;
};

using PostNormKernel = void (*)(PostNormArgs);

// Two of them are the columns that a lane of a batch takes at a time once its row has statistics.
constexpr int kRun = kLongPack / 2;

// Whether those are all that a lane has of a row, which it then reads once, and how its sums are
// added: as a pack has them, or as two halves of a row.
enum class Kept : uint8_t { kNone, kPacks, kHalves };

// A norm of a batch, in the words of Rotation and Cache.
struct BatchedNormArgs : RowNormArgs {
  LaunchRows cos, sin, position, cache, slot;
  int64_t width, positions, cos_stride, sin_stride;
  int64_t units, units_of_pairs;  // of two runs each: those of the pairs come first
  int64_t slots, page_slots, page_stride, slot_stride;
  bool interleaved, round_norm, round_each, wide_position, wide_slot;
  DType product;  // what round_each rounds products to
  Kept kept;
};

constexpr int kMostNorms = 4;  // of a launch

struct BatchArgs {
  BatchedNormArgs norm[kMostNorms];
  uint32_t first_block[kMostNorms];  // of each; of a norm that is not there, more than any
};

using BatchKernel = void (*)(BatchArgs);

__device__ __forceinline__ float mean_of(const RowNormArgs& a, float sum) {
  return a.inverse_columns != 0.f ? sum * a.inverse_columns : sum / a.columns;
}

__device__ __forceinline__ float reciprocal_deviation(const RowNormArgs& a, float squares) {
  return inverse_square_root(mean_of(a, squares) + a.options.eps);
}

// The statistic of some columns: the sum of x, or of (x - mean)^2.  Those from `count` on are
// behind the row's end: zeros, which would count as mean squared.
template <bool kSquares, int kSize>
__device__ __forceinline__ Sums<kSize / 4> sums_of(const Floats<kSize>& x, float mean,
                                                   int count = kSize) {
  Sums<kSize / 4> sums{};
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    float& sum = sums.quad[i / 4];
    const float v = x.v[i] - mean;
    if (!kSquares)
      sum += v;
    else if (i < count)
      sum = fmaf(v, v, sum);
  }
  return sums;
}

// For the backward pass.
template <Statistic kStatistic>
__device__ __forceinline__ void save(const RowNormArgs& a, uint32_t row, float mean, float rstd) {
  if (a.rstd) a.rstd[row] = rstd;
  if (kStatistic == Statistic::kLayer && a.mean) a.mean[row] = mean;
}

}  // namespace normkit::cuda
