// The names, signatures and documentation of normkit._C.
#include "bind_norm.h"
#include "bind_norm_backward.h"
#include "bind_norm_tp.h"
#include "bind_parts.h"

using namespace nanobind::literals;

namespace normkit {
namespace {

void bind_torch(nb::handle tensor, nb::handle parameter, nb::handle empty_like,
                nb::handle is_grad_enabled, nb::handle increment_version, nb::handle forward_ad,
                nb::handle float32, nb::handle float16, nb::handle bfloat16, nb::handle uint8,
                nb::handle is_autocast_enabled, nb::handle is_tracing, nb::handle modes) {
  nb::object capsule = nb::getattr(tensor, "__dlpack_c_exchange_api__");
  auto* header = static_cast<const DLPackExchangeAPIHeader*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!header) throw nb::python_error();
  while (header && header->version.major != kDLPackMajor) header = header->prev_api;
  const auto* api = reinterpret_cast<const DLPackExchangeAPI*>(header);
  if (!api || !api->dltensor_from_py_object_no_sync)
    throw nb::import_error("this torch offers no DLPack 1.x exchange API");
  Torch torch;
  torch.api = api;
  torch.tensor = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
  torch.parameter = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
  torch.empty_like = empty_like.inc_ref().ptr();
  torch.is_grad_enabled = is_grad_enabled.inc_ref().ptr();
  torch.increment_version = increment_version.inc_ref().ptr();
  torch.forward_ad = forward_ad.inc_ref().ptr();
  torch.current_level = nb::str("_current_level").release().ptr();
  torch.requires_grad = nb::str("requires_grad").release().ptr();
  torch.new_empty = nb::str("new_empty").release().ptr();
  torch.uint8 = uint8.inc_ref().ptr();
  torch.is_autocast_enabled = is_autocast_enabled.inc_ref().ptr();
  torch.is_tracing = is_tracing.inc_ref().ptr();
  torch.modes = modes.inc_ref().ptr();
  torch.in_a_mode = nb::str("_is_in_torch_dispatch_mode").release().ptr();
  torch.cuda = nb::str("cuda").release().ptr();
  torch.dtypes[int(DType::kFloat32)] = float32.inc_ref().ptr();
  torch.dtypes[int(DType::kFloat16)] = float16.inc_ref().ptr();
  torch.dtypes[int(DType::kBFloat16)] = bfloat16.inc_ref().ptr();
  torch_objects = torch;
}

PyMethodDef methods[] = {
    {"norm", as_method<norm, kPositions>(), METH_FASTCALL,
     "norm(kind, x, residual, weight, bias, eps, weight_offset, round_before_weight, round_sum,\n"
     "     clamp_inf, out_dtype, out, residual_out, mode)\n\n"
     "Run a row norm: y, or (y, residual_out) when there is a residual.\n\n"
     "kind is 0 for rms and 1 for layer, plus 2 when weight and bias may have a row per head, "
     "plus\n"
     "4 when there is a residual.\n"
     "mode is 0 for the first try, which returns None where it cannot serve; 1 when the caller "
     "has\n"
     "checked that outputs overlap nothing, and wants a str that says why not; 2 like 1 but to "
     "get\n"
     "the backend's name and its plan, as a tuple of two str, instead of running; and 3 like 1 "
     "but\n"
     "to get (y, residual_out or None, rstd, mean or None), with what norm_backward() needs."},
    {"norm_backward", as_method<norm_backward, kBackwardPositions>(), METH_FASTCALL,
     "norm_backward(kind, grad_y, grad_residual_out, x, residual, weight, bias, rstd, mean,\n"
     "              weight_offset, round_before_weight, x_dtype, residual_dtype, wanted)\n\n"
     "Gradients of a row norm: (grad_x, grad_residual, grad_weight, grad_bias), each None where "
     "it\n"
     "is not wanted; or a str that says why there are none.\n\n"
     "kind is as in norm(), plus 8 when x is the output and is to be undone.  x is what was\n"
     "normalised; or x + residual was, in float32.  x_dtype and residual_dtype are those of the\n"
     "first two gradients, or None; both are one tensor where they are of one dtype.  wanted is 1\n"
     "for weight's gradient plus 2 for bias's."},
    {"norm_tp", as_method<norm_tp, kTpPositions>(), METH_FASTCALL,
     "norm_tp(kind, xs, weights, biases, eps, weight_offset, round_before_weight, clamp_inf,\n"
     "        out_dtype, outs, streams)\n\n"
     "Run a row norm of each of xs on its device: a list of y, or None where one of them cannot "
     "be\n"
     "served.\n\n"
     "kind is as in norm(), without a residual.  weights, biases and outs are as long as xs, or "
     "None.\n"
     "streams[0] is of the CPU and streams[1 + i] of CUDA device i: a handle, -1 for torch's "
     "current\n"
     "stream, or None where there must be nothing."},
    {nullptr, nullptr, 0, nullptr}};

nb::object cuda_devices() {
  nb::list found;
#if defined(NORMKIT_HAS_CUDA)
  const cuda::Devices devices = cuda::devices();
  for (int i = 0; i < devices.count; ++i) {
    const cuda::KnownDevice& known = cuda::device(i);
    found.append(nb::make_tuple(known.name.c_str(), known.unusable.c_str()));
  }
  return nb::make_tuple(found, devices.message);
#else
  return nb::make_tuple(found, "built without CUDA");
#endif
}

#ifndef NORMKIT_EMULATED
nb::list instruction_sets() {
  nb::list names;
  for (const char* const* name = cpu::instruction_sets(); *name; ++name) names.append(*name);
  return names;
}
#endif

}  // namespace
}  // namespace normkit

NB_MODULE(_C, m) {
  using namespace normkit;
  m.doc() =
      "normkit's kernels.  Private: normkit.functional is the way in, and says what each argument "
      "means.";

  m.def("bind_torch", &bind_torch, "tensor"_a, "parameter"_a, "empty_like"_a, "is_grad_enabled"_a,
        "increment_version"_a, "forward_ad"_a, "float32"_a, "float16"_a, "bfloat16"_a, "uint8"_a,
        "is_autocast_enabled"_a, "is_tracing"_a, "modes"_a,
        "Hand over what the extension needs of torch.  Raises ImportError when torch is too old.");

  if (PyModule_AddFunctions(m.ptr(), methods) || PyModule_AddFunctions(m.ptr(), part_methods))
    throw nb::python_error();

  m.def(
      "set_quick_path", [](bool on) { quick_path_is_off = !on; }, "on"_a,
      "Whether this thread's calls in mode 0 are served.");

  m.def("cuda_devices", &cuda_devices,
        "(name, why it is not usable or an empty str) of each CUDA device, and why there is none "
        "if so.");
#ifndef NORMKIT_EMULATED
  m.def("cpu_instruction_sets", &instruction_sets, "Those with kernels that run here, best first.");
  m.def("cpu_instruction_set", &cpu::instruction_set, "The one in use, or None.");
  m.def(
      "use_cpu_instruction_set",
      [](const char* name) {
        if (!cpu::use_instruction_set(name))
          throw nb::value_error("name: expected one of cpu_instruction_sets()");
      },
      "name"_a, "Use another one from now on, in every thread.  The results are the same bits.");
#endif
}
