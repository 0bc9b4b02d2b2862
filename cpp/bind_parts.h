// The halves of a norm whose rows are split over processes: what a part says of its rows, and what
// it makes of them once it has heard all parts.  Callers see to autograd, and to the collective.
#pragma once
#include <vector>

#include "bind_norm_backward.h"
#include "checks.h"

namespace normkit {

// A float32 of (planes, *x.shape[:-1]), for a call to write.
inline nb::object new_statistics(const Tensor& x, Statistic statistic, Split& split) {
  std::vector<int64_t> shape(x.shape, x.shape + x.ndim);
  shape.insert(shape.begin(), planes_of(statistic));
  Tensor planes = x;
  planes.shape = shape.data();
  planes.ndim = x.ndim + 1;
  split.step = Step::kStatistics;
  return new_row_values(planes, split.statistics);
}

inline Refusal check_gathered(const Tensor& t, const Tensor& x, Statistic statistic) {
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

inline Split split_of(const Tensor& gathered, int64_t rows) {
  Split split;
  split.step = Step::kApply;
  split.gathered = reinterpret_cast<const float*>(gathered.data);
  split.parts = gathered.shape[0];
  split.plane = rows;
  return split;
}

// An output of x's shape; dtype is not None, and name is that of its argument.
inline Refusal make_like(const Tensor& x, nb::handle dtype, const char* name, nb::object& made,
                         Tensor& t) {
  if (!dtype_of(dtype.ptr())) return {name, "is not float32, float16 or bfloat16", Refusal::kDtype};
  return make_output(x, dtype, made, t);
}

template <class Arguments>
inline void read_kind(PyObject* arg, Arguments& a) {
  const long kind = PyLong_AsLong(arg);
  if (kind == -1 && PyErr_Occurred()) throw nb::python_error();
  a.statistic = static_cast<Statistic>(kind & 1);
  a.per_head = kind & 2;
}

// ---------------------------------------------------------------- forward

// part_statistics(kind, x, clamp_inf)
inline nb::object part_statistics(PyObject* const* args) {
  Arguments a;
  read_kind(args[0], a);
  if (const Refusal no = a.x.read(args[1])) return refuse(no);
  if (!a.x) return refuse({"x", "is None", Refusal::kOption});
  if (!read_flag(args[2], a.clamp_inf))
    return refuse({"clamp_inf", "is not a bool", Refusal::kOption});
  a.eps = a.weight_offset = 0.f;
  a.round_before_weight = a.round_sum = false;
  const Backend* backend = nullptr;
  if (const Refusal no = find_backend(a.x.device, backend)) return refuse(no);
  if (const Refusal no = check(a, true)) return refuse(no);

  RowNorm job = row_norm_of(a);
  job.split.plane = job.rows;
  nb::object statistics = new_statistics(a.x, a.statistic, job.split);
  void* stream = stream_for(*backend, a.x.device);
  run_job(backend->has_streams, job.rows * job.n,
          [&] { backend->run(job, a.x.device.device_id, stream); });
  return statistics;
}

// The arguments of part_apply(), by position.
enum ApplyPosition {
  kApplyKind,
  kApplyX,
  kApplyWeight,
  kApplyBias,
  kApplyEps,
  kApplyWeightOffset,
  kApplyRoundBeforeWeight,
  kApplyClampInf,
  kApplyOutDtype,
  kApplyGathered,
  kApplyPositions
};

inline Refusal read_apply(Arguments& a, Tensor& gathered, PyObject* const* args) {
  read_kind(args[kApplyKind], a);
  Tensor* const tensors[] = {&a.x, &a.weight, &a.bias};
  for (int i = 0; i < 3; ++i)
    if (const Refusal no = tensors[i]->read(args[kApplyX + i])) return no;
  if (!a.x) return {"x", "is None", Refusal::kOption};
  if (const Refusal no = gathered.read(args[kApplyGathered])) return no;
  a.eps = kFloat32Epsilon;
  if (args[kApplyEps] != Py_None && !read_number(args[kApplyEps], a.eps))
    return {"eps", "is not a number", Refusal::kOption};
  if (!read_number(args[kApplyWeightOffset], a.weight_offset))
    return {"weight_offset", "is not a number", Refusal::kOption};
  if (!read_flag(args[kApplyRoundBeforeWeight], a.round_before_weight))
    return {"round_before_weight", "is not a bool", Refusal::kOption};
  if (!read_flag(args[kApplyClampInf], a.clamp_inf))
    return {"clamp_inf", "is not a bool", Refusal::kOption};
  a.round_sum = false;
  return {};
}

inline nb::object part_apply(PyObject* const* args) {
  Arguments a;
  Tensor gathered{"gathered"};
  if (const Refusal no = read_apply(a, gathered, args)) return refuse(no);
  const Backend* backend = nullptr;
  if (const Refusal no = find_backend(a.x.device, backend)) return refuse(no);
  if (const Refusal no = check(a, true)) return refuse(no);
  if (const Refusal no = check_gathered(gathered, a.x, a.statistic)) return refuse(no);

  PyObject* dtype = args[kApplyOutDtype];
  if (dtype == Py_None) dtype = torch_objects.dtypes[int(a.x.dtype)];
  nb::object y, rstd, mean = nb::none();
  if (const Refusal no = make_like(a.x, dtype, "out_dtype", y, a.out)) return refuse(no);
  RowNorm job = row_norm_of(a);
  job.split = split_of(gathered, job.rows);
  rstd = new_row_values(a.x, job.rstd);
  if (a.statistic == Statistic::kLayer) mean = new_row_values(a.x, job.mean);
  void* stream = stream_for(*backend, a.x.device);
  run_job(backend->has_streams, job.rows * job.n,
          [&] { backend->run(job, a.x.device.device_id, stream); });
  return nb::make_tuple(y, rstd, mean);
}

// ---------------------------------------------------------------- backward

// The arguments that part_backward_statistics() begins with, in order, and those that
// part_backward_apply() does.
enum BackwardStatisticsPosition { kStatisticsWeightOffset = 6, kStatisticsPositions };
enum BackwardApplyPosition {
  kPartWeightOffset = 7,
  kPartRoundBeforeWeight,
  kPartXDtype,
  kPartWanted,
  kPartGathered,
  kPartPositions
};

// Tensors from args[1] on, then the offset.
template <int kTensors>
inline Refusal read_backward(BackwardArguments& a, Tensor* const (&tensors)[kTensors],
                             PyObject* const* args) {
  read_kind(args[0], a);
  a.from_output = a.round_before_weight = false;
  for (int i = 0; i < kTensors; ++i)
    if (const Refusal no = tensors[i]->read(args[1 + i])) return no;
  if (!a.x) return {"x", "is None", Refusal::kOption};
  if (!read_number(args[1 + kTensors], a.weight_offset))
    return {"weight_offset", "is not a number", Refusal::kOption};
  return {};
}

// part_backward_statistics(kind, grad_y, x, weight, rstd, mean, weight_offset)
inline nb::object part_backward_statistics(PyObject* const* args) {
  BackwardArguments a;
  Tensor* const tensors[] = {&a.grad_y, &a.x, &a.weight, &a.rstd, &a.mean};
  if (const Refusal no = read_backward(a, tensors, args)) return refuse(no);
  const Backend* backend = nullptr;
  if (const Refusal no = find_backend(a.x.device, backend)) return refuse(no);
  if (const Refusal no = check(a)) return refuse(no);

  RowNormBackward job = row_norm_backward_of(a);
  job.split.plane = job.rows;
  nb::object statistics = new_statistics(a.x, a.statistic, job.split);
  run_backward(*backend, job, a.x);
  return statistics;
}

// part_backward_apply(kind, grad_y, x, weight, bias, rstd, mean, weight_offset,
//                     round_before_weight, x_dtype, wanted, gathered)
inline nb::object part_backward_apply(PyObject* const* args) {
  BackwardArguments a;
  Tensor gathered{"gathered"};
  Tensor* const tensors[] = {&a.grad_y, &a.x, &a.weight, &a.bias, &a.rstd, &a.mean};
  if (const Refusal no = read_backward(a, tensors, args)) return refuse(no);
  if (const Refusal no = gathered.read(args[kPartGathered])) return refuse(no);
  if (!read_flag(args[kPartRoundBeforeWeight], a.round_before_weight))
    return refuse({"round_before_weight", "is not a bool", Refusal::kOption});
  const long wanted = PyLong_AsLong(args[kPartWanted]);
  if (wanted == -1 && PyErr_Occurred()) throw nb::python_error();
  const Backend* backend = nullptr;
  if (const Refusal no = find_backend(a.x.device, backend)) return refuse(no);
  if (const Refusal no = check(a)) return refuse(no);
  if (const Refusal no = check_gathered(gathered, a.x, a.statistic)) return refuse(no);

  nb::object grad_x = nb::none(), grad_weight = nb::none(), grad_bias = nb::none();
  Refusal no;
  if (args[kPartXDtype] != Py_None)
    no = make_like(a.x, args[kPartXDtype], "x_dtype", grad_x, a.grad_x);
  if (!no && (wanted & 1) && a.weight)
    no = make_output(a.weight, nb::none(), grad_weight, a.grad_weight);
  if (!no && (wanted & 2) && a.bias) no = make_output(a.bias, nb::none(), grad_bias, a.grad_bias);
  if (no) return refuse(no);
  RowNormBackward job = row_norm_backward_of(a);
  job.split = split_of(gathered, job.rows);
  run_backward(*backend, job, a.x);
  return nb::make_tuple(grad_x, grad_weight, grad_bias);
}

inline PyMethodDef part_methods[] = {
    {"part_statistics", as_method<part_statistics, 3>(), METH_FASTCALL,
     "part_statistics(kind, x, clamp_inf)\n\n"
     "What one part of rows that are split into equal parts along the last dimension knows of\n"
     "them: float32 (planes, *x.shape[:-1]), or a Refusal.\n\n"
     "kind is as in norm().  The planes are the sum of squares, which for layer is about the "
     "part's\n"
     "own mean; and for layer that mean."},
    {"part_apply", as_method<part_apply, kApplyPositions>(), METH_FASTCALL,
     "part_apply(kind, x, weight, bias, eps, weight_offset, round_before_weight, clamp_inf,\n"
     "           out_dtype, gathered)\n\n"
     "One part of a norm: (y, rstd, mean or None), or a Refusal.\n\n"
     "gathered is (parts, planes, *x.shape[:-1]): what part_statistics() gave to every part.  "
     "rstd\n"
     "and mean are those of whole rows."},
    {"part_backward_statistics", as_method<part_backward_statistics, kStatisticsPositions>(),
     METH_FASTCALL,
     "part_backward_statistics(kind, grad_y, x, weight, rstd, mean, weight_offset)\n\n"
     "What one part knows of the gradients of its rows, as part_statistics() has it: the means "
     "of\n"
     "g * xhat, and for layer of g.  rstd and mean are from part_apply()."},
    {"part_backward_apply", as_method<part_backward_apply, kPartPositions>(), METH_FASTCALL,
     "part_backward_apply(kind, grad_y, x, weight, bias, rstd, mean, weight_offset,\n"
     "                    round_before_weight, x_dtype, wanted, gathered)\n\n"
     "One part of the gradients: (grad_x, grad_weight, grad_bias), each None where it is not\n"
     "wanted; or a Refusal.  x_dtype and wanted are as in\n"
     "norm_backward(), gathered as in part_apply()."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace normkit
