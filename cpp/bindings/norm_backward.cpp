// norm_backward(): the gradients of one call.
#include "binding.h"
#include "fields.h"

namespace normkit {
namespace {

nb::object norm_backward(PyObject* const* args) {
  BackwardArguments a;
  if (const Refusal no = read<kBackwardFields>(a, args)) return refuse(no);
  const Backend* backend = nullptr;
  if (const Refusal no = find_backend(a.x.device, backend)) return refuse(no);
  if (const Refusal no = check(a)) return refuse(no);

  nb::object grad_x = nb::none(), grad_residual = nb::none(), grad_weight = nb::none(),
             grad_bias = nb::none();
  Refusal no;
  if (a.x_dtype) no = make_output(a.x, *a.x_dtype, grad_x, a.grad_x);
  if (!no && a.residual_dtype == a.x_dtype)
    grad_residual = grad_x;  // the same values in the same dtype
  else if (!no && a.residual_dtype)
    no = make_output(a.x, *a.residual_dtype, grad_residual, a.grad_residual);
  if (!no && a.wants_weight && a.weight)
    no = make_output(a.weight, a.weight.dtype, grad_weight, a.grad_weight);
  if (!no && a.wants_bias && a.bias) no = make_output(a.bias, a.bias.dtype, grad_bias, a.grad_bias);
  if (no) return refuse(no);

  run_backward(*backend, row_norm_backward_of(a), a.x);
  return nb::make_tuple(grad_x, grad_residual, grad_weight, grad_bias);
}

}  // namespace

void add_norm_backward(nb::module_& m) {
  static PyMethodDef methods[] = {
      method<kBackwardFields, norm_backward>("norm_backward", R"(Make the gradients of a row norm.

Returns (grad_x, grad_residual, grad_weight, grad_bias), each None where it is not wanted; or a
Refusal.

kind is as in try_norm(), plus 8 when x is the output and is to be undone.  x is what was
normalised; or x + residual was, in float32.  x_dtype and residual_dtype are those of the first two
gradients, or None; both are one tensor where they are of one dtype.  wanted is 1 for weight's
gradient plus 2 for bias's.)"),
      {nullptr, nullptr, 0, nullptr}};
  add_methods(m, methods);
}

}  // namespace normkit
