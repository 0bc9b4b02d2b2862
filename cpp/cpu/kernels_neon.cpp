#include "vec_neon.h"
// Separate from the line above: the stages use what it defines.
#include "backward_stages.h"

namespace normkit::cpu {

const Kernels* neon_kernels() {
  static constexpr Kernels kernels = make_kernels("neon");
  return &kernels;
}

}  // namespace normkit::cpu
