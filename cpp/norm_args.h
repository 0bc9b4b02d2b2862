// What a row norm is, in plain structs: raw pointers, byte strides, dtype codes.  Kernels of every
// backend read these and know nothing of Python or torch.
#pragma once
#include <cstdint>

namespace normkit {

enum class DType : uint8_t { kFloat32, kFloat16, kBFloat16 };
enum class Statistic : uint8_t { kRms, kLayer };

constexpr int64_t item_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// A tensor of int64-many elements has at most 62 dimensions of size two or more, and only those are
// kept.
constexpr int kMaxOuterDims = 64;

// The rows of one tensor: row (i0, i1, ...) begins at data + sum(i_k * stride[k]).  data is null
// when absent.
struct RowsOf {
  char* data;
  DType dtype;
  int64_t stride[kMaxOuterDims];  // bytes
  // Bytes from a column to the next; 0 where they are dense.  Of x and `out` of a norm with nothing
  // else around it: x[i, :] of (n, rows), as the channels of an image.
  int64_t column_stride = 0;

  bool has_strided_columns() const { return column_stride != 0; }
};

// A weight or a bias: row r of x takes its row r / inner % groups.  One for each head, where heads
// run fastest, has inner 1; one for each sample has as inner the rows of a sample.  data is null
// when absent.
struct Affine {
  const char* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride = 0;  // bytes from one of its rows to the next
  int64_t inner = 1;
  int64_t groups = 1;
};

// The groups that rows of x are in; where weight and bias both have several, they have them alike.
// There may be none, where there are no rows: that counts as one here.
constexpr int64_t groups_of(const Affine& weight, const Affine& bias) {
  const int64_t most = weight.groups > bias.groups ? weight.groups : bias.groups;
  return most > 1 ? most : 1;
}

// The options of a norm, in the words of docs/numerics.md.
struct NormOptions {
  float eps = 0.f;
  float weight_offset = 0.f;  // 0 where there is no weight
  bool round_before_weight = false;
  bool round_sum = false;
  bool clamp_inf = false;
  bool round_rstd = false;
  bool of_sum = false;        // the statistic is the sum of squares, and not their mean: an L2 norm
  bool eps_outside = false;   // rstd = 1 / max(sqrt(statistic), eps)
  bool round_weight = false;  // weight + weight_offset, to weight's dtype
  bool as_is = false;         // no statistic: mean 0 and rstd 1
};

// Those that are on or off, in the order in which calls give them.
struct Flag {
  const char* name;
  bool NormOptions::* member;
};
inline constexpr Flag kFlags[] = {
    {"round_before_weight", &NormOptions::round_before_weight},
    {"round_sum", &NormOptions::round_sum},
    {"clamp_inf", &NormOptions::clamp_inf},
    {"round_rstd", &NormOptions::round_rstd},
    {"round_weight", &NormOptions::round_weight},
};

// What a modulated norm does around the norm itself, whose result is n:
//   before  x counts as gate * x
//   after   y = n * (1 + scale) + shift
// Each may be absent.  In float32; or, with round_each, each operation is rounded to the dtype in
// which torch would have made it: n to that of what is normalised, 1 + scale to scale's, a product
// or a sum to the one of its operands where both have it, and to float32 otherwise.
struct Modulation {
  Affine gate, scale, shift;
  bool round_each = false;
  explicit operator bool() const { return gate.data || scale.data || shift.data; }
};

enum class Activation : uint8_t { kSilu, kSigmoid };

// What a gated norm does with act(z), in float32: it multiplies the norm, or x before the norm.
// Absent where z is.
struct Gating {
  RowsOf z;
  Activation activation = Activation::kSilu;
  bool norm_first = true;
  bool round_norm = false;  // to the dtype of what is normalised, before act(z) multiplies it
  explicit operator bool() const { return z.data; }
  bool is_before_norm() const { return z.data && !norm_first; }
  bool is_behind_norm() const { return z.data && norm_first; }
};

// A norm in front of the sum that is normalised.  It is that of x, and of the same statistic and
// options as the one behind the sum but for eps and the offset:
//   the sum is alpha * residual + beta * n
// In float32; or, with round_norm, n and its product with beta are rounded to x's dtype, and
// alpha * residual to residual's.  Where there is no `out`, the sum is all.
struct NormBefore {
  bool on = false;
  Affine weight, bias;
  float eps = 0.f;
  float weight_offset = 0.f;  // 0 where there is no weight
  float alpha = 1.f, beta = 1.f;
  bool round_norm = true;
  explicit operator bool() const { return on; }
  bool scales() const { return alpha != 1.f || beta != 1.f; }
};

// A token of each row: an integer of four or eight bytes, reached as rows of RowsOf are.  The
// strides are in units of four bytes where they are laid out, so that the dtype there stands in for
// one of four.
struct IndexOf {
  RowsOf at;
  bool wide = false;  // eight bytes
  explicit operator bool() const { return at.data; }
};

// What is done to the norm n of a row behind all else: its first `width` columns are pairs (a, b)
// of columns i and width / 2 + i, or 2 i and 2 i + 1 where they are interleaved, and become
//   a * cos[i] - b * sin[i]  and  b * cos[i] + a * sin[i]
// In float32, each product and the sum by themselves; or, with round_norm, n is rounded to x's
// dtype first; or, with round_each, that and each product to the dtype of what torch makes of n and
// cos.  With positions, cos and sin are tables and a row takes theirs of its position; one outside
// of them is NaN there.
struct Rotation {
  RowsOf cos, sin;  // rows of width / 2; absent where there is no rotation
  IndexOf position;
  int64_t positions = 0;                   // rows of the tables
  int64_t cos_stride = 0, sin_stride = 0;  // bytes from one of them to the next
  int64_t width = 0;
  bool interleaved = false, round_norm = false, round_each = false;
  explicit operator bool() const { return width > 0; }
};

// Where y goes as well: a cache of pages, in which the row's token has a slot.  Slots outside of it
// are not written.
struct Cache {
  bool on = false;  // there may be one without slots
  RowsOf rows;      // of slot 0; strides are those of heads
  IndexOf slot;
  int64_t slots = 0, page_slots = 1;         // in all, and of a page
  int64_t page_stride = 0, slot_stride = 0;  // bytes
  explicit operator bool() const { return on; }
};

// The dtype of what torch computes of two tensors.
constexpr DType promoted(DType a, DType b) { return a == b ? a : DType::kFloat32; }

enum class Step : uint8_t { kWhole, kStatistics, kApply };

// Rows that are split into `parts` of n columns each, of which this process has one: every part
// takes its statistics, all of them are gathered, and each part is then worked on with them.
//
// Statistics are planes, of a float32 for each row:
//   forward   the sum of squares, for kLayer about the part's own mean; and for kLayer that mean
//   backward  the part's mean of g * xhat; and for kLayer that of g
struct Split {
  Step step = Step::kWhole;
  float* statistics = nullptr;      // kStatistics writes them, and nothing else
  const float* gathered = nullptr;  // kApply: those of part 0, of part 1, ...
  int64_t parts = 1;
  int64_t plane = 0;  // floats from a plane to the next one
};

constexpr int planes_of(Statistic statistic) { return statistic == Statistic::kLayer ? 2 : 1; }

struct RowNorm {
  Statistic statistic;
  int64_t first_row = 0;  // of a part of a call: that many rows stand before it
  int64_t rows;
  int64_t n;
  int outer_dims;
  int64_t outer_size[kMaxOuterDims];  // the last one runs fastest
  RowsOf x, residual, out, residual_out;
  Affine weight, bias;
  Modulation modulation;
  Gating gating;
  NormBefore before;
  Rotation rotation;
  Cache cache;
  NormOptions options;
  float* rstd;  // one a row, as it multiplied, for the backward pass; null when not asked for
  float* mean;  // likewise; null for kRms
  Split split;  // without residual, where rows are split
};

// The dtype of what is normalised, to which options round; a float32 sum has none, and x's counts.
constexpr DType normalised_dtype(const RowNorm& norm) {
  return norm.residual.data && norm.options.round_sum ? norm.residual.dtype : norm.x.dtype;
}

// Gradients of a row norm.  With g = grad_y * (weight + weight_offset), and the means over the row:
//   of what was normalised  rstd * (g - mean(g) - xhat * mean(g * xhat)), without mean(g) for kRms
//                           and with the sum in place of the mean for of_sum, + grad_residual_out
//   of the weight           sum over rows of grad_y * xhat, rounded as the forward pass rounded it
//   of the bias             sum over rows of grad_y
// All in float32; a sum over rows is taken in an order that follows rows, n and the device only.
struct RowNormBackward {
  Statistic statistic;
  // x is the output of the forward pass: xhat = (x - bias) / (weight + weight_offset), and 0 where
  // that divisor is 0.
  bool from_output;
  int64_t rows;
  int64_t n;
  int outer_dims;
  int64_t outer_size[kMaxOuterDims];  // the last one runs fastest
  RowsOf grad_y;
  RowsOf grad_residual_out;      // may be absent, as all that follow but x
  RowsOf x, residual;            // x, or the sum x + residual in float32, was normalised
  RowsOf grad_x, grad_residual;  // both get the same values, each in its dtype
  Affine weight;
  Affine bias;        // given where the output is to be undone, or its gradient is asked for
  const float* rstd;  // one a row
  const float* mean;  // likewise; null for kRms and where x is the output
  char* grad_weight;  // of weight's shape and dtype, dense; null when it is not asked for
  char* grad_bias;
  NormOptions options;  // clamp_inf has no gradients here, and round_sum is in what was kept
  DType normalised;     // what round_before_weight rounded xhat to
  Split split;          // without residual, and not from_output, where rows are split
};

}  // namespace normkit
