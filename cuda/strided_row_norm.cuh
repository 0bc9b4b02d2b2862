// The forward row norm of rows whose columns are strided, as the channels of an image are.
#pragma once
#include "streamed_row_norm.cuh"
#include "strided_args.cuh"

namespace normkit::cuda {

// Like SumStorage, of lanes that are not neighbours: thread t has row t % rows of the block.
template <int kQuads>
struct StridedSumStorage {
  float of_thread[kQuads][kMostLanes];
};

// In the order of the other sum_of_group(): lanes are folded in half, then quads.  Every thread of
// the block calls it, and all threads of a row get the sum.
template <int kQuads>
__device__ __forceinline__ float sum_of_group(const Sums<kQuads>& v, int lanes,
                                              StridedSumStorage<kQuads>& storage) {
  const unsigned thread = threadIdx.x, rows = blockDim.x / lanes;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) storage.of_thread[q][thread] = v.quad[q];
  __syncthreads();
#pragma unroll 1
  for (unsigned half = blockDim.x / 2; half >= rows; half /= 2) {
    if (thread < half)
#pragma unroll
      for (int q = 0; q < kQuads; ++q)
        storage.of_thread[q][thread] += storage.of_thread[q][thread + half];
    __syncthreads();
  }
  float of_quad[kQuads];
#pragma unroll
  for (int q = 0; q < kQuads; ++q) of_quad[q] = storage.of_thread[q][thread & (rows - 1)];
  return fold<kQuads>(of_quad);
}

template <int kSize>
__device__ __forceinline__ Floats<kSize> load_columns(const RowAt& row, int64_t stride,
                                                      int64_t column, int64_t end) {
  Floats<kSize> values{};
  with_type(row.dtype, [&](auto like) {
    using T = decltype(like);
    const char* from = row.data + column * stride;
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      if (column + i < end) values.v[i] = widen(*reinterpret_cast<const T*>(from + i * stride));
  });
  return values;
}

template <int kSize>
__device__ __forceinline__ void store_columns(const RowAt& row, int64_t stride, int64_t column,
                                              int64_t end, const Floats<kSize>& values) {
  with_type(row.dtype, [&](auto like) {
    using T = decltype(like);
    char* to = row.data + column * stride;
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      if (column + i < end) *reinterpret_cast<T*>(to + i * stride) = narrow<T>(values.v[i]);
  });
}

// Both statistics, without a sum; all options.  The threads of a warp have rows side by side, whose
// elements in a column are one next to the other, and lanes of a row are apart by all its rows.
__global__ void __launch_bounds__(kMostLanes, 1) strided_row_norm_kernel(StridedArgs a) {
  constexpr int kSize = kLongPack, kQuads = kSize / 4;
  using Access = Any<kSize>;
  using Values = Floats<kSize>;
  using Storage = StridedSumStorage<kQuads>;
  NORMKIT_SHARED(Storage, sum_storage);
  NORMKIT_SHARED(Storage, squares_storage);
  const int lanes = 1 << a.log2_lanes;
  const int lane = threadIdx.x >> a.log2_groups;
  const uint32_t row = blockIdx.x * a.groups + (threadIdx.x & (a.groups - 1));
  const bool live = row < a.rows;
  const int64_t end = live ? a.n : 0;
  const Place place(a, live ? row : 0);
  const RowAt x_row = place.of(a.x, a.dims);
  wait_for_previous_kernel();

  const auto x_at = [&](int64_t column) {
    Values v = a.x_columns ? load_columns<kSize>(x_row, a.x_columns, column, end)
                           : Access::load(x_row, column, end);
    clamp_infinities(a, a.x.dtype, v);
    return v;
  };
  float mean = 0.f;
  if (a.split.planes == 2)
    mean = mean_of(a, sum_of_streamed_row<false>(a, lane, lanes, end, 0.f, x_at, sum_storage));
  const float squares = sum_of_streamed_row<true>(a, lane, lanes, end, mean, x_at, squares_storage);
  float rstd =
      a.options.eps_outside ? reciprocal_length(a, squares) : reciprocal_deviation(a, squares);
  if (a.options.round_rstd) rstd = round_to(a.normalised, rstd);
  let_next_kernel_start();
  if (lane == 0 && live) save<Statistic::kLayer>(a, row, mean, rstd);
#pragma unroll 1
  for (int64_t column = lane * kSize; column < end; column += lanes * kSize) {
    Values weight = filled<kSize>(1.f), bias = filled<kSize>(-0.f);  // v + -0 is v
    Values v = x_at(column);
    if (a.weight.data) weight = Access::load(place.of(a.weight), column, end);
    if (a.bias.data) bias = Access::load(place.of(a.bias), column, end);
#pragma unroll
    for (int i = 0; i < kSize; ++i) v.v[i] = (v.v[i] - mean) * rstd;
    branch_if(a.options.round_before_weight, [&] { round_all(a.normalised, v); });
#pragma unroll
    for (int i = 0; i < kSize; ++i) weight.v[i] += a.options.weight_offset;
    if (a.options.round_weight) round_all(a.weight.dtype, weight);
#pragma unroll
    for (int i = 0; i < kSize; ++i) v.v[i] = fmaf(v.v[i], weight.v[i], bias.v[i]);
    const RowAt to = place.of(a.out, a.dims);
    if (a.out_columns)
      store_columns(to, a.out_columns, column, end, v);
    else
      Access::store(to, column, end, v);
  }
}

}  // namespace normkit::cuda
