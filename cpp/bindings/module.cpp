// The module normkit._C: what it needs of torch, what it tells of devices, and its functions.
#include <algorithm>

#include "binding.h"
#include "shim.h"

using namespace nanobind::literals;

namespace normkit {
namespace {

// torch.a.b.c by its path; ImportError with the path where this torch has none, since some of them
// are private, and a quick path that took a renamed one for "off" would lose tangents in silence.
nb::object torch_attribute(nb::handle torch, const std::string& path) {
  nb::object found = nb::borrow(torch);
  for (size_t begin = 0; begin <= path.size();) {
    const size_t end = std::min(path.find('.', begin), path.size());
    const std::string name = path.substr(begin, end - begin);
    if (!nb::hasattr(found, name.c_str()))
      throw nb::import_error(
          ("normkit needs torch." + path + ", which this torch does not have").c_str());
    found = nb::getattr(found, name.c_str());
    begin = end + 1;
  }
  return found;
}

// The dict of a module of torch, in which a name is looked up at every call, and that name.
PyObject* torch_globals(nb::handle torch, const char* module, const char* name, PyObject*& key) {
  torch_attribute(torch, std::string(module) + "." + name);
  key = PyUnicode_InternFromString(name);  // found by its address, not by its letters
  return PyModule_GetDict(torch_attribute(torch, module).release().ptr());
}

Function torch_function(nb::handle torch, const char* path) {
  Function f;
  f.object = torch_attribute(torch, path).release().ptr();
  if (!PyCFunction_Check(f.object)) return f;
  f.builtin = PyCFunction_GetFunction(f.object);
  f.self = PyCFunction_GetSelf(f.object);
  f.flags = PyCFunction_GetFlags(f.object);
  return f;
}

// What reads these properties of torch.Tensor, 10 ns sooner than by their names.
descrgetfunc property_getter(PyObject* property, PyObject* other) {
  PyTypeObject* const type = Py_TYPE(property);
  void* const get = PyType_GetSlot(type, Py_tp_descr_get);
  if (!get || Py_TYPE(other) != type)
    throw nb::import_error("normkit needs requires_grad and _version as properties of a tensor");
  return reinterpret_cast<descrgetfunc>(get);
}

const DLPackExchangeAPI* exchange_api(nb::handle capsule) {
  auto* header = static_cast<const DLPackExchangeAPIHeader*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!header) throw nb::python_error();
  while (header && header->version.major != kDLPackMajor) header = header->prev_api;
  const auto* api = reinterpret_cast<const DLPackExchangeAPI*>(header);
  if (!api || !api->dltensor_from_py_object_no_sync)
    throw nb::import_error("this torch offers no DLPack 1.x exchange API");
  return api;
}

// torch's objects live as long as the interpreter: what is kept of them is never let go.
void bind_torch(nb::handle torch, nb::handle refusal) {
  const auto keep = [torch](const char* path) {
    return torch_attribute(torch, path).release().ptr();
  };
  Torch bound;
  bound.api = exchange_api(torch_attribute(torch, "Tensor.__dlpack_c_exchange_api__"));
  bound.tensor = reinterpret_cast<PyTypeObject*>(keep("Tensor"));
  bound.parameter = reinterpret_cast<PyTypeObject*>(keep("nn.Parameter"));
  bound.empty_like = keep("empty_like");
  bound.contiguous_format = keep("contiguous_format");
  bound.no_arguments = PyTuple_New(0);
  bound.is_grad_enabled = torch_function(torch, "is_grad_enabled");
#ifndef NORMKIT_EMULATED
  bound.grad_mode = shim::find_is_grad_enabled();
#endif
  bound.is_transforming = torch_function(torch, "_C._are_functorch_transforms_active");
  bound.is_inference_mode_enabled = torch_function(torch, "is_inference_mode_enabled");
  bound.increment_version = torch_function(torch, "_C._increment_version");
  bound.forward_ad =
      torch_globals(torch, "autograd.forward_ad", "_current_level", bound.current_level);
  bound.requires_grad = keep("Tensor.requires_grad");
  bound.version = keep("Tensor._version");
  bound.get_property = property_getter(bound.requires_grad, bound.version);
  bound.new_empty = nb::str("new_empty").release().ptr();
  bound.uint8 = keep("uint8");
  bound.is_autocast_enabled = torch_function(torch, "is_autocast_enabled");
  bound.is_tracing = torch_function(torch, "_C._is_tracing");
  bound.is_neg = torch_function(torch, "is_neg");
  bound.modes =
      torch_globals(torch, "utils._python_dispatch", "_is_in_torch_dispatch_mode", bound.in_a_mode);
  bound.cuda = nb::str("cuda").release().ptr();
  bound.dtypes[int(DType::kFloat32)] = keep("float32");
  bound.dtypes[int(DType::kFloat16)] = keep("float16");
  bound.dtypes[int(DType::kBFloat16)] = keep("bfloat16");
  bound.refusal = nb::borrow(refusal).release().ptr();
  for (int i = 0; i < Refusal::kKinds; ++i)
    bound.kinds[i] = nb::str(Refusal::kKindNames[i]).release().ptr();
  torch_objects = bound;
}

nb::object cuda_devices() {
  nb::list found;
#if defined(NORMKIT_HAS_CUDA)
  const cuda::Devices devices = cuda::devices();
  for (int i = 0; i < devices.count; ++i) {
    const cuda::KnownDevice known = cuda::glance_at(i);
    found.append(nb::make_tuple(known.name.c_str(), known.unusable.c_str()));
  }
  return nb::make_tuple(found, devices.message.c_str());
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

  m.def(
      "bind_torch", &bind_torch, "torch"_a, "refusal"_a,
      "Take what the extension needs of torch, raising ImportError for what this torch lacks, and "
      "the class Refusal(argument, problem, kind) that it calls where no kernel runs a call.");

  add_norm(m);
  add_norm_backward(m);
  add_norm_tp(m);
  add_norms(m);
  add_parts(m);

  m.def("cuda_devices", &cuda_devices,
        "(name, why it is not usable or an empty str) of each CUDA device, and why there is none "
        "if so.");
#ifndef NORMKIT_EMULATED
  add_operators(m);
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
