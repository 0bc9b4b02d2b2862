// The CUDA backend: runs a row norm, and its backward pass, on a device.
#pragma once
#include <string>

#include "../cpp/norm_args.h"

namespace normkit::cuda {

// The plan in words.
std::string describe(const RowNorm& norm, int device);

// Puts the kernels into the stream, a cudaStream_t.  Allocates nothing, waits for nothing.  Throws
// std::runtime_error with CUDA's text when a launch fails.
void row_norm(const RowNorm& norm, int device, void* stream);

// The same for several norms of which none reads what another writes, in as few launches as there
// can be.  Those norms are neither split, modulated nor gated, and add nothing; and they have the
// bits that they would have by themselves.
void row_norms(const RowNorm* const* norms, int count, int device, void* stream);

// The same for the backward pass, which wants some bytes of memory of the device to work with, 16
// of them aligned, and shares nothing in it with another call.
std::string describe(const RowNormBackward& norm, int device);
int64_t backward_workspace(const RowNormBackward& norm, int device);
void row_norm_backward(const RowNormBackward& norm, int device, void* stream, void* workspace);

}  // namespace normkit::cuda
