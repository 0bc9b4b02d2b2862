// How a call gets to its tensors' device, and a kernel to the driver, against a driver that is
// played here: two devices, a stack of contexts for each thread, and a list of the devices that
// have a primary context.
//
// What matters most is what does not happen: a context that the process would not have without us.
#include <cstdint>
#include <cstdio>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../../cuda/device.h"
#include "../../cuda/driver.h"

namespace {

using normkit::cuda::DeviceGuard;
using normkit::cuda::Driver;
using normkit::cuda::RelaxedCapture;

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("FAILED: %s\n", what);
  ++failures;
}

// ---------------------------------------------------------------- the driver

CUcontext primary_of(int index) { return reinterpret_cast<CUcontext>(0x100 + 0x10 * index); }
CUcontext another_of(int index) { return reinterpret_cast<CUcontext>(0x108 + 0x10 * index); }
int device_of(CUcontext context) {
  return static_cast<int>(reinterpret_cast<intptr_t>(context) - 0x100) / 0x10;
}

std::set<int> in_use;  // devices with a primary context
int retained, queries, changes, exchanges;
CUresult retain_fails, push_fails, exchange_fails;
thread_local std::vector<CUcontext> contexts;  // of this thread; the last is current
thread_local CUstreamCaptureMode capture_mode;

