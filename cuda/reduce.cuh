// Sums over a row, added in one order whatever threads share it, and whatever its dtype: the sums
// of four columns each are a list, padded with zeros to a power of two and folded in half until one
// is left.  Slots of a thread are the top bits of the index, then come blocks of a cluster, warps,
// lanes, and the two halves of a pack of eight.
#pragma once
#include "../cpp/plan.h"
#include "portable.cuh"

namespace normkit::cuda {

template <int kCount>
__device__ __forceinline__ float fold(float* v) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    static_assert(kCount % 2 == 0);
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) v[i] += v[i + kCount / 2];
    return fold<kCount / 2>(v);
  }
}

constexpr int kWarp = 32;

// What a thread has added of a row: the first and the second four columns of its packs apart, since
// a pack of float32 is four columns only.  So the order is the same for every dtype.
template <int kQuads>
struct Sums {
  float quad[kQuads];
};

// One per reduction of a kernel: memory that is used once needs no second barrier.
template <int kQuads, bool kCluster = false>
struct SumStorage {
  float thread[kQuads][kMostLanes];
  float for_peers[kCluster ? kQuads : 1][kCluster ? kMostLanes : 1];
};

// Over groups of `lanes` <= 32 neighbours.
template <int kQuads>
__device__ __forceinline__ float fold_lanes(Sums<kQuads> v, int lanes) {
#pragma unroll
  for (int q = 0; q < kQuads; ++q)
    for (int half = lanes / 2; half > 0; half /= 2)
      v.quad[q] += __shfl_xor_sync(0xffffffffu, v.quad[q], half, kWarp);
  return fold<kQuads>(v.quad);
}

// Over the `lanes` threads of this thread's group.  Every thread of the block calls it; all threads
// of a group get the sum.
template <int kQuads, bool kCluster>
__device__ __forceinline__ float sum_of_group(Sums<kQuads> v, int lanes,
                                              SumStorage<kQuads, kCluster>& storage) {
  if (lanes <= kWarp) return fold_lanes(v, lanes);
#pragma unroll
  for (int q = 0; q < kQuads; ++q) storage.thread[q][threadIdx.x] = v.quad[q];
  __syncthreads();
  const int lane = threadIdx.x % kWarp, first = threadIdx.x & ~(lanes - 1);
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    float of_warp[kMostLanes / kWarp];
#pragma unroll
    for (int warp = 0; warp < kMostLanes / kWarp; ++warp)
      of_warp[warp] = warp * kWarp < lanes ? storage.thread[q][first + warp * kWarp + lane] : 0.f;
    v.quad[q] = fold<kMostLanes / kWarp>(of_warp);
  }
  return fold_lanes(v, kWarp);
}

// Over the threads of this number in the blocks of a cluster.  They read each other's storage until
// they have arrived at the cluster's next barrier.
template <int kQuads>
__device__ __forceinline__ Sums<kQuads> sum_of_peers(Sums<kQuads> v,
                                                     SumStorage<kQuads, true>& storage) {
#pragma unroll
  for (int q = 0; q < kQuads; ++q) storage.for_peers[q][threadIdx.x] = v.quad[q];
  cluster_arrive();
  cluster_wait();
  const unsigned blocks = cluster_size();
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    float of_block[kMaxCluster];
#pragma unroll
    for (unsigned rank = 0; rank < kMaxCluster; ++rank)
      of_block[rank] =
          rank < blocks ? *cluster_peer(&storage.for_peers[q][threadIdx.x], rank) : 0.f;
    v.quad[q] = fold<kMaxCluster>(of_block);
  }
  return v;
}

}  // namespace normkit::cuda
