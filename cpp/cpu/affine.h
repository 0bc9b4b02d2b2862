// Weight and bias as the stages read them.
#pragma once
#include <algorithm>

#include "kernels.h"

namespace normkit::cpu {

// The rows of a weight or bias as the stages read them.
struct AffineRows {
  const char* data = nullptr;  // null when absent
  int64_t row_stride = 0;      // bytes
  const void* row(int64_t head) const { return data ? data + head * row_stride : nullptr; }
};

inline int64_t padded(int64_t n) { return (n + kChunk - 1) / kChunk * kChunk; }

inline int64_t affine_rows(const Affine& affine, int64_t heads) {
  return affine.data && affine.row_stride != 0 ? heads : 1;
}

// A float32 weight in natural order, or a copy of any other, with the offset added; ones where
// there is none, since the product with 1 is exact.
inline AffineRows prepared(const Affine& affine, int64_t columns, int64_t heads, Layout layout,
                           float offset, const Kernels& kernels, float*& buffer) {
  if (affine.data && affine.dtype == DType::kFloat32 && layout == Layout::kNatural && offset == 0.f)
    return {affine.data, affine.row_stride};
  if (offset == 0.f) offset = -0.f;  // a weight of -0 plus 0 would be +0
  const int64_t n = padded(columns);
  const AffineRows rows{reinterpret_cast<const char*>(buffer),
                        affine.row_stride ? n * int64_t{sizeof(float)} : 0};
  for (int64_t head = 0; head < affine_rows(affine, heads); ++head, buffer += n) {
    if (affine.data)
      kernels.affine[int(affine.dtype)][int(layout)](affine.data + head * affine.row_stride,
                                                     columns, offset, buffer);
    else
      std::fill_n(buffer, n, 1.f);
  }
  return rows;
}

}  // namespace normkit::cpu
