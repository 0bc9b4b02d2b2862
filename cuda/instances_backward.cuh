// The instances of the backward pass for one way to reach memory.
#pragma once
#include "row_norm_backward.cuh"

namespace normkit::cuda {

template <Statistic kStatistic, class Access>
BackwardKernel choose_backward(int packs) {
  constexpr int kMostPacks = kBackwardColumns / Access::kSize;
  if (packs == 1) return row_norm_backward_kernel<kStatistic, Access, 1>;
  // Values of any dtype are not kept, so that packs without columns cost little.
  if constexpr (Access::kWhole)
    if (packs == 2) return row_norm_backward_kernel<kStatistic, Access, 2>;
  return row_norm_backward_kernel<kStatistic, Access, kMostPacks>;
}

template <class Access>
BackwardKernel backward_kernel_of(Statistic statistic, int packs) {
  return statistic == Statistic::kRms ? choose_backward<Statistic::kRms, Access>(packs)
                                      : choose_backward<Statistic::kLayer, Access>(packs);
}

}  // namespace normkit::cuda
