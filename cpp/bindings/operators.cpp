// Operators of torch.ops.normkit without a Python frame: kernels that torch's dispatcher calls.
//
// Such a kernel makes Python objects of its arguments, which for tensors are the ones that they
// have already, and calls a function of this module.  What that refuses goes to the operator's
// Python implementation, which runs it elsewhere, or raises.
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "binding.h"
#include "fields.h"
#include "norm.h"
#include "shim.h"

namespace normkit {
namespace {

enum class Type { kTensor, kFloat, kBool, kDtype, kString };

struct Argument {
  Type type;
  bool optional;
};

// Where a function's argument comes from: an argument of the operator, a constant, or bits that
// flags among the operator's arguments turn on.
struct Source {
  int argument = -1;
  PyObject* constant = nullptr;
  long bits = 0;
  std::vector<std::pair<int, long>> flags;
};

// No function of this module takes more.
constexpr size_t kMostFields = std::size(kFusedFields);

using FastFunction = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

// Made while the package is imported, and never let go.
struct Operator {
  std::vector<Argument> arguments;
  std::vector<Source> sources;
  std::vector<int> unless;   // arguments that leave a call to Python where they are True
  std::vector<int> outputs;  // by their place in the function's result
  int x;                     // the argument that outputs without elements are like
  PyObject* empty_dtype;     // theirs; null for x's
  FastFunction function;
  PyObject* implementation;
};

constexpr int kMost = 64;
Operator operators[kMost];
int count = 0;

// What makes objects of values, set with the first operator.
struct Conversions {
  PyObject* to_tensor;    // of a capsule with a pointer, which it takes over
  PyObject* from_tensor;  // makes such a capsule
  std::vector<std::pair<int32_t, PyObject*>> dtypes;
};
Conversions conversions;

PyObject* checked(PyObject* made) {
  if (!made) throw nb::python_error();
  return made;
}

// ---------------------------------------------------------------- values and objects

// What is behind an optional value; false where there is none.
bool unwrap(shim::Value& value) {
  auto* const inner = reinterpret_cast<shim::Value*>(value);
  if (!inner) return false;
  value = *inner;
  if (const auto free = shim::functions()->delete_value)
    free(inner);
  else
    delete inner;  // as torch's own header does before 2.13
  return true;
}

template <class T>
T number(shim::Value value) {
  T made;
  std::memcpy(&made, &value, sizeof made);
  return made;
}

nb::object tensor_of(shim::Value value) {
  nb::object capsule =
      nb::steal(checked(PyCapsule_New(reinterpret_cast<void*>(value), nullptr, nullptr)));
  return nb::steal(
      checked(PyObject_CallFunctionObjArgs(conversions.to_tensor, capsule.ptr(), nullptr)));
}

nb::object dtype_of(shim::Value value) {
  for (const auto& [code, dtype] : conversions.dtypes)
    if (code == number<int32_t>(value)) return nb::borrow(dtype);
  throw std::runtime_error("expected a dtype of a tensor with numbers");
}

nb::object string_of(shim::Value value) {
  void* const string = reinterpret_cast<void*>(value);
  const char* text = "";
  size_t length = 0;
  shim::functions()->string_c_str(string, &text);
  shim::functions()->string_length(string, &length);
  PyObject* made = PyUnicode_FromStringAndSize(text, length);
  shim::functions()->delete_string(string);
  return nb::steal(checked(made));
}

nb::object object_of(shim::Value value, const Argument& argument) {
  if (argument.optional && !unwrap(value)) return nb::none();
  switch (argument.type) {
    case Type::kTensor:
      return tensor_of(value);
    case Type::kFloat:
      return nb::steal(checked(PyFloat_FromDouble(number<double>(value))));
    case Type::kBool:
      return nb::borrow(number<bool>(value) ? Py_True : Py_False);
    case Type::kDtype:
      return dtype_of(value);
    default:
      return string_of(value);
  }
}

shim::Value value_of(PyObject* tensor) {
  nb::object capsule =
      nb::steal(checked(PyObject_CallFunctionObjArgs(conversions.from_tensor, tensor, nullptr)));
  void* const pointer = PyCapsule_GetPointer(capsule.ptr(), nullptr);
  if (!pointer) throw nb::python_error();
  return reinterpret_cast<shim::Value>(pointer);
}

// ---------------------------------------------------------------- a call

using Objects = std::vector<nb::object>;

bool is_text(const nb::object& value, const char* text) {
  return PyUnicode_Check(value.ptr()) && PyUnicode_CompareWithASCIIString(value.ptr(), text) == 0;
}

// The words that an argument may be in place of a bool: a kind of norm, the activation of a gate.
constexpr const char* kOff[] = {"rms", "silu"};
constexpr const char* kOn[] = {"layer", "sigmoid"};

template <size_t kCount>
bool is_one_of(const nb::object& value, const char* const (&words)[kCount]) {
  return std::any_of(words, words + kCount, [&](const char* word) { return is_text(value, word); });
}

bool is_flag(const nb::object& value) {
  return PyBool_Check(value.ptr()) || is_one_of(value, kOff) || is_one_of(value, kOn);
}

bool is_on(const nb::object& flag) { return flag.ptr() == Py_True || is_one_of(flag, kOn); }

// None, for bits, where a flag is none.
nb::object field_of(const Source& source, const Objects& given) {
  if (source.argument >= 0) return given[source.argument];
  if (source.constant) return nb::borrow(source.constant);
  long bits = source.bits;
  for (const auto& [at, weight] : source.flags) {
    if (!is_flag(given[at])) return nb::none();
    if (is_on(given[at])) bits |= weight;
  }
  return nb::steal(checked(PyLong_FromLong(bits)));
}

// The function's result; none where it has not run.
nb::object call_function(const Operator& op, const Objects& given) {
  if (quick_path_is_off) return nb::none();
  for (const int at : op.unless)
    if (is_on(given[at])) return nb::none();
  nb::object fields[kMostFields];
  PyObject* borrowed[kMostFields];
  const size_t taken = op.sources.size();
  for (size_t i = 0; i < taken; ++i) {
    fields[i] = field_of(op.sources[i], given);
    if (!op.sources[i].flags.empty() && fields[i].is_none()) return nb::none();
    borrowed[i] = fields[i].ptr();
  }
  nb::object made = nb::steal(checked(op.function(nullptr, borrowed, taken)));
  const bool refused = reinterpret_cast<PyObject*>(Py_TYPE(made.ptr())) == torch_objects.refusal;
  return refused ? nb::none() : made;
}

nb::object call_implementation(const Operator& op, const Objects& given) {
  nb::object values = nb::steal(checked(PyTuple_New(given.size())));
  for (size_t i = 0; i < given.size(); ++i)
    PyTuple_SetItem(values.ptr(), i, nb::borrow(given[i]).release().ptr());
  return nb::steal(checked(PyObject_CallObject(op.implementation, values.ptr())));
}

nb::object no_elements(const Operator& op, const Objects& given) {
  nb::object method =
      nb::steal(checked(PyObject_GetAttr(given[op.x].ptr(), torch_objects.new_empty)));
  nb::dict options;
  if (op.empty_dtype) options["dtype"] = nb::handle(op.empty_dtype);
  return nb::steal(checked(PyObject_Call(method.ptr(), nb::make_tuple(0).ptr(), options.ptr())));
}

void answer(const Operator& op, shim::Value* stack, const Objects& given) {
  const nb::object made = call_function(op, given);
  if (made.is_none()) {
    const nb::object results = call_implementation(op, given);
    if (op.outputs.size() == 1) {  // by itself, as Python implementations give it
      stack[0] = value_of(results.ptr());
      return;
    }
    for (size_t i = 0; i < op.outputs.size(); ++i)
      stack[i] = value_of(checked(PyTuple_GetItem(results.ptr(), i)));
    return;
  }
  PyObject* before = nullptr;
  for (size_t i = 0; i < op.outputs.size(); ++i) {
    PyObject* const result = checked(PyTuple_GetItem(made.ptr(), op.outputs[i]));
    // No two outputs of an operator may be one tensor.
    const bool missing = result == Py_None || result == before;
    stack[i] = value_of(missing ? no_elements(op, given).ptr() : result);
    before = result;
  }
}

// torch makes a ValueError of one, and a RuntimeError of the other.
[[noreturn]] void rethrow(nb::python_error& error) {
  const std::string message = nb::str(error.value()).c_str();
  if (error.matches(PyExc_ValueError)) throw std::invalid_argument(message);
  throw std::runtime_error(message);
}

void run(const Operator& op, shim::Value* stack) {
  nb::gil_scoped_acquire lock;
  try {
    Objects given;
    given.reserve(op.arguments.size());
    for (size_t i = 0; i < op.arguments.size(); ++i)
      given.push_back(object_of(stack[i], op.arguments[i]));
    answer(op, stack, given);
  } catch (nb::python_error& error) {
    rethrow(error);
  }
}

// torch calls a kernel without telling which one: each place has a function of its own.
template <int kAt>
void kernel(shim::Value* stack, uint64_t, uint64_t) {
  run(operators[kAt], stack);
}

template <int... kAt>
shim::Kernel kernel_at(int at, std::integer_sequence<int, kAt...>) {
  static constexpr shim::Kernel kKernels[] = {kernel<kAt>...};
  return kKernels[at];
}

// ---------------------------------------------------------------- registration

Argument argument_of(std::string type) {
  const bool optional = type.back() == '?';
  if (optional) type.pop_back();
  if (type.rfind("Tensor", 0) == 0) return {Type::kTensor, optional};
  if (type == "float") return {Type::kFloat, optional};
  if (type == "bool") return {Type::kBool, optional};
  if (type == "ScalarType") return {Type::kDtype, optional};
  if (type == "str") return {Type::kString, optional};
  throw nb::type_error(("types: expected those of normkit._spec.Field, got " + type).c_str());
}

Source source_of(nb::handle given) {
  Source source;
  if (PyTuple_Check(given.ptr())) {
    source.bits = nb::cast<long>(given[0]);
    for (nb::handle flag : nb::cast<nb::tuple>(given[1]))
      source.flags.emplace_back(nb::cast<int>(flag[0]), nb::cast<long>(flag[1]));
  } else if (PyLong_Check(given.ptr()) && !PyBool_Check(given.ptr())) {
    source.argument = nb::cast<int>(given);
  } else {
    source.constant = nb::borrow(given).release().ptr();
  }
  return source;
}

// False where this torch lacks one.
bool find_conversions(nb::handle torch) {
  if (conversions.to_tensor) return true;
  constexpr const char* kFromTensor = "unsafe_alloc_void_ptr_from_tensor";
  constexpr const char* kToTensor = "alloc_tensor_by_stealing_from_void_ptr";
  if (!nb::hasattr(torch.attr("_C"), "_aoti")) return false;
  nb::object aoti = torch.attr("_C").attr("_aoti");
  if (!nb::hasattr(aoti, kFromTensor) || !nb::hasattr(aoti, kToTensor)) return false;
  for (const char* name : {"float32",       "float16",         "bfloat16",    "float64",
                           "int64",         "int32",           "int16",       "int8",
                           "uint64",        "uint32",          "uint16",      "uint8",
                           "bool",          "complex32",       "complex64",   "complex128",
                           "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
                           "float8_e8m0fnu"})
    if (nb::hasattr(torch, name))
      conversions.dtypes.emplace_back(shim::dtype_code(name),
                                      nb::object(torch.attr(name)).release().ptr());
  conversions.from_tensor = nb::object(aoti.attr(kFromTensor)).release().ptr();
  conversions.to_tensor = nb::object(aoti.attr(kToTensor)).release().ptr();
  return true;
}

void* library_for(const char* key) {
  void* library = nullptr;
  if (shim::functions()->library_init_impl("normkit", key, __FILE__, __LINE__, &library))
    throw std::runtime_error("torch has no library for kernels of operators");
  return library;
}

bool implement(nb::handle torch, const char* name, nb::sequence types, nb::sequence sources,
               nb::sequence unless, nb::sequence outputs, int x, nb::handle empty_dtype,
               nb::handle function, nb::handle implementation) {
  if (!shim::functions() || !find_conversions(torch)) return false;
  if (count == kMost) throw std::runtime_error("more operators than there are places for");
  Operator op;
  for (nb::handle type : types) op.arguments.push_back(argument_of(nb::str(type).c_str()));
  for (nb::handle source : sources) op.sources.push_back(source_of(source));
  for (nb::handle at : unless) op.unless.push_back(nb::cast<int>(at));
  for (nb::handle at : outputs) op.outputs.push_back(nb::cast<int>(at));
  if (op.sources.size() > kMostFields) throw nb::value_error("sources: more than a call has");
  op.x = x;
  op.empty_dtype = empty_dtype.is_none() ? nullptr : nb::borrow(empty_dtype).release().ptr();
  op.function = reinterpret_cast<FastFunction>(
      reinterpret_cast<void (*)()>(PyCFunction_GetFunction(function.ptr())));
  op.implementation = nb::borrow(implementation).release().ptr();
  operators[count] = std::move(op);
  const shim::Kernel made = kernel_at(count, std::make_integer_sequence<int, kMost>());
  constexpr uint64_t kTorch2_10 = 2ull << 56 | 10ull << 48;  // whose conventions these are
  static void* const libraries[] = {
      library_for("CPU"),
#ifdef NORMKIT_HAS_CUDA
      library_for("CUDA"),
#endif
  };
  for (void* library : libraries)
    if (shim::functions()->library_impl(library, name, made, kTorch2_10))
      throw std::runtime_error("torch took no kernel of an operator");
  ++count;
  return true;
}

}  // namespace

void add_operators(nb::module_& m) {
  m.def("implement", &implement, nb::arg("torch"), nb::arg("name"), nb::arg("types"),
        nb::arg("sources"), nb::arg("unless"), nb::arg("outputs"), nb::arg("x"),
        nb::arg("empty_dtype").none(), nb::arg("function"), nb::arg("implementation"),
        R"(Give an operator kernels that call `function` of this module; False where torch cannot.

types are those of its arguments.  sources are, for each argument of function: the place of the
operator's, a constant that is no int, or (bits, ((place, bits), ...)), bits and those of the
arguments that are True or "layer".  Where one of the places in unless is True, or function refuses,
implementation runs the call.  outputs are places in function's result; what is None there is a
tensor without elements, on the device of the argument at x, of empty_dtype or x's.)");
}

}  // namespace normkit
