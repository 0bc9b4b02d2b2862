#include <dlfcn.h>

#include <stdexcept>

#include "device.h"
#include "driver.h"

namespace normkit::cuda {
namespace {

template <class Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (!function) throw std::runtime_error(std::string("the NVIDIA driver has no ") + name);
}

// cuda.h renames functions to their newest version, as cuCtxPushCurrent to cuCtxPushCurrent_v2.
#define NORMKIT_SPELLED(name) #name
#define NORMKIT_FIND(function, name) find(library, NORMKIT_SPELLED(name), function)

// By dlsym, as torch does.  The runtime's cudaGetDriverEntryPoint may set the runtime up first.
void find_all(Driver& found) {
  void* const library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(std::string("no NVIDIA driver: ") + dlerror());
  NORMKIT_FIND(found.init, cuInit);
  NORMKIT_FIND(found.error_text, cuGetErrorString);
  NORMKIT_FIND(found.device_name, cuDeviceGetName);
  NORMKIT_FIND(found.device_attribute, cuDeviceGetAttribute);
  NORMKIT_FIND(found.primary_state, cuDevicePrimaryCtxGetState);
  NORMKIT_FIND(found.retain_primary, cuDevicePrimaryCtxRetain);
  NORMKIT_FIND(found.current_device, cuCtxGetDevice);
  NORMKIT_FIND(found.push, cuCtxPushCurrent);
  NORMKIT_FIND(found.pop, cuCtxPopCurrent);
  NORMKIT_FIND(found.exchange_capture_mode, cuThreadExchangeStreamCaptureMode);
  NORMKIT_FIND(found.load_kernel, cuKernelGetFunction);
  NORMKIT_FIND(found.launch, cuLaunchKernelEx);
  if (const CUresult error = found.init(0)) throw std::runtime_error(found.text(error));
}

}  // namespace

const char* Driver::text(CUresult error) const {
  const char* text = nullptr;
  error_text(error, &text);
  return text ? text : "unrecognized error code";  // as the runtime says
}

const char* Driver::launch_kernel(CUfunction kernel, const LaunchConfig& config,
                                  const void* argument) const {
  CUlaunchAttribute attributes[2];
  CUlaunchConfig how{};
  how.gridDimX = config.grid.x;
  how.gridDimY = config.grid.y;
  how.gridDimZ = config.grid.z;
  how.blockDimX = config.block.x;
  how.blockDimY = config.block.y;
  how.blockDimZ = config.block.z;
  how.sharedMemBytes = config.dynamic_smem;
  how.hStream = static_cast<CUstream>(config.stream);
  how.attrs = attributes;
  if (config.cluster > 1) {
    CUlaunchAttribute& attribute = attributes[how.numAttrs++];
    attribute.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    attribute.value.clusterDim.x = config.cluster;
    attribute.value.clusterDim.y = attribute.value.clusterDim.z = 1;
  }
  if (config.programmatic) {
    CUlaunchAttribute& attribute = attributes[how.numAttrs++];
    attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute.value.programmaticStreamSerializationAllowed = 1;
  }
  void* arguments[] = {const_cast<void*>(argument)};
  const CUresult error = launch(&how, kernel, arguments, nullptr);
  return error ? text(error) : nullptr;
}

bool Driver::is_in_use(int index) const {
  unsigned flags = 0;
  int active = 0;
  return primary_state(index, &flags, &active) == CUDA_SUCCESS && active;
}

CUcontext Driver::primary(int index) {
  const std::lock_guard lock(mutex_);
  CUcontext& kept = kept_[index];
  if (kept) return kept;
  CUcontext found;
  if (const CUresult error = retain_primary(&found, index))
    throw std::runtime_error("CUDA device " + std::to_string(index) +
                             " has no context: " + text(error));
  kept = found;
  return kept;
}

Driver& driver() {
  static Driver found;
  static const bool complete = (find_all(found), true);  // tried again after it has thrown
  static_cast<void>(complete);
  return found;
}

DeviceGuard::DeviceGuard(int index) : DeviceGuard(index, driver()) {}

// By the device and not by its primary context: on the right device another context is there on
// purpose, as one that has a part of the processors only, and what the thread has put into its
// default stream has to come first.
DeviceGuard::DeviceGuard(int index, Driver& driver) {
  CUdevice current;
  if (driver.current_device(&current) == CUDA_SUCCESS && current == index) return;
  if (const CUresult error = driver.push(driver.primary(index)))
    throw std::runtime_error("CUDA device " + std::to_string(index) +
                             " could not be made the current one: " + driver.text(error));
  pushed_ = &driver;
}

DeviceGuard::~DeviceGuard() {
  CUcontext popped;
  if (pushed_) pushed_->pop(&popped);
}

RelaxedCapture::RelaxedCapture(const Driver& driver)
    : driver_(driver), exchanged_(driver.exchange_capture_mode(&mode_) == CUDA_SUCCESS) {}

RelaxedCapture::~RelaxedCapture() {
  if (exchanged_) driver_.exchange_capture_mode(&mode_);
}

}  // namespace normkit::cuda
