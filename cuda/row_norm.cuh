// The forward row norm of rows that stay in registers: one family for every op, statistic, dtype
// and length of row.
#pragma once
#include "epilogue.cuh"

namespace normkit::cuda {

// Threads of a block at most, and blocks of so many that a processor is to have room for: 128
// registers a thread, but 80 for up to four packs of x alone and 96 for four rows, which have less
// in flight each, so that more of them are needed.
template <bool kMixed>
constexpr int most_threads(int packs, int rows) {
  return rows > 1 ? kThreads : packs > kMostPacks<kMixed> / 2 ? kMostLanes : kMaxLanes;
}
template <bool kMixed>
constexpr int fewest_blocks(int packs, int rows, bool adds) {
  return rows > 1 ? 5 : packs > kMostPacks<kMixed> / 2 ? 1 : kMixed || adds ? 2 : 3;
}

// As it multiplies.
template <class Access>
__device__ __forceinline__ float rstd_of(const RowNormArgs& a, float squares) {
  float rstd = reciprocal_deviation(a, squares);
  branch_if(a.options.round_rstd, [&] { rstd = Access::rounded(rstd, a.normalised); });
  return rstd;
}

template <class T, Statistic kStatistic, bool kAdds, class Access, int kPacks, int kRows>
__global__ void __launch_bounds__(most_threads<Access::kMixed>(kPacks, kRows),
                                  fewest_blocks<Access::kMixed>(kPacks, kRows, kAdds))
    row_norm_kernel(RowNormArgs a) {
  using RowOf = Row<T, Access, kAdds, kPacks, kRows>;
  using Storage = typename RowOf::Storage;
  NORMKIT_SHARED(Storage, sum_storage);
  NORMKIT_SHARED(Storage, squares_storage);

  RowOf row(a);
  Affine<RowOf, kStatistic> affine(row);
  wait_for_previous_kernel();
  row.load();
  affine.template load<Load::kWithX>(row);

  row.add_residual();
  affine.template load<Load::kBeforeSum>(row);
  float mean[kRows] = {}, rstd[kRows];
  if constexpr (kStatistic == Statistic::kLayer) {
    row.template reduce<false>(mean, sum_storage, [&](float sum) { return mean_of(a, sum); }, mean);
    affine.template load<Load::kBetweenSums>(row);
  }
  row.template reduce<true>(
      mean, squares_storage, [&](float squares) { return rstd_of<Access>(a, squares); }, rstd);

  let_next_kernel_start();
  if (row.has_peers()) cluster_arrive();  // no peer's memory is read any more
  affine.finish(row, mean, rstd);
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (row.is_first_lane() && row.live[r]) save<kStatistic>(a, row.number[r], mean[r], rstd[r]);
  if (row.has_peers()) cluster_wait();  // nobody reads ours: it may go
}

}  // namespace normkit::cuda
