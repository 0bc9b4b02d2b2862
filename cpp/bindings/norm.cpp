// try_norm(), norm(), norm_saving() and plan(): one call of a row norm.
#include "norm.h"

#include <string_view>
#include <vector>

namespace normkit {
namespace {

// Where autocast decides on the dtype of the output, Python does what it says.
bool autocasts(const Arguments& a, const Backend& backend) {
  return backend.has_streams && !a.out && !a.out_dtype &&
         ask(torch_objects.is_autocast_enabled, torch_objects.cuda);
}

// What a dict has under a key, or nothing.  Borrowed where the interpreter's lock keeps other
// threads from replacing it while it is looked at.
#ifdef NB_FREE_THREADED
nb::object item_of(PyObject* dict, PyObject* key) {
  PyObject* found;
  if (PyDict_GetItemRef(dict, key, &found) < 0) throw nb::python_error();
  return nb::steal(found);
}
#else
nb::handle item_of(PyObject* dict, PyObject* key) { return PyDict_GetItemWithError(dict, key); }
#endif

// A TorchDispatchMode is active, in some thread; it may have to see the operators that run.
bool modes_are_on() {
  return item_of(torch_objects.modes, torch_objects.in_a_mode).ptr() == Py_True;
}

// A dual tensor does not say that it is one; torch.autograd.forward_ad says whether there are any.
bool forward_ad_is_on() {
  const auto level = item_of(torch_objects.forward_ad, torch_objects.current_level);
  return level.is_valid() && PyLong_AsLong(level.ptr()) >= 0;
}

// A property of torch.Tensor; null with torch's error.
nb::object get(PyObject* property, const Tensor& t) {
  return nb::steal(torch_objects.get_property(property, t.object,
                                              reinterpret_cast<PyObject*>(Py_TYPE(t.object))));
}

bool requires_grad(const Tensor& t) {
  const nb::object answer = get(torch_objects.requires_grad, t);
  if (!answer.is_valid()) throw nb::python_error();
  return answer.ptr() == Py_True;
}

// A tensor that was made in inference mode has none, which torch tells by an error.
bool has_version_counter(const Tensor& t) {
  if (get(torch_objects.version, t).is_valid()) return true;
  if (!PyErr_ExceptionMatches(PyExc_RuntimeError)) throw nb::python_error();
  PyErr_Clear();
  return false;
}

// The first tensor that requires a gradient, or none.
const Tensor* find_differentiated(const Arguments& a) {
  // in place, out is x, which need not be asked twice
  for (const Tensor* t : {&a.x, &a.residual, &a.weight, &a.bias, &a.out, &a.residual_out})
    if (*t && (t == &a.x || t->object != a.x.object) && requires_grad(*t)) return t;
  if (a.is_fused())
    for (const Tensor* t : {&a.gate, &a.scale, &a.shift, &a.z, &a.cos, &a.sin, &a.cache})
      if (*t && requires_grad(*t)) return t;
  if (a.post)
    for (const Tensor* t : {&a.next_weight, &a.next_bias})
      if (*t && requires_grad(*t)) return t;
  return nullptr;
}

// Is autograd, forward-mode AD or a tracer recording?  They cannot see a call that bypasses the
// dispatcher.  `differentiates` becomes whether its caller has to tell autograd.
Refusal check_recorders(const Arguments& a, Caller caller, bool& differentiates) {
  if (forward_ad_is_on()) return {"forward-mode AD", "is on", Refusal::kRecorder};
  const bool grad_is_on = is_grad_enabled();
  if (const Tensor* const differentiated = grad_is_on ? find_differentiated(a) : nullptr) {
    if (caller != Caller::kDifferentiates || a.out || a.residual_out ||
        ask(torch_objects.is_transforming))
      return {differentiated->name, "requires a gradient", Refusal::kRecorder};
    differentiates = true;
  }
  // A trace records torch's operators, and would take what a kernel writes for a constant.
  if (ask(torch_objects.is_tracing)) return {"torch.jit.trace", "is recording", Refusal::kRecorder};
  // torch writes to a tensor of inference mode only there, where gradients are off too.  Not by
  // is_inference(), which lets go of the interpreter's lock and takes it again: 40 ns.
  if (a.out || a.residual_out || a.cache) {
    if (!grad_is_on && ask(torch_objects.is_inference_mode_enabled)) return {};
    for (const Tensor* t : {&a.out, &a.residual_out, &a.cache})
      if (*t && !has_version_counter(*t))
        return {t->name, "is an inference tensor", Refusal::kRecorder};
  }
  return {};
}

// Of a tensor whose columns are strided; another is refused where it could be.
bool is_negated(const Tensor& t) {
  return t && t.ndim > 0 && has_strided_columns(t) && ask(torch_objects.is_neg, t.object);
}

}  // namespace

Refusal Prepared::check(Caller caller) {
  if (const Refusal no = find_backend(a.x.device, backend)) return no;
  device = a.x.device.device_id;
  const bool quick = caller != Caller::kHasCheckedMemory;
  // The exchange API does not tell of a lazily negated tensor.  Such a one has a last stride of 2
  // or more, unless its rows are single elements.
  for (const Tensor* t : {&a.x, &a.cos})
    if (quick && t->ndim > 0 && t->size(1) == 1)
      return {t->name, "may be negated lazily", Refusal::kStrides};
  if (is_negated(a.x)) return {"x", "is negated lazily", Refusal::kStrides};
  if (is_negated(a.out)) return {"out", "is negated lazily", Refusal::kMemory};
  if (quick && modes_are_on()) return {"a dispatch mode", "is on", Refusal::kRecorder};
  if (quick && autocasts(a, *backend)) return {"autocast", "is on", Refusal::kRecorder};
  if (const Refusal no = normkit::check(a, !quick)) return no;
  return check_recorders(a, caller, differentiates);
}

Refusal Prepared::make_outputs() {
  writes_out = bool(a.out), writes_residual_out = bool(a.residual_out);
  const bool is_only_kept = a.options.as_is && a.cache;
  if (!a.out && !is_only_kept)
    if (const Refusal no = make_output(a.x, a.out_dtype_of(), made, a.out)) return no;
  if (a.adds && !a.residual_out)
    if (const Refusal no = make_output(a.residual, a.residual.dtype, made_residual, a.residual_out))
      return no;
  lay_out(a, job);
  stream = stream_for(*backend, a.x.device);
  return {};
}

// Autograd learns of the writes by version counters, as it does from torch's own in-place
// operators.
void Prepared::count_writes() const {
  PyObject* written[3];
  Py_ssize_t count = 0;
  if (writes_out) written[count++] = a.out.object;
  if (writes_residual_out) written[count++] = a.residual_out.object;
  if (a.cache) written[count++] = a.cache.object;
  if (count == 0) return;
  nb::object all = nb::steal(PyTuple_New(count));
  if (!all.is_valid()) throw nb::python_error();
  for (Py_ssize_t i = 0; i < count; ++i) {
    Py_INCREF(written[i]);
    PyTuple_SetItem(all.ptr(), i, written[i]);
  }
  call(torch_objects.increment_version, all.ptr());
}

namespace {

template <const auto& kFields>
Refusal prepare(Prepared& p, PyObject* const* args, Caller caller) {
  if (const Refusal no = read<kFields>(p.a, args)) return no;
  if (const Refusal no = p.check(caller)) return no;
  return p.make_outputs();
}

void run(const Prepared& p) {
  run_job(p.backend->has_streams, p.job.rows * p.job.n, [&] { p.run(); });
  p.count_writes();
}

nb::object result_of(const Prepared& p) {
  nb::object y = nb::borrow(p.a.out.object);
  return p.a.adds ? nb::make_tuple(y, nb::borrow(p.a.residual_out.object)) : y;
}

template <const auto& kFields>
nb::object norm(PyObject* const* args) {
  Prepared p;
  if (const Refusal no = prepare<kFields>(p, args, Caller::kHasCheckedMemory)) return refuse(no);
  run(p);
  return result_of(p);
}

// Runs a call that has been prepared, and keeps what its gradients need.
nb::object run_saving(Prepared& p) {
  const Arguments& a = p.a;
  nb::object rstd = nb::none(), mean = nb::none();
  if (!a.post) rstd = new_row_values(a.x, p.job.rstd);
  if (!a.post && a.statistic == Statistic::kLayer) mean = new_row_values(a.x, p.job.mean);
  run(p);
  nb::object sum = a.adds ? nb::borrow(a.residual_out.object) : nb::none();
  return nb::make_tuple(nb::borrow(a.out.object), sum, rstd, mean);
}

template <const auto& kFields>
nb::object norm_saving(PyObject* const* args) {
  Prepared p;
  if (const Refusal no = prepare<kFields>(p, args, Caller::kHasCheckedMemory)) return refuse(no);
  return run_saving(p);
}

// ---------------------------------------------------------------- with gradients

constexpr size_t field_called(std::string_view name) {
  size_t at = 0;
  while (kNormFields[at].name != name) ++at;
  return at;
}
constexpr size_t kKind = 0, kX = field_called("x"), kResidual = field_called("residual"),
                 kWeight = field_called("weight"), kBias = field_called("bias"),
                 kEps = field_called("eps"), kOffset = field_called("weight_offset"),
                 kBehindOptions = field_called("out_dtype"),
                 kMemoryEfficient = field_called("memory_efficient");

// The backward pass wants numbers that torch can add.
bool are_floats(PyObject* const* args) {
  return PyFloat_CheckExact(args[kEps]) && PyFloat_CheckExact(args[kOffset]);
}

// What of a call its gradients depend on: kind, eps, the options, memory_efficient.
nb::object formula_of(PyObject* const* args) {
  nb::object values = nb::steal(PyTuple_New(2 + kBehindOptions - kEps));
  if (!values.is_valid()) throw nb::python_error();
  Py_ssize_t at = 0;
  const auto add = [&](size_t field) {
    PyTuple_SetItem(values.ptr(), at++, nb::borrow(args[field]).release().ptr());
  };
  add(kKind);
  for (size_t field = kEps; field < kBehindOptions; ++field) add(field);
  add(kMemoryEfficient);
  return values;
}

// Runs a call that has been prepared, and leaves with autograd what its gradients need.
nb::object differentiate(Prepared& p, PyObject* const* args) {
  const nb::object saved = run_saving(p), formula = formula_of(args);
  nb::object made = nb::steal(
      PyObject_CallFunctionObjArgs(torch_objects.differentiate, formula.ptr(), saved.ptr(),
                                   args[kX], args[kResidual], args[kWeight], args[kBias], nullptr));
  if (!made.is_valid()) throw nb::python_error();
  return made;
}

template <const auto& kFields>
nb::object try_norm(PyObject* const* args) {
  if (quick_path_is_off) return nb::none();
  Prepared p;
  if (prepare<kFields>(p, args, Caller::kQuick)) return nb::none();
  run(p);
  return result_of(p);
}

template <>
nb::object try_norm<kNormFields>(PyObject* const* args) {
  if (quick_path_is_off) return nb::none();
  Prepared p;
  const Caller caller =
      torch_objects.differentiate && are_floats(args) ? Caller::kDifferentiates : Caller::kQuick;
  if (prepare<kNormFields>(p, args, caller)) return nb::none();
  if (p.differentiates) return differentiate(p, args);
  run(p);
  return result_of(p);
}

// An output as make_output() would make it, without memory of its own: a plan asks of an address
// only how it is aligned, and whether it is another tensor's.
class Announced {
 public:
  void stand_in(Tensor& output, const Tensor& like, DType dtype) {
    alignas(256) static char nowhere[1];
    strides_.resize(like.ndim);
    int64_t packed = 1;
    for (int d = like.ndim - 1; d >= 0; --d) {
      strides_[d] = packed;
      packed *= like.shape[d] > 0 ? like.shape[d] : 1;
    }
    const char* const name = output.name;
    output = like;
    output.name = name;
    output.data = nowhere;
    output.dtype = dtype;
    output.strides = strides_.data();
  }

