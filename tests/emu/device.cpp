// The emulated device.
#include "../../cuda/device.h"

#include "emu.hpp"

namespace {

// Few enough processors that a handful of rows fills them, and both kinds of plan are met.
normkit::cuda::KnownDevice emulated{{4, true, true}, "emulated", ""};

}  // namespace

extern "C" __attribute__((visibility("default"))) void normkit_emulate_device(int processors,
                                                                              int clusters) {
  emulated.processors = processors;
  emulated.clusters = clusters != 0;
}

extern "C" __attribute__((visibility("default"))) uint64_t normkit_emulated_launches() {
  return emu::launches();
}

namespace normkit::cuda {

Devices devices() { return {1, ""}; }
const KnownDevice& device(int) { return emulated; }
DeviceGuard::DeviceGuard(int) {}
DeviceGuard::~DeviceGuard() {}

}  // namespace normkit::cuda
