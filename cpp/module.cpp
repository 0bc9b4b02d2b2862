// The names, signatures and documentation of normkit._C.
#include <nanobind/nanobind.h>

#include <string>

#include "checks.h"
#include "cpu/row_norm.h"
#ifdef NORMKIT_HAS_CUDA
#include "../cuda/device_query.h"
#endif

namespace nb = nanobind;
using namespace nb::literals;

namespace normkit {
namespace {

// Work below this is over before another thread could take the interpreter.
constexpr int64_t kReleaseGilBytes = 64 << 10;

nb::object reason(const Refusal& no) {
  return nb::str((std::string(no.argument) + " " + no.what).c_str());
}

void bind_torch(nb::handle tensor, nb::handle parameter, nb::handle empty_like,
                nb::handle is_grad_enabled, nb::handle increment_version, nb::handle float32,
                nb::handle float16, nb::handle bfloat16) {
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
  torch.dtypes[int(DType::kFloat32)] = float32.inc_ref().ptr();
  torch.dtypes[int(DType::kFloat16)] = float16.inc_ref().ptr();
  torch.dtypes[int(DType::kBFloat16)] = bfloat16.inc_ref().ptr();
  torch_objects = torch;
}

// Set while use_backend() names another backend than "auto", so that the quick path asks normkit._dispatch first.
thread_local bool quick_path_is_off = false;

bool grad_enabled() {
  nb::object enabled = nb::steal(PyObject_CallNoArgs(torch_objects.is_grad_enabled));
  if (!enabled.is_valid()) throw nb::python_error();
  return enabled.is(nb::handle(Py_True));
}

Refusal check_gradients(const Arguments& a) {
  if (!grad_enabled()) return {};
  for (const Tensor* t : {&a.x, &a.residual, &a.weight, &a.bias, &a.out, &a.residual_out})
    if (*t && nb::bool_(nb::getattr(nb::handle(t->object), "requires_grad")))
      return {t->name, "requires a gradient"};
  return {};
}

nb::object empty_like(const Tensor& like, nb::handle dtype) {
  PyObject* made;
  if (dtype.is_none()) {
    made = PyObject_CallFunctionObjArgs(torch_objects.empty_like, like.object, nullptr);
  } else {
    nb::dict options;
    options["dtype"] = dtype;
    made = PyObject_Call(torch_objects.empty_like, nb::make_tuple(nb::handle(like.object)).ptr(),
                         options.ptr());
  }
  if (!made) throw nb::python_error();
  return nb::steal(made);
}

// Autograd learns of the write by the version counter, as it does from torch's own in-place operators.
void count_write(const Tensor& t) {
  nb::object done = nb::steal(PyObject_CallFunctionObjArgs(
      torch_objects.increment_version, nb::make_tuple(nb::handle(t.object)).ptr(), nullptr));
  if (!done.is_valid()) throw nb::python_error();
}

bool read_number(nb::handle value, float& number) {
  PyObject* object = value.ptr();
  if (PyBool_Check(object) || !(PyFloat_Check(object) || PyLong_Check(object))) return false;
  number = static_cast<float>(PyFloat_AsDouble(object));
  if (PyErr_Occurred()) throw nb::python_error();
  return true;
}

bool read_flag(nb::handle value, bool& flag) {
  flag = value.ptr() == Py_True;
  return flag || value.ptr() == Py_False;
}

constexpr float kFloat32Epsilon = 1.1920929e-07f;

Refusal read_arguments(Arguments& a, int kind, nb::handle x, nb::handle residual, nb::handle weight,
                       nb::handle bias, nb::handle out, nb::handle residual_out) {
  a.statistic = static_cast<Statistic>(kind & 1);
  a.per_head = kind & 2;
  Tensor* const tensors[] = {&a.x, &a.residual, &a.weight, &a.bias, &a.out, &a.residual_out};
  const nb::handle sources[] = {x, residual, weight, bias, out, residual_out};
  for (int i = 0; i < 6; ++i)
    if (const Refusal no = tensors[i]->read(sources[i].ptr())) return no;
  if (!a.x) return {"x", "is None"};
  return {};
}

Refusal read_options(Arguments& a, nb::handle eps, nb::handle weight_offset,
                     nb::handle round_before_weight, nb::handle round_sum, nb::handle clamp_inf) {
  a.eps = kFloat32Epsilon;
  if (!eps.is_none() && !read_number(eps, a.eps)) return {"eps", "is not a number"};
  if (!read_number(weight_offset, a.weight_offset)) return {"weight_offset", "is not a number"};
  if (!read_flag(round_before_weight, a.round_before_weight))
    return {"round_before_weight", "is not a bool"};
  if (!read_flag(round_sum, a.round_sum)) return {"round_sum", "is not a bool"};
  if (!read_flag(clamp_inf, a.clamp_inf)) return {"clamp_inf", "is not a bool"};
  return {};
}

nb::object describe(const RowNorm& job) {
  const cpu::Plan plan = cpu::plan(job);
  std::string text = std::string(cpu::instruction_set()) + ", " + std::to_string(plan.threads) +
                     (plan.threads == 1 ? " thread, " : " threads, ") +
                     std::to_string(plan.block_rows) +
                     (plan.block_rows == 1 ? " row" : " rows") + " at a time";
  if (plan.stream) text += ", stores around the caches";
  return nb::make_tuple(text);
}

enum Mode { kQuick = 0, kChecked = 1, kExplain = 2 };

nb::object norm(int kind, nb::handle x, nb::handle residual, nb::handle weight, nb::handle bias,
                nb::handle eps, nb::handle weight_offset, nb::handle round_before_weight,
                nb::handle round_sum, nb::handle clamp_inf, nb::handle out_dtype, nb::handle out,
                nb::handle residual_out, int mode) {
  const bool quick = mode == kQuick, explain = mode == kExplain;
  if (quick && quick_path_is_off) return nb::str("a backend was asked for by name");
  if (!cpu::instruction_set()) return nb::str("the processor has none of AVX2, AVX-512 and NEON");
  Arguments a;
  if (const Refusal no = read_arguments(a, kind, x, residual, weight, bias, out, residual_out))
    return reason(no);
  if (const Refusal no =
          read_options(a, eps, weight_offset, round_before_weight, round_sum, clamp_inf))
    return reason(no);
  if (const Refusal no = check(a, !quick)) return reason(no);
  if (!out_dtype.is_none()) {
    const auto type = dtype_of(out_dtype.ptr());
    if (!type || (a.out && a.out.dtype != *type)) return reason({"out_dtype", "is not out's dtype or not a norm's"});
  }
  if (const Refusal no = check_gradients(a)) return reason(no);

  nb::object made, made_residual;
  const bool writes_out = bool(a.out), writes_residual_out = bool(a.residual_out);
  if (!a.out) {
    made = empty_like(a.x, out_dtype);
    if (const Refusal no = a.out.read(made.ptr())) return reason(no);
  }
  if (a.residual && !a.residual_out) {
    made_residual = empty_like(a.residual, nb::none());
    if (const Refusal no = a.residual_out.read(made_residual.ptr())) return reason(no);
  }
  const RowNorm job = row_norm_of(a);
  if (explain) return describe(job);
  if (job.rows * job.n >= kReleaseGilBytes) {
    nb::gil_scoped_release release;
    cpu::row_norm(job);
  } else {
    cpu::row_norm(job);
  }
  if (writes_out) count_write(a.out);
  if (writes_residual_out) count_write(a.residual_out);
  nb::object y = nb::borrow(a.out.object);
  if (!a.residual) return y;
  return nb::make_tuple(y, nb::borrow(a.residual_out.object));
}


nb::object cuda_devices() {
#ifdef NORMKIT_HAS_CUDA
  const cuda::Devices devices = cuda::devices();
  return nb::make_tuple(devices.count, devices.message);
#else
  return nb::make_tuple(0, "built without CUDA");
#endif
}

nb::list instruction_sets() {
  nb::list names;
  for (const char* const* name = cpu::instruction_sets(); *name; ++name) names.append(*name);
  return names;
}

}  // namespace
}  // namespace normkit

