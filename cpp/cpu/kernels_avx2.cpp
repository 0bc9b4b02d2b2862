#include "vec_avx2.h"
// Separate from the line above: the stages use what it defines.
#include "backward_stages.h"

namespace normkit::cpu {

const Kernels* avx2_kernels() {
  static constexpr Kernels kernels = make_kernels("avx2");
  return &kernels;
}

}  // namespace normkit::cpu
