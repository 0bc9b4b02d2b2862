#include "vec_avx512.h"
// Separate from the line above: the stages use what it defines.
#include "backward_stages.h"

namespace normkit::cpu {

const Kernels* avx512_kernels() {
  static constexpr Kernels kernels = make_kernels("avx512");
  return &kernels;
}

}  // namespace normkit::cpu
