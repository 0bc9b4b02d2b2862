#include "shim.h"

#include <string>

#include "../cpu/platform.h"

namespace normkit::shim {
namespace {

void* torch_cpu() {
#ifdef _WIN32
  static void* const library = platform::loaded_library("torch_cpu");
#else
  static void* const library = platform::loaded_library("libtorch_cpu");
#endif
  return library;
}

template <class Function>
bool find(const char* name, Function& function) {
  function =
      torch_cpu() ? reinterpret_cast<Function>(platform::symbol(torch_cpu(), name)) : nullptr;
  return function != nullptr;
}

}  // namespace

const Functions* functions() {
  static Functions found{};
  static const bool complete = find("aoti_torch_library_init_impl", found.library_init_impl) &&
                               find("torch_library_impl", found.library_impl) &&
                               find("torch_string_length", found.string_length) &&
                               find("torch_string_c_str", found.string_c_str) &&
                               find("torch_delete_string", found.delete_string);
  static const bool deletes = complete && find("torch_delete_stable_ivalue", found.delete_value);
  static_cast<void>(deletes);
  return complete ? &found : nullptr;
}

bool (*find_is_grad_enabled())() {
  bool (*function)() = nullptr;
  find("aoti_torch_grad_mode_is_enabled", function);
  return function;
}

int32_t dtype_code(const char* name) {
  int32_t (*code)() = nullptr;
  return find(("aoti_torch_dtype_" + std::string(name)).c_str(), code) ? code() : -1;
}

}  // namespace normkit::shim
