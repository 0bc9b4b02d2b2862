// norm_backward(): the gradients of one call.
#pragma once
#include "binding.h"
#include "checks_backward.h"

namespace normkit {

// The arguments of norm_backward(), by position.
enum BackwardPosition {
  kBackwardKind,
  kGradY,
  kGradResidualOut,
  kBackwardX,
  kBackwardResidual,
  kBackwardWeight,
  kBackwardBias,
  kRstd,
  kMean,
  kBackwardWeightOffset,
  kBackwardRoundBeforeWeight,
  kXDtype,
  kResidualDtype,
  kWanted,
  kBackwardPositions
};

inline Refusal read(BackwardArguments& a, PyObject* const* args) {
  const long kind = PyLong_AsLong(args[kBackwardKind]);
  if (kind == -1 && PyErr_Occurred()) throw nb::python_error();
  a.statistic = static_cast<Statistic>(kind & 1);
  a.per_head = kind & 2;
  a.from_output = kind & 8;
  Tensor* const tensors[] = {
      &a.grad_y, &a.grad_residual_out, &a.x, &a.residual, &a.weight, &a.bias, &a.rstd, &a.mean};
  for (int i = 0; i < 8; ++i)
    if (const Refusal no = tensors[i]->read(args[kGradY + i])) return no;
  if (!a.x) return {"x", "is None", Refusal::kOption};
  if (!read_number(args[kBackwardWeightOffset], a.weight_offset))
    return {"weight_offset", "is not a number", Refusal::kOption};
  if (!read_flag(args[kBackwardRoundBeforeWeight], a.round_before_weight))
    return {"round_before_weight", "is not a bool", Refusal::kOption};
  return {};
}

// A gradient of t's shape; made stays None where it is not wanted.
inline Refusal make_gradient(Tensor& gradient, nb::object& made, const Tensor& like,
                             PyObject* dtype) {
  if (dtype == torch_objects.dtypes[int(like.dtype)]) dtype = Py_None;  // which is quicker
  return make_output(like, nb::handle(dtype), made, gradient);
}

inline void run_backward(const Backend& backend, const RowNormBackward& job, const Tensor& x) {
  const int device = x.device.device_id;
  nb::object workspace;
  void* memory = nullptr;
  if (const int64_t bytes = backend.backward_workspace(job, device)) {
    workspace = new_empty(x, nb::make_tuple(bytes), torch_objects.uint8);
    DLTensor view;
    if (torch_objects.api->dltensor_from_py_object_no_sync(workspace.ptr(), &view))
      throw nb::python_error();
    memory = static_cast<char*>(view.data) + view.byte_offset;
  }
  void* stream = stream_for(backend, x.device);
  run_job(backend.has_streams, job.rows * job.n,
          [&] { backend.run_backward(job, device, stream, memory); });
}

inline nb::object norm_backward(PyObject* const* args) {
  BackwardArguments a;
  if (const Refusal no = read(a, args)) return refuse(no);
  const Backend* backend = nullptr;
  if (const Refusal no = find_backend(a.x.device, backend)) return refuse(no);
  if (const Refusal no = check(a)) return refuse(no);
  const long wanted = PyLong_AsLong(args[kWanted]);
  if (wanted == -1 && PyErr_Occurred()) throw nb::python_error();

  nb::object grad_x = nb::none(), grad_residual = nb::none(), grad_weight = nb::none(),
             grad_bias = nb::none();
  PyObject *const x_dtype = args[kXDtype], *const residual_dtype = args[kResidualDtype];
  Refusal no;
  if (x_dtype != Py_None) no = make_gradient(a.grad_x, grad_x, a.x, x_dtype);
  if (!no && residual_dtype == x_dtype)
    grad_residual = grad_x;  // the same values in the same dtype
  else if (!no && residual_dtype != Py_None)
    no = make_gradient(a.grad_residual, grad_residual, a.x, residual_dtype);
  if (!no && (wanted & 1) && a.weight)
    no = make_gradient(a.grad_weight, grad_weight, a.weight, Py_None);
  if (!no && (wanted & 2) && a.bias) no = make_gradient(a.grad_bias, grad_bias, a.bias, Py_None);
  if (no) return refuse(no);

  run_backward(*backend, row_norm_backward_of(a), a.x);
  return nb::make_tuple(grad_x, grad_residual, grad_weight, grad_bias);
}

}  // namespace normkit
