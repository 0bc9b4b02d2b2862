#include "row_norm.cuh"
#include "row_norm_backward.cuh"

namespace normkit::cuda {

// One instance for all dtypes, lengths and statistics: next to the collective between the steps,
// what is asked for as a kernel goes costs nothing.
Kernel split_kernel(Step step) {
  if (step == Step::kStatistics)
    return long_row_norm_kernel<Coded, Statistic::kLayer, false, Step::kStatistics>;
  return long_row_norm_kernel<Coded, Statistic::kLayer, false, Step::kApply>;
}

BackwardKernel split_backward_kernel(Step step) {
  if (step == Step::kStatistics)
    return long_row_backward_kernel<Statistic::kLayer, Step::kStatistics>;
  return long_row_backward_kernel<Statistic::kLayer, Step::kApply>;
}

}  // namespace normkit::cuda
