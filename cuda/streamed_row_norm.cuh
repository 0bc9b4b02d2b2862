// The forward row norm of rows that are read again for each pass: those beyond every register,
// those that cannot be reached in whole packs, and parts of a row.
#pragma once
#include "args.cuh"
#include "pack.cuh"

namespace normkit::cuda {

template <int kSize>
__device__ __forceinline__ void clamp_infinities(const RowNormArgs& a, DType dtype,
                                                 Floats<kSize>& v) {
  branch_if(a.options.clamp_inf && dtype == DType::kFloat16, [&] {
#pragma unroll
    for (int i = 0; i < kSize; ++i) v.v[i] = clamp_half(v.v[i]);
  });
}

// Of a root that is no less than eps; NaN stays.
__device__ __forceinline__ float reciprocal_length(const RowNormArgs& a, float squares) {
  const float rstd = inverse_square_root(mean_of(a, squares)), largest = 1.f / a.options.eps;
  return rstd > largest ? largest : rstd;
}

template <int kSize>
__device__ __forceinline__ void round_all(DType dtype, Floats<kSize>& v) {
  if (dtype == DType::kFloat32) return;
#pragma unroll
  for (int i = 0; i < kSize; ++i) v.v[i] = round_to(dtype, v.v[i]);
}

// The norm of v, once its row has statistics.
template <int kSize>
__device__ __forceinline__ void normalise(const NormOptions& options, DType dtype, float mean,
                                          float rstd, DType weight_dtype, float offset,
                                          Floats<kSize> weight, const Floats<kSize>& bias,
                                          Floats<kSize>& v) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) v.v[i] = (v.v[i] - mean) * rstd;
  branch_if(options.round_before_weight, [&] { round_all(dtype, v); });
#pragma unroll
  for (int i = 0; i < kSize; ++i) weight.v[i] += offset;
  if (options.round_weight) round_all(weight_dtype, weight);
#pragma unroll
  for (int i = 0; i < kSize; ++i) v.v[i] = fmaf(v.v[i], weight.v[i], bias.v[i]);
}

// Times act(z).
template <int kSize>
__device__ __forceinline__ void multiply_by_activation(const GatingArgs& g, const Floats<kSize>& z,
                                                       Floats<kSize>& v) {
  const bool silu = g.activation == Activation::kSilu;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const float divisor = 1.f + exponential(-z.v[i]);
    v.v[i] *= (silu ? z.v[i] : 1.f) / divisor;
  }
}

// The sum of values_of(column), or of squares about a mean, over all columns of a row: in the order
// of rows that stay in registers, where rows of this length may (a.turns).
template <bool kSquares, class Values, class Storage>
__device__ __forceinline__ float sum_of_streamed_row(const RowNormArgs& a, int lane, int lanes,
                                                     int64_t end, float mean,
                                                     const Values& values_of, Storage& storage) {
  constexpr int kSize = kLongPack, kQuads = kSize / 4;
  TreeSums<kQuads> tree;
  LongSums<kQuads> any_length;
  int64_t column = lane * kSize;
  const uint32_t packs = a.turns ? a.turns : static_cast<uint32_t>(a.n / (lanes * kSize)) + 1;
  int turn = 0;
#pragma unroll 1
  for (uint32_t before = 0; before < packs; ++before) {
    Sums<kQuads> sums{};
    if (column < end) {
      const Floats<kSize> v = values_of(column);
      if (mean == 0.f || column + kSize <= end)  // without a mean, zeros do not count
        sums = sums_of<kSquares>(v, mean);
      else
        sums = sums_of<kSquares>(v, mean, static_cast<int>(end - column));
    }
    if (a.turns) {
      tree.add(before, sums);
      turn = next_turn(turn, a.turns);
      column = (turn * lanes + lane) * kSize;
    } else {
      any_length.add(sums);
      column += lanes * kSize;
    }
  }
  // By value: for a choice between the two the compiler puts both into local memory.
  Sums<kQuads> sum;
#pragma unroll
  for (int q = 0; q < kQuads; ++q)
    sum.quad[q] = a.turns ? tree.sum.quad[q] : any_length.sum.quad[q];
  return sum_of_group(sum, lanes, storage);
}

