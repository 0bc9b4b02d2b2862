// Weight and bias as the stages read them.
#pragma once
#include <algorithm>

#include "kernels.h"

namespace normkit::cpu {

// The rows of a weight or bias as the stages read them.
struct AffineRows {
  const char* data = nullptr;  // null when absent
  int64_t stride = 0;          // bytes; 0 where there is one row
  const void* row(int64_t group) const { return data ? data + group * stride : nullptr; }
};

// Which of their rows weight and bias have for each row of x, from `row` on.
class GroupCursor {
 public:
  GroupCursor(const Affine& weight, const Affine& bias, int64_t row)
      : inner_((weight.groups > 1 ? weight : bias).inner), groups_(groups_of(weight, bias)) {
    left_ = inner_;
    // Most calls begin here, and a division takes as long as ten sums.
    if (row == 0 || groups_ == 1) return;
    const int64_t turn = row / inner_;
    left_ -= row - turn * inner_;
    group_ = turn % groups_;
  }
  int64_t group() const { return group_; }
  // Rows from one to the next in the same place of the same group.
  int64_t turn() const { return groups_ == 1 ? 1 : inner_ * groups_; }
  void next() {
    if (--left_ > 0) return;
    left_ = inner_;
    if (++group_ == groups_) group_ = 0;
  }

 private:
  int64_t inner_, groups_, left_, group_ = 0;
};

inline int64_t padded(int64_t n) { return (n + kChunk - 1) / kChunk * kChunk; }

inline AffineRows stored(const Affine& affine) {
  return {affine.data, affine.groups > 1 ? affine.stride : 0};
}

// Whether the stages read it where it is: a float32 one in natural order.
inline bool is_as_read(const Affine& affine, Layout layout, float offset) {
  return affine.data && affine.dtype == DType::kFloat32 && layout == Layout::kNatural &&
         offset == 0.f;
}

// A float32 weight in natural order, or a copy of any other, with the offset added and rounded if
// it rounds; ones where there is none, since the product with 1 is exact.  copies: a copy of that,
// too.
inline AffineRows prepared(const Affine& affine, int64_t columns, Layout layout, float offset,
                           bool rounds, bool copies, const Kernels& kernels, float*& buffer) {
  if (!copies && is_as_read(affine, layout, offset)) return stored(affine);
  if (offset == 0.f) offset = -0.f;  // a weight of -0 plus 0 would be +0
  const int64_t n = padded(columns);
  const AffineRows rows{reinterpret_cast<const char*>(buffer),
                        affine.groups > 1 ? n * int64_t{sizeof(float)} : 0};
  for (int64_t group = 0; group < affine.groups; ++group, buffer += n) {
    if (affine.data)
      kernels.affine[int(affine.dtype)][int(layout)](affine.data + group * affine.stride, columns,
                                                     offset, rounds, buffer);
    else
      std::fill_n(buffer, n, 1.f);
  }
  return rows;
}

// Where a row is not whole chunks, the apply stage takes its last 64 columns as one: in split order
// the last chunk of a prepared row holds those.
inline void add_last_chunk(const Affine& affine, int64_t group, int64_t columns, Layout layout,
                           float offset, bool rounds, const Kernels& kernels, float* row) {
  if (layout != Layout::kSplit || columns < kChunk || columns % kChunk == 0) return;
  const int64_t first = columns - kChunk;
  kernels.affine[int(affine.dtype)][int(layout)](
      affine.data + group * affine.stride + first * item_size(affine.dtype), kChunk,
      offset == 0.f ? -0.f : offset, rounds, row + padded(columns) - kChunk);
}

}  // namespace normkit::cpu
