// The one file that knows whether the kernels are compiled by nvcc, for AMD's GPUs (hip.cuh) or for
// the emulation on the CPU (tests/emu).  Kernels use what is here and the parts of CUDA that all
// have: threadIdx and the like, __syncthreads, __syncwarp, __shfl_sync, __shfl_xor_sync, and the
// types float16 and bfloat16.
#pragma once

#if defined(__HIP__)
#include <hip/hip_fp16.h>
#include <hip/hip_runtime.h>
#elif defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "driver.h"
#else
#include "emu.hpp"
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "launch_config.h"

// Null, or why the kernel could not be launched.
//   NORMKIT_LAUNCH(loaded(kernel, device), config, argument)
#define NORMKIT_LAUNCH(kernel, ...) ::normkit::cuda::launch_kernel(kernel, __VA_ARGS__)

namespace normkit::cuda {

// Whether blocks of this processor can reach each other's shared memory.
#if defined(__HIP__) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900)
constexpr bool kHasClusters = false;
#else
constexpr bool kHasClusters = true;
#endif

}  // namespace normkit::cuda

#if defined(__HIP__) || defined(__CUDACC__)

// Type may be an array: NORMKIT_SHARED(float[32], partial).
#define NORMKIT_SHARED(Type, name) \
  using name##_shared_type = Type; \
  __shared__ name##_shared_type name
#define NORMKIT_DYNAMIC_SHARED(Type, name)                              \
  extern __shared__ __align__(16) unsigned char normkit_shared_bytes[]; \
  Type* const name = reinterpret_cast<Type*>(normkit_shared_bytes)

#endif

#if defined(__HIP__)
#include "hip.cuh"
#elif defined(__CUDACC__)

namespace normkit::cuda {

// A kernel that can be launched; it keeps the type of its one parameter.
template <class Parameter>
struct Loaded {
  CUfunction function;
};

// The current context is one of the device.
template <class Parameter>
Loaded<Parameter> loaded(void (*kernel)(Parameter), int device) {
  return {load_kernel(reinterpret_cast<const void*>(kernel), device)};
}

template <class Parameter>
const char* launch_kernel(Loaded<Parameter> kernel, const LaunchConfig& config,
                          const Parameter& argument) {
  return driver().launch_kernel(kernel.function, config, &argument);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define NORMKIT_SM_90(...) __trap()
#else
#define NORMKIT_SM_90(...) asm volatile(__VA_ARGS__)
#endif

__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank = 0;
  NORMKIT_SM_90("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ unsigned cluster_size() {
  unsigned size = 1;
  NORMKIT_SM_90("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
// Every thread of the cluster arrives once and then waits once.  What it wrote before it arrived is
// there for all who have waited.
__device__ __forceinline__ void cluster_arrive() {
  NORMKIT_SM_90("barrier.cluster.arrive.release;" :: : "memory");
}
// The same for a thread that has written nothing yet, without the wait for its writes.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  NORMKIT_SM_90("barrier.cluster.arrive.relaxed;" :: : "memory");
}
__device__ __forceinline__ void cluster_wait() {
  NORMKIT_SM_90("barrier.cluster.wait.acquire;" :: : "memory");
}
// Where the block of that rank has what this block has at `shared`.
template <class T>
__device__ __forceinline__ T* cluster_peer(T* shared, unsigned rank) {
  uint64_t address = reinterpret_cast<uint64_t>(shared);
  NORMKIT_SM_90("mapa.u64 %0, %0, %1;" : "+l"(address) : "r"(rank));
  return reinterpret_cast<T*>(address);
}

#undef NORMKIT_SM_90

// Until the kernel ahead in the stream has ended, and its writes can be seen.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ float inverse_square_root(float v) { return __frsqrt_rn(v); }
__device__ __forceinline__ float exponential(float v) { return expf(v); }

// 16 bytes, or undefined where they are not wanted.  One predicated instruction: of an `if` the
// compiler makes a branch, and moves the first use of what came before in front of it, so that a
// thread waits for one load before it issues the next.
__device__ __forceinline__ uint4 load_if(const void* from, bool wanted) {
  uint4 v;
  asm volatile(
      "{\n\t.reg .pred wanted;\n\tsetp.ne.u32 wanted, %5, 0;\n\t"
      "@wanted ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(from), "r"(static_cast<unsigned>(wanted))
      : "memory");
  return v;
}
__device__ __forceinline__ uint2 load_half_if(const void* from, bool wanted) {
  uint2 v;
  asm volatile(
      "{\n\t.reg .pred wanted;\n\tsetp.ne.u32 wanted, %3, 0;\n\t"
      "@wanted ld.global.v2.u32 {%0, %1}, [%2];\n\t}"
      : "=r"(v.x), "=r"(v.y)
      : "l"(from), "r"(static_cast<unsigned>(wanted))
      : "memory");
  return v;
}
__device__ __forceinline__ void store_if(void* to, bool wanted, const uint4& v) {
  asm volatile(
      "{\n\t.reg .pred wanted;\n\tsetp.ne.u32 wanted, %5, 0;\n\t"
      "@wanted st.global.v4.u32 [%4], {%0, %1, %2, %3};\n\t}" ::"r"(v.x),
      "r"(v.y), "r"(v.z), "r"(v.w), "l"(to), "r"(static_cast<unsigned>(wanted))
      : "memory");
}
__device__ __forceinline__ void store_if(void* to, bool wanted, const uint2& v) {
  asm volatile(
      "{\n\t.reg .pred wanted;\n\tsetp.ne.u32 wanted, %3, 0;\n\t"
      "@wanted st.global.v2.u32 [%2], {%0, %1};\n\t}" ::"r"(v.x),
      "r"(v.y), "l"(to), "r"(static_cast<unsigned>(wanted))
      : "memory");
}

// f() where a condition holds that is the same for the whole grid.  A loop of one turn or none
// stays a branch, where the compiler may not see that its body changes nothing in a second turn; of
// an `if`, ptxas makes instructions that are issued for nothing, and that take registers.
template <class F>
__device__ __forceinline__ void branch_if(bool condition, const F& f) {
#pragma unroll 1
  for (int turn = 0; turn < static_cast<int>(condition); ++turn) {
    asm volatile("");
    f();
  }
}

__device__ __forceinline__ float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }

// Makes the compiler forget what it knows of a value, and anything it has computed from it.
__device__ __forceinline__ void keep(int& v) { asm volatile("" : "+r"(v)); }
__device__ __forceinline__ void keep(uint4& v) {
  asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w));
}

}  // namespace normkit::cuda

