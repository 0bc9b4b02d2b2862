// What portable.cuh has of AMD's GPUs.  Nothing launches kernels on them yet: this is for compiling
// them, and no AMD GPU has run one.
#pragma once

// Kernels think in warps of 32.  A wave of 64 has two of them: a shuffle of width 32 stays in its
// half, and all threads of a block come to each one.
#define __shfl_sync(mask, v, lane, width) __shfl(v, lane, width)
#define __shfl_xor_sync(mask, v, lanes, width) __shfl_xor(v, lanes, width)
#define __syncwarp() ::normkit::cuda::order_wave()

namespace normkit::cuda {

// A wave runs in step; what remains is what the compiler may reorder.
__device__ __forceinline__ void order_wave() {
  __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront");
  __builtin_amdgcn_wave_barrier();
}

// Under the names of CUDA's headers; hip_bf16.h has come late, and has changed since.
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 low, high;
};

__device__ __forceinline__ float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }

__device__ __forceinline__ float __bfloat162float(__nv_bfloat16 v) {
  return float_of_bits(uint32_t{v.bits} << 16);
}
// To nearest even; a NaN stays one, whatever its payload is.
__device__ __forceinline__ __nv_bfloat16 bfloat_of(float v) {
  const uint32_t bits = __float_as_uint(v);
  const uint32_t rounded = v == v ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x00400000;
  return {static_cast<uint16_t>(rounded >> 16)};
}
__device__ __forceinline__ __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return {bfloat_of(low), bfloat_of(high)};
}
__device__ __forceinline__ __nv_bfloat16 __low2bfloat16(__nv_bfloat162 v) { return v.low; }
__device__ __forceinline__ __nv_bfloat16 __high2bfloat16(__nv_bfloat162 v) { return v.high; }

// There are no clusters; plans for such devices have blocks that stand alone.
__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ unsigned cluster_size() { return 1; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_arrive_relaxed() {}
__device__ __forceinline__ void cluster_wait() {}
template <class T>
__device__ __forceinline__ T* cluster_peer(T* shared, unsigned) {
  return shared;
}

// A kernel begins when the one ahead of it in the stream has ended.
__device__ __forceinline__ void wait_for_previous_kernel() {}
__device__ __forceinline__ void let_next_kernel_start() {}

// As the emulation does: the root of a float32 is never so near to the middle of two others that
// the first rounding does harm.
__device__ __forceinline__ float inverse_square_root(float v) {
  return static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(v)));
}
__device__ __forceinline__ float exponential(float v) { return expf(v); }

// A wave runs both sides of a branch under a mask: nothing has to be predicated by hand.
__device__ __forceinline__ uint4 load_if(const void* from, bool wanted) {
  uint4 v{};
  if (wanted) v = *static_cast<const uint4*>(from);
  return v;
}
__device__ __forceinline__ uint2 load_half_if(const void* from, bool wanted) {
  uint2 v{};
  if (wanted) v = *static_cast<const uint2*>(from);
  return v;
}
template <class Bits>
__device__ __forceinline__ void store_if(void* to, bool wanted, const Bits& v) {
  if (wanted) *static_cast<Bits*>(to) = v;
}

template <class F>
__device__ __forceinline__ void branch_if(bool condition, const F& f) {
  if (condition) f();
}

__device__ __forceinline__ void keep(int&) {}
__device__ __forceinline__ void keep(uint4&) {}

}  // namespace normkit::cuda