NB_MODULE(_C, m) {
  using namespace normkit;
  m.doc() = "normkit's kernels.  Private: normkit.functional is the way in, and says what each argument means.";

  m.def("bind_torch", &bind_torch, "tensor"_a, "parameter"_a, "empty_like"_a, "is_grad_enabled"_a,
        "increment_version"_a, "float32"_a, "float16"_a, "bfloat16"_a,
        "Hand over what the extension needs of torch.  Raises ImportError when torch is too old.");

  m.def("norm", &norm, "kind"_a, "x"_a.none(), "residual"_a.none(), "weight"_a.none(), "bias"_a.none(),
        "eps"_a.none(), "weight_offset"_a.none(), "round_before_weight"_a.none(), "round_sum"_a.none(),
        "clamp_inf"_a.none(), "out_dtype"_a.none(), "out"_a.none(), "residual_out"_a.none(), "mode"_a,
        "Run a row norm: y, or (y, residual_out) when there is a residual, or a str that says why not.\n\n"
        "kind is 0 for rms and 1 for layer, plus 2 when weight and bias may have a row per head.\n"
        "mode is 0 for the first try, 1 when the caller has checked that outputs overlap nothing, and\n"
        "2 to get the plan as a tuple of one str instead of running.");

  m.def("set_quick_path", [](bool on) { quick_path_is_off = !on; }, "on"_a,
        "Whether this thread's calls in mode 0 are served.");

  m.def("cuda_devices", &cuda_devices, "The number of CUDA devices, and why it is 0 if it is.");
  m.def("cpu_instruction_sets", &instruction_sets, "Those with kernels that run here, best first.");
  m.def("cpu_instruction_set", &cpu::instruction_set, "The one in use, or None.");
  m.def(
      "use_cpu_instruction_set",
      [](const char* name) {
        if (!cpu::use_instruction_set(name))
          throw nb::value_error("name: expected one of cpu_instruction_sets()");
      },
      "name"_a, "Use another one from now on, in every thread.  The results are the same bits.");
}
