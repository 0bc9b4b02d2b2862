// What a part of a split row says to the others, and hears from them.  Planes are those of
// norm_args.h, and one kernel serves both statistics: an RMSNorm has one plane, and what it has not
// counts as zeros.
#pragma once
#include "reduce.cuh"

namespace normkit::cuda {

struct SplitArgs : Split {
  int planes;
};

__device__ __forceinline__ void save_statistics(const SplitArgs& split, uint32_t row,
                                                const float (&of_plane)[2]) {
#pragma unroll
  for (int plane = 0; plane < 2; ++plane)
    if (plane < split.planes) split.statistics[plane * split.plane + row] = of_plane[plane];
}

__device__ __forceinline__ float gathered(const SplitArgs& split, int64_t part, int plane,
                                          uint32_t row) {
  if (plane >= split.planes) return 0.f;
  return split.gathered[(part * split.planes + plane) * split.plane + row];
}

// Parts have equally many columns.  They are added in their order, and with care, so that many lose
// no more than few.
__device__ __forceinline__ float mean_of_parts(const SplitArgs& split, int plane, uint32_t row) {
  float sum = 0.f, lost = 0.f;
  for (int64_t part = 0; part < split.parts; ++part)
    add_to(sum, lost, gathered(split, part, plane, row));
  return sum / static_cast<float>(split.parts);
}

// Of a whole row about its mean: n columns of a part lie that much further from it than from their
// own.
__device__ __forceinline__ float squares_of_parts(const SplitArgs& split, uint32_t row, int64_t n,
                                                  float mean) {
  float sum = 0.f, lost = 0.f;
  for (int64_t part = 0; part < split.parts; ++part) {
    const float apart = gathered(split, part, 1, row) - mean;
    add_to(sum, lost, gathered(split, part, 0, row));
    add_to(sum, lost, static_cast<float>(n) * apart * apart);
  }
  return sum;
}

}  // namespace normkit::cuda
