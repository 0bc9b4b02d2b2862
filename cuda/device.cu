#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>

#include "device.h"
#include "driver.h"

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

constexpr int kArchitectures[] = {__CUDA_ARCH_LIST__};  // of this build: 900 for 9.0

// Whether this build has code for such a device, or may have: the list does not say what there is
// as PTX, of which the driver makes code for all that came later.
bool may_have_kernels(int capability) {
  return capability >= *std::min_element(std::begin(kArchitectures), std::end(kArchitectures));
}

// Needs no context, and makes none.
CUresult read_properties(const Driver& driver, int index, KnownDevice& found, int& capability) {
  char name[256];
  int major = 0, minor = 0;
  CUresult error = driver.device_name(name, sizeof(name), index);
  const auto read = [&](int& value, CUdevice_attribute attribute) {
    if (!error) error = driver.device_attribute(&value, attribute, index);
  };
  read(major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
  read(minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
  read(found.processors, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
  found.index = index;
  if (error) {
    found.unusable = driver.text(error);
    return error;
  }
  capability = 100 * major + 10 * minor;
  found.name = std::string(name) + " (" + std::to_string(major) + "." + std::to_string(minor) + ")";
  return error;
}

std::string no_kernels_for(const KnownDevice& device) {
  return "this build has no kernels for " + device.name;
}

KnownDevice ask(int index) {
  KnownDevice found{};
  int capability = 0;
  if (read_properties(driver(), index, found, capability)) return found;
  const DeviceGuard guard(index);
  const RelaxedCapture relaxed;  // the first query loads code
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    found.unusable = no_kernels_for(found) + ": " + cudaGetErrorString(error);
  } else if (error != cudaSuccess) {
    found.unusable = cudaGetErrorString(error);
  } else if (attributes.ptxVersion >= 90) {
    // Kernels built for less do not wait for the previous one, whatever device they run on.
    found.programmatic = programmatic_launch_is_wanted();
    found.clusters = runs_clusters();
  }
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

KnownDevice glance_at(int index) {
  if (driver().is_in_use(index)) return device(index);
  KnownDevice found{};
  int capability = 0;
  if (read_properties(driver(), index, found, capability)) return found;
  if (!may_have_kernels(capability)) found.unusable = no_kernels_for(found);
  return found;
}

// The runtime has registered the kernel, and gives a handle that is of no context.  To ask what it
// is in the current one loads it there.
CUfunction load_kernel(const void* kernel, int device) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, CUfunction> all;
  const std::lock_guard lock(mutex);
  CUfunction& known = all[{kernel, device}];
  if (known) return known;
  const RelaxedCapture relaxed;
  cudaKernel_t found;
  const cudaError_t error = cudaGetKernel(&found, kernel);
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the next caller would see it as its own
    throw std::runtime_error(std::string("the kernel could not be found: ") +
                             cudaGetErrorString(error));
  }
  CUfunction here;
  if (const CUresult error = driver().load_kernel(&here, found))
    throw std::runtime_error(std::string("the kernel could not be loaded: ") +
                             driver().text(error));
  return known = reinterpret_cast<CUfunction>(found);
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
