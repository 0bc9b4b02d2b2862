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

// How the tensors of a call may be reached.
enum class Access : uint8_t {
  kUniform,  // all have x's dtype, and whole packs of x, 16 bytes, can be moved at once
  kMixed,  // whole packs of x and of what goes with them, in dtypes that the kernels know together
  kAny,    // anything else: element by element where need be
};

struct Plan {
  Access access;
  int packs;     // kept in registers by each thread; 0: the row is streamed, and read again
  int turns;     // of a streamed row: packs of a lane, padded to a power of two; 0: any number
  int unrolled;  // rows that a thread works on at once
  int lanes;     // threads that share a row in a block, a power of two
  int groups;    // of lanes in a block
  int cluster;   // blocks that share a row
};

// A thread keeps up to eight packs, 32 registers.  Beside a pack of 16 bits it has 32 bytes of each
// float32 tensor, and room for four.
template <bool kMixed>
constexpr int kMostPacks = kMixed ? 4 : 8;
// Blocks of 256 leave two or more of them to a processor at 128 registers a thread, so that one
// loads while another stores; 512 are taken only where there is no other way to keep a row.
constexpr int kMaxLanes = 256, kMostLanes = 512;
// Every device with clusters can place eight blocks; sixteen need an attribute and luck.
constexpr int kMaxCluster = 8;
constexpr int64_t kMostPacksOfBlock = 2048;  // where a cluster may share a row
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

// The sums of longer rows have no fixed number of addends, and float32 needs all the registers
// there are for these.
constexpr int64_t kMostColumns = int64_t{kMostLanes} * kMostPacks<false> * 4;
constexpr int kLongPack = 8;  // columns that a thread takes at a time of a longer row

// The blocks that share a row of so many packs.
constexpr int blocks_per_row(int64_t packs, const Device& device) {
  int cluster = 1;
  while (device.clusters && cluster < kMaxCluster && packs > cluster * kMostPacksOfBlock)
    cluster *= 2;
  return cluster;
}

// Lanes take the packs of a row in turns, so that all but the last of each are full.
constexpr void take_lanes(Plan& plan, int64_t share, int64_t lanes) {
  plan.lanes = static_cast<int>(lanes);
  plan.packs = static_cast<int>(divide_up(share, lanes));
}

// Lanes and packs for many rows: few lanes with several loads in flight each.  128 threads with
// eight loads take half the time of 1024 with one (MLX, B200, n = 8192).
constexpr void share_for_throughput(Plan& plan, int64_t share, int64_t most_packs) {
  const bool is_short = share <= 32;  // for one warp
  const int64_t each = is_short ? 1 : share <= 64 ? 2 : share <= 512 ? 4 : 8;
  const int64_t lanes = power_of_two_from(divide_up(share, at_most(each, most_packs)));
  take_lanes(plan, share, is_short ? lanes : at_least(lanes, 32));
  // A lane whose last pack is empty issues its instructions all the same.  Fewer lanes with more
  // packs may have less of that: 64 with five for n = 2560, where 128 with three are a fifth too
  // many.  Down to lanes that still move 64 or 128 bytes side by side.
  const int64_t most = is_short ? 4 : most_packs;
  for (int64_t fewer = plan.lanes / 2; fewer >= (is_short ? 4 : 8); fewer /= 2) {
    const int64_t packs = divide_up(share, fewer);
    if (packs > most) break;
    if (8 * packs * fewer <= 7 * int64_t{plan.packs} * plan.lanes) take_lanes(plan, share, fewer);
  }
}

// Lanes and packs for fewer rows than fill the device: more lanes, so that one processor pulls its
// row at its full rate, up to where the barrier costs more than they save.
constexpr void share_for_latency(Plan& plan, int64_t share) {
  const int64_t lanes = power_of_two_from(share <= 32 ? share : at_least(divide_up(share, 2), 32));
  take_lanes(plan, share, at_most(lanes, at_least(kMaxLanes, plan.lanes)));
}