CUresult error_text(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : nullptr;
  return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult primary_state(CUdevice device, unsigned* flags, int* active) {
  *flags = 0;
  *active = in_use.count(device);
  return CUDA_SUCCESS;
}
CUresult retain_primary(CUcontext* context, CUdevice device) {
  if (retain_fails) return retain_fails;
  ++retained;
  in_use.insert(device);
  *context = primary_of(device);
  return CUDA_SUCCESS;
}
CUresult current_device(CUdevice* device) {
  ++queries;
  if (contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  *device = device_of(contexts.back());
  return CUDA_SUCCESS;
}
CUresult push(CUcontext context) {
  if (push_fails) return push_fails;
  ++changes;
  contexts.push_back(context);
  return CUDA_SUCCESS;
}
CUresult pop(CUcontext* context) {
  if (contexts.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  ++changes;
  *context = contexts.back();
  contexts.pop_back();
  return CUDA_SUCCESS;
}
CUresult exchange_capture_mode(CUstreamCaptureMode* mode) {
  if (exchange_fails) return exchange_fails;
  ++exchanges;
  std::swap(*mode, capture_mode);
  return CUDA_SUCCESS;
}

struct Launched {
  CUlaunchConfig config;
  std::vector<CUlaunchAttribute> attributes;
  CUfunction kernel;
  const void* argument;
} launched;
CUresult launch_fails;

CUresult launch(const CUlaunchConfig* config, CUfunction kernel, void** arguments, void** extra) {
  if (extra) return CUDA_ERROR_INVALID_VALUE;
  launched = {*config, {config->attrs, config->attrs + config->numAttrs}, kernel, arguments[0]};
  return launch_fails;
}

// The same devices as a process has them that uses those given.
struct Machine : Driver {
  explicit Machine(std::set<int> devices, std::vector<CUcontext> current = {}) {
    Driver::error_text = ::error_text;
    Driver::primary_state = ::primary_state;
    Driver::retain_primary = ::retain_primary;
    Driver::current_device = ::current_device;
    Driver::push = ::push;
    Driver::pop = ::pop;
    Driver::exchange_capture_mode = ::exchange_capture_mode;
    Driver::launch = ::launch;
    in_use = std::move(devices);
    contexts = std::move(current);
    retained = queries = changes = exchanges = 0;
    retain_fails = push_fails = exchange_fails = launch_fails = CUDA_SUCCESS;
    capture_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
  }
};

bool is_current(CUcontext context) { return !contexts.empty() && contexts.back() == context; }

template <class F>
std::string error_of(const F& f) {
  try {
    f();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

// ---------------------------------------------------------------- tests

void test_the_right_device_costs_one_query() {
  Machine machine({1}, {primary_of(1)});
  {
    const DeviceGuard guard(1, machine);
  }
  expect(queries == 1 && changes == 0 && retained == 0, "the right device costs one query");
}

void test_another_device_is_current_meanwhile_only() {
  Machine machine({0, 1}, {primary_of(0)});
  {
    const DeviceGuard guard(1, machine);
    expect(is_current(primary_of(1)), "the device is the current one");
    const DeviceGuard inner(1, machine);
    expect(changes == 1, "a guard in a guard changes nothing");
    const DeviceGuard back(0, machine);
    expect(is_current(primary_of(0)), "a guard in a guard may be of another device");
  }
  expect(contexts == std::vector{primary_of(0)}, "the former device is current again");
}

// What the guard was before: cudaSetDevice, as it is from CUDA 12 on.  It shows that the driver
// that is played here would tell.
void set_device(int index) {
  in_use.insert(index);
  contexts = {primary_of(index)};
}

void test_device_0_gets_no_context_where_only_device_1_is_used() {
  const auto run = [](auto&& call) {
    Machine machine({1});
    call(machine);
    return in_use.count(0) > 0;
  };
  expect(run([](Machine&) { set_device(1), set_device(0); }), "a context would be noticed");
  expect(!run([](Machine& machine) { const DeviceGuard guard(1, machine); }),
         "no context on device 0");
  expect(contexts.empty(), "a thread without a context has none afterwards");
}

void test_another_context_of_the_device_stays() {
  Machine machine({1}, {another_of(1)});
  {
    const DeviceGuard guard(1, machine);
    expect(is_current(another_of(1)), "another context of the right device stays current");
  }
  expect(changes == 0, "and nothing is pushed");
}

void test_a_context_is_retained_once() {
  Machine machine({0, 1}, {primary_of(0)});
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&] {
      for (int call = 0; call < 100; ++call) machine.primary(1);
    });
  for (std::thread& thread : threads) thread.join();
  for (int call = 0; call < 10; ++call) {
    const DeviceGuard guard(1, machine);
  }
  expect(retained == 1, "a context is retained once, by whatever thread comes first");
}

void test_nothing_stays_behind_an_error() {
  Machine machine({1}, {primary_of(1)});
  retain_fails = CUDA_ERROR_OUT_OF_MEMORY;
  expect(error_of([&] { const DeviceGuard guard(0, machine); }) ==
             "CUDA device 0 has no context: out of memory",
         "a context that cannot be had is an error, with CUDA's text");
  expect(changes == 0 && is_current(primary_of(1)), "and nothing is pushed or popped");
  retain_fails = CUDA_SUCCESS;
  push_fails = CUDA_ERROR_INVALID_CONTEXT;
  expect(error_of([&] { const DeviceGuard guard(0, machine); }) ==
             "CUDA device 0 could not be made the current one: unrecognized error code",
         "so is one that cannot be pushed, also where CUDA has no text");
  expect(changes == 0 && is_current(primary_of(1)), "and nothing is popped");
  push_fails = CUDA_SUCCESS;
  expect(error_of([&] {
           const DeviceGuard guard(0, machine);
           const RelaxedCapture relaxed(machine);
           throw std::runtime_error("a launch failed");
         }) == "a launch failed",
         "an error of the call comes out, and the next call works");
  expect(contexts == std::vector{primary_of(1)}, "what was pushed is popped behind an error");
  expect(capture_mode == CU_STREAM_CAPTURE_MODE_GLOBAL, "and the capture mode is the former one");
}

void test_a_context_that_was_replaced_meanwhile_is_the_one_popped() {
  Machine machine({0, 1}, {primary_of(0)});
  {
    const DeviceGuard guard(1, machine);
    contexts.back() = primary_of(0);  // cudaSetDevice(0), by somebody that the call called
  }
  expect(contexts == std::vector{primary_of(0)}, "the stack is as deep as before");
}

void test_captures_are_relaxed_meanwhile_only() {
  Machine machine({0}, {primary_of(0)});
  capture_mode = CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
  {
    const RelaxedCapture relaxed(machine);
    expect(capture_mode == CU_STREAM_CAPTURE_MODE_RELAXED, "captures are relaxed");
    const RelaxedCapture inner(machine);
  }
  expect(capture_mode == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL && exchanges == 4,
         "the thread's own mode comes back");
  exchange_fails = CUDA_ERROR_NOT_INITIALIZED;
  {
    const RelaxedCapture relaxed(machine);
    exchange_fails = CUDA_SUCCESS;
  }
  expect(capture_mode == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL && exchanges == 4,
         "what was not exchanged is not restored");
}

void test_a_device_in_use_is_told_from_others() {
  const Machine machine({1});
  expect(machine.is_in_use(1) && !machine.is_in_use(0), "a device in use is told from others");
}

void test_a_launch_says_what_the_plan_says() {
  const Machine machine({0}, {primary_of(0)});
  const auto kernel = reinterpret_cast<CUfunction>(0x77);
  const int argument = 7;
  const auto run = [&](unsigned cluster, bool programmatic) {
    void* const stream = reinterpret_cast<void*>(0x88);
    return machine.launch_kernel(
        kernel, {dim3(12, 3, 2), dim3(64, 5, 4), 48, cluster, programmatic, stream}, &argument);
  };
  expect(!run(1, false), "a launch that worked says nothing");
  const CUlaunchConfig& how = launched.config;
  expect(how.gridDimX == 12 && how.gridDimY == 3 && how.gridDimZ == 2, "blocks");
  expect(how.blockDimX == 64 && how.blockDimY == 5 && how.blockDimZ == 4, "threads");
  expect(how.sharedMemBytes == 48 && how.hStream == reinterpret_cast<CUstream>(0x88),
         "shared memory and stream");
  expect(launched.kernel == kernel && launched.argument == &argument, "kernel and argument");
  expect(launched.attributes.empty(), "no attributes");
  run(4, false);
  expect(launched.attributes.size() == 1, "one attribute for clusters");
  const auto& cluster = launched.attributes[0].value.clusterDim;
  expect(launched.attributes[0].id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION && cluster.x == 4 &&
             cluster.y == 1 && cluster.z == 1,
         "clusters along x");
  run(1, true);
  expect(launched.attributes.size() == 1 &&
             launched.attributes[0].id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION &&
             launched.attributes[0].value.programmaticStreamSerializationAllowed == 1,
         "one attribute for programmatic launches");
  run(2, true);
  expect(launched.attributes.size() == 2, "both");
  launch_fails = CUDA_ERROR_OUT_OF_MEMORY;
  expect(run(1, false) == std::string("out of memory"), "a launch that failed says why");
}

}  // namespace

int main(int, char** argv) {
  test_the_right_device_costs_one_query();
  test_another_device_is_current_meanwhile_only();
  test_device_0_gets_no_context_where_only_device_1_is_used();
  test_another_context_of_the_device_stays();
  test_a_context_is_retained_once();
  test_nothing_stays_behind_an_error();
  test_a_context_that_was_replaced_meanwhile_is_the_one_popped();
  test_captures_are_relaxed_meanwhile_only();
  test_a_device_in_use_is_told_from_others();
  test_a_launch_says_what_the_plan_says();
  std::printf("%s: %d failures\n", argv[0], failures);
  return failures != 0;
}
