// What the functions of the extension share: refusing a call, making outputs, running a job.
#pragma once
#include <nanobind/nanobind.h>

#include <string>

#include "backends.h"
#include "checks.h"

namespace normkit {

namespace nb = nanobind;

// Work below this is over before another thread could take the interpreter.
inline constexpr int64_t kReleaseGilElements = 32 << 10;

// What a function returns instead of a result: normkit's Refusal(argument, problem, kind).
inline nb::object refuse(const Refusal& no) {
  if (!torch_objects.refusal) throw std::runtime_error("bind_torch() was not called");
  return nb::handle(torch_objects.refusal)(no.argument, no.problem,
                                           nb::handle(torch_objects.kinds[no.kind]));
}

// Calls a function of torch with at most one argument; a builtin's C function takes 10 to 35 ns
// less than PyObject_Call.
inline nb::object call(const Function& f, PyObject* argument = nullptr) {
  PyObject* result;
  if (f.flags == (argument ? METH_O : METH_NOARGS))
    result = f.builtin(f.self, argument);
  else if (f.flags == (METH_VARARGS | METH_KEYWORDS) && !argument)
    result = reinterpret_cast<PyCFunctionWithKeywords>(reinterpret_cast<void (*)()>(f.builtin))(
        f.self, torch_objects.no_arguments, nullptr);
  else if (argument)
    result = PyObject_CallFunctionObjArgs(f.object, argument, nullptr);
  else
    result = PyObject_CallNoArgs(f.object);
  if (!result) throw nb::python_error();
  return nb::steal(result);
}

// Calls one that tells yes or no.
inline bool ask(const Function& f, PyObject* argument = nullptr) {
  return call(f, argument).ptr() == Py_True;
}

inline bool is_grad_enabled() {
  return torch_objects.grad_mode ? torch_objects.grad_mode() : ask(torch_objects.is_grad_enabled);
}

// torch.empty_like(like, dtype=dtype), but packed.  DLPack's allocator would take 160 ns less, but
// what it makes is memory of a stranger to torch: its storage cannot be resized, and
// record_stream() does nothing, so that another stream could read what has been freed.
// torch.empty_like sorts equal strides by size and keeps gaps in dimensions of size 1; asking it
// for another order costs 0.3 us, so it is asked only where `like` is not packed itself.
inline nb::object empty_like(const Tensor& like, DType dtype) {
  const bool packed = is_packed(like);
  PyObject* made;
  if (packed && dtype == like.dtype) {
    made = PyObject_CallFunctionObjArgs(torch_objects.empty_like, like.object, nullptr);
  } else {
    nb::dict options;
    if (dtype != like.dtype) options["dtype"] = nb::handle(torch_objects.dtypes[int(dtype)]);
    if (!packed) options["memory_format"] = nb::handle(torch_objects.contiguous_format);
    made = PyObject_Call(torch_objects.empty_like, nb::make_tuple(nb::handle(like.object)).ptr(),
                         options.ptr());
  }
  if (!made) throw nb::python_error();
  return nb::steal(made);
}

// An output of the shape of `like`, checked like one that was given.
inline Refusal make_output(const Tensor& like, DType dtype, nb::object& made, Tensor& output) {
  made = empty_like(like, dtype);
  if (const Refusal no = output.read(made.ptr())) return no;
  if (!same_shape(output, like) || !is_packed(output))
    return {output.name, "was not made packed", Refusal::kMemory};
  return {};
}

// x.new_empty(shape, dtype=dtype)
inline nb::object new_empty(const Tensor& x, nb::handle shape, PyObject* dtype) {
  nb::object method = nb::steal(PyObject_GetAttr(x.object, torch_objects.new_empty));
  if (!method.is_valid()) throw nb::python_error();
  nb::dict options;
  options["dtype"] = nb::handle(dtype);
  PyObject* made = PyObject_Call(method.ptr(), nb::make_tuple(shape).ptr(), options.ptr());
  if (!made) throw nb::python_error();
  return nb::steal(made);
}

inline void raise(void*, const char*, const char* message) {
  PyErr_SetString(PyExc_RuntimeError, message);
}

// A float32 for each row of x; through DLPack it takes a third of new_empty's time.
inline nb::object new_row_values(const Tensor& x, float*& data) {
  DLTensor like{};
  like.device = x.device;
  like.ndim = x.ndim - 1;
  like.dtype = {kDLFloat, 32, 1};
  like.shape = const_cast<int64_t*>(x.shape);
  DLManagedTensorVersioned* managed = nullptr;
  void* made = nullptr;
  DLTensor view;
  if (torch_objects.api->managed_tensor_allocator(&like, &managed, nullptr, raise) ||
      torch_objects.api->managed_tensor_to_py_object_no_sync(managed, &made) ||
      torch_objects.api->dltensor_from_py_object_no_sync(made, &view)) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_RuntimeError, "torch made no tensor");
    throw nb::python_error();
  }
  data = reinterpret_cast<float*>(static_cast<char*>(view.data) + view.byte_offset);
  return nb::steal(static_cast<PyObject*>(made));
}

// A launch can block on a full stream whose host callback is waiting for the GIL, so release it.
template <class F>
inline void run_job(bool has_streams, int64_t elements, const F& run) {
  if (has_streams || elements >= kReleaseGilElements) {
    nb::gil_scoped_release release;
    run();
  } else {
    run();
  }
}

// Runs a backward pass in torch's current stream, and makes the workspace for it.
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

// Puts a table of functions, null at its end, into the module.
inline void add_methods(nb::module_& m, PyMethodDef* methods) {
  if (PyModule_AddFunctions(m.ptr(), methods)) throw nb::python_error();
}

void add_norm(nb::module_& m);
void add_norm_backward(nb::module_& m);
void add_norm_tp(nb::module_& m);
void add_norms(nb::module_& m);
void add_parts(nb::module_& m);
void add_operators(nb::module_& m);

}  // namespace normkit
