#include <algorithm>
#include <stdexcept>

#include "device.h"
#include "launch.h"
#include "row_norm.cuh"

namespace normkit::cuda {

template <class T>
Kernel kernel_of(Statistic statistic, bool adds, const Plan& plan);  // instances_*.cu

namespace {

// Below 2^31 threads and blocks in every plan.  The emulation splits earlier, to see it done.
#ifndef NORMKIT_MAX_LAUNCH_ROWS
#define NORMKIT_MAX_LAUNCH_ROWS (int64_t{1} << 27)
#endif
constexpr int64_t kMaxLaunchRows = NORMKIT_MAX_LAUNCH_ROWS;

int64_t pack_size(const RowNorm& norm) { return 16 / item_size(norm.x.dtype); }

bool aligned(int64_t offset, DType dtype, int64_t pack) {
  return offset % std::min<int64_t>(16, pack * item_size(dtype)) == 0;
}

// Whether packs of every row begin where 16 bytes (8 where the pack has no more) may be moved at
// once.
bool is_wide(const RowNorm& norm, const RowsOf& rows, int64_t pack) {
  bool wide = aligned(reinterpret_cast<intptr_t>(rows.data), rows.dtype, pack);
  for (int d = 0; d < norm.outer_dims; ++d)
    wide = wide && aligned(rows.stride[d], rows.dtype, pack);
  return wide;
}

bool is_wide(const RowNorm&, const Affine& affine, int64_t pack) {
  return aligned(reinterpret_cast<intptr_t>(affine.data), affine.dtype, pack) &&
         aligned(affine.row_stride, affine.dtype, pack);
}

bool is_uniform(const RowNorm& norm) {
  const auto fits = [&](const auto& t) {
    return !t.data || (t.dtype == norm.x.dtype && is_wide(norm, t, pack_size(norm)));
  };
  return norm.n % pack_size(norm) == 0 && fits(norm.x) && fits(norm.residual) && fits(norm.out) &&
         fits(norm.residual_out) && fits(norm.weight) && fits(norm.bias) &&
         (!norm.residual.data || norm.round_sum);
}

Plan plan_of(const RowNorm& norm, const Device& device) {
  return plan(norm.n, norm.x.dtype, is_uniform(norm), norm.rows, device);
}

// factor = ceil(2^(32 + shift) / value) with 2^shift < value <= 2^(shift + 1): exact below 2^31.
Divisor divisor(int64_t value) {
  Divisor d{static_cast<uint32_t>(value), 0, 0};
  if (value <= 1) return {1, 0, 0};
  while ((int64_t{2} << d.shift) < value) ++d.shift;
  const uint64_t power = uint64_t{1} << (32 + d.shift);
  d.factor = static_cast<uint32_t>((power + d.value - 1) / d.value);
  return d;
}

RowNormArgs args_of(const RowNorm& norm, const Plan& plan) {
  const int64_t pack = plan.packs == 0 ? kLongPack : pack_size(norm);
  RowNormArgs a{};
  const auto rows = [&](LaunchRows& to, const RowsOf& from) {
    to.data = from.data;
    to.dtype = from.dtype;
    to.wide = from.data && is_wide(norm, from, pack);
    for (int d = 0; d < norm.outer_dims; ++d)
      to.stride[kLaunchDims - norm.outer_dims + d] = from.stride[d];
  };
  rows(a.x, norm.x);
  rows(a.residual, norm.residual);
  rows(a.out, norm.out);
  rows(a.residual_out, norm.residual_out);
  const auto affine = [&](const Affine& from) {
    return LaunchAffine{from.data, from.row_stride, from.dtype,
                        from.data && is_wide(norm, from, pack)};
  };
  a.weight = affine(norm.weight);
  a.bias = affine(norm.bias);
  a.dims = norm.outer_dims;
  for (int d = 0; d < 2; ++d) {
    const int from = norm.outer_dims - 2 + d;
    a.size[d] = divisor(from >= 0 ? norm.outer_size[from] : 1);
  }
  a.heads = divisor(norm.heads);
  a.rows = static_cast<uint32_t>(norm.rows);
  while (1 << a.log2_lanes < plan.lanes) ++a.log2_lanes;
  a.groups = plan.groups;
  a.n = norm.n;
  a.eps = norm.eps;
  a.weight_offset = norm.weight_offset == 0.f ? -0.f : norm.weight_offset;  // -0 + 0 would be +0
  a.normalised = norm.residual.data && norm.round_sum ? norm.residual.dtype : norm.x.dtype;
  a.round_before_weight = norm.round_before_weight;
  a.round_sum = norm.round_sum;
  a.clamp_inf = norm.clamp_inf;
  return a;
}

Kernel kernel_for(const RowNorm& norm, const Plan& plan) {
  const bool adds = norm.residual.data != nullptr;
  switch (norm.x.dtype) {
    case DType::kFloat32:
      return kernel_of<float>(norm.statistic, adds, plan);
    case DType::kFloat16:
      return kernel_of<Half>(norm.statistic, adds, plan);
    default:
      return kernel_of<BFloat16>(norm.statistic, adds, plan);
  }
}

// The rows [begin, begin + count) of the first dimension, or those of one index of it.
RowNorm slice(const RowNorm& norm, int64_t begin, int64_t count) {
  RowNorm part = norm;
  for (RowsOf* t : {&part.x, &part.residual, &part.out, &part.residual_out})
    if (t->data) t->data += begin * t->stride[0];
  part.rows = norm.rows / norm.outer_size[0] * count;
  part.outer_size[0] = count;
  return part;
}

RowNorm drop_first_dimension(const RowNorm& norm, int64_t index) {
  RowNorm part = slice(norm, index, 1);
  --part.outer_dims;
  std::copy_n(norm.outer_size + 1, part.outer_dims, part.outer_size);
  for (RowsOf* t : {&part.x, &part.residual, &part.out, &part.residual_out})
    std::copy_n(t->stride + 1, part.outer_dims, t->stride);
  return part;
}

// f(part) for parts that one launch can do.
template <class F>
void for_launches(const RowNorm& norm, const F& f) {
  if (norm.outer_dims > kLaunchDims) {
    for (int64_t i = 0; i < norm.outer_size[0]; ++i) for_launches(drop_first_dimension(norm, i), f);
    return;
  }
  if (norm.rows <= kMaxLaunchRows) return f(norm);
  const int64_t size = norm.outer_size[0], inside = norm.rows / size;
  if (inside > kMaxLaunchRows) {
    for (int64_t i = 0; i < size; ++i) for_launches(drop_first_dimension(norm, i), f);
    return;
  }
  int64_t step = kMaxLaunchRows / inside;
  if (norm.outer_dims > 1 || norm.heads <= step) {
    if (norm.outer_dims == 1) step -= step % norm.heads;  // so that each part begins at head 0
    for (int64_t i = 0; i < size; i += step) f(slice(norm, i, std::min(step, size - i)));
    return;
  }
  for (int64_t i = 0; i < size; i += step) {
    const int64_t head = i % norm.heads;
    step = std::min({kMaxLaunchRows, norm.heads - head, size - i});
    RowNorm part = slice(norm, i, step);
    part.heads = step;
    for (Affine* affine : {&part.weight, &part.bias})
      if (affine->data) affine->data += head * affine->row_stride;
    f(part);
  }
}

}  // namespace

std::string describe(const RowNorm& norm, int index) {
  const Device& on = device(index);
  const Plan p = plan_of(norm, on);
  const auto text = [](int64_t value) { return std::to_string(value); };
  std::string plan;
  if (p.packs == 0)
    plan = "row read again for each pass, by " + text(p.lanes) + " threads";
  else
    plan = "row in registers, " + text(p.lanes) + " lanes with up to " + text(p.packs) +
           (p.packs == 1 ? " pack" : " packs") + ", " + text(p.groups * p.unrolled) +
           " to a block of " + text(p.lanes * p.groups);
  if (p.cluster > 1) plan += ", in clusters of " + text(p.cluster);
  plan += p.uniform ? ", all of x's dtype and 16 bytes at a time" : ", any dtypes and alignment";
  if (on.programmatic) plan += ", programmatic launch";
  return plan;
}

void row_norm(const RowNorm& norm, int index, void* stream) {
  if (norm.rows == 0) return;
  const DeviceGuard guard(index);
  const Device& on = device(index);
  const Plan plan = plan_of(norm, on);
  const Kernel kernel = kernel_for(norm, plan);
  for_launches(norm, [&](const RowNorm& part) {
    const int64_t blocks =
        divide_up(part.rows, int64_t{plan.groups} * plan.unrolled) * plan.cluster;
    const LaunchConfig config{dim3(static_cast<unsigned>(blocks)),
                              dim3(static_cast<unsigned>(plan.lanes * plan.groups)),
                              0,
                              static_cast<unsigned>(plan.cluster),
                              on.programmatic,
                              stream};
    const RowNormArgs args = args_of(part, plan);
    if (const char* error = NORMKIT_LAUNCH(kernel, config, args))
      throw std::runtime_error(std::string("the kernel could not be launched: ") + error);
  });
}

}  // namespace normkit::cuda
