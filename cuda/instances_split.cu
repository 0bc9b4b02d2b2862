#include "row_norm.cuh"
#include "row_norm_backward.cuh"

namespace normkit::cuda {

// Any dtypes and lengths through a few instances: next to the collective in between, dtype codes
// cost nothing.
Kernel split_kernel(Statistic statistic, Step step) {
  constexpr Statistic kRms = Statistic::kRms, kLayer = Statistic::kLayer;
  if (step == Step::kStatistics)
    return statistic == kRms ? long_row_norm_kernel<Coded, kRms, false, Step::kStatistics>
                             : long_row_norm_kernel<Coded, kLayer, false, Step::kStatistics>;
  return statistic == kRms ? long_row_norm_kernel<Coded, kRms, false, Step::kApply>
                           : long_row_norm_kernel<Coded, kLayer, false, Step::kApply>;
}

BackwardKernel split_backward_kernel(Statistic statistic, Step step) {
  constexpr Statistic kRms = Statistic::kRms, kLayer = Statistic::kLayer;
  if (step == Step::kStatistics)
    return statistic == kRms ? long_row_backward_kernel<kRms, Step::kStatistics>
                             : long_row_backward_kernel<kLayer, Step::kStatistics>;
  return statistic == kRms ? long_row_backward_kernel<kRms, Step::kApply>
                           : long_row_backward_kernel<kLayer, Step::kApply>;
}

}  // namespace normkit::cuda
