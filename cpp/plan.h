// How CUDA runs a row norm: a pure function of the row, the number of rows and the device.
//
// None of it changes the bits of a row, except whether the row is kept or streamed, which follows n
// and the device alone.  A row's columns are summed in fours, and the fours are added as a tree
// that folds them in half until one is left (cuda/reduce.cuh).  Lanes, packs per lane, rows per
// block and blocks per row only decide which thread adds, never the order, so they may follow the
// number of rows and the dtype.
#pragma once
#include "norm_args.h"

namespace normkit::cuda {

// What a plan may know of a device.
struct Device {
  int processors;
  bool clusters;      // blocks that reach each other's shared memory: compute capability 9.0 on
  bool programmatic;  // a launch may overlap the end of the previous kernel: 9.0 on
};

struct Plan {
  bool uniform;  // every tensor has x's dtype, and is reached in whole packs of 16 bytes
  int packs;     // kept in registers by each thread; 0: the row is streamed, and read again
  int unrolled;  // rows that a thread works on at once
  int lanes;     // threads that share a row in a block, a power of two
  int groups;    // of lanes in a block
  int cluster;   // blocks that share a row
};

#ifndef NORMKIT_TUNE_PACKS
#define NORMKIT_TUNE_PACKS 8
#endif
#ifndef NORMKIT_TUNE_LANES
#define NORMKIT_TUNE_LANES 256
#endif
#ifndef NORMKIT_TUNE_CLUSTER_FROM
#define NORMKIT_TUNE_CLUSTER_FROM 2048  // packs
#endif

// A thread keeps up to 64 values: 32 registers when packed, 64 as float32.  More of them spill.
constexpr int kMaxPacks = NORMKIT_TUNE_PACKS;
// Blocks of 256 leave two or more of them to a processor at 128 registers a thread, so that one
// loads while another stores; 512 are taken only where there is no other way to keep a row.
constexpr int kMaxLanes = NORMKIT_TUNE_LANES, kMostLanes = 512;
// Every device with clusters can place eight blocks; sixteen need an attribute and luck.
constexpr int kMaxCluster = 8;
// Four warps hide the latency of their loads, and leave the scheduler small blocks to place.
constexpr int kThreads = 128;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t power_of_two_from(int64_t a) {
  int64_t p = 1;
  while (p < a) p *= 2;
  return p;
}

constexpr int64_t at_least(int64_t a, int64_t low) { return a < low ? low : a; }
constexpr int64_t at_most(int64_t a, int64_t high) { return a > high ? high : a; }

// Longer rows are read again instead of kept: float32 needs all the registers there are for these.
constexpr int64_t kMostColumns = int64_t{kMostLanes} * kMaxPacks * 4;
constexpr int kLongPack = 8;  // columns that a thread takes at a time of a longer row

// The blocks that share a row of so many packs.
constexpr int blocks_per_row(int64_t packs, const Device& device) {
  int cluster = 1;
  while (device.clusters && cluster < kMaxCluster &&
         packs > int64_t{cluster} * NORMKIT_TUNE_CLUSTER_FROM)
    cluster *= 2;
  return cluster;
}

// Lanes and packs for many rows: few lanes with several loads in flight each.  128 threads with
// eight loads take half the time of 1024 with one (MLX, B200, n = 8192).
constexpr void share_for_throughput(Plan& plan, int64_t share) {
  const int64_t each = share <= 32 ? 1 : share <= 64 ? 2 : share <= 512 ? 4 : 8;
  plan.packs = static_cast<int>(at_most(each, kMaxPacks));
  plan.lanes = static_cast<int>(power_of_two_from(divide_up(share, plan.packs)));
  if (share > 32) plan.lanes = static_cast<int>(at_least(plan.lanes, 32));
}

// Lanes and packs for fewer rows than fill the device: more lanes, so that one processor pulls its
// row at its full rate, up to where the barrier costs more than they save.
constexpr void share_for_latency(Plan& plan, int64_t share) {
  plan.lanes = static_cast<int>(
      at_most(power_of_two_from(share <= 32 ? share : at_least(divide_up(share, 2), 32)),
              at_least(kMaxLanes, plan.lanes)));
  plan.packs = static_cast<int>(power_of_two_from(divide_up(share, plan.lanes)));
}

constexpr Plan plan(int64_t n, DType x, bool uniform, int64_t rows, const Device& device) {
  const int64_t pack = 16 / item_size(x);
  const int64_t packs = divide_up(n, pack);
  Plan plan{uniform, 0, 1, kMostLanes, 1, 1};
  if (n > kMostColumns * (device.clusters ? kMaxCluster : 1)) {
    plan.uniform = false;  // dtype codes cost nothing next to reading the row again
    return plan;
  }
  const int cluster = blocks_per_row(packs, device);
  const int64_t share = divide_up(packs, cluster);
  plan.cluster = cluster;
  share_for_throughput(plan, share);
  if (cluster > 1) {
    plan.packs = kMaxPacks;  // the one instance for clusters
    plan.lanes = static_cast<int>(at_least(power_of_two_from(divide_up(share, kMaxPacks)), 32));
    return plan;
  }
  plan.groups = static_cast<int>(at_least(kThreads / plan.lanes, 1));
  // Four rows a thread keep 64 bytes in flight where one pack is a lane's whole share.  Four rows
  // of float32 values would spill.
  const int unrolled = plan.packs == 1 && uniform ? 4 : 1;
  const int64_t blocks = divide_up(rows, int64_t{plan.groups} * unrolled);
  if (blocks >= device.processors * (unrolled > 1 ? 4 : 1)) {
    plan.unrolled = unrolled;
  } else {
    share_for_latency(plan, share);
    plan.groups = static_cast<int>(at_least(32 / plan.lanes, 1));
  }
  // Values of any dtype are kept as float32 by two instances only, to keep the build short.
  if (!uniform && plan.packs > 1) {
    plan.packs = kMaxPacks;
    plan.lanes = static_cast<int>(at_least(power_of_two_from(divide_up(share, kMaxPacks)), 32));
    plan.groups = static_cast<int>(at_least(kThreads / plan.lanes, 1));
  }
  return plan;
}

// Lanes for what this process has of a split row, which is reached as longer rows are: they follow
// n alone, and are whole warps.
constexpr int split_lanes(int64_t n) {
  return static_cast<int>(
      at_most(at_least(power_of_two_from(divide_up(n, kLongPack)), 32), kMostLanes));
}

constexpr Plan split_plan(int64_t n) { return {false, 0, 1, split_lanes(n), 1, 1}; }

// The backward pass.  A block takes rows of one head, keeps what they add to the gradients of
// weight and bias in registers, and leaves one row of partial sums behind.
struct BackwardPlan {
  bool uniform;  // as above
  int packs;     // that a thread takes of a row; 0: each kind of gradient has a kernel of its own
  int lanes;     // threads that share a row, a power of two; follows n and x's dtype alone
  int groups;    // of lanes in a block
  int slices;    // of a head's rows, each for one block
};

// A thread holds x and grad_y of two rows, weight, and two sums of 16 columns at most.
constexpr int kBackwardColumns = 16;
// Blocks of kThreads that fit on a processor at 80 registers, enough for rows of a warp or less.
constexpr int kBackwardBlocks = 6;
// And at 96, for the sums over columns of longer rows.
constexpr int kColumnBlocks = 5;
// Rows whose sums are added plainly before they go to the partial sums with care, which keeps what
// the gradient of a weight loses near 2^-24 of its size.  The emulation has fewer rows a launch.
#ifndef NORMKIT_CHAIN_ROWS
#define NORMKIT_CHAIN_ROWS 32
#endif
constexpr int kChainRows = NORMKIT_CHAIN_ROWS;
// Fewer rows for a partial sum would have the partial sums move more memory than the rows.
constexpr int kFewestRows = 4;

constexpr BackwardPlan backward_plan(int64_t n, DType x, bool uniform, int64_t rows, int64_t heads,
                                     const Device& device, bool split) {
  const int64_t pack = 16 / item_size(x), share = divide_up(n, pack);
  BackwardPlan plan{uniform, 0, kMostLanes, 1, 1};
  int64_t blocks = 0;  // that are to share all rows
  if (split || n > kMostLanes * kBackwardColumns) {
    plan.uniform = false;
    plan.lanes = split_lanes(n);
    blocks = kColumnBlocks * device.processors / divide_up(n, int64_t{kThreads} * kLongPack);
  } else {
    plan.packs = share <= 32 ? 1 : share <= 2 * kMostLanes ? 2 : 4;
    plan.lanes = static_cast<int>(power_of_two_from(divide_up(share, plan.packs)));
    plan.groups = static_cast<int>(at_least(kThreads / plan.lanes, 1));
    // All of them at once on the device: at 128 registers a thread where there are more packs.
    blocks = device.processors *
             (plan.packs == 1 ? kBackwardBlocks : int64_t{512} / (plan.lanes * plan.groups));
  }
  const int64_t of_head = divide_up(rows, heads);
  plan.slices = static_cast<int>(
      at_least(at_most(blocks / heads, of_head / (int64_t{plan.groups} * kFewestRows)), 1));
  return plan;
}

}  // namespace normkit::cuda
