#include <stdexcept>

#include "device.h"
#include "launch.h"
#include "launches.h"
#include "row_norm_backward.cuh"

namespace normkit::cuda {

template <class Access>
BackwardKernel backward_kernel_of(Statistic statistic, int packs);  // instances_backward_*.cu
BackwardKernel long_row_backward(Statistic statistic);
BackwardKernel long_columns();
BackwardKernel split_backward_kernel(Step step);

namespace {

constexpr int kFoldColumns = kWarp, kMostWalkers = 16;

// The gradient of a weight, or of a bias: the sums of `count` rows each.
struct FoldArgs {
  struct Gradient {
    const float* sums;
    char* out;
    DType dtype;
    uint32_t rows;        // of the gradient
    int64_t count;        // of partial sums for each
    int64_t row, stride;  // floats from one row's first partial sums to the next's; to the second
  } of[2];
  int64_t n;
  uint32_t column_blocks;
  int walkers;  // warps of a block
};

// Adds up partial sums, for one gradient after the other along y: each warp takes its turn of them
// in some columns, and what the warps have is folded.
__global__ void __launch_bounds__(kFoldColumns* kMostWalkers) fold_kernel(FoldArgs a) {
  using Storage = float[kMostWalkers][kFoldColumns];
  NORMKIT_SHARED(Storage, storage);
  const int walker = threadIdx.x / kFoldColumns, lane = threadIdx.x % kFoldColumns;
  const uint32_t row = blockIdx.x / a.column_blocks;
  const int64_t column = int64_t{blockIdx.x - row * a.column_blocks} * kFoldColumns + lane;
  wait_for_previous_kernel();
  const FoldArgs::Gradient gradient = blockIdx.y ? a.of[1] : a.of[0];
  float sum = 0.f, lost = 0.f;
  if (row < gradient.rows && column < a.n) {
    const float* from = gradient.sums + row * gradient.row + column;
#pragma unroll 4
    for (int64_t i = walker; i < gradient.count; i += a.walkers)
      add_to(sum, lost, from[i * gradient.stride]);
  }
  storage[walker][lane] = sum;
  __syncthreads();
  let_next_kernel_start();
  if (walker != 0 || row >= gradient.rows || column >= a.n) return;
  float of_walker[kMostWalkers];
#pragma unroll
  for (int i = 0; i < kMostWalkers; ++i) of_walker[i] = i < a.walkers ? storage[i][lane] : 0.f;
  const float total = fold<kMostWalkers>(of_walker);
  with_type(gradient.dtype, [&](auto zero) {
    using T = decltype(zero);
    reinterpret_cast<T*>(gradient.out)[row * a.n + column] = narrow<T>(total);
  });
}

bool is_uniform(const RowNormBackward& norm) {
  const int64_t pack = 16 / item_size(norm.x.dtype);
  const auto fits = [&](const auto& t) {
    return !t.data || (t.dtype == norm.x.dtype && is_wide(norm, t, pack));
  };
  return norm.n % pack == 0 && fits(norm.x) && fits(norm.grad_y) && fits(norm.grad_x) &&
         fits(norm.grad_residual_out) && fits(norm.weight) && !norm.residual.data &&
         !norm.grad_residual.data && !norm.from_output &&
         !(norm.options.round_before_weight && norm.normalised != norm.x.dtype) &&
         !(norm.statistic == Statistic::kRms && norm.grad_bias);
}

BackwardPlan plan_of(const RowNormBackward& norm, const Device& device) {
  return backward_plan(norm.n, norm.x.dtype, is_uniform(norm), std::min(norm.rows, kMaxLaunchRows),
                       heads_of(norm), device, norm.split.step != Step::kWhole);
}

// Where the partial sums are, in floats.
struct Workspace {
  int64_t padded;  // a row of them
  int64_t sums;    // of one gradient
  bool keeps_lost;
  bool weight, bias;

