// One forward call on its way from the arguments to the kernels; norm_tp() has several.
#pragma once
#include "binding.h"
#include "fields.h"

namespace normkit {

// Set while use_backend() names another backend than "auto": the quick entries then leave the
// choice to Python.
inline thread_local bool quick_path_is_off = false;

// A quick call is an eager one of which nothing has been checked, and a differentiated one a quick
// one that may need gradients; of any other the caller has checked that what is written overlaps
// nothing.
enum class Caller { kQuick, kDifferentiates, kHasCheckedMemory };

struct Prepared {
  Arguments a;
  const Backend* backend = nullptr;
  RowNorm job;
  int device;
  void* stream;
  nb::object made, made_residual;
  bool writes_out, writes_residual_out;
  bool differentiates = false;  // a gradient is needed

  // `a` has been read; backend and device are found.
  Refusal check(Caller caller);
  // Makes the outputs that were not given, and the job.
  Refusal make_outputs();
  void run() const { backend->run(job, device, stream); }
  void count_writes() const;
};

}  // namespace normkit
