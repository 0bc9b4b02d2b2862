// The arguments of the extension's functions: a table for each, in their order.  What reads them,
// how many there must be, `fields` and the signatures in the docs follow from it.
#pragma once
#include <array>
#include <iterator>
#include <utility>

#include "binding.h"
#include "checks_backward.h"

namespace normkit {

template <class Arguments>
struct Field {
  const char* name;
  Refusal (*read)(Arguments& a, const char* name, PyObject* value);
};

// ---------------------------------------------------------------- from objects to values
//
// Always inlined: out of line, each brings its Refusal back through memory, 30 ns for a call.

[[gnu::always_inline]] inline Refusal read_value(float& number, const char* name, PyObject* value) {
  const Refusal no{name, "is not a number", Refusal::kOption};
  if (PyBool_Check(value) || !(PyFloat_Check(value) || PyLong_Check(value))) return no;
  number = static_cast<float>(PyFloat_AsDouble(value));
  if (!PyErr_Occurred()) return {};
  PyErr_Clear();  // an int beyond every double
  return no;
}

[[gnu::always_inline]] inline Refusal read_value(bool& flag, const char* name, PyObject* value) {
  flag = value == Py_True;
  if (flag || value == Py_False) return {};
  return {name, "is not a bool", Refusal::kOption};
}

[[gnu::always_inline]] inline Refusal read_value(std::optional<DType>& dtype, const char* name,
                                                 PyObject* value) {
  if (value == Py_None) return {};
  dtype = dtype_of(value);
  if (dtype) return {};
  return {name, "is not float32, float16 or bfloat16", Refusal::kDtype};
}

[[gnu::always_inline]] inline Refusal read_value(Tensor& tensor, const char*, PyObject* value) {
  return tensor.read(value);
}

inline Refusal read_value(Indices& indices, const char*, PyObject* value) {
  return indices.read(value);
}

inline Refusal read_value(PyObject*& object, const char*, PyObject* value) {
  object = value;
  return {};
}

[[gnu::always_inline]] inline long read_bits(PyObject* value) {
  const long bits = PyLong_AsLong(value);
  if (bits == -1 && PyErr_Occurred()) throw nb::python_error();
  return bits;
}

// ---------------------------------------------------------------- from objects to arguments

template <auto kMember, class Arguments>
[[gnu::always_inline]] inline Refusal member(Arguments& a, const char* name, PyObject* value) {
  return read_value(a.*kMember, name, value);
}

template <auto kOption, class Arguments>
[[gnu::always_inline]] inline Refusal option(Arguments& a, const char* name, PyObject* value) {
  return read_value(a.options.*kOption, name, value);
}

// 1 layer instead of rms, 2 weight and bias may have a row per head, 4 adds a residual, 8 x is the
// output; 32 gated, 64 sigmoid instead of silu, 128 the gate multiplies the norm and not x; 256
// normalises x before it is added; 512 of the sum of squares instead of their mean, 1024 eps bounds
// the root; 2048 rotates, 4096 pairs that are interleaved; 8192 no statistic.
template <class Arguments>
[[gnu::always_inline]] inline Refusal kind(Arguments& a, const char*, PyObject* value) {
  const long bits = read_bits(value);
  a.statistic = static_cast<Statistic>(bits & 1);
  a.per_head = bits & 2;
  a.options.of_sum = bits & 512;
  if constexpr (std::is_base_of_v<BackwardArguments, Arguments>) {
    a.from_output = bits & 8;
  } else {
    a.adds = bits & 4;
    a.gated = bits & 32;
    a.activation = bits & 64 ? Activation::kSigmoid : Activation::kSilu;
    a.norm_before_gate = bits & 128;
    a.post = bits & 256;
    a.options.eps_outside = bits & 1024;
    a.rotated = bits & 2048;
    a.interleaved = bits & 4096;
    a.options.as_is = bits & 8192;
  }
  return {};
}

template <class Arguments>
[[gnu::always_inline]] inline Refusal x(Arguments& a, const char* name, PyObject* value) {
  if (value == Py_None) return {name, "is None", Refusal::kOption};
  return a.x.read(value);
}

template <class Arguments>
[[gnu::always_inline]] inline Refusal eps(Arguments& a, const char* name, PyObject* value) {
  constexpr float kFloat32Epsilon = 1.1920929e-07f;
  a.options.eps = kFloat32Epsilon;
  return value == Py_None ? Refusal{} : read_value(a.options.eps, name, value);
}

// None: eps, which has been read.
template <class Arguments>
Refusal next_eps(Arguments& a, const char* name, PyObject* value) {
  a.next_eps = a.options.eps;
  return value == Py_None ? Refusal{} : read_value(a.next_eps, name, value);
}

// 1 the gradient of weight, 2 that of bias.
template <class Arguments>
Refusal wanted(Arguments& a, const char*, PyObject* value) {
  const long bits = read_bits(value);
  a.wants_weight = bits & 1;
  a.wants_bias = bits & 2;
  return {};
}

// ---------------------------------------------------------------- the tables

template <class Arguments, size_t... kAt>
constexpr auto flags(std::index_sequence<kAt...>) {
  return std::array<Field<Arguments>, sizeof...(kAt)>{
      {{kFlags[kAt].name, option<kFlags[kAt].member, Arguments>}...}};
}

// The options of a forward call, between the fields in front of them and those behind.
template <class Arguments, size_t kBefore, size_t kBehind>
constexpr auto with_options(const Field<Arguments> (&before)[kBefore],
                            const Field<Arguments> (&behind)[kBehind]) {
  std::array<Field<Arguments>, kBefore + 2 + std::size(kFlags) + kBehind> all{};
  size_t at = 0;
  for (const auto& field : before) all[at++] = field;
  all[at++] = {"eps", eps};
  all[at++] = {"weight_offset", option<&NormOptions::weight_offset, Arguments>};
  for (const auto& field : flags<Arguments>(std::make_index_sequence<std::size(kFlags)>()))
    all[at++] = field;
  for (const auto& field : behind) all[at++] = field;
  return all;
}

inline constexpr auto kNormFields = with_options<Arguments>(
    {
        {"kind", kind},
        {"x", x},
        {"residual", member<&Arguments::residual>},
        {"weight", member<&Arguments::weight>},
        {"bias", member<&Arguments::bias>},
    },
    {
        {"out_dtype", member<&Arguments::out_dtype>},
        {"out", member<&Arguments::out>},
        {"residual_out", member<&Arguments::residual_out>},
        {"memory_efficient", member<&Arguments::memory_efficient>},
    });

template <size_t kBefore, size_t kBehind>
constexpr auto joined(const std::array<Field<Arguments>, kBefore>& before,
                      const Field<Arguments> (&behind)[kBehind]) {
  std::array<Field<Arguments>, kBefore + kBehind> all{};
  size_t at = 0;
  for (const auto& field : before) all[at++] = field;
  for (const auto& field : behind) all[at++] = field;
  return all;
}

// What a fused norm has besides; other calls end before these.
inline constexpr auto kFusedFields =
    joined(kNormFields, {
                            {"gate", member<&Arguments::gate>},
                            {"scale", member<&Arguments::scale>},
                            {"shift", member<&Arguments::shift>},
                            {"round_each", member<&Arguments::round_each>},
                            {"z", member<&Arguments::z>},
                            {"next_weight", member<&Arguments::next_weight>},
                            {"next_bias", member<&Arguments::next_bias>},
                            {"next_eps", next_eps},
                            {"alpha", member<&Arguments::alpha>},
                            {"beta", member<&Arguments::beta>},
                            {"round_norm", member<&Arguments::round_norm>},
                            {"cos", member<&Arguments::cos>},
                            {"sin", member<&Arguments::sin>},
                            {"positions", member<&Arguments::positions>},
                            {"cache", member<&Arguments::cache>},
                            {"slots", member<&Arguments::slots>},
                        });

inline constexpr Field<BackwardArguments> kBackwardFields[] = {
    {"kind", kind},
    {"grad_y", member<&BackwardArguments::grad_y>},
    {"grad_residual_out", member<&BackwardArguments::grad_residual_out>},
    {"x", x},
    {"residual", member<&BackwardArguments::residual>},
    {"weight", member<&BackwardArguments::weight>},
    {"bias", member<&BackwardArguments::bias>},
    {"rstd", member<&BackwardArguments::rstd>},
    {"mean", member<&BackwardArguments::mean>},
    {"weight_offset", option<&NormOptions::weight_offset>},
    {"round_before_weight", option<&NormOptions::round_before_weight>},
    {"x_dtype", member<&BackwardArguments::x_dtype>},
    {"residual_dtype", member<&BackwardArguments::residual_dtype>},
    {"wanted", wanted},
};

// A call on several devices: what they share, and a sequence of each tensor.
struct TpArguments : Arguments {
  PyObject *xs = nullptr, *weights = nullptr, *biases = nullptr, *outs = nullptr,
           *streams = nullptr;
};

inline constexpr auto kTpFields = with_options<TpArguments>(
    {
        {"kind", kind},
        {"xs", member<&TpArguments::xs>},
        {"weights", member<&TpArguments::weights>},
        {"biases", member<&TpArguments::biases>},
    },
    {
        {"out_dtype", member<&TpArguments::out_dtype>},
        {"outs", member<&TpArguments::outs>},
        {"streams", member<&TpArguments::streams>},
    });

struct PartArguments : Arguments {
  Tensor gathered{"gathered"};
};

inline constexpr Field<PartArguments> kPartStatisticsFields[] = {
    {"kind", kind},
    {"x", x},
    {"clamp_inf", option<&NormOptions::clamp_inf>},
};

inline constexpr auto kPartApplyFields = with_options<PartArguments>(
    {
        {"kind", kind},
        {"x", x},
        {"weight", member<&PartArguments::weight>},
        {"bias", member<&PartArguments::bias>},
    },
    {
        {"out_dtype", member<&PartArguments::out_dtype>},
        {"gathered", member<&PartArguments::gathered>},
    });

struct BackwardPartArguments : BackwardArguments {
  Tensor gathered{"gathered"};
};

inline constexpr Field<BackwardPartArguments> kPartBackwardStatisticsFields[] = {
    {"kind", kind},
    {"grad_y", member<&BackwardPartArguments::grad_y>},
    {"x", x},
    {"weight", member<&BackwardPartArguments::weight>},
    {"rstd", member<&BackwardPartArguments::rstd>},
    {"mean", member<&BackwardPartArguments::mean>},
    {"weight_offset", option<&NormOptions::weight_offset>},
};

inline constexpr Field<BackwardPartArguments> kPartBackwardApplyFields[] = {
    {"kind", kind},
    {"grad_y", member<&BackwardPartArguments::grad_y>},
    {"x", x},
    {"weight", member<&BackwardPartArguments::weight>},
    {"bias", member<&BackwardPartArguments::bias>},
    {"rstd", member<&BackwardPartArguments::rstd>},
    {"mean", member<&BackwardPartArguments::mean>},
    {"weight_offset", option<&NormOptions::weight_offset>},
    {"round_before_weight", option<&NormOptions::round_before_weight>},
    {"x_dtype", member<&BackwardPartArguments::x_dtype>},
    {"wanted", wanted},
    {"gathered", member<&BackwardPartArguments::gathered>},
};

// ---------------------------------------------------------------- reading a table

template <const auto& kFields, class Arguments, size_t... kAt>
Refusal read_each(Arguments& a, PyObject* const* args, std::index_sequence<kAt...>) {
  Refusal no;
  static_cast<void>(((no = kFields[kAt].read(a, kFields[kAt].name, args[kAt])) || ...));
  return no;
}

// args has an object for each field.
template <const auto& kFields, class Arguments>
Refusal read(Arguments& a, PyObject* const* args) {
  return read_each<kFields>(a, args, std::make_index_sequence<std::size(kFields)>());
}

// ---------------------------------------------------------------- functions of the module

// Not through nanobind: fourteen arguments cost it 60 ns more than a plain vector of them.
template <const auto& kFields, nb::object (*kFunction)(PyObject* const*)>
PyObject* entry(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != static_cast<Py_ssize_t>(std::size(kFields))) {
    PyErr_Format(PyExc_TypeError, "expected %d positional arguments", int(std::size(kFields)));
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

// A function whose last arguments may be left out, all of them at once.
template <const auto& kFields, nb::object (*kFunction)(PyObject* const*), const auto& kMoreFields,
          nb::object (*kFunctionOfMore)(PyObject* const*)>
PyObject* entry_of_either(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  if (count == static_cast<Py_ssize_t>(std::size(kMoreFields)))
    return entry<kMoreFields, kFunctionOfMore>(self, args, count);
  return entry<kFields, kFunction>(self, args, count);
}

using FastCall = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

// Puts the signature, which inspect.signature() reads, in front of the text; `doc` keeps it.
template <class Fields>
PyMethodDef method_of(const char* name, const Fields& fields, FastCall function, std::string& doc,
                      const char* text) {
  doc = std::string(name) + "(";
  for (const auto& field : fields) doc += std::string(field.name) + ", ";
  doc += std::string("/)\n--\n\n") + text;
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
          METH_FASTCALL, doc.c_str()};
}

template <const auto& kFields, nb::object (*kFunction)(PyObject* const*)>
PyMethodDef method(const char* name, const char* text) {
  static std::string doc;
  return method_of(name, kFields, entry<kFields, kFunction>, doc, text);
}

template <const auto& kFields, nb::object (*kFunction)(PyObject* const*), const auto& kMoreFields,
          nb::object (*kFunctionOfMore)(PyObject* const*)>
PyMethodDef method(const char* name, const char* text) {
  static std::string doc;
  return method_of(name, kFields, entry_of_either<kFields, kFunction, kMoreFields, kFunctionOfMore>,
                   doc, text);
}

}  // namespace normkit
