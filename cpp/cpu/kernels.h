// The stages of a row norm, one table of them per instruction set.  A stage works on a block of
// rows that stays in the first-level cache between the stages, so a row is read from memory once
// however many passes it takes.
#pragma once
#include <cstdint>

#include "../norm_args.h"

namespace normkit::cpu {

constexpr int kMaxBlockRows = 64;

// The stages work on chunks of this many columns, which are also the partial sums of a statistic.
constexpr int64_t kChunk = 64;

// Order of the columns within a chunk.  kSplit keeps the even and the odd columns of each 32 apart:
// bfloat16 pairs then widen with one shift and one mask.
enum class Layout : uint8_t { kNatural, kSplit };

constexpr Layout layout_of(DType source, DType out) {
  return source == DType::kBFloat16 && out == DType::kBFloat16 ? Layout::kSplit : Layout::kNatural;
}

struct Block {
  int rows;
  int64_t n;
  const void* x[kMaxBlockRows];
  const void* residual[kMaxBlockRows];
  void* residual_out[kMaxBlockRows];
  float* wide[kMaxBlockRows];         // float32 copy of the row, where a stage has to keep one
  const void* source[kMaxBlockRows];  // what is normalised: x, residual_out or wide
  void* out[kMaxBlockRows];
  const void* weight[kMaxBlockRows];  // float32 in the apply stage's layout, or as stored
  const void* bias[kMaxBlockRows];
  const void*
      next[kMaxBlockRows];  // a row that is wanted soon, for the apply stage to fetch; or null
  float sum[kMaxBlockRows];
  float mean[kMaxBlockRows];
  float rstd[kMaxBlockRows];
  bool has_bias;
  bool stream;  // write around the caches
};

using Stage = void (*)(Block&);

struct Kernels {
  const char* name;
  Stage clamp;  // wide = x, a float16, with its infinities at +-65504
  Stage add[3][3]
           [2];  // [x][residual][keep]: residual_out = x + residual, and wide = the unrounded sum
  Stage sum[3];  // [source]: sum of the row
  Stage squares[3][2];  // [source][centred]: sum of squares, about the mean if centred
  void (*affine[3][2])(const void* item, int64_t n, float offset, float* out);  // [item][layout]
  // [source][rounded to][out][weight and bias as stored][statistic]; rounding to kFloat32 is none.
  // "As stored" is there for 16-bit source, output, weight and bias of one type.
  Stage apply[3][3][3][2][2];
};

// Null where this build or this processor cannot run them.
const Kernels* avx512bf16_kernels();
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* neon_kernels();

}  // namespace normkit::cpu
