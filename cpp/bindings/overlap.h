// Shapes and strides of tensors: whether they are alike, and whether memory is shared.
#pragma once
#include "tensor.h"

namespace normkit {

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.ndim != b.ndim) return false;
  for (int d = 0; d < a.ndim; ++d)
    if (a.shape[d] != b.shape[d]) return false;
  return true;
}

// Of a tensor with dimensions.
inline bool has_strided_columns(const Tensor& t) { return t.size(1) > 1 && t.stride(1) != 1; }

// Whether the memory from the first to the last element of one crosses that of the other.
template <class Other>
bool share_memory(const Tensor& a, const Other& b) {
  return a && b && a.data < b.data + b.extent() && b.data < a.data + a.extent();
}

// Whether memory is shared in a way that is not plainly harmless: one tensor over itself, or none
// at all.
inline bool may_overlap(const Tensor& written, const Tensor& other) {
  if (!share_memory(written, other)) return false;
  if (written.data != other.data || written.dtype != other.dtype || !same_shape(written, other))
    return true;
  for (int d = 0; d < written.ndim; ++d)
    if (written.shape[d] > 1 && written.strides[d] != other.strides[d]) return true;
  return false;
}

// Whether no two elements share memory, for all that the strides say in any order of them: each is
// beyond what lies inside it.
inline bool elements_are_apart(const Tensor& t) {
  int order[kMaxOuterDims + 1], dims = 0;
  for (int d = 0; d < t.ndim; ++d) {
    if (t.shape[d] <= 1) continue;
    if (dims > kMaxOuterDims) return false;
    int at = dims++;
    for (; at > 0 && t.strides[order[at - 1]] > t.strides[d]; --at) order[at] = order[at - 1];
    order[at] = d;
  }
  int64_t inside = 1;
  for (int i = 0; i < dims; ++i) {
    const int d = order[i];
    if (t.strides[d] < inside) return false;
    inside += (t.shape[d] - 1) * t.strides[d];
  }
  return true;
}

// Whether the rows are laid out from the innermost dimension outwards, each stride beyond what lies
// inside it.
inline bool rows_are_apart(const Tensor& t) {
  if (has_strided_columns(t)) return elements_are_apart(t);
  int64_t inside = t.size(1);
  for (int d = t.ndim - 2; d >= 0; --d) {
    if (t.shape[d] <= 1) continue;
    if (t.strides[d] < inside) return false;
    inside = (t.shape[d] - 1) * t.strides[d] + inside;
  }
  return true;
}

}  // namespace normkit
