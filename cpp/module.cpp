// The names, signatures and documentation of normkit._C.
#include "binding.h"
#include "checks.h"
#include "checks_backward.h"

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

// Set while use_backend() names another backend than "auto", so that the quick path asks
// normkit._dispatch first.
thread_local bool quick_path_is_off = false;

// Where autocast decides on the dtype of the output, normkit._ops knows what it says.
bool autocasts(const Arguments& a, const Backend& backend, nb::handle out_dtype) {
  return backend.has_streams && !a.out && out_dtype.is_none() &&
         call(torch_objects.is_autocast_enabled, torch_objects.cuda).is(nb::handle(Py_True));
}

// A TorchDispatchMode is about, in some thread, which may have to see the operators that run.
bool modes_are_on() {
  return PyDict_GetItemWithError(torch_objects.modes, torch_objects.in_a_mode) == Py_True;
}

// A dual tensor does not say that it is one; that duals are about, torch.autograd.forward_ad does.
bool forward_ad_is_on() {
  PyObject* level = PyDict_GetItemWithError(torch_objects.forward_ad, torch_objects.current_level);
  return level && PyLong_AsLong(level) >= 0;
}

// A trace records the operators of torch, and takes what a kernel writes for a constant.
bool is_tracing() {
  PyObject* answer = PyObject_CallNoArgs(torch_objects.is_tracing);
  if (!answer) throw nb::python_error();
  Py_DECREF(answer);  // True and False live for ever
  return answer == Py_True;
}

// Whether somebody has to learn of the call who does not see what the extension does.
Refusal check_recorders(const Arguments& a) {
  if (forward_ad_is_on()) return {"forward-mode AD", "is on"};
  if (call(torch_objects.is_grad_enabled, nullptr).is(nb::handle(Py_True)))
    for (const Tensor* t : {&a.x, &a.residual, &a.weight, &a.bias, &a.out, &a.residual_out}) {
      if (!*t) continue;
      nb::object wanted = nb::steal(PyObject_GetAttr(t->object, torch_objects.requires_grad));
      if (!wanted.is_valid()) throw nb::python_error();
      if (wanted.is(nb::handle(Py_True))) return {t->name, "requires a gradient"};
    }
  if (is_tracing()) return {"torch.jit.trace", "is recording"};
  return {};
}

// The arguments of norm(), by position.
enum Position {
  kKind,
  kX,
  kResidual,
  kWeight,
  kBias,
  kEps,
  kWeightOffset,
  kRoundBeforeWeight,
  kRoundSum,
  kClampInf,
  kOutDtype,
  kOut,
  kResidualOut,
  kMode,
  kPositions
};
enum Mode { kQuick = 0, kChecked = 1, kExplain = 2, kSaving = 3 };

Refusal read(Arguments& a, PyObject* const* args) {
  const long kind = PyLong_AsLong(args[kKind]);
  if (kind == -1 && PyErr_Occurred()) throw nb::python_error();
  a.statistic = static_cast<Statistic>(kind & 1);
  a.per_head = kind & 2;
  const auto tensor = [args](Tensor& t, Position at) { return t.read(args[at]); };
  if (const Refusal no = tensor(a.x, kX)) return no;
  if (!a.x) return {"x", "is None"};
  if (const Refusal no = tensor(a.residual, kResidual)) return no;
  if (bool(a.residual) != bool(kind & 4)) return {"residual", "is None"};
  if (const Refusal no = tensor(a.weight, kWeight)) return no;
  if (const Refusal no = tensor(a.bias, kBias)) return no;
  if (const Refusal no = tensor(a.out, kOut)) return no;
  if (const Refusal no = tensor(a.residual_out, kResidualOut)) return no;
  a.eps = kFloat32Epsilon;
  if (args[kEps] != Py_None && !read_number(args[kEps], a.eps)) return {"eps", "is not a number"};
  if (!read_number(args[kWeightOffset], a.weight_offset))
    return {"weight_offset", "is not a number"};
  if (!read_flag(args[kRoundBeforeWeight], a.round_before_weight))
    return {"round_before_weight", "is not a bool"};
  if (!read_flag(args[kRoundSum], a.round_sum)) return {"round_sum", "is not a bool"};
  if (!read_flag(args[kClampInf], a.clamp_inf)) return {"clamp_inf", "is not a bool"};
  if (args[kOutDtype] != Py_None) {
    const auto type = dtype_of(args[kOutDtype]);
    if (!type) return {"out_dtype", "is not float32, float16 or bfloat16"};
    if (a.out && a.out.dtype != *type) return {"out", "is not of out_dtype"};
  }
  return {};
}

