// Gradients of weight and bias in the making: what the threads of a block add to them.
#pragma once
#include "../cpp/plan.h"
#include "pack.cuh"
#include "reduce.cuh"

namespace normkit::cuda {

// For each slice of the rows of each head, a row of sums, and a row of what they have lost to
// rounding.  sum is null where nobody asks for it, lost where nothing is added to a sum.
struct PartialSums {
  float *sum, *lost;
};

template <int kSize>
__device__ __forceinline__ Floats<kSize> load_sums(const float* from) {
  Floats<kSize> f;
#pragma unroll
  for (int i = 0; i < kSize; i += 4) {
    const uint4 bits = *reinterpret_cast<const uint4*>(from + i);
    memcpy(f.v + i, &bits, 16);
  }
  return f;
}
template <int kSize>
__device__ __forceinline__ void store_sums(float* to, const Floats<kSize>& f) {
#pragma unroll
  for (int i = 0; i < kSize; i += 4) {
    uint4 bits;
    memcpy(&bits, f.v + i, 16);
    store_if(to + i, true, bits);
  }
}

template <int kSize>
struct GroupStorage {
  float thread[kSize][kThreads];
};

// The sums of all groups of a block, in the first one.  Every thread of the block calls it.
template <int kSize>
__device__ __forceinline__ void fold_groups(Floats<kSize>& v, int lanes, int groups,
                                            GroupStorage<kSize>& storage) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) storage.thread[i][threadIdx.x] = v.v[i];
  __syncthreads();
  for (int half = groups / 2; half > 0; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half * lanes)
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        storage.thread[i][threadIdx.x] += storage.thread[i][threadIdx.x + half * lanes];
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kSize; ++i) v.v[i] = storage.thread[i][threadIdx.x];
}

// Adds sums to the partial sums that are `at` floats into their memory, or begins with them.
template <int kSize>
__device__ __forceinline__ void add_to_partial(const PartialSums& partial, int64_t at, bool adds,
                                               const Floats<kSize>& v) {
  // Four at a time: more of them beside the sums in the making would spill.
#pragma unroll 1
  for (int half = 0; half < kSize / 4; ++half) {
    Floats<4> sum{}, lost{};
    if (adds) sum = load_sums<4>(partial.sum + at + 4 * half);
    if (adds) lost = load_sums<4>(partial.lost + at + 4 * half);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      add_to(sum.v[i], lost.v[i], half == 0 ? v.v[i] : v.v[kSize - 4 + i]);
    store_sums(partial.sum + at + 4 * half, sum);
    if (partial.lost) store_sums(partial.lost + at + 4 * half, lost);
  }
}

}  // namespace normkit::cuda
