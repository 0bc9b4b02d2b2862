// The CUDA devices of this machine.  Works, and says so, on a machine without a driver.
#pragma once
#include <string>

#include "../cpp/plan.h"

namespace normkit::cuda {

struct Devices {
  int count;
  std::string message;  // why there are none; empty if there are some
};

Devices devices();

struct KnownDevice : Device {
  std::string name;      // and compute capability
  std::string unusable;  // why no kernel runs here; empty if they do
};

// Asked of the driver at the first call for this index, and kept.
const KnownDevice& device(int index);

// Makes a device the current one, for as long as this lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int index);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = -1;  // -1: nothing to restore
};

// What is put into the stream `later` from now on waits for what `earlier` has.  Both are
// cudaStream_t of this device.
void let_wait(int index, void* later, void* earlier);

}  // namespace normkit::cuda
