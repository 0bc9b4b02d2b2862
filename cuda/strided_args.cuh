// What the kernel of strided columns is told.
#pragma once
#include "args.cuh"

namespace normkit::cuda {

struct StridedArgs : RowNormArgs {
  int64_t x_columns, out_columns;  // bytes from a column to the next; 0 where they are dense
  int log2_groups;
};

using StridedKernel = void (*)(StridedArgs);

StridedKernel strided_kernel_of();  // instances_streamed.cu

}  // namespace normkit::cuda
