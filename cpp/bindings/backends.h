// Which kernels run a row norm: those for the device that x is on.
#pragma once
#include <stdexcept>
#include <string>

#include "tensor.h"
#ifndef NORMKIT_EMULATED
#include "../cpu/row_norm.h"
#endif
#if defined(NORMKIT_HAS_CUDA) || defined(NORMKIT_EMULATED)
#include "../../cuda/device.h"
#include "../../cuda/launch.h"
#endif

namespace normkit {

struct Backend {
  const char* name;
  std::string (*describe)(const RowNorm& norm, int device);
  void (*run)(const RowNorm& norm, int device, void* stream);
  // Several that write nothing that another reads or writes, in one launch.  Null where there is no
  // such thing as a launch.
  void (*run_together)(const RowNorm* const* norms, int count, int device, void* stream);
  // Bytes of workspace that run_backward() needs.
  int64_t (*backward_workspace)(const RowNormBackward& norm, int device);
  void (*run_backward)(const RowNormBackward& norm, int device, void* stream, void* workspace);
  // Work put into the stream `later` from now on waits for the work that `earlier` holds.  Null
  // without streams.
  void (*let_wait)(int device, void* later, void* earlier);
  bool has_streams;
};

#ifdef NORMKIT_EMULATED
// The CUDA kernels on the CPU: a build for the tests.
inline constexpr Backend kEmulated{"emu",
                                   cuda::describe,
                                   cuda::row_norm,
                                   cuda::row_norms,
                                   cuda::backward_workspace,
                                   cuda::row_norm_backward,
                                   nullptr,
                                   false};

inline Refusal find_backend(DLDevice device, const Backend*& backend) {
  if (device.device_type != kDLCPU) return {"x", "is not on the CPU", Refusal::kDevice};
  backend = &kEmulated;
  return {};
}
#else
namespace cpu {
inline std::string describe_on(const RowNorm& norm, int) { return describe(norm); }
inline void run_on(const RowNorm& norm, int, void*) { row_norm(norm); }
// Its workspace stays with the thread.
inline int64_t no_workspace(const RowNormBackward&, int) { return 0; }
inline void run_backward_on(const RowNormBackward& norm, int, void*, void*) {
  row_norm_backward(norm);
}
}  // namespace cpu

inline constexpr Backend kCpu{
    "cpu", cpu::describe_on, cpu::run_on, nullptr, cpu::no_workspace, cpu::run_backward_on, nullptr,
    false};
#ifdef NORMKIT_HAS_CUDA
inline constexpr Backend kCuda{"cuda",
                               cuda::describe,
                               cuda::row_norm,
                               cuda::row_norms,
                               cuda::backward_workspace,
                               cuda::row_norm_backward,
                               cuda::let_wait,
                               true};
#endif

inline Refusal find_backend(DLDevice device, const Backend*& backend) {
  if (device.device_type == kDLCPU) {
    if (!cpu::instruction_set())
      return {"the processor", "has none of AVX2, AVX-512 and NEON", Refusal::kDevice};
    backend = &kCpu;
    return {};
  }
#ifdef NORMKIT_HAS_CUDA
  if (device.device_type == kDLCUDA) {
    const std::string& unusable = cuda::device(device.device_id).unusable;
    if (!unusable.empty()) return {"x's device:", unusable.c_str(), Refusal::kDevice};
    backend = &kCuda;
    return {};
  }
  return {"x", "is neither on the CPU nor on a CUDA device", Refusal::kDevice};
#else
  if (device.device_type == kDLCUDA)
    return {"x", "is on a CUDA device, and this build has no CUDA kernels", Refusal::kDevice};
  return {"x", "is not on the CPU", Refusal::kDevice};
#endif
}
#endif

// torch's current stream of the device that x is on; null on the CPU.
inline void* stream_for(const Backend& backend, DLDevice device) {
  void* stream = nullptr;
  if (backend.has_streams &&
      torch_objects.api->current_work_stream(device.device_type, device.device_id, &stream))
    throw std::runtime_error("torch has no current stream to tell");
  return stream;
}

}  // namespace normkit