#else  // the emulation

#define NORMKIT_SHARED(Type, name)                       \
  static const char name##_key = 0;                      \
  auto& name = *static_cast<::emu::SharedPointer<Type>>( \
      ::emu::shared(&name##_key, sizeof(Type), __FILE__, __LINE__))
#define NORMKIT_DYNAMIC_SHARED(Type, name) \
  Type* const name = static_cast<Type*>(::emu::dynamic_shared())

namespace normkit::cuda {

template <class Parameter>
using Loaded = void (*)(Parameter);
template <class Parameter>
Loaded<Parameter> loaded(void (*kernel)(Parameter), int) {
  return kernel;
}

template <class... Parameters, class... Arguments>
const char* launch_kernel(void (*kernel)(Parameters...), const LaunchConfig& config,
                          Arguments&&... arguments) {
  return emu::launch({config.grid, config.block, config.dynamic_smem, config.cluster}, kernel,
                     std::forward<Arguments>(arguments)...);
}

inline unsigned cluster_rank() { return emu::self->block->rank; }
inline unsigned cluster_size() { return emu::self->block->cluster; }
inline void cluster_arrive(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emu::cluster_arrive(true, file, line);
}
inline void cluster_arrive_relaxed(const char* file = __builtin_FILE(),
                                   int line = __builtin_LINE()) {
  emu::cluster_arrive(false, file, line);
}
inline void cluster_wait(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emu::cluster_wait(file, line);
}
template <class T>
T* cluster_peer(T* shared, unsigned rank, const char* file = __builtin_FILE(),
                int line = __builtin_LINE()) {
  return static_cast<T*>(emu::cluster_peer(shared, rank, file, line));
}

inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

// Two roundings, of which the first does no harm: no float32 has a root that near to the middle of
// two others.
inline float inverse_square_root(float v) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(v)));
}
inline float exponential(float v) { return std::exp(v); }

// What is not wanted is NaN in every dtype, so that a use of it shows.
template <class Bits>
Bits bits_if(const void* from, bool wanted) {
  Bits v;
  if (wanted)
    v = *static_cast<const Bits*>(from);
  else
    std::memset(static_cast<void*>(&v), 0xFF, sizeof v);
  return v;
}
inline uint4 load_if(const void* from, bool wanted) { return bits_if<uint4>(from, wanted); }
inline uint2 load_half_if(const void* from, bool wanted) { return bits_if<uint2>(from, wanted); }
template <class Bits>
void store_if(void* to, bool wanted, const Bits& v) {
  if (wanted) *static_cast<Bits*>(to) = v;
}

template <class F>
void branch_if(bool condition, const F& f) {
  if (condition) f();
}

inline float float_of_bits(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

inline void keep(int&) {}
inline void keep(uint4&) {}

}  // namespace normkit::cuda

#endif
