// norm_tp(): a row norm on each of several devices, in one call.
#include <memory>

#include "norm.h"

namespace normkit {
namespace {

// Whether what one device writes is what another reads or writes: the result would depend on the
// order of launches.
bool devices_interfere(const Prepared* calls, Py_ssize_t count) {
  const auto shares = [](const Tensor& written, const Tensor& other) {
    return other && written.device.device_type == other.device.device_type &&
           written.device.device_id == other.device.device_id &&
           written.data < other.data + other.extent() &&
           other.data < written.data + written.extent();
  };
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!calls[i].writes_out) continue;
    for (Py_ssize_t j = 0; j < count; ++j) {
      if (i == j) continue;
      const Arguments& other = calls[j].a;
      for (const Tensor* t : {&other.x, &other.weight, &other.bias, &other.out})
        if (shares(calls[i].a.out, *t)) return true;
    }
  }
  return false;
}

// The context's stream for a device, where it has that device: streams[0] is of the CPU,
// streams[1 + i] of CUDA device i; None for another context's, -1 for torch's current stream.
bool find_stream(PyObject* streams, DLDevice device, void* current, void*& stream) {
  const Py_ssize_t at = device.device_type == kDLCPU ? 0 : 1 + device.device_id;
  if (at >= PyTuple_Size(streams)) return false;
  PyObject* const handle = PyTuple_GetItem(streams, at);
  if (handle == Py_None) return false;
  stream = PyLong_AsVoidPtr(handle);
  if (PyErr_Occurred()) throw nb::python_error();
  if (reinterpret_cast<intptr_t>(stream) == -1) stream = current;
  return true;
}

Refusal read_of_device(Arguments& a, PyObject* x, PyObject* weight, PyObject* bias, PyObject* out) {
  if (x == Py_None) return {"x", "is None", Refusal::kOption};
  if (const Refusal no = a.x.read(x)) return no;
  if (const Refusal no = a.weight.read(weight)) return no;
  if (const Refusal no = a.bias.read(bias)) return no;
  return a.out.read(out);
}

// None where no kernel runs the call, before anything has run.
nb::object norm_tp(PyObject* const* args) {
  if (quick_path_is_off) return nb::none();
  TpArguments shared;
  if (read<kTpFields>(shared, args)) return nb::none();
  if (!PyTuple_Check(shared.streams)) return nb::none();
  PyObject* const of_devices[] = {shared.xs, shared.weights, shared.biases, shared.outs};
  nb::object lists[4];
  Py_ssize_t count = 0;
  for (int l = 0; l < 4; ++l) {
    PyObject* const given = of_devices[l];
    if (l > 0 && given == Py_None) continue;
    if (!PyList_Check(given) && !PyTuple_Check(given)) return nb::none();
    lists[l] = nb::steal(PySequence_Tuple(given));
    if (!lists[l].is_valid()) throw nb::python_error();
    const Py_ssize_t size = PyTuple_Size(lists[l].ptr());
    if (l == 0) count = size;
    if (size != count) return nb::none();
  }
  const auto item = [](const nb::object& of, Py_ssize_t i) {
    return of.is_valid() ? PyTuple_GetItem(of.ptr(), i) : Py_None;
  };

  const std::unique_ptr<Prepared[]> calls(new Prepared[count]);
  const std::unique_ptr<void*[]> streams(new void*[count]);
  int64_t elements = 0;
  bool waits = false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    Prepared& p = calls[i];
    p.a = shared;
    if (read_of_device(p.a, item(lists[0], i), item(lists[1], i), item(lists[2], i),
                       item(lists[3], i)) ||
        p.check(Caller::kQuick) || p.make_outputs())
      return nb::none();
    if (!find_stream(shared.streams, p.a.x.device, p.stream, streams[i])) return nb::none();
    elements += p.job.rows * p.job.n;
    waits = waits || p.backend->has_streams;
  }
  if (devices_interfere(calls.get(), count)) return nb::none();
  run_job(waits, elements, [&] {
    for (Py_ssize_t i = 0; i < count; ++i) {
      Prepared& p = calls[i];
      void* const current = p.stream;
      const bool apart = streams[i] != current;
      if (apart) p.backend->let_wait(p.device, streams[i], current);
      if (apart) p.stream = streams[i];
      p.run();
      if (apart) p.backend->let_wait(p.device, current, streams[i]);
    }
  });
  nb::list made;
  for (Py_ssize_t i = 0; i < count; ++i) {
    calls[i].count_writes();
    made.append(nb::handle(calls[i].a.out.object));
  }
  return made;
}

}  // namespace

void add_norm_tp(nb::module_& m) {
  static PyMethodDef methods[] = {
      method<kTpFields, norm_tp>("norm_tp", R"(Run a row norm of each of xs on its device.

Returns a list of y, or None where Python has to look at the call.

kind is as in try_norm(), without a residual.  weights, biases and outs are as long as xs, or None.
streams[0] is of the CPU and streams[1 + i] of CUDA device i: a handle, -1 for torch's current
stream, or None where there must be nothing.)"),
      {nullptr, nullptr, 0, nullptr}};
  add_methods(m, methods);
}

}  // namespace normkit
