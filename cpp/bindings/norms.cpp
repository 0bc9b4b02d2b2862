// try_norms() and norms(): several row norms in one call, and where kernels can in one launch.
#include <memory>
#include <vector>

#include "norm.h"

namespace normkit {
namespace {

// Whether two tensors are slices of one that repeats itself each `period` bytes: q and k of a
// packed projection, whose rows take turns in memory.
bool are_slices(const Tensor& a, const Tensor& b, int64_t period) {
  const auto inside = [&](const Tensor& t) {
    const int64_t item = item_size(t.dtype);
    int64_t bytes = item;
    for (int d = 0; d < t.ndim; ++d)
      if (t.strides[d] * item % period != 0) bytes += (t.shape[d] - 1) * t.strides[d] * item;
    return bytes;
  };
  const int64_t apart = ((b.data - a.data) % period + period) % period;
  return apart >= inside(a) && apart + inside(b) <= period;
}

bool meet(const Tensor& a, const Tensor& b) {
  if (!share_memory(a, b)) return false;
  for (int d = 0; d < a.ndim; ++d) {
    const int64_t period = a.strides[d] * item_size(a.dtype);
    if (period > 0 && are_slices(a, b, period)) return false;
  }
  return true;
}

// Whether one writes what another reads or writes, or they are for different devices or kernels:
// they have to run one after the other.
bool take_turns(const std::vector<Prepared*>& calls) {
  for (const Prepared* one : calls) {
    if (has_strided_columns(one->a.x) || (one->a.out && has_strided_columns(one->a.out)))
      return true;
    for (const Prepared* other : calls) {
      if (one == other) continue;
      if (one->backend != other->backend || one->device != other->device) return true;
      const Arguments& b = other->a;
      for (const Tensor* written : {&one->a.out, &one->a.cache})
        for (const Tensor* t : {&b.x, &b.weight, &b.bias, &b.cos, &b.sin, &b.out, &b.cache})
          if (meet(*written, *t)) return true;
      // Of which only the extent is known.
      for (const Indices* t : {&b.positions, &b.slots})
        if (share_memory(one->a.out, *t) || share_memory(one->a.cache, *t)) return true;
    }
  }
  return false;
}

void run(const std::vector<Prepared*>& calls) {
  const Prepared& first = *calls.front();
  int64_t elements = 0;
  bool has_streams = false;
  for (const Prepared* p : calls) {
    elements += p->job.rows * p->job.n;
    has_streams = has_streams || p->backend->has_streams;
  }
  const bool together = first.backend->run_together && !take_turns(calls);
  run_job(has_streams, elements, [&] {
    if (!together) {
      for (const Prepared* p : calls) p->run();
      return;
    }
    std::vector<const RowNorm*> jobs;
    for (const Prepared* p : calls) jobs.push_back(&p->job);
    first.backend->run_together(jobs.data(), static_cast<int>(jobs.size()), first.device,
                                first.stream);
  });
  for (const Prepared* p : calls) p->count_writes();
}

Refusal prepare(Prepared& p, PyObject* fields, Caller caller) {
  constexpr size_t kFields = std::size(kFusedFields);
  PyObject* args[kFields];
  if (!PyTuple_Check(fields) || PyTuple_Size(fields) != Py_ssize_t{kFields})
    throw nb::type_error("calls: expected a tuple of fields for each");
  for (size_t i = 0; i < kFields; ++i) args[i] = PyTuple_GetItem(fields, i);
  if (const Refusal no = read<kFusedFields>(p.a, args)) return no;
  if (const Refusal no = p.check(caller)) return no;
  return p.make_outputs();
}

// `made` becomes the list of results.
Refusal run_all(PyObject* calls, Caller caller, nb::object& made) {
  if (!PyTuple_Check(calls)) throw nb::type_error("calls: expected a tuple");
  const Py_ssize_t count = PyTuple_Size(calls);
  const std::unique_ptr<Prepared[]> prepared(new Prepared[count]);
  std::vector<Prepared*> all;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (const Refusal no = prepare(prepared[i], PyTuple_GetItem(calls, i), caller)) return no;
    all.push_back(&prepared[i]);
  }
  if (count > 0) run(all);
  nb::list results;
  for (const Prepared* p : all) results.append(p->a.out ? nb::borrow(p->a.out.object) : nb::none());
  made = results;
  return {};
}

PyObject* norms(PyObject*, PyObject* const* args, Py_ssize_t count, Caller caller) {
  if (count != 1) {
    PyErr_SetString(PyExc_TypeError, "expected 1 positional argument");
    return nullptr;
  }
  try {
    if (caller == Caller::kQuick && quick_path_is_off) return nb::none().release().ptr();
    nb::object made = nb::none();
    const Refusal no = run_all(args[0], caller, made);
    if (no && caller == Caller::kQuick) return nb::none().release().ptr();
    return (no ? refuse(no) : made).release().ptr();
  } catch (nb::python_error& error) {
    error.restore();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const nb::builtin_exception& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyObject* try_norms(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return norms(self, args, count, Caller::kQuick);
}

PyObject* checked_norms(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  return norms(self, args, count, Caller::kHasCheckedMemory);
}

}  // namespace

void add_norms(nb::module_& m) {
  static std::string docs[2];
  static constexpr struct {
    const char* name;
  } kCalls[] = {{"calls"}};
  static PyMethodDef methods[] = {
      method_of("try_norms", kCalls, try_norms, docs[0], R"(Run several row norms.

calls is a tuple, with the arguments of try_norm() as a tuple for each, all of them.  Those that
write nothing that another reads or writes are one launch; the others run one after the other.

Returns a list of y, which is None where x only goes to a cache as it is; or None, and nothing has
run, where Python has to look at a call.)"),
      method_of("norms", kCalls, checked_norms, docs[1],
                R"(Run several row norms, as try_norms() does.

The caller has checked that outputs overlap nothing of their own call.  A Refusal where there is no
result.)"),
      {nullptr, nullptr, 0, nullptr}};
  add_methods(m, methods);
}

}  // namespace normkit