nb::object norm(PyObject* const* args) {
  const long mode = PyLong_AsLong(args[kMode]);
  if (mode == -1 && PyErr_Occurred()) throw nb::python_error();
  const bool quick = mode == kQuick;
  if (quick && quick_path_is_off) return nb::none();
  Arguments a;
  if (const Refusal no = read(a, args)) return refuse(quick, no);
  const Backend* backend = nullptr;
  if (const Refusal no = find_backend(a.x.device, backend)) return refuse(quick, no);
  // The exchange API does not tell of a lazily negated tensor.  Such a one has a last stride of 2
  // or more, unless its rows are single elements; normkit._dispatch resolves it.
  if (quick && a.x.ndim > 0 && a.x.size(1) == 1) return nb::none();
  if (quick && modes_are_on()) return nb::none();
  if (quick && autocasts(a, *backend, args[kOutDtype])) return nb::none();
  if (const Refusal no = check(a, !quick)) return refuse(quick, no);
  if (const Refusal no = check_recorders(a)) return refuse(quick, no);

  nb::object made, made_residual;
  const bool writes_out = bool(a.out), writes_residual_out = bool(a.residual_out);
  if (!a.out) {
    made = empty_like(a.x, args[kOutDtype]);
    if (const Refusal no = a.out.read(made.ptr())) return refuse(quick, no);
  }
  if (a.residual && !a.residual_out) {
    made_residual = empty_like(a.residual, nb::none());
    if (const Refusal no = a.residual_out.read(made_residual.ptr())) return refuse(quick, no);
  }
  RowNorm job = row_norm_of(a);
  const int device = a.x.device.device_id;
  if (mode == kExplain)
    return nb::make_tuple(backend->name, backend->describe(job, device).c_str());
  void* stream = stream_for(*backend, a.x.device);
  nb::object rstd = nb::none(), mean = nb::none();
  if (mode == kSaving) {
    rstd = new_row_values(a.x, job.rstd);
    if (a.statistic == Statistic::kLayer) mean = new_row_values(a.x, job.mean);
  }
  run_job(*backend, job.rows * job.n, [&] { backend->run(job, device, stream); });
  if (writes_out) count_write(a.out);
  if (writes_residual_out) count_write(a.residual_out);
  nb::object y = nb::borrow(a.out.object);
  if (mode == kSaving) {
    nb::object total = a.residual ? nb::borrow(a.residual_out.object) : nb::none();
    return nb::make_tuple(y, total, rstd, mean);
  }
  if (!a.residual) return y;
  return nb::make_tuple(y, nb::borrow(a.residual_out.object));
}

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

Refusal read(BackwardArguments& a, PyObject* const* args) {
  const long kind = PyLong_AsLong(args[kBackwardKind]);
  if (kind == -1 && PyErr_Occurred()) throw nb::python_error();
  a.statistic = static_cast<Statistic>(kind & 1);
  a.per_head = kind & 2;
  a.from_output = kind & 8;
  Tensor* const tensors[] = {
      &a.grad_y, &a.grad_residual_out, &a.x, &a.residual, &a.weight, &a.bias, &a.rstd, &a.mean};
  for (int i = 0; i < 8; ++i)
    if (const Refusal no = tensors[i]->read(args[kGradY + i])) return no;
  if (!a.x) return {"x", "is None"};
  if (!read_number(args[kBackwardWeightOffset], a.weight_offset))
    return {"weight_offset", "is not a number"};
  if (!read_flag(args[kBackwardRoundBeforeWeight], a.round_before_weight))
    return {"round_before_weight", "is not a bool"};
  return {};
}

// A gradient of t's shape; made stays None where it is not wanted.
Refusal make_gradient(Tensor& gradient, nb::object& made, const Tensor& like, PyObject* dtype) {
  if (dtype == torch_objects.dtypes[int(like.dtype)]) dtype = Py_None;  // which is quicker
  made = empty_like(like, nb::handle(dtype));
  return gradient.read(made.ptr());
}

nb::object norm_backward(PyObject* const* args) {
  BackwardArguments a;
  if (const Refusal no = read(a, args)) return refuse(false, no);
  const Backend* backend = nullptr;
  if (const Refusal no = find_backend(a.x.device, backend)) return refuse(false, no);
  if (const Refusal no = check(a)) return refuse(false, no);
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
  for (const Tensor* t : {&a.grad_x, &a.grad_residual})
    if (!no) no = check_rows(*t, a.x);
  if (no) return refuse(false, no);

  const RowNormBackward job = row_norm_backward_of(a);
  const int device = a.x.device.device_id;
  nb::object workspace;
  Tensor memory{"workspace"};
  if (const int64_t bytes = backend->backward_workspace(job, device)) {
    workspace = new_empty(a.x, nb::make_tuple(bytes), torch_objects.uint8);
    DLTensor view;
    if (torch_objects.api->dltensor_from_py_object_no_sync(workspace.ptr(), &view))
      throw nb::python_error();
    memory.data = static_cast<char*>(view.data) + view.byte_offset;
  }
  void* stream = stream_for(*backend, a.x.device);
  run_job(*backend, job.rows * job.n,
          [&] { backend->run_backward(job, device, stream, memory.data); });
  return nb::make_tuple(grad_x, grad_residual, grad_weight, grad_bias);
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

  if (PyModule_AddFunctions(m.ptr(), methods)) throw nb::python_error();

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
