// What the CUDA runtime cannot do: contexts.  libcuda is not linked, so that a machine without a
// driver imports the extension; it is looked up when a CUDA device is first used.
#pragma once
#include <cuda.h>

#include <map>
#include <mutex>

#include "launch_config.h"

namespace normkit::cuda {

// The driver's functions; tests put others in their place.  A CUdevice is the index that the
// runtime and torch number devices by.
class Driver {
 public:
  decltype(&::cuInit) init = nullptr;
  decltype(&::cuGetErrorString) error_text = nullptr;
  decltype(&::cuDeviceGetName) device_name = nullptr;
  decltype(&::cuDeviceGetAttribute) device_attribute = nullptr;
  decltype(&::cuDevicePrimaryCtxGetState) primary_state = nullptr;
  decltype(&::cuDevicePrimaryCtxRetain) retain_primary = nullptr;
  decltype(&::cuCtxGetDevice) current_device = nullptr;
  decltype(&::cuCtxPushCurrent) push = nullptr;
  decltype(&::cuCtxPopCurrent) pop = nullptr;
  decltype(&::cuThreadExchangeStreamCaptureMode) exchange_capture_mode = nullptr;
  decltype(&::cuKernelGetFunction) load_kernel = nullptr;
  decltype(&::cuLaunchKernelEx) launch = nullptr;

  const char* text(CUresult error) const;

  // Whether the process has a primary context on this device: the one of the runtime and of torch.
  bool is_in_use(int index) const;

  // Null, or CUDA's text for why the kernel, which has one parameter, could not be launched.  This
  // is what the runtime does too, once it has found the kernel.
  const char* launch_kernel(CUfunction kernel, const LaunchConfig& config,
                            const void* argument) const;

  // Kept from the first call for a device on, since a context that is looked up anew costs a lock
  // of the driver each time.  Throws std::runtime_error with CUDA's text.
  CUcontext primary(int index);

 private:
  std::mutex mutex_;
  std::map<int, CUcontext> kept_;
};

// That of this machine.  Throws std::runtime_error where there is none.
Driver& driver();

// A kernel's handle, which is good on every device and for cuLaunchKernelEx only: that looks for
// the context of the stream it launches into, and for the current one where there is no stream. The
// first time, its code is loaded into the current context, which is one of the device.  Throws
// std::runtime_error with CUDA's text.
CUfunction load_kernel(const void* kernel, int device);

// While this lives, this thread may do what a capture forbids for not being recorded, as memory
// that is allocated or code that is loaded.  Only for what a replay need not repeat.  Not by the
// runtime, whose function makes a context on device 0 in a thread that has none.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const Driver& driver = cuda::driver());
  ~RelaxedCapture();
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  const Driver& driver_;
  CUstreamCaptureMode mode_ = CU_STREAM_CAPTURE_MODE_RELAXED;  // the other one, once exchanged
  bool exchanged_;
};

}  // namespace normkit::cuda
