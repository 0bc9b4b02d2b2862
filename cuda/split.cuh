// What a part of a split row says to the others, and hears from them.
#pragma once
#include "reduce.cuh"

namespace normkit::cuda {

// As norm_args.h has them.
template <Statistic kStatistic>
constexpr int kPlanesOf = planes_of(kStatistic);

template <int kPlanes>
__device__ __forceinline__ void save_statistics(const Split& split, uint32_t row,
                                                const float (&of_plane)[kPlanes]) {
#pragma unroll
  for (int plane = 0; plane < kPlanes; ++plane)
    split.statistics[plane * split.plane + row] = of_plane[plane];
}

template <int kPlanes>
__device__ __forceinline__ float gathered(const Split& split, int64_t part, int plane,
                                          uint32_t row) {
  return split.gathered[(part * kPlanes + plane) * split.plane + row];
}

// Parts have equally many columns.  They are added in their order, and with care, so that many lose
// no more than few.
template <int kPlanes>
__device__ __forceinline__ float mean_of_parts(const Split& split, int plane, uint32_t row) {
  float sum = 0.f, lost = 0.f;
  for (int64_t part = 0; part < split.parts; ++part)
    add_to(sum, lost, gathered<kPlanes>(split, part, plane, row));
  return sum / static_cast<float>(split.parts);
}

// Of a whole row, about its mean where parts have means: n columns of a part lie that much further
// from it than from their own.
template <int kPlanes>
__device__ __forceinline__ float squares_of_parts(const Split& split, uint32_t row, int64_t n,
                                                  float mean) {
  float sum = 0.f, lost = 0.f;
  for (int64_t part = 0; part < split.parts; ++part) {
    add_to(sum, lost, gathered<kPlanes>(split, part, 0, row));
    if constexpr (kPlanes == 2) {
      const float apart = gathered<kPlanes>(split, part, 1, row) - mean;
      add_to(sum, lost, static_cast<float>(n) * apart * apart);
    }
  }
  return sum;
}

}  // namespace normkit::cuda
