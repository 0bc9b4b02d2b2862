// What CUDA devices there are.  Works, and says so, on a machine without a driver.
#pragma once

namespace normkit::cuda {

struct Devices {
  int count;
  const char* message;  // why there are none; empty if there are some
};

Devices devices();

}  // namespace normkit::cuda
