#include "platform.h"

#include <cstdint>
#include <cstring>

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#define PSAPI_VERSION 2  // of kernel32 itself
#include <windows.h>
// Behind windows.h, whose types it uses.
#include <psapi.h>

#include <vector>
#else
#include <dlfcn.h>
#include <pthread.h>
#if defined(__APPLE__)
#include <mach-o/dyld.h>
#else
#include <link.h>
#endif
#endif

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#endif

namespace normkit::platform {
namespace {

[[maybe_unused]] bool begins_with(const char* text, const char* beginning) {
  return std::strncmp(text, beginning, std::strlen(beginning)) == 0;
}

[[maybe_unused]] bool is_file_named(const char* path, const char* name) {
  const char* slash = std::strrchr(path, '/');
  return begins_with(slash ? slash + 1 : path, name);
}

}  // namespace

#if defined(_WIN32)

void* loaded_library(const char* name) {
  const HANDLE process = GetCurrentProcess();
  std::vector<HMODULE> modules(512);
  DWORD bytes = 0;
  for (;;) {
    const DWORD room = static_cast<DWORD>(modules.size() * sizeof(HMODULE));
    if (!EnumProcessModules(process, modules.data(), room, &bytes)) return nullptr;
    if (bytes <= room) break;
    modules.resize(bytes / sizeof(HMODULE) + 64);
  }
  modules.resize(bytes / sizeof(HMODULE));
  for (const HMODULE module : modules) {
    char file[MAX_PATH];
    if (GetModuleBaseNameA(process, module, file, sizeof(file)) && begins_with(file, name))
      return module;
  }
  return nullptr;
}

void* symbol(void* library, const char* name) {
  return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(library), name));
}

void call_in_forked_children(void (*)()) {}

#else

#if defined(__APPLE__)

void* loaded_library(const char* name) {
  for (uint32_t i = 0; i < _dyld_image_count(); ++i) {
    const char* path = _dyld_get_image_name(i);  // null where it has been unloaded meanwhile
    if (path && is_file_named(path, name)) return dlopen(path, RTLD_NOW | RTLD_NOLOAD);
  }
  return nullptr;
}

#else

namespace {

struct Search {
  const char* name;
  const char* path = nullptr;
};

int look_at(dl_phdr_info* info, size_t, void* argument) {
  Search& search = *static_cast<Search*>(argument);
  if (!is_file_named(info->dlpi_name, search.name)) return 0;
  search.path = info->dlpi_name;
  return 1;
}

}  // namespace

void* loaded_library(const char* name) {
  Search search{name};
  dl_iterate_phdr(look_at, &search);
  return search.path ? dlopen(search.path, RTLD_NOW | RTLD_NOLOAD) : nullptr;
}

#endif

void* symbol(void* library, const char* name) { return dlsym(library, name); }

void call_in_forked_children(void (*f)()) { pthread_atfork(nullptr, nullptr, f); }

#endif

#if defined(__x86_64__) || defined(_M_X64)

namespace {

// The registers that the system keeps when it changes threads.
uint64_t kept_registers() {
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

bool has(uint32_t word, uint32_t bits) { return (word & bits) == bits; }

}  // namespace

// Not __builtin_cpu_supports, which clang answers on Windows from a library that it does not link.
VectorSets vector_sets() {
  constexpr uint32_t kFma = 1u << 12, kXgetbv = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;
  constexpr uint32_t kAvx2 = 1u << 5, kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31;
  constexpr uint32_t kBf16 = 1u << 5;
  constexpr uint64_t kYmm = 0x06, kZmm = 0xe6;
  VectorSets sets{};
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, kFma | kXgetbv | kAvx | kF16c)) return sets;
  const uint64_t kept = kept_registers();
  if ((kept & kYmm) != kYmm || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return sets;
  const uint32_t leaves = a;
  sets.avx2 = has(b, kAvx2);
  sets.avx512 = (kept & kZmm) == kZmm && has(b, kF | kDq | kBw | kVl);
  if (sets.avx512 && leaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d))
    sets.avx512bf16 = has(a, kBf16);
  return sets;
}

#else

VectorSets vector_sets() { return {}; }

#endif

}  // namespace normkit::platform
