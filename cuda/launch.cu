#include <stdexcept>

#include "args.cuh"
#include "device.h"
#include "launch.h"
#include "launches.h"
#include "memo.h"
#include "strided_args.cuh"

namespace normkit::cuda {

template <class T>
Kernel kernel_of(Statistic statistic, bool adds, const Plan& plan);  // instances_*.cu
Kernel streamed_kernel_of(Statistic statistic, bool adds, Step step,
                          bool fused);  // instances_streamed.cu
PostNormKernel post_norm_kernel_of();   // likewise
BatchKernel batch_kernel_of();          // likewise

namespace {

int64_t pack_size(const RowNorm& norm) { return 16 / item_size(norm.x.dtype); }

// f(tensor) holds for each that there is.
template <class F>
bool all_of(const RowNorm& norm, const F& f) {
  const auto holds = [&](const auto& t) { return !t.data || f(t); };
  return holds(norm.x) && holds(norm.residual) && holds(norm.out) && holds(norm.residual_out) &&
         holds(norm.weight) && holds(norm.bias);
}

// Whether its rows are more than normalised, or not even that: for the kernel of batches alone.
bool takes_batch_kernel(const RowNorm& norm) {
  return norm.rotation || norm.cache || norm.options.as_is;
}

// Whether it is a call of one of the kernels that can do all, and that no other call pays for.
bool takes_rare_kernel(const RowNorm& norm) {
  const NormOptions& o = norm.options;
  const bool rounds =
      o.round_weight && o.weight_offset != 0.f && norm.weight.dtype != DType::kFloat32;
  return norm.split.step == Step::kWhole && (norm.modulation || norm.gating || norm.before ||
                                             takes_batch_kernel(norm) || o.eps_outside || rounds);
}

bool has_strided_columns(const RowNorm& norm) {
  return norm.x.has_strided_columns() || norm.out.has_strided_columns();
}

Access access_of(const RowNorm& norm) {
  if (takes_rare_kernel(norm)) return Access::kAny;  // one for all
  const int64_t pack = pack_size(norm);
  const auto wide = [&](const auto& t) { return is_wide(norm, t, pack); };
  if (norm.n % pack != 0 || !all_of(norm, wide)) return Access::kAny;
  const bool sum_stays = norm.residual.data && !norm.options.round_sum;  // as float32
  const auto same = [&](const auto& t) { return t.dtype == norm.x.dtype; };
  if (!sum_stays && all_of(norm, same)) return Access::kUniform;
  const auto mixes = [&](const auto& t) {
    return same(t) || t.dtype == DType::kFloat32 || norm.x.dtype == DType::kFloat32;
  };
  return all_of(norm, mixes) ? Access::kMixed : Access::kAny;
}

Plan plan_of(const RowNorm& norm, const Device& device) {
  if (norm.split.step != Step::kWhole) return split_plan(norm.n);
  if (has_strided_columns(norm)) return strided_plan(norm.n, device);
  return plan(norm.n, norm.x.dtype, access_of(norm), heads_of(norm) == 1,
              norm.residual.data != nullptr, norm.rows, device);
}

RowNormArgs args_of(const RowNorm& norm, const Plan& plan) {
  const int64_t pack = plan.packs == 0 ? kLongPack : pack_size(norm);
  RowNormArgs a{};
  static_cast<Grid&>(a) = grid_of(norm);
  a.x = launch_rows(norm, norm.x, pack);
  a.residual = launch_rows(norm, norm.residual, pack);
  a.out = launch_rows(norm, norm.out, pack);
  a.residual_out = launch_rows(norm, norm.residual_out, pack);
  a.weight = launch_affine(norm, norm.weight, pack);
  a.bias = launch_affine(norm, norm.bias, pack);
  a.rstd = norm.rstd;
  a.mean = norm.mean;
  while (1 << a.log2_lanes < plan.lanes) ++a.log2_lanes;
  while (1 << a.log2_cluster < plan.cluster) ++a.log2_cluster;
  a.groups = plan.groups;
  a.turns = plan.turns;
  a.n = norm.n;
  int64_t columns = norm.split.step == Step::kApply ? norm.n * norm.split.parts : norm.n;
  if (norm.options.of_sum) columns = 1;
  a.columns = static_cast<float>(columns);
  a.inverse_columns = columns == power_of_two_from(columns) ? 1.f / a.columns : 0.f;
  a.options = norm.options;
  a.options.weight_offset = launch_offset(norm.options.weight_offset);
  a.normalised = normalised_dtype(norm);
  a.split = {norm.split, planes_of(norm.statistic)};
  const Modulation& m = norm.modulation;
  a.modulation = {launch_affine(norm, m.gate, pack),    launch_affine(norm, m.scale, pack),
                  launch_affine(norm, m.shift, pack),   m.round_each,
                  promoted(norm.x.dtype, m.gate.dtype), promoted(a.normalised, m.scale.dtype)};
  if (norm.gating)
    a.gating = {launch_rows(norm, norm.gating.z, pack), norm.gating.activation,
                norm.gating.norm_first, norm.gating.round_norm};
  return a;
}

Kernel kernel_for(const RowNorm& norm, const Plan& plan) {
  const bool adds = norm.residual.data != nullptr;
  if (plan.packs == 0)
    return streamed_kernel_of(norm.statistic, adds, norm.split.step, takes_rare_kernel(norm));
  switch (norm.x.dtype) {
    case DType::kFloat32:
      return kernel_of<float>(norm.statistic, adds, plan);
    case DType::kFloat16:
      return kernel_of<Half>(norm.statistic, adds, plan);
    default:
      return kernel_of<BFloat16>(norm.statistic, adds, plan);
  }
}

PostNormArgs post_norm_args_of(const RowNorm& norm, const Plan& plan) {
  const NormBefore& first = norm.before;
  return {args_of(norm, plan),
          launch_affine(norm, first.weight, kLongPack),
          launch_affine(norm, first.bias, kLongPack),
          first.eps,
          launch_offset(first.weight_offset),
          first.alpha,
          first.beta,
          first.round_norm,
          first.scales(),
          norm.out.data != nullptr};
}

// Halves can be added where they are all of a row, and a warp's lanes have a unit each.
Kept kept_of(const RowNorm& norm, const Plan& plan) {
  const Rotation& r = norm.rotation;
  if (plan.turns != 1) return Kept::kNone;
  if (!r || r.interleaved) return r.width % kLongPack ? Kept::kNone : Kept::kPacks;
  const bool all = r.width == norm.n && norm.n == plan.lanes * kLongPack;
  return all && plan.lanes <= 32 ? Kept::kHalves : Kept::kNone;
}

BatchedNormArgs batched_args_of(const RowNorm& norm, const Plan& plan) {
  BatchedNormArgs a{};
  static_cast<RowNormArgs&>(a) = args_of(norm, plan);
  if (const Rotation& r = norm.rotation) {
    a.cos = launch_rows(norm, r.cos, kRun);
    a.sin = launch_rows(norm, r.sin, kRun);
    if (r.position) {
      a.position = launch_rows(norm, r.position.at, 1);
      a.cos.wide = a.cos.wide && aligned(r.cos_stride, r.cos.dtype, kRun);
      a.sin.wide = a.sin.wide && aligned(r.sin_stride, r.sin.dtype, kRun);
    }
    a.width = r.width;
    a.positions = r.positions;
    a.cos_stride = r.cos_stride;
    a.sin_stride = r.sin_stride;
    a.interleaved = r.interleaved;
    a.round_norm = r.round_norm;
    a.round_each = r.round_each;
    a.wide_position = r.position.wide;
    a.product = promoted(norm.x.dtype, r.cos.dtype);
  }
  if (const Cache& c = norm.cache) {
    a.cache = launch_rows(norm, c.rows, kRun);
    a.cache.wide = a.cache.wide && aligned(c.page_stride, c.rows.dtype, kRun) &&
                   aligned(c.slot_stride, c.rows.dtype, kRun);
    a.slot = launch_rows(norm, c.slot.at, 1);
    a.slots = c.slots;
    a.page_slots = c.page_slots;
    a.page_stride = c.page_stride;
    a.slot_stride = c.slot_stride;
    a.wide_slot = c.slot.wide;
  }
  a.units_of_pairs = divide_up(a.width, kLongPack);
  a.units = a.units_of_pairs + divide_up(norm.n - a.width, kLongPack);
  a.kept = kept_of(norm, plan);
  if (a.width % kLongPack) {  // runs begin anywhere
    a.x.wide = a.out.wide = a.cache.wide = false;
    a.weight.wide = a.bias.wide = false;
  }
  return a;
}

StridedArgs strided_args_of(const RowNorm& norm, const Plan& plan) {
  StridedArgs a{args_of(norm, plan), norm.x.column_stride, norm.out.column_stride, 0};
  while (1 << a.log2_groups < plan.groups) ++a.log2_groups;
  return a;
}

template <class Args>
struct LaunchOf {
  Loaded<Args> kernel;
  LaunchConfig config;
  Args args;
};
using Launch = LaunchOf<RowNormArgs>;

LaunchConfig config_of(const RowNorm& norm, const Plan& plan, const Device& on) {
  const int64_t blocks = divide_up(norm.rows, int64_t{plan.groups} * plan.unrolled) * plan.cluster;
  return {dim3(static_cast<unsigned>(blocks)),
          dim3(static_cast<unsigned>(plan.lanes * plan.groups)),
          0,
          static_cast<unsigned>(plan.cluster),
          on.programmatic,
          nullptr};
}

Launch launch_of(const RowNorm& norm, const Plan& plan, const Device& on, int index) {
  return {loaded(kernel_for(norm, plan), index), config_of(norm, plan, on), args_of(norm, plan)};
}

// All that a launch of the same key may have elsewhere.
void point(RowNormArgs& a, const RowNorm& norm) {
  a.x.data = norm.x.data;
  a.residual.data = norm.residual.data;
  a.out.data = norm.out.data;
  a.residual_out.data = norm.residual_out.data;
  a.weight.data = norm.weight.data;
  a.bias.data = norm.bias.data;
  a.rstd = norm.rstd;
  a.mean = norm.mean;
  a.split.statistics = norm.split.statistics;
  a.split.gathered = norm.split.gathered;
}

// A norm whose weight is 1 + scale and whose bias is shift, where that is all there is to it.
bool is_plain_norm(const RowNorm& norm) {
  const Modulation& m = norm.modulation;
  return (m.scale.data || m.shift.data) && !m.round_each && !m.gate.data && !norm.weight.data &&
         !norm.bias.data;
}

RowNorm as_plain_norm(const RowNorm& norm) {
  RowNorm plain = norm;
  plain.weight = norm.modulation.scale;
  plain.bias = norm.modulation.shift;
  plain.options.weight_offset = plain.weight.data ? 1.f : 0.f;
  plain.options.round_weight = false;
  plain.modulation = {};
  return plain;
}

template <class Args>
void start(LaunchOf<Args>& launch, void* stream) {
  launch.config.stream = stream;
  if (const char* error = NORMKIT_LAUNCH(launch.kernel, launch.config, launch.args))
    throw std::runtime_error(std::string("the kernel could not be launched: ") + error);
}

// Norms that share a launch, whose blocks are as large as the largest of them asks for; the others
// take more rows a block.
class Batch {
 public:
  Batch(const Device& on, int index, void* stream) : on_(on), index_(index), stream_(stream) {}

