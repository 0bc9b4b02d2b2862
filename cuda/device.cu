#include <cuda_runtime.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>

#include "device.h"

namespace normkit::cuda {
namespace {

__global__ void __launch_bounds__(kMostLanes, 1) probe() {}

// Whether the largest clusters of any plan find room.
bool runs_clusters() {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {kMaxCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kMaxCluster);
  config.blockDim = dim3(kMostLanes);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  return cudaOccupancyMaxActiveClusters(&clusters, probe, &config) == cudaSuccess && clusters > 0;
}

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
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, probe);
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
      found.unusable =
          "this build has no kernels for " + found.name + ": " + cudaGetErrorString(error);
    } else if (error == cudaSuccess && attributes.ptxVersion >= 90) {
      // Kernels built for less do not wait for the previous one, whatever device they run on.
      found.programmatic = programmatic_launch_is_wanted();
      found.clusters = runs_clusters();
    }
  }
  if (error != cudaSuccess && found.unusable.empty()) found.unusable = cudaGetErrorString(error);
  cudaGetLastError();  // clears our error, which the next caller would see
  return found;
}

}  // namespace

// The runtime calls a missing driver an insufficient one, and sends people looking for an update.
std::string why_insufficient() {
  int driver = 0, runtime = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no NVIDIA driver";
  cudaRuntimeGetVersion(&runtime);
  const auto text = [](int version) {
    return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  };
  return "the NVIDIA driver is for CUDA " + text(driver) + " at most, and this build needs CUDA " +
         text(runtime);
}

Devices devices() {
  int count = 0;  // untouched by a failing query
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver) return {0, why_insufficient()};
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

void let_wait(int index, void* later, void* earlier) {
  const DeviceGuard guard(index);
  cudaEvent_t event;
  cudaError_t error = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
  if (error == cudaSuccess) {
    error = cudaEventRecord(event, static_cast<cudaStream_t>(earlier));
    if (error == cudaSuccess)
      error = cudaStreamWaitEvent(static_cast<cudaStream_t>(later), event, 0);
    cudaEventDestroy(event);  // the driver lets go of it once the wait is over
  }
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("streams could not be ordered: ") +
                             cudaGetErrorString(error));
}

}  // namespace normkit::cuda
