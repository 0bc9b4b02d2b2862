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

// Rows of up to this many columns are worked on side by side.
constexpr int64_t kShortRow = 256;

struct Block {
  int rows;
  int64_t n;
  const void* x[kMaxBlockRows];
  const void* residual[kMaxBlockRows];
  void* residual_out[kMaxBlockRows];
  float* wide[kMaxBlockRows];         // room for a copy of the row, where a stage has to keep one
  const void* source[kMaxBlockRows];  // what is normalised: x, residual_out or wide
  void* out[kMaxBlockRows];
  const void* weight[kMaxBlockRows];  // float32 in the apply stage's layout, or as stored
  const void* bias[kMaxBlockRows];
  const void* z[kMaxBlockRows];
  float* factor[kMaxBlockRows];      // memory for act(z)
  const void* gate[kMaxBlockRows];   // float32; null: none
  const void* scale[kMaxBlockRows];  // 1 + scale, or act(z), as float32 in its stage's layout
  const void* shift[kMaxBlockRows];
  const char* cos[kMaxBlockRows];  // as they are stored; null: NaN
  const char* sin[kMaxBlockRows];
  void*
      normalised[kMaxBlockRows];  // the row between norm and modulation, where they are two stages
  // A row that comes next, to fetch in the apply stage, or to add up there; or null.
  const void* next[kMaxBlockRows];
  float next_sum[kMaxBlockRows];
  float sum[kMaxBlockRows];
  float mean[kMaxBlockRows];
  float rstd[kMaxBlockRows];
  float alpha, beta;  // of the stage `combine`
  bool has_bias;
  bool sums_next;  // the apply stage adds up the rows of `next`
  bool has_sum;    // what the first pass over a row adds up is there already
  bool shared;     // all rows have the first one's weight and bias
  bool fetch;      // rows come from memory
  bool stream;     // write around the caches
};

using Stage = void (*)(Block&);

// When the sum of a row is taken beside other work, and not in a pass of its own, which waits for
// the row where that does not.  kAlways has the cases of kFromMemory, and that those of kStreamed.
enum class Beside : uint8_t { kNever, kStreamed, kFromMemory, kAlways };
// 1 / sqrt(sum * inverse_n + eps), of no less than `least`.
using RstdStage = void (*)(Block&, double inverse_n, double eps, double least);

// A row whose first `width` columns are pairs that are rotated.  cos and sin are of each pair or,
// where these are interleaved, of each column, with sin as the first of a pair subtracts it.
struct RotatedRow {
  const void* x;
  int64_t n, width;
  bool interleaved;
  const float *cos, *sin;
  void* swapped;  // memory for pairs with their columns exchanged
  void* out;
};
using RotateRow = void (*)(const RotatedRow&);

// Rows whose part of grad_weight and grad_bias is added as float32.  Such a sum has an error of at
// most 3 * 2^-24 of that of the magnitudes, four products one of 4 * 2^-24; the sums of the sums
// are doubles.
constexpr int kBackwardRows = 4;
// Rows of which some columns are worked on before the next ones, while the doubles are near.
constexpr int kWalkedRows = 16;

// Rows of a backward pass that go through its two stages together.  All tensors of a block are of
// one type; what is not has been widened to float32.
struct BackwardBlock {
  int rows;
  int64_t n;
  const void* grad_y[kMaxBlockRows];
  const void* grad_residual_out[kMaxBlockRows];  // null: none
  const void* x[kMaxBlockRows];
  void* grad_x[kMaxBlockRows];         // null: not wanted
  const float* weight[kMaxBlockRows];  // float32 in the stages' layout
  // Sums over rows in the stages' layout, whole chunks; null where they are not wanted.
  double* grad_weight[kMaxBlockRows];
  double* grad_bias[kMaxBlockRows];
  int64_t group[kMaxBlockRows];  // rows of one have the same weight and sums
  uint8_t order[kMaxBlockRows];  // the rows, those of a group one after the other
  bool shared;                   // there is one group
  float mean[kMaxBlockRows];     // xhat = (x - mean) * scale
  float scale[kMaxBlockRows];    // rstd, unless x is xhat itself
  float rstd[kMaxBlockRows];
  float g_mean[kMaxBlockRows];   // of g = grad_y * weight; layer norm only
  float gx_mean[kMaxBlockRows];  // of g * xhat
  // Made of these by the apply stage: grad_x = g * rstd + xhat * gx_scale + g_shift
  float g_shift[kMaxBlockRows];
  float gx_scale[kMaxBlockRows];
  float columns;  // what sums are divided by
  DType rounded;  // what the forward pass rounded xhat to; kFloat32: nothing
  bool stream;    // write around the caches
};

using BackwardStage = void (*)(BackwardBlock&);

struct Kernels {
  const char* name;
  Stage clamp;  // wide = x, a float16, with its infinities at +-65504
  Stage add[3][3]
           [2];  // [x][residual][keep]: residual_out = x + residual, and wide = the unrounded sum
  // [x][residual][rounds]: residual_out = alpha * residual + beta * x; rounds: the products, to the
  // dtypes of what alpha and beta multiply.
  Stage combine[3][3][2];
  // [x and residual][around the caches][statistic]: add, and sum = what the first pass over that
  // adds up.  Around the caches, wide = the rounded sum, of its type.  Null where it does not pay.
  Stage add_and_sum[3][2][2];
  Stage sum[3];         // [source]: sum of the row
  Stage squares[3][2];  // [source][centred]: sum of squares, about the mean if centred
  RstdStage rstd;       // from the sums of squares
  void (*affine[3][2])(const void* item, int64_t n, float offset, bool rounds,
                       float* out);  // [item][layout]
  // [source][rounded to][out][weight and bias as stored][statistic]; rounding to kFloat32 is none.
  // "As stored" is there for 16-bit source, output, weight and bias of one type.
  Stage apply[3][3][3][2][2];
  // [source and out][rounds to that][weight and bias as stored][statistic]: apply, and next_sum =
  // what the first pass over the next rows adds up.  Null where that is never faster, or not usual.
  Stage apply_and_sum[3][2][2][2];
  Beside next_beside_apply[3][2];  // [source and out][statistic]
  Stage gate[3][3];                // [x][product]: wide = gate * x
  // [activation]: rows z of whole chunks become act(z), times weight where there is one.
  void (*activate[2])(float* row, int64_t n, const float* weight);
  // [source, and what xhat is rounded to][product][out][statistic]: apply, with the product rounded
  // before the bias is added.  Null for what is made in two stages, or no kernel's.
  Stage modulate[3][3][3][2];

  // [x][what products are rounded to][out]; rounding to kFloat32 is none.
  RotateRow rotate[3][3][3];

  BackwardStage backward_sums[3][2];   // [item][statistic]: g_mean and gx_mean
  BackwardStage backward_apply[3][2];  // [item][statistic]: grad_x, and what rows add to the sums
  void (*narrow[3])(const float* row, int64_t n, void* out);  // [item]
};

// Where backward stages have column i of each chunk.
constexpr Layout backward_layout(DType item) { return layout_of(item, item); }
constexpr int64_t column_in(Layout layout, int64_t i) {
  return layout == Layout::kNatural ? i : i / 32 * 32 + i % 2 * 16 + i % 32 / 2;
}

// Those of the instruction set in use.
const Kernels& kernels_in_use();

// Null where this build or this processor cannot run them.
const Kernels* avx512bf16_kernels();
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* neon_kernels();

}  // namespace normkit::cpu
