#include "post_norm.cuh"
#include "rotation.cuh"
#include "row_norm_backward.cuh"
#include "streamed_row_norm.cuh"
#include "strided_row_norm.cuh"

namespace normkit::cuda {

// One instance for all dtypes: next to reading a row again, what is asked for as a kernel goes
// costs little.  One for both statistics too where a row is split, next to the collective between
// steps, and where it is fused with more than a sum.
Kernel streamed_kernel_of(Statistic statistic, bool adds, Step step, bool fused) {
  constexpr Statistic kRms = Statistic::kRms, kLayer = Statistic::kLayer;
  if (fused) return streamed_row_norm_kernel<kLayer, true, Step::kWhole, true>;
  if (step == Step::kStatistics) return streamed_row_norm_kernel<kLayer, false, Step::kStatistics>;
  if (step == Step::kApply) return streamed_row_norm_kernel<kLayer, false, Step::kApply>;
  if (statistic == kRms)
    return adds ? streamed_row_norm_kernel<kRms, true> : streamed_row_norm_kernel<kRms, false>;
  return adds ? streamed_row_norm_kernel<kLayer, true> : streamed_row_norm_kernel<kLayer, false>;
}

PostNormKernel post_norm_kernel_of() { return post_norm_kernel; }

BatchKernel batch_kernel_of() { return norm_batch_kernel; }

StridedKernel strided_kernel_of() { return strided_row_norm_kernel; }

BackwardKernel split_backward_kernel(Step step) {
  if (step == Step::kStatistics)
    return long_row_backward_kernel<Statistic::kLayer, Step::kStatistics>;
  return long_row_backward_kernel<Statistic::kLayer, Step::kApply>;
}

}  // namespace normkit::cuda
