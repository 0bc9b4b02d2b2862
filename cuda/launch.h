// The CUDA backend: runs a row norm on a device.
#pragma once
#include <string>

#include "../cpp/norm_args.h"

namespace normkit::cuda {

// The plan in words.
std::string describe(const RowNorm& norm, int device);

// Puts the kernels into the stream, a cudaStream_t.  Allocates nothing, waits for nothing.  Throws
// std::runtime_error with CUDA's text when a launch fails.
void row_norm(const RowNorm& norm, int device, void* stream);

}  // namespace normkit::cuda
