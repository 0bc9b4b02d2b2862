// The forward row norm of rows that are read again for each pass: those beyond every register, those
// that cannot be reached in whole packs, and parts of a row.
#pragma once
#include "args.cuh"
#include "pack.cuh"

namespace normkit::cuda {

// What is normalised: x, or the sum x + residual, which is also what residual_out gets.
template <bool kAdds, int kSize>
__device__ __forceinline__ void add_residual(const RowNormArgs& a, Floats<kSize>& x,
                                             Floats<kSize>& residual) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    float v = x.v[i];
    if (a.options.clamp_inf && a.x.dtype == DType::kFloat16) v = clamp_half(v);
    if constexpr (kAdds) {
      const float sum = v + residual.v[i];
      residual.v[i] = round_to(a.residual.dtype, sum);
      v = a.options.round_sum ? residual.v[i] : sum;
      if (a.options.round_sum && a.options.clamp_inf && a.residual.dtype == DType::kFloat16)
        v = clamp_half(v);
    }
    x.v[i] = v;
  }
}

// The statistic of some columns, of which `count` are in the row; the others are zeros, and would
// count as mean squared.
template <bool kSquares, int kSize>
__device__ __forceinline__ Sums<kSize / 4> sums_of(const Floats<kSize>& x, float mean, int count) {
  Sums<kSize / 4> sums{};
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    float& sum = sums.quad[i / 4];
    const float v = x.v[i] - mean;
    if (!kSquares)
      sum += x.v[i];
    else if (i < count)
      sum = fmaf(v, v, sum);
  }
  return sums;
}

// A group of lanes a row.  The sum with the residual is made anew in each pass and written last, so
// that outputs may be inputs.  Packs are of eight columns for every dtype.  Where a row of this
// length may also stay in registers, it is added up in the order of that kernel (a.turns).
template <Statistic kStatistic, bool kAdds, Step kStep = Step::kWhole>
__global__ void __launch_bounds__(kMostLanes, 1) streamed_row_norm_kernel(RowNormArgs a) {
  constexpr int kSize = kLongPack, kQuads = kSize / 4;
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
  const RowAt weight_row = place.of(a.weight), bias_row = place.of(a.bias);
  wait_for_previous_kernel();

  const auto column_of = [&](int64_t turn) { return (turn * lanes + lane) * kSize; };
  // What is normalised of these columns, and what residual_out gets.
  const auto values_of = [&](int64_t column, Values& added) {
    Values v = Access::load(x_row, column, end);
    if constexpr (kAdds) added = Access::load(residual_row, column, end);
    add_residual<kAdds>(a, v, added);
    return v;
  };
  const auto sum_of_row = [&](auto squares, float mean, Storage& storage) {
    const auto sums_at = [&](int64_t column) {
      if (column >= end) return Sums<kQuads>{};
      Values added{};
      const int count = end - column < kSize ? static_cast<int>(end - column) : kSize;
      return sums_of<decltype(squares)::value>(values_of(column, added), mean, count);
    };
    TreeSums<kQuads> tree;
    LongSums<kQuads> any_length;
    const int64_t packs = a.turns ? a.turns : (a.n + kSize - 1) / kSize / lanes + 1;
    int64_t turn = 0;
    for (int64_t before = 0; before < packs; ++before) {
      const Sums<kQuads> sums = sums_at(column_of(turn));
      if (a.turns)
        tree.add(static_cast<int>(before), sums), turn = next_turn(static_cast<int>(turn), a.turns);
      else
        any_length.add(sums), ++turn;
    }
    // By value: for a choice between the two the compiler puts both into local memory.
    Sums<kQuads> sum;
#pragma unroll
    for (int q = 0; q < kQuads; ++q)
      sum.quad[q] = a.turns ? tree.sum.quad[q] : any_length.sum.quad[q];
    return sum_of_group(sum, lanes, storage);
  };

  float mean = 0.f, squares;
  if constexpr (kStep == Step::kApply) {
    mean = mean_of_parts(a.split, 1, row);
    squares = squares_of_parts(a.split, row, a.n, mean);
  } else {
    if (kStatistic == Statistic::kLayer && (kStep == Step::kWhole || a.split.planes == 2))
      mean = mean_of(a, sum_of_row(std::false_type{}, 0.f, sum_storage));
    squares = sum_of_row(std::true_type{}, mean, squares_storage);
  }
  if constexpr (kStep == Step::kStatistics) {
    let_next_kernel_start();
    const float statistics[] = {squares, mean};
    if (lane == 0) save_statistics(a.split, row, statistics);
  } else {
    float rstd = reciprocal_deviation(a, squares);
    if (a.options.round_rstd) rstd = round_to(a.normalised, rstd);
    let_next_kernel_start();
    if (lane == 0 && live) save<kStatistic>(a, row, mean, rstd);
    for (int64_t column = column_of(0); column < end; column += int64_t{lanes} * kSize) {
      Values added{}, weight{}, bias{};
      Values v = values_of(column, added);
      if constexpr (kAdds) Access::store(place.of(a.residual_out, a.dims), column, end, added);
      if (a.weight.data) weight = Access::load(weight_row, column, end);
      if (a.bias.data) bias = Access::load(bias_row, column, end);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        float xhat = (v.v[i] - mean) * rstd;
        if (a.options.round_before_weight) xhat = round_to(a.normalised, xhat);
        const float w = a.weight.data ? weight.v[i] + a.options.weight_offset : 1.f;
        v.v[i] = a.bias.data ? fmaf(xhat, w, bias.v[i]) : xhat * w;
      }
      Access::store(place.of(a.out, a.dims), column, end, v);
    }
  }
}

}  // namespace normkit::cuda
