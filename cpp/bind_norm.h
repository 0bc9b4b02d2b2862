// try_norm(), norm(), norm_saving() and plan(): one call of a row norm.
#pragma once
#include <vector>

#include "binding.h"
#include "checks.h"

namespace normkit {

// Set while use_backend() names another backend than "auto", so that try_norm() leaves the choice
// to Python.
inline thread_local bool quick_path_is_off = false;

// Where autocast decides on the dtype of the output, normkit._ops knows what it says.
inline bool autocasts(const Arguments& a, const Backend& backend, nb::handle out_dtype) {
  return backend.has_streams && !a.out && out_dtype.is_none() &&
         call(torch_objects.is_autocast_enabled, torch_objects.cuda).is(nb::handle(Py_True));
}

// A TorchDispatchMode is about, in some thread, which may have to see the operators that run.
inline bool modes_are_on() {
  return PyDict_GetItemWithError(torch_objects.modes, torch_objects.in_a_mode) == Py_True;
}

// A dual tensor does not say that it is one; that duals are about, torch.autograd.forward_ad does.
inline bool forward_ad_is_on() {
  PyObject* level = PyDict_GetItemWithError(torch_objects.forward_ad, torch_objects.current_level);
  return level && PyLong_AsLong(level) >= 0;
}

// A trace records the operators of torch, and takes what a kernel writes for a constant.
inline bool is_tracing() {
  PyObject* answer = PyObject_CallNoArgs(torch_objects.is_tracing);
  if (!answer) throw nb::python_error();
  Py_DECREF(answer);  // True and False live for ever
  return answer == Py_True;
}

// Whether somebody has to learn of the call who does not see what the extension does.
inline Refusal check_recorders(const Arguments& a) {
  if (forward_ad_is_on()) return {"forward-mode AD", "is on", Refusal::kRecorder};
  if (call(torch_objects.is_grad_enabled, nullptr).is(nb::handle(Py_True)))
    for (const Tensor* t : {&a.x, &a.residual, &a.weight, &a.bias, &a.out, &a.residual_out}) {
      if (!*t) continue;
      nb::object wanted = nb::steal(PyObject_GetAttr(t->object, torch_objects.requires_grad));
      if (!wanted.is_valid()) throw nb::python_error();
      if (wanted.is(nb::handle(Py_True)))
        return {t->name, "requires a gradient", Refusal::kRecorder};
    }
  if (is_tracing()) return {"torch.jit.trace", "is recording", Refusal::kRecorder};
  return {};
}

// Outside of inference mode torch writes to no tensor that was made in it: it has no version
// counter.
inline Refusal check_inference(const Arguments& a) {
  for (const Tensor* t : {&a.out, &a.residual_out}) {
    if (!*t) continue;
    PyObject* const answer = torch_objects.is_inference(t->object, nullptr);
    if (!answer) throw nb::python_error();
    Py_DECREF(answer);  // True and False live for ever
    if (answer == Py_True &&
        call(torch_objects.is_inference_mode_enabled, nullptr).is(nb::handle(Py_False)))
      return {t->name, "is an inference tensor", Refusal::kRecorder};
  }
  return {};
}

// The arguments of a forward call, by position.
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
  kPositions
};
inline constexpr const char* kFieldNames[kPositions] = {
    "kind",        "x",         "residual",      "weight",
    "bias",        "eps",       "weight_offset", "round_before_weight",
    "round_sum",   "clamp_inf", "out_dtype",     "out",
    "residual_out"};

inline Refusal read_eps(PyObject* value, Arguments& a) {
  a.eps = kFloat32Epsilon;
  if (value != Py_None && !read_number(value, a.eps))
    return {"eps", "is not a number", Refusal::kOption};
  return {};
}

inline Refusal check_out_dtype(PyObject* dtype, const Tensor& out) {
  if (dtype == Py_None) return {};
  const auto type = dtype_of(dtype);
  if (!type) return {"out_dtype", "is not float32, float16 or bfloat16", Refusal::kDtype};
  if (out && out.dtype != *type) return {"out", "is not of out_dtype", Refusal::kDtype};
  return {};
}

inline Refusal read(Arguments& a, PyObject* const* args) {
  const long kind = PyLong_AsLong(args[kKind]);
  if (kind == -1 && PyErr_Occurred()) throw nb::python_error();
  a.statistic = static_cast<Statistic>(kind & 1);
  a.per_head = kind & 2;
  const auto tensor = [args](Tensor& t, Position at) { return t.read(args[at]); };
  if (const Refusal no = tensor(a.x, kX)) return no;
  if (!a.x) return {"x", "is None", Refusal::kOption};
  if (const Refusal no = tensor(a.residual, kResidual)) return no;
  if (bool(a.residual) != bool(kind & 4)) return {"residual", "is None", Refusal::kOption};
  if (const Refusal no = tensor(a.weight, kWeight)) return no;
  if (const Refusal no = tensor(a.bias, kBias)) return no;
  if (const Refusal no = tensor(a.out, kOut)) return no;
  if (const Refusal no = tensor(a.residual_out, kResidualOut)) return no;
  if (const Refusal no = read_eps(args[kEps], a)) return no;
  if (!read_number(args[kWeightOffset], a.weight_offset))
    return {"weight_offset", "is not a number", Refusal::kOption};
  if (!read_flag(args[kRoundBeforeWeight], a.round_before_weight))
    return {"round_before_weight", "is not a bool", Refusal::kOption};
  if (!read_flag(args[kRoundSum], a.round_sum))
    return {"round_sum", "is not a bool", Refusal::kOption};
  if (!read_flag(args[kClampInf], a.clamp_inf))
    return {"clamp_inf", "is not a bool", Refusal::kOption};
  return check_out_dtype(args[kOutDtype], a.out);
}