  Workspace(const RowNormBackward& norm, const BackwardPlan& plan)
      : padded(divide_up(norm.n, 8) * 8),
        sums(norm.rows == 0 ? 0 : plan.slices * heads_of(norm) * padded),
        weight(norm.grad_weight),
        bias(norm.grad_bias) {
    const int64_t of_head = divide_up(std::min(norm.rows, kMaxLaunchRows), heads_of(norm));
    keeps_lost =
        !is_one_launch(norm) || divide_up(of_head, int64_t{plan.slices} * plan.groups) > kChainRows;
  }
  int64_t floats() const { return sums * (weight + bias) * (1 + keeps_lost); }
  PartialSums of(float* memory, bool is_bias, int64_t head) const {
    if (!(is_bias ? bias : weight)) return {};
    float* sum = memory + (is_bias && weight ? sums * (1 + keeps_lost) : 0) + head * padded;
    return {sum, keeps_lost ? sum + sums : nullptr};
  }
};

RowNormBackwardArgs args_of(const RowNormBackward& norm, const BackwardPlan& plan) {
  const int64_t pack = plan.packs == 0 ? kLongPack : 16 / item_size(norm.x.dtype);
  RowNormBackwardArgs a{};
  static_cast<Grid&>(a) = grid_of(norm);
  a.grad_y = launch_rows(norm, norm.grad_y, pack);
  a.grad_residual_out = launch_rows(norm, norm.grad_residual_out, pack);
  a.x = launch_rows(norm, norm.x, pack);
  a.residual = launch_rows(norm, norm.residual, pack);
  a.grad_x = launch_rows(norm, norm.grad_x, pack);
  a.grad_residual = launch_rows(norm, norm.grad_residual, pack);
  a.weight = launch_affine(norm, norm.weight, pack);
  a.bias = launch_affine(norm, norm.bias, pack);
  a.rstd = norm.rstd;
  a.mean = norm.mean;
  a.n = norm.n;
  a.columns = norm.options.of_sum ? 1.f : static_cast<float>(norm.n);
  a.slices = static_cast<uint32_t>(plan.slices);
  while (1 << a.log2_lanes < plan.lanes) ++a.log2_lanes;
  a.groups = plan.groups;
  a.column_blocks = static_cast<uint32_t>(divide_up(norm.n, int64_t{kThreads} * kLongPack));
  a.options = norm.options;
  a.options.weight_offset = launch_offset(norm.options.weight_offset);
  a.normalised = norm.normalised;
  a.from_output = norm.from_output;
  a.split = {norm.split, planes_of(norm.statistic)};
  return a;
}

BackwardKernel kernel_for(const RowNormBackward& norm, const BackwardPlan& plan) {
  if (norm.split.step != Step::kWhole) return split_backward_kernel(norm.split.step);
  if (plan.packs == 0) return long_row_backward(norm.statistic);
  if (!plan.uniform)
    return norm.x.dtype == DType::kFloat32 ? backward_kernel_of<Any<4>>(norm.statistic, plan.packs)
                                           : backward_kernel_of<Any<8>>(norm.statistic, plan.packs);
  switch (norm.x.dtype) {
    case DType::kFloat32:
      return backward_kernel_of<Uniform<float>>(norm.statistic, plan.packs);
    case DType::kFloat16:
      return backward_kernel_of<Uniform<Half>>(norm.statistic, plan.packs);
    default:
      return backward_kernel_of<Uniform<BFloat16>>(norm.statistic, plan.packs);
  }
}

template <class Args>
void launch(void (*kernel)(Args), const Args& args, dim3 blocks, int threads, const KnownDevice& on,
            void* stream) {
  const LaunchConfig config{blocks, dim3(static_cast<unsigned>(threads)), 0, 1, on.programmatic,
                            stream};
  if (const char* error = NORMKIT_LAUNCH(loaded(kernel, on.index), config, args))
    throw std::runtime_error(std::string("the kernel could not be launched: ") + error);
}

void fold_partial_sums(const RowNormBackward& norm, const BackwardPlan& plan,
                       const Workspace& space, float* memory, const KnownDevice& on, void* stream) {
  FoldArgs a{};
  a.n = norm.n;
  a.column_blocks = static_cast<uint32_t>(divide_up(norm.n, kFoldColumns));
  const int64_t partials = norm.rows == 0 ? 0 : plan.slices;
  const int64_t heads = heads_of(norm);
  const auto gradient = [&](const Affine& affine, char* out, const float* sums) {
    const bool per_head = affine.groups != 1;
    return FoldArgs::Gradient{sums,
                              out,
                              affine.dtype,
                              static_cast<uint32_t>(per_head ? heads : 1),
                              per_head ? partials : partials * heads,
                              space.padded,
                              per_head ? heads * space.padded : space.padded};
  };
  unsigned count = 0;
  if (space.weight)
    a.of[count++] = gradient(norm.weight, norm.grad_weight, space.of(memory, false, 0).sum);
  if (space.bias)
    a.of[count++] = gradient(norm.bias, norm.grad_bias, space.of(memory, true, 0).sum);
  const uint32_t rows = std::max(a.of[0].rows, a.of[1].rows);
  if (rows == 0) return;  // no heads: gradients of no elements
  const int64_t most = std::max(a.of[0].count, a.of[1].count);
  a.walkers = static_cast<int>(std::min<int64_t>(power_of_two_from(most), kMostWalkers));
  launch(fold_kernel, a, dim3(rows * a.column_blocks, count), kFoldColumns * a.walkers, on, stream);
}

}  // namespace

std::string describe(const RowNormBackward& norm, int index) {
  const BackwardPlan p = plan_of(norm, device(index));
  const auto text = [](int64_t value) { return std::to_string(value); };
  if (p.packs == 0) return "rows and columns apart, rows read twice";
  return text(p.lanes) + " lanes with up to " + text(p.packs) +
         (p.packs == 1 ? " pack" : " packs") + " of a row, " + text(p.groups) +
         (p.groups == 1 ? " row" : " rows") + " to a block" +
         (p.uniform ? ", all of x's dtype and 16 bytes at a time" : ", any dtypes and alignment");
}

int64_t backward_workspace(const RowNormBackward& norm, int index) {
  const int64_t floats = Workspace(norm, plan_of(norm, device(index))).floats();
  return floats * static_cast<int64_t>(sizeof(float));
}

void row_norm_backward(const RowNormBackward& norm, int index, void* stream, void* workspace) {
  const DeviceGuard guard(index);
  const KnownDevice& on = device(index);
  const BackwardPlan plan = plan_of(norm, on);
  const Workspace space(norm, plan);
  const bool rows_wanted =
      norm.grad_x.data || norm.grad_residual.data || norm.split.step == Step::kStatistics;
  const int64_t heads = heads_of(norm);
  const bool sums_wanted = space.weight || space.bias;
  float* const memory = static_cast<float*>(workspace);
  if (norm.rows > 0 && (rows_wanted || sums_wanted))
    for_launches(norm, [&](const RowNormBackward& part) {
      RowNormBackwardArgs a = args_of(part, plan);
      // Parts are of whole turns of all heads, or of some heads of one turn.
      const int64_t first_row = part.rstd - norm.rstd;
      a.adds = first_row >= heads;
      a.weight_sums = space.of(memory, false, first_row % heads);
      a.bias_sums = space.of(memory, true, first_row % heads);
      a.padded = space.padded;
      a.sums_stride = heads * space.padded;
      const auto blocks = static_cast<unsigned>(heads_of(part) * plan.slices);
      const BackwardKernel kernel = kernel_for(part, plan);
      if (plan.packs) return launch(kernel, a, dim3(blocks), plan.lanes * plan.groups, on, stream);
      if (rows_wanted) launch(kernel, a, dim3(a.rows), plan.lanes, on, stream);
      if (sums_wanted)
        launch(long_columns(), a, dim3(blocks * a.column_blocks), kThreads, on, stream);
    });
  if (sums_wanted) fold_partial_sums(norm, plan, space, memory, on, stream);
}

}  // namespace normkit::cuda
