// Norms of several tensors in one launch, of rows that are read again for each pass.  Behind its
// norm a row may be rotated, and it may go to a cache as well, or there alone.
#pragma once
#include "streamed_row_norm.cuh"

namespace normkit::cuda {

// Columns that a lane works on at once: a pack, or runs of it that have the two columns of a pair
// in the same place, where halves of a row are rotated.  Nobody else reads or writes a column of
// its pairs once the row has its statistics, so that outputs may be inputs.
struct Unit {
  using Access = Any<kLongPack, 2>;
  OfRuns begin, end;
  bool rotates;

  __device__ __forceinline__ Unit(const BatchedNormArgs& a, int64_t number) {
    rotates = number < a.units_of_pairs;
    if (rotates && !a.interleaved) {
      const int64_t half = a.width / 2, at = number * kRun;
      begin = {at, half + at};
      end = {half, a.width};
    } else {
      const int64_t before = rotates ? 0 : a.width - a.units_of_pairs * kLongPack;
      const int64_t at = before + number * kLongPack, behind = rotates ? a.width : a.n;
      begin = {at, at + kRun};
      end = {behind, behind};
    }
  }
  __device__ __forceinline__ Floats<kLongPack> load(const RowAt& row) const {
    return Access::load(row, begin, end);
  }
  __device__ __forceinline__ void store(const RowAt& row, const Floats<kLongPack>& v) const {
    Access::store(row, begin, end, v);
  }
};

// Of pairs that are neighbours, or in the same place of each run.  Nothing is fused, as torch does
// not.
template <bool kInterleaved>
__device__ __forceinline__ void rotate(const BatchedNormArgs& a, const Floats<kRun>& cos,
                                       const Floats<kRun>& sin, Floats<kLongPack>& v) {
  Floats<kLongPack> by_cos, by_sin;
#pragma unroll
  for (int i = 0; i < kLongPack; ++i) {
    const int pair = kInterleaved ? i / 2 : i % kRun;
    by_cos.v[i] = v.v[i] * cos.v[pair];
    by_sin.v[i] = v.v[i] * sin.v[pair];
  }
  if (a.round_each) {
    round_all(a.product, by_cos);
    round_all(a.product, by_sin);
  }
#pragma unroll
  for (int pair = 0; pair < kRun; ++pair) {
    const int i = kInterleaved ? 2 * pair : pair, j = kInterleaved ? i + 1 : kRun + pair;
    v.v[i] = by_cos.v[i] - by_sin.v[j];
    v.v[j] = by_cos.v[j] + by_sin.v[i];
  }
}

__device__ __forceinline__ int64_t index_at(const RowAt& at, bool wide) {
  if (wide) return *reinterpret_cast<const int64_t*>(at.data);
  return *reinterpret_cast<const int32_t*>(at.data);
}

// The bytes from the first slot of a cache to another one.
__device__ __forceinline__ int64_t offset_of_slot(const BatchedNormArgs& a, int64_t slot) {
  const uint64_t page = static_cast<uint64_t>(slot) / static_cast<uint64_t>(a.page_slots);
  return page * a.page_stride + (slot - page * a.page_slots) * a.slot_stride;
}

// The sum over a row of which each lane has a unit, or of squares about a mean: in the order of
// rows that are read again.  Halves of a row are the first two that this folds onto each other.
template <bool kSquares, int kQuads>
__device__ __forceinline__ float sum_of_kept_row(const BatchedNormArgs& a,
                                                 const Floats<kLongPack>& x, int lane, int lanes,
                                                 float mean, SumStorage<kQuads>& storage) {
  const bool halves = a.kept == Kept::kHalves;
  const int left = halves ? kLongPack : static_cast<int>(a.n) - lane * kLongPack;
  // Without a mean, zeros do not count.
  const Sums<kQuads> sums = mean == 0.f || left >= kLongPack ? sums_of<kSquares>(x, mean)
                                                             : sums_of<kSquares>(x, mean, left);
  if (halves) return fold_lanes(sums.quad[0] + sums.quad[1], lanes);
  return sum_of_group(sums, lanes, storage);
}

// A group of lanes a row, and rows of one norm a block.  All of it is asked for as the kernel goes,
// both statistics and none too.
__global__ void __launch_bounds__(kMostLanes, 1) norm_batch_kernel(BatchArgs batch) {
  constexpr int kQuads = kLongPack / 4;
  using Values = Floats<kLongPack>;
  using Storage = SumStorage<kQuads>;
  NORMKIT_SHARED(Storage, sum_storage);
  NORMKIT_SHARED(Storage, squares_storage);
  int which = 0;
#pragma unroll
  for (int i = 1; i < kMostNorms; ++i) which += blockIdx.x >= batch.first_block[i];
  const BatchedNormArgs& a = batch.norm[which];
  const int lanes = 1 << a.log2_lanes;
  const int lane = threadIdx.x & (lanes - 1);
  const uint32_t row =
      (blockIdx.x - batch.first_block[which]) * a.groups + (threadIdx.x >> a.log2_lanes);
  const bool live = row < a.rows;
  const int64_t end = live ? a.n : 0;
  const Place place(a, live ? row : 0);
  const RowAt x_row = place.of(a.x, a.dims);
  wait_for_previous_kernel();

  RowAt cos_row = place.of(a.cos, a.dims), sin_row = place.of(a.sin, a.dims);
  bool has_angles = true, has_slot = false;
  if (a.position.data) {
    const int64_t position = index_at(place.of(a.position, a.dims), a.wide_position);
    has_angles = position >= 0 && position < a.positions;
    cos_row.data += (has_angles ? position : 0) * a.cos_stride;
    sin_row.data += (has_angles ? position : 0) * a.sin_stride;
  }
  RowAt cache_row = place.of(a.cache, a.dims);
  if (a.cache.data) {
    const int64_t slot = index_at(place.of(a.slot, a.dims), a.wide_slot);
    has_slot = slot >= 0 && slot < a.slots;
    cache_row.data += has_slot ? offset_of_slot(a, slot) : 0;
  }

  // Of a row that stays in registers; none behind the last one, which would be a row that another
  // group writes.
  Values x{};
  if (live && a.kept != Kept::kNone) {
    x = Unit(a, lane).load(x_row);
    clamp_infinities(a, a.x.dtype, x);
  }
  const auto sum_of_row = [&](auto squares, float mean, Storage& storage) {
    constexpr bool kSquares = decltype(squares)::value;
    if (a.kept != Kept::kNone) return sum_of_kept_row<kSquares>(a, x, lane, lanes, mean, storage);
    const auto x_at = [&](int64_t column) {
      Values v = Any<kLongPack>::load(x_row, column, end);
      clamp_infinities(a, a.x.dtype, v);
      return v;
    };
    return sum_of_streamed_row<kSquares>(a, lane, lanes, end, mean, x_at, storage);
  };
  float mean = 0.f, rstd = 1.f;
  if (!a.options.as_is) {
    if (a.split.planes == 2) mean = mean_of(a, sum_of_row(std::false_type{}, 0.f, sum_storage));
    const float squares = sum_of_row(std::true_type{}, mean, squares_storage);
    rstd = a.options.eps_outside ? reciprocal_length(a, squares) : reciprocal_deviation(a, squares);
    if (a.options.round_rstd) rstd = round_to(a.x.dtype, rstd);
  }
  __syncwarp();  // others may have read what a lane writes, and a shuffle orders no memory
  let_next_kernel_start();
  if (!live) return;
  if (lane == 0) save<Statistic::kLayer>(a, row, mean, rstd);

#pragma unroll 1
  for (int64_t number = lane; number < a.units; number += lanes) {
    const Unit at(a, number);
    Values v = x, weight = filled<kLongPack>(1.f), bias = filled<kLongPack>(-0.f);  // v + -0 is v
    if (a.kept == Kept::kNone) {
      v = at.load(x_row);
      clamp_infinities(a, a.x.dtype, v);
    }
    if (a.weight.data) weight = at.load(place.of(a.weight));
    if (a.bias.data) bias = at.load(place.of(a.bias));
    normalise(a.options, a.x.dtype, mean, rstd, a.weight.dtype, a.options.weight_offset, weight,
              bias, v);
    if (a.round_norm) round_all(a.x.dtype, v);
    if (at.rotates) {
      Floats<kRun> cos = filled<kRun>(float_of_bits(0x7fc00000)), sin = cos;
      if (has_angles) {
        cos = Any<kRun>::load(cos_row, number * kRun, a.width / 2);
        sin = Any<kRun>::load(sin_row, number * kRun, a.width / 2);
      }
      if (a.interleaved)
        rotate<true>(a, cos, sin, v);
      else
        rotate<false>(a, cos, sin, v);
    }
    if (a.out.data) at.store(place.of(a.out, a.dims), v);
    if (has_slot) at.store(cache_row, v);
  }
}

}  // namespace normkit::cuda
