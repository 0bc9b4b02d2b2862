// From the arguments of a backward call to a RowNormBackward, as checks.h does for the forward
// pass.
#pragma once
#include "checks.h"

namespace normkit {

struct BackwardArguments {
  Tensor grad_y{"grad_y"}, grad_residual_out{"grad_residual_out"}, x{"x"}, residual{"residual"},
      weight{"weight"}, bias{"bias"}, rstd{"rstd"}, mean{"mean"};
  Tensor grad_x{"grad_x"}, grad_residual{"grad_residual"}, grad_weight{"grad_weight"},
      grad_bias{"grad_bias"};  // made for the call; the second may be the first
  Statistic statistic;
  bool per_head, from_output;
  NormOptions options;
  std::optional<DType> x_dtype, residual_dtype;  // of the gradients; none: they are not wanted
  bool wants_weight, wants_bias;
};

// rstd or mean: a float32 for each row, in their order.
inline Refusal check_row_values(const Tensor& t, const Tensor& x) {
  if (!t) return {};
  if (t.dtype != DType::kFloat32) return {t.name, "is not float32", Refusal::kDtype};
  if (t.ndim != x.ndim - 1) return {t.name, "does not fit x's shape", Refusal::kShape};
  for (int d = 0; d < t.ndim; ++d)
    if (t.shape[d] != x.shape[d]) return {t.name, "does not fit x's shape", Refusal::kShape};
  if (!is_dense(t)) return {t.name, "is not contiguous", Refusal::kMemory};
  return {};
}

inline Refusal check(const BackwardArguments& a) {
  // One without heads where they may be: a row of a gated norm.
  if (a.x.ndim < 1) return {"x", "has too few dimensions", Refusal::kShape};
  if (a.x.size(1) < 1) return {"x", "has rows of no elements", Refusal::kShape};
  for (const Tensor* t :
       {&a.grad_y, &a.grad_residual_out, &a.residual, &a.weight, &a.bias, &a.rstd, &a.mean})
    if (const Refusal no = check_device(*t, a.x)) return no;
  for (const Tensor* t : {&a.x, &a.grad_y, &a.grad_residual_out, &a.residual})
    if (const Refusal no = check_rows(*t, a.x, Refusal::kStrides)) return no;
  for (const Tensor* t : {&a.weight, &a.bias})
    if (const Refusal no = check_affine(*t, a.x, a.per_head)) return no;
  if (!a.grad_y || !a.rstd) return {"grad_y or rstd", "is None", Refusal::kOption};
  if (bool(a.mean) != (a.statistic == Statistic::kLayer && !a.from_output))
    return {"mean", "is wrong for this kind of norm", Refusal::kOption};
  for (const Tensor* t : {&a.rstd, &a.mean})
    if (const Refusal no = check_row_values(*t, a.x)) return no;
  if (!(a.options.weight_offset - a.options.weight_offset == 0.f))
    return {"weight_offset", "is not finite", Refusal::kOption};
  if (a.from_output && a.residual)
    return {"residual", "is not None although x is the output", Refusal::kOption};
  if (a.from_output && a.options.round_before_weight)
    return {"round_before_weight", "loses what is undone", Refusal::kOption};
  return {};
}

inline RowNormBackward row_norm_backward_of(const BackwardArguments& a) {
  RowNormBackward job;
  job.statistic = a.statistic;
  job.from_output = a.from_output;
  job.n = a.x.size(1);
  job.weight = affine_of(a.weight);
  job.bias = affine_of(a.bias);
  job.rstd = reinterpret_cast<const float*>(a.rstd.data);
  job.mean = reinterpret_cast<const float*>(a.mean.data);
  job.grad_weight = a.grad_weight.data;
  job.grad_bias = a.grad_bias.data;
  job.options = a.options;
  if (!a.weight) job.options.weight_offset = 0.f;
  job.normalised = a.x.dtype;
  const Tensor* const tensors[] = {&a.grad_y, &a.grad_residual_out, &a.x, &a.residual,
                                   &a.grad_x, &a.grad_residual};
  RowsOf* const rows[] = {&job.grad_y, &job.grad_residual_out, &job.x, &job.residual,
                          &job.grad_x, &job.grad_residual};
  lay_out_rows(a.x, tensors, rows, job);
  return job;
}

}  // namespace normkit