// A row that is read again for each pass, a pack a lane where it is short enough.
constexpr Plan streamed_plan(int64_t n, bool kept_elsewhere) {
  const int64_t packs = divide_up(n, kLongPack);
  const int lanes = static_cast<int>(at_most(power_of_two_from(packs), kMostLanes));
  const int64_t turns = kept_elsewhere ? power_of_two_from(divide_up(packs, lanes)) : 0;
  const int groups = static_cast<int>(at_least(kThreads / lanes, 1));
  return {Access::kAny, 0, static_cast<int>(turns), 1, lanes, groups, 1};
}

// Whether rows of so many columns stay in registers, where they can be reached in whole packs: only
// then is the order of their sums one that any number of lanes can keep to.
constexpr bool stays_in_registers(int64_t n, const Device& device) {
  return n <= kMostColumns * (device.clusters ? kMaxCluster : 1);
}

// A row with strided columns, which is streamed.  As many rows to a block as fill the memory that
// is moved at a time, and lanes for a few packs each.
constexpr Plan strided_plan(int64_t n, const Device& device) {
  constexpr int64_t kMostTurns = 32, kSideBySide = 32;
  if (!stays_in_registers(n, device)) return streamed_plan(n, false);
  const int64_t packs = divide_up(n, kLongPack);
  const int64_t lanes = at_least(at_most(power_of_two_from(divide_up(packs, 4)), 16),
                                 power_of_two_from(packs) / kMostTurns);
  const int64_t turns = power_of_two_from(divide_up(packs, lanes));
  const int64_t groups = at_most(kSideBySide, kMostLanes / lanes);
  return {Access::kAny,
          0,
          static_cast<int>(turns),
          1,
          static_cast<int>(lanes),
          static_cast<int>(groups),
          1};
}

// one_map: all rows have the same weight and bias.
constexpr Plan plan(int64_t n, DType x, Access access, bool one_map, bool adds, int64_t rows,
                    const Device& device) {
  const int64_t packs = divide_up(n, 16 / item_size(x));
  const int cluster = blocks_per_row(packs, device);
  const int64_t share = divide_up(packs, cluster);
  const int64_t most_packs = access == Access::kMixed ? kMostPacks<true> : kMostPacks<false>;
  const bool is_kept = stays_in_registers(n, device);
  if (!is_kept || access == Access::kAny || share > most_packs * kMostLanes)
    return streamed_plan(n, is_kept);
  Plan plan{access, 0, 0, 1, 0, 1, cluster};
  share_for_throughput(plan, share, most_packs);
  if (cluster > 1) return plan;
  plan.groups = static_cast<int>(at_least(kThreads / plan.lanes, 1));
  // Four rows a thread keep 64 bytes in flight where one pack is a lane's whole share.  They hand
  // their sums around, for which there have to be as many lanes as sums.
  // A weight for each of them finds room where all is of x's dtype, and nothing is added.
  const bool has_room = access == Access::kUniform ? one_map || !adds : one_map && !adds;
  const bool unrolls = plan.packs == 1 && plan.lanes >= 8 && has_room;
  const int64_t blocks = divide_up(rows, int64_t{plan.groups} * (unrolls ? 4 : 1));
  if (blocks >= device.processors * (unrolls ? 4 : 1)) {
    plan.unrolled = unrolls ? 4 : 1;
  } else {
    share_for_latency(plan, share);
    plan.groups = static_cast<int>(at_least(32 / plan.lanes, 1));
  }
  return plan;
}

// Lanes for what this process has of a split row, which is reached as longer rows are: they follow
// n alone, and are whole warps.
constexpr int split_lanes(int64_t n) {
  return static_cast<int>(
      at_most(at_least(power_of_two_from(divide_up(n, kLongPack)), 32), kMostLanes));
}

constexpr Plan split_plan(int64_t n) { return {Access::kAny, 0, 0, 1, split_lanes(n), 1, 1}; }

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
// Rows that a thread adds plainly, each with a rounding of the whole, before they go to the partial
// sums with care: of 8 such rows a sum of equal gradients loses up to 3.4 * 2^-24 of its size, and
// one that is made for it 6.2; of 4 rows 1.9 and 2.3.
constexpr int kChainRows = 4;
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
