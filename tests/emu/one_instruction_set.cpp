// For programs in which one of x86's instruction sets stands for all.
#if defined(__x86_64__)
#include "../../cpp/cpu/kernels.h"

namespace normkit::cpu {

const Kernels* avx512_kernels() { return avx2_kernels(); }
const Kernels* avx512bf16_kernels() { return avx2_kernels(); }

}  // namespace normkit::cpu
#endif
