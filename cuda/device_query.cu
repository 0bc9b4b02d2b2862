#include <cuda_runtime.h>

#include "device_query.h"

namespace normkit::cuda {

Devices devices() {
  int count = 0;  // untouched by a failing query
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return {0, cudaGetErrorString(error)};
  return {count, count == 0 ? "no CUDA device" : ""};
}

}  // namespace normkit::cuda
