#include <stdexcept>

#include "device.h"
#include "launch.h"
#include "launches.h"
#include "row_norm.cuh"

namespace normkit::cuda {

template <class T>
Kernel kernel_of(Statistic statistic, bool adds, const Plan& plan);  // instances_*.cu
Kernel split_kernel(Step step);

namespace {

int64_t pack_size(const RowNorm& norm) { return 16 / item_size(norm.x.dtype); }

bool is_uniform(const RowNorm& norm) {
  const auto fits = [&](const auto& t) {
    return !t.data || (t.dtype == norm.x.dtype && is_wide(norm, t, pack_size(norm)));
  };
  return norm.n % pack_size(norm) == 0 && fits(norm.x) && fits(norm.residual) && fits(norm.out) &&
         fits(norm.residual_out) && fits(norm.weight) && fits(norm.bias) &&
         (!norm.residual.data || norm.options.round_sum);
}

Plan plan_of(const RowNorm& norm, const Device& device) {
  if (norm.split.step != Step::kWhole) return split_plan(norm.n);
  return plan(norm.n, norm.x.dtype, is_uniform(norm), norm.rows, device);
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
  a.groups = plan.groups;
  a.n = norm.n;
  a.options = norm.options;
  a.options.weight_offset = launch_offset(norm.options.weight_offset);
  a.normalised = normalised_dtype(norm);
  a.split = {norm.split, planes_of(norm.statistic)};
  return a;
}

Kernel kernel_for(const RowNorm& norm, const Plan& plan) {
  if (norm.split.step != Step::kWhole) return split_kernel(norm.split.step);
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
