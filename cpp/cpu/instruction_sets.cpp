// The instruction sets that this build has kernels for and this processor can run.
#include <atomic>
#include <cstring>

#include "kernels.h"
#include "platform.h"
#include "row_norm.h"

namespace normkit::cpu {
namespace {

struct InstructionSets {
  const Kernels* kernels[4] = {};
  const char* names[5] = {};
  int count = 0;
  void add(const Kernels* k) {
    kernels[count] = k;
    names[count++] = k->name;
  }
};

const InstructionSets& usable() {
  static const InstructionSets found = [] {
    InstructionSets sets;
#if defined(__x86_64__) || defined(_M_X64)
    const platform::VectorSets has = platform::vector_sets();
    if (has.avx512bf16) sets.add(avx512bf16_kernels());
    if (has.avx512) sets.add(avx512_kernels());
    if (has.avx2) sets.add(avx2_kernels());
#elif defined(__aarch64__) || defined(_M_ARM64)
    sets.add(neon_kernels());
#endif
    return sets;
  }();
  return found;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{usable().kernels[0]};
  return kernels;
}

}  // namespace

const Kernels& kernels_in_use() { return *chosen().load(std::memory_order_relaxed); }

const char* const* instruction_sets() { return usable().names; }

const char* instruction_set() {
  const Kernels* kernels = chosen().load(std::memory_order_relaxed);
  return kernels ? kernels->name : nullptr;
}

bool use_instruction_set(const char* name) {
  for (int i = 0; i < usable().count; ++i)
    if (!std::strcmp(usable().names[i], name)) {
      chosen().store(usable().kernels[i], std::memory_order_relaxed);
      return true;
    }
  return false;
}

}  // namespace normkit::cpu
