// The norm in front of a sum, as a norm by itself: from x to memory of this thread.
#pragma once
#include "affine.h"

namespace normkit::cpu {

// What it makes: rounded to x's dtype, or as float32.
inline DType dtype_before_sum(const RowNorm& norm) {
  return norm.before.round_norm ? norm.x.dtype : DType::kFloat32;
}

// Its rows go to `out` of blocks, wherever that is.
inline RowNorm norm_before_sum(const RowNorm& norm) {
  RowNorm first = norm;
  first.before = {};
  first.residual = first.residual_out = {};
  first.out = {};
  first.out.dtype = dtype_before_sum(norm);
  first.weight = norm.before.weight;
  first.bias = norm.before.bias;
  first.options.eps = norm.before.eps;
  first.options.weight_offset = norm.before.weight_offset;
  first.rstd = first.mean = nullptr;
  return first;
}

}  // namespace normkit::cpu
