// Steps through the rows of several tensors at once.
#pragma once
#include "../norm_args.h"

namespace normkit::cpu {

template <int kTensors>
class Cursor {
 public:
  Cursor(const RowsOf* const (&tensors)[kTensors], int outer_dims, const int64_t* outer_size,
         int64_t row)
      : outer_dims_(outer_dims), outer_size_(outer_size) {
    for (int t = 0; t < kTensors; ++t) tensors_[t] = tensors[t];
    for (int64_t d = outer_dims - 1, rest = row; d >= 0; --d) {
      index_[d] = 0;
      if (rest == 0) continue;  // most calls begin here, and a division takes as long as ten sums
      index_[d] = rest % outer_size[d];
      rest /= outer_size[d];
      for (int t = 0; t < kTensors; ++t) at_[t] += index_[d] * tensors[t]->stride[d];
    }
  }
  // Null where the tensor is absent.
  char* at(int t) const { return tensors_[t]->data ? tensors_[t]->data + at_[t] : nullptr; }
  // Rows from here on that lie at one stride.
  int64_t run() const {
    return outer_dims_ > 0 ? outer_size_[outer_dims_ - 1] - index_[outer_dims_ - 1] : 1;
  }
  // Pointers to the next `count` rows of that run, or nulls where the tensor is absent.
  template <class Pointer>
  void place(int t, int64_t count, Pointer* rows) const {
    char* row = at(t);
    const int64_t step = row ? stride(t) : 0;
    for (int64_t r = 0; r < count; ++r) rows[r] = row + r * step;
  }
  // Steps over `rows` of that run.
  void skip(int64_t rows) {
    if (outer_dims_ == 0) return;
    index_[outer_dims_ - 1] += rows - 1;
    for (int t = 0; t < kTensors; ++t) at_[t] += (rows - 1) * stride(t);
    next();
  }
  void next() {
    for (int d = outer_dims_ - 1; d >= 0; --d) {
      const bool wraps = ++index_[d] == outer_size_[d];
      const int64_t steps = wraps ? 1 - outer_size_[d] : 1;
      for (int t = 0; t < kTensors; ++t) at_[t] += steps * tensors_[t]->stride[d];
      if (!wraps) return;
      index_[d] = 0;
    }
  }

 private:
  int64_t stride(int t) const { return outer_dims_ > 0 ? tensors_[t]->stride[outer_dims_ - 1] : 0; }

  const RowsOf* tensors_[kTensors];
  int outer_dims_;
  const int64_t* outer_size_;
  int64_t index_[kMaxOuterDims];
  int64_t at_[kTensors] = {};
};

}  // namespace normkit::cpu