  void add(const RowNorm& norm) {
    const Plan plan = cuda::plan(norm.n, norm.x.dtype, Access::kAny, true, false, norm.rows, on_);
    launch_.args.norm[count_] = batched_args_of(norm, plan);
    threads_ = std::max(threads_, plan.lanes * plan.groups);
    if (++count_ == kMostNorms) flush();
  }

  void flush() {
    if (count_ == 0) return;
    uint32_t blocks = 0;
    for (int i = 0; i < kMostNorms; ++i) {
      BatchedNormArgs& a = launch_.args.norm[i];
      launch_.args.first_block[i] = i < count_ ? blocks : UINT32_MAX;
      a.groups = threads_ >> a.log2_lanes;
      if (i < count_) blocks += static_cast<uint32_t>(divide_up(a.rows, a.groups));
    }
    launch_.kernel = loaded(batch_kernel_of(), index_);
    launch_.config = {dim3(blocks), dim3(threads_), 0, 1, on_.programmatic, nullptr};
    start(launch_, stream_);
    count_ = threads_ = 0;
  }

 private:
  const Device& on_;
  int index_;
  void* stream_;
  LaunchOf<BatchArgs> launch_{};
  int count_ = 0, threads_ = 0;
};

}  // namespace

std::string describe(const RowNorm& norm, int index) {
  if (is_plain_norm(norm)) return describe(as_plain_norm(norm), index);
  const Device& on = device(index);
  Plan p = plan_of(norm, on);
  if (takes_batch_kernel(norm) && kept_of(norm, p) != Kept::kNone) p.packs = 1;
  const auto text = [](int64_t value) { return std::to_string(value); };
  std::string plan;
  if (p.packs == 0)
    plan = "row read again for each pass, by " + text(p.lanes) +
           (p.lanes == 1 ? " thread, " : " threads, ") + text(p.groups) + " to a block";
  else
    plan = "row in registers, " + text(p.lanes) + " lanes with up to " + text(p.packs) +
           (p.packs == 1 ? " pack" : " packs") + ", " + text(p.groups * p.unrolled) +
           " to a block of " + text(p.lanes * p.groups);
  if (p.cluster > 1) plan += ", in clusters of " + text(p.cluster);
  switch (p.access) {
    case Access::kUniform:
      plan += ", all of x's dtype and 16 bytes at a time";
      break;
    case Access::kMixed:
      plan += ", of several dtypes and 16 bytes at a time";
      break;
    case Access::kAny:
      plan += ", any dtypes and alignment";
  }
  if (has_strided_columns(norm)) plan += ", strided columns of rows side by side";
  if (on.programmatic) plan += ", programmatic launch";
  return plan;
}

void row_norm(const RowNorm& norm, int index, void* stream) {
  if (norm.rows == 0) return;
  if (is_plain_norm(norm)) return row_norm(as_plain_norm(norm), index, stream);
  const DeviceGuard guard(index);
  const Device& on = device(index);
  if (has_strided_columns(norm)) {
    const Plan plan = plan_of(norm, on);
    return for_launches(norm, [&](const RowNorm& part) {
      LaunchOf<StridedArgs> launch{loaded(strided_kernel_of(), index), config_of(part, plan, on),
                                   strided_args_of(part, plan)};
      start(launch, stream);
    });
  }
  if (is_one_launch(norm) && !takes_rare_kernel(norm)) {
    thread_local Memo<Launch> memo;
    const LaunchKey key = key_of(norm, on, index);
    Launch* launch = memo.find(key);
    if (!launch) launch = &memo.add(key, launch_of(norm, plan_of(norm, on), on, index));
    point(launch->args, norm);
    return start(*launch, stream);
  }
  if (takes_batch_kernel(norm)) {
    const RowNorm* const alone = &norm;
    return row_norms(&alone, 1, index, stream);
  }
  const Plan plan = plan_of(norm, on);
  if (norm.before)
    return for_launches(norm, [&](const RowNorm& part) {
      LaunchOf<PostNormArgs> launch{loaded(post_norm_kernel_of(), index), config_of(part, plan, on),
                                    post_norm_args_of(part, plan)};
      start(launch, stream);
    });
  for_launches(norm, [&](const RowNorm& part) {
    Launch launch = launch_of(part, plan, on, index);
    start(launch, stream);
  });
}

void row_norms(const RowNorm* const* norms, int count, int index, void* stream) {
  const DeviceGuard guard(index);
  Batch batch(device(index), index, stream);
  for (const RowNorm* const* norm = norms; norm != norms + count; ++norm)
    if ((*norm)->rows > 0) for_launches(**norm, [&](const RowNorm& part) { batch.add(part); });
  batch.flush();
}

}  // namespace normkit::cuda
