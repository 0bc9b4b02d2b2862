#include "instances_backward.cuh"

namespace normkit::cuda {

// By the size of a pack: dtypes are asked for as the kernels go.
template BackwardKernel backward_kernel_of<Any<4>>(Statistic, int);
template BackwardKernel backward_kernel_of<Any<8>>(Statistic, int);

BackwardKernel long_row_backward(Statistic statistic) {
  return statistic == Statistic::kRms ? long_row_backward_kernel<Statistic::kRms>
                                      : long_row_backward_kernel<Statistic::kLayer>;
}

BackwardKernel long_columns() { return long_columns_kernel<Any<kLongPack>>; }

}  // namespace normkit::cuda
