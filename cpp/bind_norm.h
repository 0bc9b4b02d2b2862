// norm(): one call of a row norm.
#pragma once
#include "binding.h"
#include "checks.h"

namespace normkit {

// Set while use_backend() names another backend than "auto", so that the quick path asks
// normkit._dispatch first.
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
      return {t->name, "is an inference tensor"};
  }
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

inline Refusal read(Arguments& a, PyObject* const* args) {
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

// A call that has been read and checked, and has its outputs.
struct Prepared {
  Arguments a;
  const Backend* backend = nullptr;
  RowNorm job;
  int device;
  void* stream;
  nb::object made, made_residual;
  bool writes_out, writes_residual_out;

  void run() const { backend->run(job, device, stream); }
  void count_writes() const {
    if (writes_out) count_write(a.out);
    if (writes_residual_out) count_write(a.residual_out);
  }
};

inline Refusal prepare(Prepared& p, PyObject* const* args, bool quick) {
  Arguments& a = p.a;
  if (const Refusal no = read(a, args)) return no;
  if (const Refusal no = find_backend(a.x.device, p.backend)) return no;
  // The exchange API does not tell of a lazily negated tensor.  Such a one has a last stride of 2
  // or more, unless its rows are single elements; normkit._dispatch resolves it.
  if (quick && a.x.ndim > 0 && a.x.size(1) == 1) return {"x", "may be negated lazily"};
  if (quick && modes_are_on()) return {"a dispatch mode", "is on"};
  if (quick && autocasts(a, *p.backend, args[kOutDtype])) return {"autocast", "is on"};
  if (const Refusal no = check(a, !quick)) return no;
  if (const Refusal no = check_recorders(a)) return no;
  if (const Refusal no = check_inference(a)) return no;

  p.writes_out = bool(a.out), p.writes_residual_out = bool(a.residual_out);
  if (!a.out)
    if (const Refusal no = make_output(a.x, args[kOutDtype], p.made, a.out)) return no;
  if (a.residual && !a.residual_out)
    if (const Refusal no = make_output(a.residual, nb::none(), p.made_residual, a.residual_out))
      return no;
  p.job = row_norm_of(a);
  p.device = a.x.device.device_id;
  return {};
}

inline nb::object norm(PyObject* const* args) {
  const long mode = PyLong_AsLong(args[kMode]);
  if (mode == -1 && PyErr_Occurred()) throw nb::python_error();
  const bool quick = mode == kQuick;
  if (quick && quick_path_is_off) return nb::none();
  Prepared p;
  if (const Refusal no = prepare(p, args, quick)) return refuse(quick, no);
  const Arguments& a = p.a;
  if (mode == kExplain)
    return nb::make_tuple(p.backend->name, p.backend->describe(p.job, p.device).c_str());
  p.stream = stream_for(*p.backend, a.x.device);
  nb::object rstd = nb::none(), mean = nb::none();
  if (mode == kSaving) {
    rstd = new_row_values(a.x, p.job.rstd);
    if (a.statistic == Statistic::kLayer) mean = new_row_values(a.x, p.job.mean);
  }
  run_job(p.backend->has_streams, p.job.rows * p.job.n, [&] { p.run(); });
  p.count_writes();
  nb::object y = nb::borrow(a.out.object);
  if (mode == kSaving) {
    nb::object total = a.residual ? nb::borrow(a.residual_out.object) : nb::none();
    return nb::make_tuple(y, total, rstd, mean);
  }
  if (!a.residual) return y;
  return nb::make_tuple(y, nb::borrow(a.residual_out.object));
}

}  // namespace normkit
