// A norm in front of a sum, and where there is one the norm behind it, of rows that are read again
// for each pass: at most twice for the statistics of each norm, and once to write.
#pragma once
#include "streamed_row_norm.cuh"

namespace normkit::cuda {

// A group of lanes a row, of both statistics.  What was normalised first and the sum are made anew
// in each pass, and the sum is written last, so that outputs may be inputs.
__global__ void __launch_bounds__(kMostLanes, 1) post_norm_kernel(PostNormArgs a) {
  constexpr int kSize = kLongPack, kQuads = kSize / 4;
  using Access = Any<kSize>;
  using Values = Floats<kSize>;
  using Storage = SumStorage<kQuads>;
  NORMKIT_SHARED(Storage, first_sum_storage);
  NORMKIT_SHARED(Storage, first_squares_storage);
  NORMKIT_SHARED(Storage, sum_storage);
  NORMKIT_SHARED(Storage, squares_storage);
  const int lanes = 1 << a.log2_lanes;
  const int lane = threadIdx.x & (lanes - 1);
  const uint32_t row = blockIdx.x * a.groups + (threadIdx.x >> a.log2_lanes);
  const bool live = row < a.rows, layer = a.split.planes == 2;
  const int64_t end = live ? a.n : 0;
  const Place place(a, live ? row : 0);
  const RowAt x_row = place.of(a.x, a.dims), residual_row = place.of(a.residual, a.dims);
  wait_for_previous_kernel();

  const auto normalise_at = [&](Values& v, float mean, float rstd, DType dtype,
                                const LaunchAffine& weight, float offset, const LaunchAffine& bias,
                                int64_t column) {
    Values w = filled<kSize>(1.f), b = filled<kSize>(-0.f);  // v + -0 is v
    if (weight.data) w = Access::load(place.of(weight), column, end);
    if (bias.data) b = Access::load(place.of(bias), column, end);
    normalise(a.options, dtype, mean, rstd, weight.dtype, offset, w, b, v);
  };
  const auto rstd_of_row = [&](float squares, float eps, DType dtype) {
    const float rstd = inverse_square_root(mean_of(a, squares) + eps);
    return a.options.round_rstd ? round_to(dtype, rstd) : rstd;
  };

  const auto x_at = [&](int64_t column) {
    Values v = Access::load(x_row, column, end);
    clamp_infinities(a, a.x.dtype, v);
    return v;
  };
  float first_mean = 0.f;
  if (layer)
    first_mean =
        mean_of(a, sum_of_streamed_row<false>(a, lane, lanes, end, 0.f, x_at, first_sum_storage));
  const float first_rstd = rstd_of_row(
      sum_of_streamed_row<true>(a, lane, lanes, end, first_mean, x_at, first_squares_storage),
      a.first_eps, a.x.dtype);

  // The sum as residual_out gets it.
  const auto sum_at = [&](int64_t column) {
    Values v = x_at(column);
    normalise_at(v, first_mean, first_rstd, a.x.dtype, a.first_weight, a.first_offset, a.first_bias,
                 column);
    if (a.round_norm) round_all(a.x.dtype, v);
    Values residual = Access::load(residual_row, column, end);
    if (a.scales) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) v.v[i] *= a.beta, residual.v[i] *= a.alpha;
      if (a.round_norm) round_all(a.x.dtype, v);
      if (a.round_norm) round_all(a.residual.dtype, residual);
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) v.v[i] += residual.v[i];
    round_all(a.residual.dtype, v);
    return v;
  };
  // What is normalised of it; there is none behind the row's end, where a mean or bias made some.
  const auto clamped_sum_at = [&](int64_t column) {
    Values v = sum_at(column);
    clamp_infinities(a, a.residual.dtype, v);
    branch_if(column + kSize > end, [&] {
#pragma unroll
      for (int i = 0; i < kSize; ++i) v.v[i] = column + i < end ? v.v[i] : 0.f;
    });
    return v;
  };
  float mean = 0.f, rstd = 0.f;
  if (a.has_next) {
    if (layer)
      mean = mean_of(
          a, sum_of_streamed_row<false>(a, lane, lanes, end, 0.f, clamped_sum_at, sum_storage));
    rstd = rstd_of_row(
        sum_of_streamed_row<true>(a, lane, lanes, end, mean, clamped_sum_at, squares_storage),
        a.options.eps, a.residual.dtype);
  }
  let_next_kernel_start();
#pragma unroll 1
  for (int64_t column = lane * kSize; column < end; column += lanes * kSize) {
    Values v = sum_at(column);
    Access::store(place.of(a.residual_out, a.dims), column, end, v);
    if (!a.has_next) continue;
    clamp_infinities(a, a.residual.dtype, v);
    normalise_at(v, mean, rstd, a.residual.dtype, a.weight, a.options.weight_offset, a.bias,
                 column);
    Access::store(place.of(a.out, a.dims), column, end, v);
  }
}

}  // namespace normkit::cuda
