#define NORMKIT_AVX512_BF16
#include "vec_avx512.h"
// Separate from the line above: the stages use what it defines.
#include "backward_stages.h"

namespace normkit::cpu {

const Kernels* avx512bf16_kernels() {
  static constexpr Kernels kernels = make_kernels("avx512bf16");
  return &kernels;
}

}  // namespace normkit::cpu