// A group of lanes a row.  The sum with the residual is made anew in each pass and written last, so
// that outputs may be inputs.  Packs are of eight columns for every dtype.  One that is kFused
// serves both statistics, does what of the rest is asked for, and is the only one of whole rows
// that knows eps_outside and round_weight.
template <Statistic kStatistic, bool kAdds, Step kStep = Step::kWhole, bool kFused = false>
__global__ void __launch_bounds__(kMostLanes, 1) streamed_row_norm_kernel(RowNormArgs a) {
  constexpr int kSize = kLongPack, kQuads = kSize / 4;
  constexpr bool kRoundsWeight = kFused || kStep == Step::kApply;
  using Access = Any<kSize>;
  using Values = Floats<kSize>;
  using Storage = SumStorage<kQuads>;
  NORMKIT_SHARED(Storage, sum_storage);
  NORMKIT_SHARED(Storage, squares_storage);
  const int lanes = 1 << a.log2_lanes;
  const int lane = threadIdx.x & (lanes - 1);
  const uint32_t row = blockIdx.x * a.groups + (threadIdx.x >> a.log2_lanes);
  const bool live = row < a.rows;
  const int64_t end = live ? a.n : 0;
  const Place place(a, live ? row : 0);
  const RowAt x_row = place.of(a.x, a.dims);
  const RowAt residual_row = kAdds ? place.of(a.residual, a.dims) : RowAt{};
  const ModulationArgs& m = a.modulation;
  const GatingArgs& g = a.gating;
  const RowAt gate_row = kFused ? place.of(m.gate) : RowAt{};
  const RowAt weight_row = place.of(a.weight), bias_row = place.of(a.bias);
  wait_for_previous_kernel();

  // What is normalised of these columns: x, or the sum x + residual, which residual_out gets too.
  const auto values_of = [&](int64_t column, Values& sum) {
    Values v = Access::load(x_row, column, end);
    clamp_infinities(a, a.x.dtype, v);
    if (kFused && g.z.data && !g.norm_first)
      multiply_by_activation(g, Access::load(place.of(g.z, a.dims), column, end), v);
    if (kFused && m.gate.data) {
      const Values gate = Access::load(gate_row, column, end);
#pragma unroll
      for (int i = 0; i < kSize; ++i) v.v[i] *= gate.v[i];
      if (m.round_each) round_all(m.gated, v);
    }
    if (kAdds && (!kFused || a.residual.data)) {
      const Values residual = Access::load(residual_row, column, end);
#pragma unroll
      for (int i = 0; i < kSize; ++i) v.v[i] += residual.v[i];
      sum = v;
      round_all(a.residual.dtype, sum);
      if (a.options.round_sum) {
        v = sum;
        clamp_infinities(a, a.residual.dtype, v);
      }
    }
    return v;
  };
  const auto sum_of_row = [&](auto squares, float mean, Storage& storage) {
    const auto values = [&](int64_t column) {
      Values sum;
      return values_of(column, sum);
    };
    return sum_of_streamed_row<decltype(squares)::value>(a, lane, lanes, end, mean, values,
                                                         storage);
  };

  float mean = 0.f, squares;
  if constexpr (kStep == Step::kApply) {
    mean = mean_of_parts(a.split, 1, row);
    squares = squares_of_parts(a.split, row, a.n, mean);
  } else {
    if (kStatistic == Statistic::kLayer &&
        ((kStep == Step::kWhole && !kFused) || a.split.planes == 2))
      mean = mean_of(a, sum_of_row(std::false_type{}, 0.f, sum_storage));
    squares = sum_of_row(std::true_type{}, mean, squares_storage);
  }
  if constexpr (kStep == Step::kStatistics) {
    let_next_kernel_start();
    const float statistics[] = {squares, mean};
    if (lane == 0) save_statistics(a.split, row, statistics);
  } else {
    float rstd = reciprocal_deviation(a, squares);
    if (kFused && a.options.eps_outside) rstd = reciprocal_length(a, squares);
    if (a.options.round_rstd) rstd = round_to(a.normalised, rstd);
    let_next_kernel_start();
    if (lane == 0 && live) save<kStatistic>(a, row, mean, rstd);
#pragma unroll 1
    for (int64_t column = lane * kSize; column < end; column += lanes * kSize) {
      Values sum, weight = filled<kSize>(1.f), bias = filled<kSize>(-0.f);  // v + -0 is v
      Values v = values_of(column, sum);
      if (kAdds && (!kFused || a.residual.data))
        Access::store(place.of(a.residual_out, a.dims), column, end, sum);
      if (a.weight.data) weight = Access::load(weight_row, column, end);
      if (a.bias.data) bias = Access::load(bias_row, column, end);
#pragma unroll
      for (int i = 0; i < kSize; ++i) v.v[i] = (v.v[i] - mean) * rstd;
      branch_if(a.options.round_before_weight, [&] { round_all(a.normalised, v); });
#pragma unroll
      for (int i = 0; i < kSize; ++i) weight.v[i] += a.options.weight_offset;
      if (kRoundsWeight && a.options.round_weight) round_all(a.weight.dtype, weight);
#pragma unroll
      for (int i = 0; i < kSize; ++i) v.v[i] = fmaf(v.v[i], weight.v[i], bias.v[i]);
      if constexpr (kFused) {
        if (g.z.data && g.norm_first) {
          if (g.round_norm) round_all(a.normalised, v);
          multiply_by_activation(g, Access::load(place.of(g.z, a.dims), column, end), v);
        }
        if (m.round_each) round_all(a.normalised, v);
        if (m.scale.data) {
          Values factor = Access::load(place.of(m.scale), column, end);
#pragma unroll
          for (int i = 0; i < kSize; ++i) factor.v[i] += 1.f;
          if (m.round_each) round_all(m.scale.dtype, factor);
#pragma unroll
          for (int i = 0; i < kSize; ++i) v.v[i] *= factor.v[i];
          if (m.round_each) round_all(m.product, v);
        }
        if (m.shift.data) {
          const Values shift = Access::load(place.of(m.shift), column, end);
#pragma unroll
          for (int i = 0; i < kSize; ++i) v.v[i] += shift.v[i];
        }
      }
      Access::store(place.of(a.out, a.dims), column, end, v);
    }
  }
}

}  // namespace normkit::cuda
