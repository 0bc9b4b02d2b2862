// One planted error for each tool of compute-sanitizer: a tool that does not report it here cannot
// clear the kernels either.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

namespace {

constexpr int kThreads = 64;

// memcheck: the last thread writes one element past the end.
__global__ void out_of_bounds(float* y) { y[threadIdx.x + 1] = 1.0f; }

// racecheck: a warp reads what the other has written, with no barrier in between.
__global__ void race(float* y) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = float(threadIdx.x);
  y[threadIdx.x] = shared[(threadIdx.x + 32) % kThreads];
}

// synccheck: half of a warp arrives at a barrier that is meant for all.
__global__ void divergent_barrier(float* y) {
  if (threadIdx.x < 16) __syncthreads();
  y[threadIdx.x] = 1.0f;
}

// initcheck: x has never been written.
__global__ void uninitialized(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }

}  // namespace

int main(int count, char** arguments) {
  const char* tool = count > 1 ? arguments[1] : "";
  float *x = nullptr, *y = nullptr;
  if (cudaMalloc(&x, kThreads * sizeof(float)) || cudaMalloc(&y, kThreads * sizeof(float))) {
    std::puts("no memory on the device");
    return 2;
  }
  if (!std::strcmp(tool, "memcheck")) out_of_bounds<<<1, kThreads>>>(y);
  if (!std::strcmp(tool, "racecheck")) race<<<1, kThreads>>>(y);
  if (!std::strcmp(tool, "synccheck")) divergent_barrier<<<1, kThreads>>>(y);
  if (!std::strcmp(tool, "initcheck")) uninitialized<<<1, kThreads>>>(x, y);
  std::puts(cudaGetErrorString(cudaDeviceSynchronize()));
  return 0;  // whatever happened: it is for the tool to say so
}
