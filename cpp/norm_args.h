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
};

// A weight or a bias: row % heads picks its row.  data is null when absent.
struct Affine {
  const char* data;
  DType dtype;
  int64_t row_stride;  // bytes; 0 when one row serves every head
};

struct RowNorm {
  Statistic statistic;
  int64_t rows;
  int64_t n;
  int64_t heads;  // 1 unless the weight or the bias has a row per head
  int outer_dims;
  int64_t outer_size[kMaxOuterDims];  // the last one runs fastest
  RowsOf x, residual, out, residual_out;
  Affine weight, bias;
  float eps;
  float weight_offset;
  bool round_before_weight;
  bool round_sum;
  bool clamp_inf;
};

}  // namespace normkit