// A call that has been checked.  A quick one is an eager call of which nothing has been checked
// before; of any other the caller has checked that what is written overlaps nothing.
struct Prepared {
  Arguments a;
  const Backend* backend = nullptr;
  RowNorm job;
  int device;
  void* stream;
  nb::object made, made_residual;
  bool writes_out, writes_residual_out;

  Refusal check_call(nb::handle out_dtype, bool quick) {
    if (const Refusal no = find_backend(a.x.device, backend)) return no;
    // The exchange API does not tell of a lazily negated tensor.  Such a one has a last stride of 2
    // or more, unless its rows are single elements.
    if (quick && a.x.ndim > 0 && a.x.size(1) == 1)
      return {"x", "may be negated lazily", Refusal::kStrides};
    if (quick && modes_are_on()) return {"a dispatch mode", "is on", Refusal::kRecorder};
    if (quick && autocasts(a, *backend, out_dtype))
      return {"autocast", "is on", Refusal::kRecorder};
    if (const Refusal no = check(a, !quick)) return no;
    if (const Refusal no = check_recorders(a)) return no;
    if (const Refusal no = check_inference(a)) return no;
    device = a.x.device.device_id;
    return {};
  }

  // Makes the outputs that were not given.
  Refusal make_outputs(nb::handle out_dtype) {
    writes_out = bool(a.out), writes_residual_out = bool(a.residual_out);
    if (!a.out)
      if (const Refusal no = make_output(a.x, out_dtype, made, a.out)) return no;
    if (a.residual && !a.residual_out)
      if (const Refusal no = make_output(a.residual, nb::none(), made_residual, a.residual_out))
        return no;
    job = row_norm_of(a);
    stream = stream_for(*backend, a.x.device);
    return {};
  }

  Refusal prepare(PyObject* const* args, bool quick) {
    if (const Refusal no = read(a, args)) return no;
    if (const Refusal no = check_call(args[kOutDtype], quick)) return no;
    return make_outputs(args[kOutDtype]);
  }

  void run() const { backend->run(job, device, stream); }
  void run_and_count() const {
    run_job(backend->has_streams, job.rows * job.n, [this] { run(); });
    count_writes();
  }
  void count_writes() const {
    if (writes_out) count_write(a.out);
    if (writes_residual_out) count_write(a.residual_out);
  }
  nb::object result() const {
    nb::object y = nb::borrow(a.out.object);
    return a.residual ? nb::make_tuple(y, nb::borrow(a.residual_out.object)) : y;
  }
};

inline nb::object try_norm(PyObject* const* args) {
  if (quick_path_is_off) return nb::none();
  Prepared p;
  if (p.prepare(args, true)) return nb::none();
  p.run_and_count();
  return p.result();
}

inline nb::object norm(PyObject* const* args) {
  Prepared p;
  if (const Refusal no = p.prepare(args, false)) return refuse(no);
  p.run_and_count();
  return p.result();
}

inline nb::object norm_saving(PyObject* const* args) {
  Prepared p;
  if (const Refusal no = p.prepare(args, false)) return refuse(no);
  const Arguments& a = p.a;
  nb::object rstd = new_row_values(a.x, p.job.rstd), mean = nb::none();
  if (a.statistic == Statistic::kLayer) mean = new_row_values(a.x, p.job.mean);
  p.run_and_count();
  nb::object sum = a.residual ? nb::borrow(a.residual_out.object) : nb::none();
  return nb::make_tuple(nb::borrow(a.out.object), sum, rstd, mean);
}

// A packed output as make_output() would make it, but without memory of its own: a plan asks of an
// address only how it is aligned, and whether it is another tensor's.
struct Announced {
  std::vector<int64_t> strides;

  void stand_in(Tensor& output, const Tensor& like, DType dtype) {
    alignas(256) static char nowhere[1];
    strides.resize(like.ndim);
    int64_t packed = 1;
    for (int d = like.ndim - 1; d >= 0; --d) {
      strides[d] = packed;
      packed *= like.shape[d] > 0 ? like.shape[d] : 1;
    }
    const char* const name = output.name;
    output = like;
    output.name = name;
    output.data = nowhere;
    output.dtype = dtype;
    output.strides = strides.data();
  }
};

inline nb::object plan(PyObject* const* args) {
  Prepared p;
  Arguments& a = p.a;
  if (const Refusal no = read(a, args)) return refuse(no);
  if (const Refusal no = p.check_call(args[kOutDtype], false)) return refuse(no);
  Announced out, residual_out;
  if (!a.out) out.stand_in(a.out, a.x, dtype_of(args[kOutDtype]).value_or(a.x.dtype));
  if (a.residual && !a.residual_out)
    residual_out.stand_in(a.residual_out, a.residual, a.residual.dtype);
  const std::string text = p.backend->describe(row_norm_of(a), p.device);
  return nb::make_tuple(p.backend->name, text.c_str());
}

}  // namespace normkit
