// The halves of a norm whose rows are split over processes: what a part says of its rows, and what
// it makes of them once it has heard all parts.  Callers see to autograd, and to the collective.
#include <vector>

#include "binding.h"
#include "fields.h"

namespace normkit {
namespace {

// A float32 of (planes, *x.shape[:-1]), for a call to write.
nb::object new_statistics(const Tensor& x, Statistic statistic, Split& split) {
  std::vector<int64_t> shape(x.shape, x.shape + x.ndim);
  shape.insert(shape.begin(), planes_of(statistic));
  Tensor planes = x;
  planes.shape = shape.data();
  planes.ndim = x.ndim + 1;
  split.step = Step::kStatistics;
  return new_row_values(planes, split.statistics);
}

Refusal check_gathered(const Tensor& t, const Tensor& x, Statistic statistic) {
  if (!t) return {t.name, "is None", Refusal::kOption};
  if (t.dtype != DType::kFloat32) return {t.name, "is not float32", Refusal::kDtype};
  if (t.ndim != x.ndim + 1 || t.shape[0] < 1 || t.shape[1] != planes_of(statistic))
    return {t.name, "is not (parts, planes, *x.shape[:-1])", Refusal::kShape};
  for (int d = 2; d < t.ndim; ++d)
    if (t.shape[d] != x.shape[d - 2])
      return {t.name, "is not (parts, planes, *x.shape[:-1])", Refusal::kShape};
  if (!is_dense(t)) return {t.name, "is not contiguous", Refusal::kMemory};
  return check_device(t, x);
}

Split split_of(const Tensor& gathered, int64_t rows) {
  Split split;
  split.step = Step::kApply;
  split.gathered = reinterpret_cast<const float*>(gathered.data);
  split.parts = gathered.shape[0];
  split.plane = rows;
  return split;
}

// ---------------------------------------------------------------- forward

nb::object part_statistics(PyObject* const* args) {
  PartArguments a;
  if (const Refusal no = read<kPartStatisticsFields>(a, args)) return refuse(no);
  const Backend* backend = nullptr;
  if (const Refusal no = find_backend(a.x.device, backend)) return refuse(no);
  if (const Refusal no = check(a, true)) return refuse(no);
  if (const Refusal no = check_rows(a.x, a.x, Refusal::kStrides)) return refuse(no);

  RowNorm job;
  lay_out(a, job);
  job.split.plane = job.rows;
  nb::object statistics = new_statistics(a.x, a.statistic, job.split);
  void* stream = stream_for(*backend, a.x.device);
  run_job(backend->has_streams, job.rows * job.n,
          [&] { backend->run(job, a.x.device.device_id, stream); });
  return statistics;
}

nb::object part_apply(PyObject* const* args) {
  PartArguments a;
  if (const Refusal no = read<kPartApplyFields>(a, args)) return refuse(no);
  const Backend* backend = nullptr;
  if (const Refusal no = find_backend(a.x.device, backend)) return refuse(no);
  if (const Refusal no = check(a, true)) return refuse(no);
  if (const Refusal no = check_rows(a.x, a.x, Refusal::kStrides)) return refuse(no);
  if (const Refusal no = check_gathered(a.gathered, a.x, a.statistic)) return refuse(no);

  nb::object y, rstd, mean = nb::none();
  if (const Refusal no = make_output(a.x, a.out_dtype.value_or(a.x.dtype), y, a.out))
    return refuse(no);
  RowNorm job;
  lay_out(a, job);
  job.split = split_of(a.gathered, job.rows);
  rstd = new_row_values(a.x, job.rstd);
  if (a.statistic == Statistic::kLayer) mean = new_row_values(a.x, job.mean);
  void* stream = stream_for(*backend, a.x.device);
  run_job(backend->has_streams, job.rows * job.n,
          [&] { backend->run(job, a.x.device.device_id, stream); });
  return nb::make_tuple(y, rstd, mean);
}

// ---------------------------------------------------------------- backward

nb::object part_backward_statistics(PyObject* const* args) {
  BackwardPartArguments a;
  if (const Refusal no = read<kPartBackwardStatisticsFields>(a, args)) return refuse(no);
  const Backend* backend = nullptr;
  if (const Refusal no = find_backend(a.x.device, backend)) return refuse(no);
  if (const Refusal no = check(a)) return refuse(no);

  RowNormBackward job = row_norm_backward_of(a);
  job.split.plane = job.rows;
  nb::object statistics = new_statistics(a.x, a.statistic, job.split);
  run_backward(*backend, job, a.x);
  return statistics;
}

nb::object part_backward_apply(PyObject* const* args) {
  BackwardPartArguments a;
  if (const Refusal no = read<kPartBackwardApplyFields>(a, args)) return refuse(no);
  const Backend* backend = nullptr;
  if (const Refusal no = find_backend(a.x.device, backend)) return refuse(no);
  if (const Refusal no = check(a)) return refuse(no);
  if (const Refusal no = check_gathered(a.gathered, a.x, a.statistic)) return refuse(no);

  nb::object grad_x = nb::none(), grad_weight = nb::none(), grad_bias = nb::none();
  Refusal no;
  if (a.x_dtype) no = make_output(a.x, *a.x_dtype, grad_x, a.grad_x);
  if (!no && a.wants_weight && a.weight)
    no = make_output(a.weight, a.weight.dtype, grad_weight, a.grad_weight);
  if (!no && a.wants_bias && a.bias) no = make_output(a.bias, a.bias.dtype, grad_bias, a.grad_bias);
  if (no) return refuse(no);
  RowNormBackward job = row_norm_backward_of(a);
  job.split = split_of(a.gathered, job.rows);
  run_backward(*backend, job, a.x);
  return nb::make_tuple(grad_x, grad_weight, grad_bias);
}

}  // namespace

void add_parts(nb::module_& m) {
  static PyMethodDef methods[] = {
      method<kPartStatisticsFields, part_statistics>("part_statistics",
                                                     R"(Take the statistics of one part of rows.

Rows are split into equal parts along the last dimension.  Returns float32 (planes, *x.shape[:-1]),
or a Refusal.

kind is as in try_norm().  The planes are the sum of squares, which for layer is about the part's
own mean; and for layer that mean.)"),
      method<kPartApplyFields, part_apply>("part_apply", R"(Run one part of a norm.

Returns (y, rstd, mean or None), or a Refusal; rstd and mean are those of whole rows.

gathered is (parts, planes, *x.shape[:-1]): what part_statistics() gave to every part.)"),
      method<kPartBackwardStatisticsFields, part_backward_statistics>(
          "part_backward_statistics", R"(Take what one part knows of the gradients of its rows.

As part_statistics(), the planes being the means of g * xhat, and for layer of g.  rstd and mean are
from part_apply().)"),
      method<kPartBackwardApplyFields, part_backward_apply>("part_backward_apply",
                                                            R"(Make one part of the gradients.

Returns (grad_x, grad_weight, grad_bias), each None where it is not wanted; or a Refusal.

x_dtype and wanted are as in norm_backward(), gathered as in part_apply().)"),
      {nullptr, nullptr, 0, nullptr}};
  add_methods(m, methods);
}

}  // namespace normkit
