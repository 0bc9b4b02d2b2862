// The C functions of the libtorch that this process has loaded, found by name: nothing is linked.
// torch promises to keep them: torch/csrc/inductor/aoti_torch/c/shim.h, torch/csrc/stable/c/shim.h.
#pragma once
#include <cstddef>
#include <cstdint>

namespace normkit::shim {

// A value of an operator's stack: a number in its first bytes, or a pointer.
using Value = uint64_t;
using Kernel = void (*)(Value* stack, uint64_t arguments, uint64_t outputs);

// Each but the last four returns 0 on success.
struct Functions {
  int32_t (*library_init_impl)(const char* space, const char* key, const char* file, uint32_t line,
                               void** library);
  int32_t (*library_impl)(void* library, const char* name, Kernel kernel, uint64_t version);
  int32_t (*string_length)(void* string, size_t* length);
  int32_t (*string_c_str)(void* string, const char** text);  // borrowed
  int32_t (*delete_string)(void* string);
  int32_t (*delete_value)(Value* value);  // null before torch 2.13
};

// Null where this torch lacks one of them, or is none that normkit knows.
const Functions* functions();

bool (*find_is_grad_enabled())();
// The number that stands for a dtype on a stack, by its name in torch; -1 where there is none.
int32_t dtype_code(const char* name);

}  // namespace normkit::shim
