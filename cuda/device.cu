#include <cuda_runtime.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>

#include "device.h"

namespace normkit::cuda {
namespace {

__global__ void probe() {}

// NORMKIT_PDL=0 launches every kernel only after the one before it has ended.
bool programmatic_launch_is_wanted() {
  const char* value = std::getenv("NORMKIT_PDL");
  return !value || std::string(value) != "0";
}

KnownDevice ask(int index) {
  KnownDevice found{};
  const DeviceGuard guard(index);
  cudaDeviceProp properties;
  cudaError_t error = cudaGetDeviceProperties(&properties, index);
  if (error == cudaSuccess) {
    const std::string capability =
        std::to_string(properties.major) + "." + std::to_string(properties.minor);
    found.name = std::string(properties.name) + " (" + capability + ")";
    found.processors = properties.multiProcessorCount;
    found.programmatic = properties.major >= 9 && programmatic_launch_is_wanted();
    int clusters = 0;
    if (cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, index) == cudaSuccess)
      found.clusters = clusters != 0 && properties.major >= 9;
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, probe);
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction)
      found.unusable =
          "this build has no kernels for " + found.name + ": " + cudaGetErrorString(error);
    else if (error == cudaSuccess && found.clusters && attributes.binaryVersion < 90)
      found.clusters = false;
  }
  if (error != cudaSuccess && found.unusable.empty()) found.unusable = cudaGetErrorString(error);
  if (error != cudaSuccess) cudaGetLastError();  // ours, and nobody else's to find
  return found;
}

}  // namespace

Devices devices() {
  int count = 0;  // untouched by a failing query
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return {0, cudaGetErrorString(error)};
  return {count, count == 0 ? "no CUDA device" : ""};
}

const KnownDevice& device(int index) {
  // A thread asks for one device again and again; the map is for the first time only.
  thread_local int last = -1;
  thread_local const KnownDevice* known = nullptr;
  if (index == last) return *known;
  static std::mutex mutex;
  static std::map<int, std::unique_ptr<const KnownDevice>> all;
  const std::lock_guard lock(mutex);
  auto& found = all[index];
  if (!found) found = std::make_unique<const KnownDevice>(ask(index));
  last = index;
  known = found.get();
  return *known;
}

DeviceGuard::DeviceGuard(int index) {
  int current = -1;
  if (cudaGetDevice(&current) != cudaSuccess || current == index) return;
  const cudaError_t error = cudaSetDevice(index);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  before_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (before_ >= 0) cudaSetDevice(before_);
}

}  // namespace normkit::cuda
