// Tensors as the extension sees them: borrowed DLPack views of torch tensors, read through torch's
// exchange API.  Three tensors cost 0.15 us this way and 5.4 us as nb::ndarray.
#pragma once
#include <Python.h>

#include <optional>

#include "../norm_args.h"
#include "dlpack.h"

namespace normkit {

// Why no kernel here runs a call: an argument, and what is wrong with it; problem is null where
// nothing is.
struct Refusal {
  // kStrides: a copy of the inputs would help.  kRecorder: autograd, a tracer or the like records.
  enum Kind { kStrides, kDtype, kDevice, kOption, kMemory, kRecorder, kShape };
  static constexpr const char* kKindNames[] = {"strides", "dtype",    "device", "option",
                                               "memory",  "recorder", "shape"};
  static constexpr int kKinds = 7;

  const char* argument = nullptr;
  const char* problem = nullptr;
  Kind kind = kOption;
  explicit operator bool() const { return problem != nullptr; }
};

// A function of torch, and of a builtin its C function, which is called where `flags` (METH_O and
// the like) say that it takes what it is called with.
struct Function {
  PyObject* object = nullptr;
  PyCFunction builtin = nullptr;
  PyObject* self = nullptr;
  int flags = -1;
};

// The Python objects that the extension needs; set once, by bind_torch(), while the package is
// imported: no other thread has its functions before.
struct Torch {
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  const DLPackExchangeAPI* api = nullptr;
  PyObject* empty_like = nullptr;
  PyObject* contiguous_format = nullptr;
  PyObject* no_arguments = nullptr;  // an empty tuple
  Function is_grad_enabled;
  bool (*grad_mode)() = nullptr;  // torch's C function for it, where it has one: 20 ns less
  Function is_transforming;
  Function is_inference_mode_enabled;
  Function is_autocast_enabled;
  Function is_tracing;
  Function is_neg;
  Function increment_version;
  PyObject* requires_grad = nullptr;    // the property of torch.Tensor
  PyObject* version = nullptr;          // likewise, of _version
  descrgetfunc get_property = nullptr;  // reads them
  PyObject* forward_ad = nullptr;       // the dict of torch.autograd.forward_ad
  PyObject* current_level = nullptr;    // "_current_level"
  PyObject* new_empty = nullptr;        // "new_empty"
  PyObject* uint8 = nullptr;
  PyObject* modes = nullptr;              // the dict of torch.utils._python_dispatch
  PyObject* in_a_mode = nullptr;          // "_is_in_torch_dispatch_mode"
  PyObject* cuda = nullptr;               // "cuda"
  PyObject* dtypes[3] = {};               // in the order of DType
  PyObject* refusal = nullptr;            // normkit's class of that name
  PyObject* differentiate = nullptr;      // likewise, what leaves a node with autograd
  PyObject* kinds[Refusal::kKinds] = {};  // in the order of Refusal::Kind
};
inline Torch torch_objects;

inline std::optional<DType> dtype_of(const DLDataType& type) {
  if (type.lanes != 1) return std::nullopt;
  if (type.code == kDLFloat && type.bits == 32) return DType::kFloat32;
  if (type.code == kDLFloat && type.bits == 16) return DType::kFloat16;
  if (type.code == kDLBfloat && type.bits == 16) return DType::kBFloat16;
  return std::nullopt;
}

inline std::optional<DType> dtype_of(PyObject* dtype) {
  for (int i = 0; i < 3; ++i)
    if (dtype == torch_objects.dtypes[i]) return static_cast<DType>(i);
  return std::nullopt;
}

// One argument.  shape and strides are borrowed from the tensor: nothing keeps them beyond the
// call.
struct Tensor {
  const char* name;
  PyObject* object = nullptr;  // null: absent
  char* data = nullptr;
  DLDevice device = {};
  DType dtype = DType::kFloat32;
  int ndim = 0;
  const int64_t* shape = nullptr;
  const int64_t* strides = nullptr;

  explicit operator bool() const { return object != nullptr; }
  int64_t size(int from_the_end) const { return shape[ndim - from_the_end]; }
  int64_t stride(int from_the_end) const { return strides[ndim - from_the_end]; }

  // Bytes from data to behind the last element.  torch has no negative strides.
  int64_t extent() const {
    int64_t last = 0;
    for (int d = 0; d < ndim; ++d) {
      if (shape[d] == 0) return 0;
      last += (shape[d] - 1) * strides[d];
    }
    return (last + 1) * item_size(dtype);
  }

  // None, for absent, is not worth a call.
  [[gnu::always_inline]] Refusal read(PyObject* source) {
    return source == Py_None ? Refusal{} : read_tensor(source);
  }

  Refusal read_tensor(PyObject* source) {
    DLTensor view;
    if (const Refusal no = read_view(source, view)) return no;
    const auto type = dtype_of(view.dtype);
    if (!type)
      return {name,
              view.dtype.code == kDLFloat && view.dtype.bits == 64
                  ? "is float64"
                  : "is not float32, float16 or bfloat16",
              Refusal::kDtype};
    dtype = *type;
    return take(source, view);
  }

 protected:
  Refusal read_view(PyObject* source, DLTensor& view) const {
    if (Py_TYPE(source) != torch_objects.tensor && Py_TYPE(source) != torch_objects.parameter)
      return {name, "is not a plain torch.Tensor", Refusal::kDtype};
    if (torch_objects.api->dltensor_from_py_object_no_sync(source, &view)) {
      PyErr_Clear();
      return {name, "has no memory that DLPack can describe", Refusal::kMemory};
    }
    return {};
  }

  Refusal take(PyObject* source, const DLTensor& view) {
    object = source;
    device = view.device;
    data = static_cast<char*>(view.data) + view.byte_offset;
    ndim = view.ndim;
    shape = view.shape;
    strides = view.strides;
    if (!view.data)
      for (int d = 0;; ++d) {
        if (d == ndim) return {name, "has no memory", Refusal::kMemory};
        if (shape[d] == 0) break;
      }
    return {};
  }
};

// One of integers, of four or eight bytes; its dtype is that of float32 and says nothing.
struct Indices : Tensor {
  bool wide = false;

  int64_t extent() const { return Tensor::extent() * (wide ? 2 : 1); }

  Refusal read(PyObject* source) {
    if (source == Py_None) return {};
    DLTensor view;
    if (const Refusal no = read_view(source, view)) return no;
    if (view.dtype.code != kDLInt || view.dtype.lanes != 1 ||
        (view.dtype.bits != 32 && view.dtype.bits != 64))
      return {name, "is not int32 or int64", Refusal::kDtype};
    wide = view.dtype.bits == 64;
    return take(source, view);
  }
};

}  // namespace normkit
