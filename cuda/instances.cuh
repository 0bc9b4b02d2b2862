// The instances of the family for one dtype of x, as a choice by plan.  Included by one source file
// per dtype, so that they compile side by side.
#pragma once
#include "row_norm.cuh"

namespace normkit::cuda {

// f(std::integral_constant) of the one among kFrom to kTo that value is.
template <int kFrom, int kTo, class F>
Kernel with_number(int value, const F& f) {
  if constexpr (kFrom < kTo)
    if (value != kFrom) return with_number<kFrom + 1, kTo>(value, f);
  return f(std::integral_constant<int, kFrom>{});
}

template <class T, Statistic kStatistic, bool kAdds, bool kMixed>
Kernel choose_kept(const Plan& plan) {
  using To = Wide<T, kMixed>;
  if constexpr (!(kAdds && kMixed))
    if (plan.unrolled == 4) return row_norm_kernel<T, kStatistic, kAdds, To, 1, 4>;
  return with_number<1, kMostPacks<kMixed>>(plan.packs, [](auto packs) -> Kernel {
    return row_norm_kernel<T, kStatistic, kAdds, To, decltype(packs)::value, 1>;
  });
}

template <class T, Statistic kStatistic, bool kAdds>
Kernel choose(const Plan& plan) {
  return plan.access == Access::kMixed ? choose_kept<T, kStatistic, kAdds, true>(plan)
                                       : choose_kept<T, kStatistic, kAdds, false>(plan);
}

template <class T>
Kernel kernel_of(Statistic statistic, bool adds, const Plan& plan) {
  if (statistic == Statistic::kRms)
    return adds ? choose<T, Statistic::kRms, true>(plan) : choose<T, Statistic::kRms, false>(plan);
  return adds ? choose<T, Statistic::kLayer, true>(plan)
              : choose<T, Statistic::kLayer, false>(plan);
}

}  // namespace normkit::cuda
