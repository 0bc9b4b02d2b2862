// CUDA's threads on the CPU, for tests: with this in the place of <cuda_runtime.h> a host compiler
// compiles and runs the kernels.  Every CUDA thread is a fiber; the fibers of one cluster of blocks
// (of one block where there are no clusters) run in turns, in an order that a seed decides.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

namespace emu {

struct Block {
  uint3 index;
  dim3 block_size, grid_size;
  unsigned rank, cluster;  // its place among so many blocks
};
struct Thread {
  uint3 index;
  unsigned linear, lane;
  Block* block;
};
extern Thread* self;  // the CUDA thread that runs now

struct LaunchShape {
  dim3 grid, block;
  unsigned dynamic_smem, cluster;
};

// Decides the order of threads and blocks from here on.
void seed(std::uint64_t value);

// Runs body(context) once for every thread.  Null, or CUDA's text for why that cannot be launched.
const char* run(const LaunchShape& shape, void (*body)(const void*), const void* context);

template <class... Parameters, class... Arguments>
const char* launch(const LaunchShape& shape, void (*kernel)(Parameters...),
                   Arguments&&... arguments) {
  static_assert(!(std::is_reference_v<Parameters> || ...), "a kernel's parameters are values");
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "more parameters than a kernel can have");
  // Converted once, as a launch does, and copied for every thread.
  using Call = std::pair<void (*)(Parameters...), std::tuple<Parameters...>>;
  const Call call(kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...));
  const auto body = [](const void* context) {
    const Call& c = *static_cast<const Call*>(context);
    std::apply(c.first, c.second);
  };
  return run(shape, body, &call);
}

// How many kernels have run.
std::uint64_t launches();

// What follows is called by kernels.  Misuse ends the process, with a message on stderr.

void sync_threads(const char* file, int line);
void sync_warp(unsigned mask, const char* file, int line);
void cluster_arrive(bool releases, const char* file, int line);
void cluster_wait(const char* file, int line);
void* cluster_peer(void* shared, unsigned rank, const char* file, int line);

template <class T>
struct SharedType {
  static_assert(std::is_trivially_default_constructible_v<T>, "shared memory is not initialised");
  using Pointer = std::add_pointer_t<T>;
};
template <class T>
using SharedPointer = typename SharedType<T>::Pointer;

// This block's copy of a variable, filled with 0xFF, which is NaN, when the block starts.
void* shared(const void* key, std::size_t bytes, const char* file, int line);
void* dynamic_shared();

// Waits for all lanes of the mask; what the source lane has brought.
std::uint64_t exchange(unsigned mask, std::uint64_t bits, unsigned source_lane, const char* file,
                       int line);

template <class T>
T exchange_value(unsigned mask, T value, unsigned source_lane, const char* file, int line) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source_lane, file, line);
  std::memcpy(static_cast<void*>(&value), &bits, sizeof(T));
  return value;
}

}  // namespace emu

// The headers of CUDA give these a meaning of their own.
#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (::emu::self->index)
#define blockIdx (::emu::self->block->index)
#define blockDim (::emu::self->block->block_size)
#define gridDim (::emu::self->block->grid_size)
#define __syncthreads() ::emu::sync_threads(__FILE__, __LINE__)

inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  ::emu::sync_warp(mask, file, line);
}

// As on the device, a lane can read from its own segment of `width` lanes and from those before it;
// from a later one it gets its own value.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const unsigned lane = ::emu::self->lane, segment = lane & ~unsigned(width - 1);
  const unsigned source = lane ^ unsigned(lane_mask);
  return ::emu::exchange_value(mask, value, source < segment + unsigned(width) ? source : lane,
                               file, line);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  const unsigned inside = unsigned(width - 1);
  return ::emu::exchange_value(
      mask, value, (::emu::self->lane & ~inside) | (unsigned(from) & inside), file, line);
}
