// Sums over a row, added in one order whatever threads share it, and whatever its dtype: the sums
// of four columns each are a list, padded with zeros to a power of two and folded in half until one
// is left.  Slots of a thread are the top bits of the index, then come blocks of a cluster, warps,
// lanes, and the two halves of a pack of eight.
#pragma once
#include "../cpp/plan.h"
#include "portable.cuh"

namespace normkit::cuda {

template <int kCount>
constexpr int kHalfOf = static_cast<int>(power_of_two_from(kCount) / 2);

template <int kCount>
__device__ __forceinline__ float fold(float* v) {
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    constexpr int kHalf = kHalfOf<kCount>;
#pragma unroll
    for (int i = 0; i + kHalf < kCount; ++i) v[i] += v[i + kHalf];  // the others would get zeros
    return fold<kHalf>(v);
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
template <int kQuads, bool kPeers = false>
struct SumStorage {
  alignas(16) float of_group[kQuads * kMostLanes];  // by group, quad, lane of the warp, and warp
  float for_peers[kPeers ? kQuads : 1][kPeers ? kMostLanes : 1];
};

__device__ __forceinline__ float shuffle_xor(float v, int lanes) {
  return __shfl_xor_sync(0xffffffffu, v, lanes, kWarp);
}

// Over groups of `lanes` neighbours, a power of two up to kMost.
template <int kMost = kWarp>
__device__ __forceinline__ float fold_lanes(float v, int lanes) {
#pragma unroll
  for (int half = kMost / 2; half > 0; half /= 2)
    if (half < lanes) v += shuffle_xor(v, half);
  return v;
}

// In the first step each half of the lanes takes one of the quads from the other, and has half as
// much to do after it: 6 shuffles where two sums would take 10.
template <int kQuads>
__device__ __forceinline__ float fold_lanes(const Sums<kQuads>& v, int lanes) {
  if constexpr (kQuads == 1) {
    return fold_lanes(v.quad[0], lanes);
  } else {
    if (lanes == 1) return v.quad[0] + v.quad[1];
    const int half = lanes / 2;
    const bool upper = threadIdx.x & half;
    const float given = shuffle_xor(upper ? v.quad[0] : v.quad[1], half);
    const float sum = fold_lanes<kWarp / 2>((upper ? v.quad[1] : v.quad[0]) + given, half);
    return sum + shuffle_xor(sum, half);
  }
}

// The same for several rows: each step halves what a lane holds, until it has the sum of one row.
// That lane says f(sum) for all of them, which get it as of_row.  For as many lanes as there are
// sums, or more.
template <int kQuads, int kRows, class F>
__device__ __forceinline__ void fold_rows(const Sums<kQuads> (&v)[kRows], int lanes, const F& f,
                                          float (&of_row)[kRows]) {
  constexpr int kSums = kQuads * kRows;
  float held[kSums];
#pragma unroll
  for (int q = 0; q < kQuads; ++q)
#pragma unroll
    for (int r = 0; r < kRows; ++r) held[q * kRows + r] = v[r].quad[q];
  int half = lanes / 2;
#pragma unroll
  for (int keeps = kSums / 2; keeps > 0; keeps /= 2) {
    const bool upper = threadIdx.x & half;
#pragma unroll
    for (int i = 0; i < keeps; ++i) {
      const float given = shuffle_xor(upper ? held[i] : held[i + keeps], half);
      held[i] = (upper ? held[i + keeps] : held[i]) + given;
    }
    half /= 2;
  }
  float sum = fold_lanes<kWarp / kSums>(held[0], 2 * half);
  if constexpr (kQuads == 2) sum += shuffle_xor(sum, lanes / 2);
  const float own = f(sum);
  const int first = threadIdx.x & (kWarp - lanes), apart = lanes / kSums;
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    of_row[r] = __shfl_sync(0xffffffffu, own, first + r * apart, kWarp);
}

// What kWarps warps have left of one lane.
template <int kWarps>
__device__ __forceinline__ float fold_warps(const float* of_warp) {
  using Bits = std::conditional_t<kWarps == 2, uint2, uint4>;
  float v[kWarps];
#pragma unroll
  for (int w = 0; w < kWarps; w += sizeof(Bits) / 4) {
    const Bits bits = *reinterpret_cast<const Bits*>(of_warp + w);
    memcpy(v + w, &bits, sizeof bits);
  }
  return fold<kWarps>(v);
}

// The steps between warps and within one, for a group of kWarps.  A lane takes one quad of two
// lanes, where there are two quads.
template <int kQuads, int kWarps>
__device__ __forceinline__ float fold_group(const float* of_group) {
  const int lane = threadIdx.x % kWarp;
  if constexpr (kQuads == 1) {
    return fold_lanes(fold_warps<kWarps>(of_group + lane * kWarps), kWarp);
  } else {
    constexpr int kHalf = kWarp / 2;
    const float* of_lane = of_group + (lane / kHalf * kWarp + lane % kHalf) * kWarps;
    const float sum = fold_lanes<kHalf>(
        fold_warps<kWarps>(of_lane) + fold_warps<kWarps>(of_lane + kHalf * kWarps), kHalf);
    return sum + shuffle_xor(sum, kHalf);
  }
}

// Over the `lanes` threads of this thread's group.  Every thread of the block calls it; all threads
// of a group get the sum.
template <int kQuads, bool kPeers>
__device__ __forceinline__ float sum_of_group(const Sums<kQuads>& v, int lanes,
                                              SumStorage<kQuads, kPeers>& storage) {
  if (lanes <= kWarp) return fold_lanes(v, lanes);
  const int warps = lanes / kWarp, warp = (threadIdx.x & (lanes - 1)) / kWarp;
  float* const of_group = storage.of_group + (threadIdx.x & ~(lanes - 1)) * kQuads;
#pragma unroll
  for (int q = 0; q < kQuads; ++q)
    of_group[(q * kWarp + threadIdx.x % kWarp) * warps + warp] = v.quad[q];
  __syncthreads();
  // Not by equality, of which the compiler makes a jump through a table.
  if (warps < 4) return fold_group<kQuads, 2>(of_group);
  if (warps < 8) return fold_group<kQuads, 4>(of_group);
  if (warps < 16) return fold_group<kQuads, 8>(of_group);
  return fold_group<kQuads, kMostLanes / kWarp>(of_group);
}

// Over the threads of this number in the blocks of a cluster.  They read each other's storage until
// they have arrived at the cluster's next barrier.
template <int kQuads>
__device__ __forceinline__ Sums<kQuads> sum_of_peers(Sums<kQuads> v, unsigned blocks,
                                                     SumStorage<kQuads, true>& storage) {
#pragma unroll
  for (int q = 0; q < kQuads; ++q) storage.for_peers[q][threadIdx.x] = v.quad[q];
  cluster_arrive();
  cluster_wait();
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

// `fold` of sums that come one by one, in the order next_turn() gives: two neighbours are added as
// soon as both are there, then two such sums, and so on.
template <int kQuads>
struct TreeSums {
  static constexpr int kLevels = 5;  // 32 turns: as many packs of eight columns as a lane can have
  Sums<kQuads> waits[kLevels] = {}, sum{};

  __device__ __forceinline__ void add(int before, const Sums<kQuads>& v) {
    sum = v;
    bool carries = true;
#pragma unroll
    for (int level = 0; level < kLevels; ++level) {
      const bool is_second = before >> level & 1;
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        const float both = sum.quad[q] + waits[level].quad[q];
        if (carries && !is_second) waits[level].quad[q] = sum.quad[q];
        if (carries && is_second) sum.quad[q] = both;
      }
      carries = carries && is_second;
    }
  }
};

// Counts to `turns`, a power of two, with the bits in reverse: 0, 4, 2, 6, 1, 5, 3, 7.
__device__ __forceinline__ int next_turn(int turn, int turns) {
  int bit = turns / 2;
  for (; turn & bit; bit /= 2) turn ^= bit;
  return turn | bit;
}

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
