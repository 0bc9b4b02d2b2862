// What the functions of the extension share: reading arguments, making outputs, running a job.
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

// Calls a Python function of at most one argument; 25 ns less than PyObject_Call for torch's own,
// which are METH_NOARGS and METH_O.
inline nb::object call(PyObject* function, PyObject* argument) {
  const int flags = PyCFunction_Check(function) ? PyCFunction_GetFlags(function) : -1;
  PyObject* result =
      flags == (argument ? METH_O : METH_NOARGS)
          ? PyCFunction_GetFunction(function)(PyCFunction_GetSelf(function), argument)
      : argument ? PyObject_CallFunctionObjArgs(function, argument, nullptr)
                 : PyObject_CallNoArgs(function);
  if (!result) throw nb::python_error();
  return nb::steal(result);
}

// torch.empty_like(like, dtype=dtype), but packed.  torch.empty_like sorts equal strides by size
// and keeps gaps in dimensions of size 1; asking it for another order costs 0.3 us, so it is asked
// where `like` is not packed itself.
inline nb::object empty_like(const Tensor& like, nb::handle dtype) {
  const bool packed = is_packed(like);
  PyObject* made;
  if (packed && dtype.is_none()) {
    made = PyObject_CallFunctionObjArgs(torch_objects.empty_like, like.object, nullptr);
  } else {
    nb::dict options;
    if (!dtype.is_none()) options["dtype"] = dtype;
    if (!packed) options["memory_format"] = nb::handle(torch_objects.contiguous_format);
    made = PyObject_Call(torch_objects.empty_like, nb::make_tuple(nb::handle(like.object)).ptr(),
                         options.ptr());
  }
  if (!made) throw nb::python_error();
  return nb::steal(made);
}

// An output of the shape of `like`, checked like one that was given; a dtype of None is that of
// `like`.
inline Refusal make_output(const Tensor& like, nb::handle dtype, nb::object& made, Tensor& output) {
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

// A launch may have to wait for room in the stream, which a callback that wants the interpreter may
// be keeping.
template <class F>
inline void run_job(bool has_streams, int64_t elements, const F& run) {
  if (has_streams || elements >= kReleaseGilElements) {
    nb::gil_scoped_release release;
    run();
  } else {
    run();
  }
}

// Autograd learns of the write by the version counter, as it does from torch's own in-place
// operators.
inline void count_write(const Tensor& t) {
  call(torch_objects.increment_version, nb::make_tuple(nb::handle(t.object)).ptr());
}

inline bool read_number(nb::handle value, float& number) {
  PyObject* object = value.ptr();
  if (PyBool_Check(object) || !(PyFloat_Check(object) || PyLong_Check(object))) return false;
  number = static_cast<float>(PyFloat_AsDouble(object));
  if (!PyErr_Occurred()) return true;
  PyErr_Clear();  // an int beyond every double
  return false;
}

inline bool read_flag(nb::handle value, bool& flag) {
  flag = value.ptr() == Py_True;
  return flag || value.ptr() == Py_False;
}

inline constexpr float kFloat32Epsilon = 1.1920929e-07f;

// Not through nanobind: fourteen arguments cost it 60 ns more than a plain vector of them.
template <nb::object (*kFunction)(PyObject* const*), int kCount>
PyObject* entry(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != kCount) {
    PyErr_Format(PyExc_TypeError, "expected %d positional arguments", kCount);
    return nullptr;
  }
  try {
    return kFunction(args).release().ptr();
  } catch (nb::python_error& error) {
    error.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <nb::object (*kFunction)(PyObject* const*), int kCount>
PyCFunction as_method() {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(entry<kFunction, kCount>));
}

}  // namespace normkit
