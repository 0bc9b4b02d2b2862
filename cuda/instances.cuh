// The instances of the family for one dtype of x, as a choice by plan.  Included by one source file
// per dtype, so that they compile side by side.
#pragma once
#include "row_norm.cuh"

namespace normkit::cuda {

template <class T, Statistic kStatistic, bool kAdds>
Kernel choose(const Plan& plan) {
  using U = Uniform<T>;
  using A = Any<T>;
  constexpr int kAll = kMaxPacks;
  if (plan.packs == 0) return long_row_norm_kernel<T, kStatistic, kAdds>;
  if (plan.cluster > 1)
    return plan.uniform ? row_norm_kernel<T, kStatistic, kAdds, U, kAll, 1, true>
                        : row_norm_kernel<T, kStatistic, kAdds, A, kAll, 1, true>;
  if (plan.unrolled == 4) return row_norm_kernel<T, kStatistic, kAdds, U, 1, 4, false>;
  if (plan.packs == 1)
    return plan.uniform ? row_norm_kernel<T, kStatistic, kAdds, U, 1, 1, false>
                        : row_norm_kernel<T, kStatistic, kAdds, A, 1, 1, false>;
  if (!plan.uniform) return row_norm_kernel<T, kStatistic, kAdds, A, kAll, 1, false>;
  if (plan.packs == 2) return row_norm_kernel<T, kStatistic, kAdds, U, 2, 1, false>;
  if (plan.packs == 4) return row_norm_kernel<T, kStatistic, kAdds, U, 4, 1, false>;
  return row_norm_kernel<T, kStatistic, kAdds, U, kAll, 1, false>;
}

template <class T>
Kernel kernel_of(Statistic statistic, bool adds, const Plan& plan) {
  if (statistic == Statistic::kRms)
    return adds ? choose<T, Statistic::kRms, true>(plan) : choose<T, Statistic::kRms, false>(plan);
  return adds ? choose<T, Statistic::kLayer, true>(plan)
              : choose<T, Statistic::kLayer, false>(plan);
}

}  // namespace normkit::cuda