 private:
  std::vector<int64_t> strides_;
};

template <const auto& kFields>
nb::object plan(PyObject* const* args) {
  Prepared p;
  Arguments& a = p.a;
  if (const Refusal no = read<kFields>(a, args)) return refuse(no);
  if (const Refusal no = p.check(Caller::kHasCheckedMemory)) return refuse(no);
  Announced out, residual_out;
  if (!a.out) out.stand_in(a.out, a.x, a.out_dtype_of());
  if (a.adds && !a.residual_out)
    residual_out.stand_in(a.residual_out, a.residual, a.residual.dtype);
  lay_out(a, p.job);
  const std::string text = p.backend->describe(p.job, p.device);
  return nb::make_tuple(p.backend->name, text.c_str());
}

}  // namespace

void add_norm(nb::module_& m) {
  static PyMethodDef methods[] = {
      method<kNormFields, try_norm<kNormFields>, kFusedFields, try_norm<kFusedFields>>(
          "try_norm", R"(Run a row norm of eager tensors, where nothing speaks against it.

Returns y, or (y, residual_out) when there is a residual; None where Python has to look at the call.
Where a gradient is needed, what set_differentiate() named tells autograd of the call, unless it has
other arguments than those of every norm.

kind is 0 for rms and 1 for layer, plus 2 when weight and bias may have a row per head, plus 4 when
there is a residual; the other bits are those of normkit._spec.  The other arguments are those of
the functions of normkit.)"),
      method<kNormFields, norm<kNormFields>, kFusedFields, norm<kFusedFields>>(
          "norm", R"(Run a row norm for a caller who has checked that outputs overlap nothing.

Arguments and result are those of try_norm(), but a Refusal where there is no result.)"),
      method<kNormFields, norm_saving<kNormFields>, kFusedFields, norm_saving<kFusedFields>>(
          "norm_saving",
          R"(Run norm(), and keep what norm_backward() needs.

Returns (y, residual_out or None, rstd, mean or None), or a Refusal.  With a norm in front of a sum
rstd and mean are None: its gradients take them again.)"),
      method<kNormFields, plan<kNormFields>, kFusedFields, plan<kFusedFields>>(
          "plan",
          R"(Tell what norm() would do, without making or running anything.

Returns (name of the backend, its plan in words), or a Refusal.)"),
      {nullptr, nullptr, 0, nullptr}};
  add_methods(m, methods);

  nb::list names;
  for (const auto& field : kFusedFields) names.append(field.name);
  m.attr("fields") = nb::tuple(names);
  m.def(
      "set_differentiate",
      [](nb::object apply) { torch_objects.differentiate = apply.release().ptr(); },
      nb::arg("apply"),
      "Set what makes a node of autograd of (kind, eps, options and memory_efficient), the result "
      "of"
      " norm_saving(), x, residual, weight and bias, and returns what try_norm() does.");
  m.def(
      "set_quick_path", [](bool on) { quick_path_is_off = !on; }, nb::arg("on"),
      "Whether this thread's calls of try_norm() and norm_tp() are taken.");
}

}  // namespace normkit
