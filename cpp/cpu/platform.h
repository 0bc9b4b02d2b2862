// What operating systems do each in a way of their own.
#pragma once

namespace normkit::platform {

// A library that somebody else has loaded into this process, by how its file name begins; null
// where there is none.  It is neither loaded nor kept: for those that stay until the process ends.
void* loaded_library(const char* name);

// Null where the library has none of this name.
void* symbol(void* library, const char* name);

// Calls f in every forked child of this process.  Windows forks nothing.
void call_in_forked_children(void (*f)());

// What processor and system can run together of x86's vector instructions.  Nothing on others.
struct VectorSets {
  bool avx2;        // and FMA and F16C
  bool avx512;      // F, BW, VL and DQ
  bool avx512bf16;  // and all of avx512
};
VectorSets vector_sets();

}  // namespace normkit::platform
