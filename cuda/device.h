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
  int index = 0;
};

// Asked of the driver at the first call for this index, and kept.
const KnownDevice& device(int index);

// The same for a list of devices, on each of which it would make a context: where the process has
// none, only the name, and whether this build has nothing for such a device.
KnownDevice glance_at(int index);

class Driver;

// Makes a device the current one of this thread, for as long as this lives, by way of the thread's
// stack of contexts: to set the device back, as the runtime has it, makes a context on the one that
// was current in name only, as device 0 is for a thread that has never set any.
class DeviceGuard {
 public:
  explicit DeviceGuard(int index);
  DeviceGuard(int index, Driver& driver);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  const Driver* pushed_ = nullptr;  // null: the device was current
};

// What is put into the stream `later` from now on waits for what `earlier` has.  Both are
// cudaStream_t of this device.
void let_wait(int index, void* later, void* earlier);

}  // namespace normkit::cuda
