// How a kernel is launched, on a device and in the emulation.
#pragma once
#if defined(__HIP__)
#include <hip/hip_runtime.h>
#else
#include <vector_types.h>
#endif

namespace normkit::cuda {

struct LaunchConfig {
  dim3 grid, block;
  unsigned dynamic_smem;
  unsigned cluster;   // blocks along x that reach each other's shared memory; 1: none
  bool programmatic;  // may start before the kernel ahead of it in the stream has ended
  void* stream;
};

}  // namespace normkit::cuda
