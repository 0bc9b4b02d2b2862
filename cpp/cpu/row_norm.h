// The CPU backend: runs a row norm on the best kernels this processor has.
#pragma once
#include <string>

#include "../norm_args.h"

namespace normkit::cpu {

// Names of the instruction sets usable here, best first; null at the end.
const char* const* instruction_sets();

// The one in use; null when this processor has none of them.
const char* instruction_set();

// Uses the named one from now on.  False, and no change, when it is not among instruction_sets().
bool use_instruction_set(const char* name);

// How row_norm() would work on this.  Nothing here changes bits.
struct Plan {
  int64_t block_rows;  // rows that go through the stages together
  int threads;
  bool stream;  // write y around the caches, and maybe the sum with the residual
  bool fetch;   // fetch the next rows while these are stored
};
Plan plan(const RowNorm& norm);

// The plan in words.
std::string describe(const RowNorm& norm);

void row_norm(const RowNorm& norm);

void row_norm_backward(const RowNormBackward& norm);

}  // namespace normkit::cpu
