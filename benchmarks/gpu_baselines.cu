// What the GPU benchmarks hold the norms against: a plain copy, an empty kernel, a bare launch.
//
// Built by graphs.py and called through ctypes.  Every function returns null, or CUDA's text of
// what went wrong; all of them launch on the given stream and may be captured in a graph.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

struct Launch {
  int blocks, threads;
  int cluster;       // 1: none
  int programmatic;  // may start before the kernel ahead has ended
};

const char* text(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), const Launch& how, void* stream,
                   Parameters... arguments) {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(how.blocks);
  config.blockDim = dim3(how.threads);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (how.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {unsigned(how.cluster), 1, 1};
  }
  if (how.programmatic) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Where the norms have them: before the first load, and before the first store.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// A block takes chunks of blockDim * kPacks packs; its threads have kPacks loads each in flight.
template <int kTensors, int kPacks>
__global__ void copy_kernel(const uint4* from, uint4* to, const uint4* from2, uint4* to2,
                            int64_t packs) {
  wait_for_previous_kernel();
  const int64_t chunk = int64_t(blockDim.x) * kPacks;
  for (int64_t base = blockIdx.x * chunk; base < packs; base += gridDim.x * chunk) {
    const int64_t first = base + threadIdx.x;
    uint4 a[kPacks], b[kPacks];
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const int64_t at = first + int64_t(j) * blockDim.x;
      if (at >= packs) break;
      a[j] = from[at];
      if (kTensors == 2) b[j] = from2[at];
    }
    let_next_kernel_start();
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const int64_t at = first + int64_t(j) * blockDim.x;
      if (at >= packs) break;
      to[at] = a[j];
      if (kTensors == 2) to2[at] = b[j];
    }
  }
}

// As many bytes of arguments as a norm has.
struct Arguments {
  char bytes[352];
};

__global__ void empty_kernel(Arguments) {
  wait_for_previous_kernel();
  let_next_kernel_start();
}

}  // namespace

extern "C" {

// One tensor, or two in one launch; at most `most_blocks` blocks, 0: as many as there are chunks.
const char* nk_copy(int tensors, int packs_in_flight, int threads, int most_blocks,
                    int programmatic, const void* from, void* to, const void* from2, void* to2,
                    int64_t bytes, void* stream) {
  const int64_t packs = bytes / int64_t(sizeof(uint4));
  const int64_t chunk = int64_t(threads) * packs_in_flight;  // 1 or 4
  const bool one = packs_in_flight == 1;
  const auto copy = tensors == 1 ? (one ? copy_kernel<1, 1> : copy_kernel<1, 4>)
                                 : (one ? copy_kernel<2, 1> : copy_kernel<2, 4>);
  if (packs == 0) return "fewer bytes than one access";
  int64_t blocks = (packs + chunk - 1) / chunk;
  if (most_blocks && blocks > most_blocks) blocks = most_blocks;
  if (blocks > INT32_MAX) blocks = INT32_MAX;
  const Launch how{int(blocks), threads, 1, programmatic};
  return text(launch(copy, how, stream, static_cast<const uint4*>(from), static_cast<uint4*>(to),
                     static_cast<const uint4*>(from2), static_cast<uint4*>(to2), packs));
}

// `count` launches of an empty kernel in a row.
const char* nk_launch(int blocks, int threads, int cluster, int programmatic, int count,
                      void* stream) {
  cudaError_t error = cudaSuccess;
  for (int i = 0; i < count && error == cudaSuccess; ++i) {
    error = launch(empty_kernel, {blocks, threads, cluster, programmatic}, stream, Arguments{});
  }
  return text(error);
}

}  // extern "C"
