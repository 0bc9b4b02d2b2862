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

template <int kQuads, int kPacks>
__device__ __forceinline__ Sums<kQuads> fold_packs(const Sums<kQuads> (&of_pack)[kPacks]) {
  Sums<kQuads> sums;
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    float v[kPacks];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) v[p] = of_pack[p].quad[q];
    sums.quad[q] = fold<kPacks>(v);
  }
  return sums;
}

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

// Adds with the rounding errors of the sum kept beside it (Kahan), so that the error does not grow
// with the number of addends.
__device__ __forceinline__ void add_to(float& sum, float& lost, float v) {
  const float y = v - lost, t = sum + y;
  // inf - inf would make a NaN of an overflow, which is to stay one.
  lost = t - t == 0.f ? (t - sum) - y : 0.f;
  sum = t;
}

// For a row of any length.
template <int kQuads>
struct LongSums {
  Sums<kQuads> sum{}, lost{};
  __device__ __forceinline__ void add(const Sums<kQuads>& v) {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) add_to(sum.quad[q], lost.quad[q], v.quad[q]);
  }
};

// What the warps of a block have added, of each of several sums.  Two of these in turns need one
// barrier a sum: who comes to the second has left the first.
template <int kSums>
struct WarpSums {
  float of_warp[kSums][kMostLanes / kWarp];
};

// The backward pass adds in an order of its own, lanes before warps, which leaves little to shared
// memory.  It follows the number of lanes, which there follows n and x's dtype alone.
template <int kSums>
__device__ __forceinline__ void sum_over_lanes(float (&v)[kSums], int lanes,
                                               WarpSums<kSums>& storage) {
  for (int half = (lanes < kWarp ? lanes : kWarp) / 2; half > 0; half /= 2)
#pragma unroll
    for (int s = 0; s < kSums; ++s) v[s] += __shfl_xor_sync(0xffffffffu, v[s], half, kWarp);
  if (lanes <= kWarp) return;
  const int warp = threadIdx.x / kWarp, first = (threadIdx.x & ~(lanes - 1)) / kWarp;
  if (threadIdx.x % kWarp == 0)
#pragma unroll
    for (int s = 0; s < kSums; ++s) storage.of_warp[s][warp] = v[s];
  __syncthreads();
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    float of_warp[kMostLanes / kWarp];
#pragma unroll
    for (int i = 0; i < kMostLanes / kWarp; ++i)
      of_warp[i] = i * kWarp < lanes ? storage.of_warp[s][first + i] : 0.f;
    v[s] = fold<kMostLanes / kWarp>(of_warp);
  }
}

}  // namespace normkit::cuda
