// Gate, scale and shift as the stages read them.  There may be as many rows of them as of x, so
// that each is prepared when the rows of x come to it, and no sooner.
#pragma once
#include "affine.h"

namespace normkit::cpu {

// One of the three: its row of the group that was asked for last, prepared.
class ModulationRows {
 public:
  struct Form {
    int64_t n;
    Layout layout;
    float offset;
    bool rounds;  // row + offset, to the dtype of the row
  };

  // Ones where there are none; memory from `buffer` on is taken.
  ModulationRows(const Affine& rows, const Form& form, int64_t block_rows, const Kernels& kernels,
                 float*& buffer)
      : rows_(rows),
        form_(form),
        kernels_(kernels),
        buffer_(buffer),
        slots_(slots(rows, block_rows)) {
    buffer += slots_ * padded(form.n);
  }

  // Rows that are in use at once: those of two blocks, and the one that goes on behind them.
  static int64_t slots(const Affine& rows, int64_t block_rows) {
    return rows.groups > 1 ? 2 * block_rows + 1 : 1;
  }

  const void* row(int64_t group) {
    if (rows_.groups <= 1) group = 0;
    if (group != group_) current_ = make(group);
    group_ = group;
    return current_;
  }

 private:
  const void* make(int64_t group) {
    const char* const from = rows_.data + group * rows_.stride;
    if (is_as_read(rows_, form_.layout, form_.offset)) return from;
    float* const to = buffer_ + slot_ * padded(form_.n);
    if (++slot_ == slots_) slot_ = 0;
    if (!rows_.data) {
      std::fill_n(to, padded(form_.n), 1.f);
      return to;
    }
    const float offset = form_.offset == 0.f ? -0.f : form_.offset;
    kernels_.affine[int(rows_.dtype)][int(form_.layout)](from, form_.n, offset, form_.rounds, to);
    add_last_chunk(rows_, group, form_.n, form_.layout, form_.offset, form_.rounds, kernels_, to);
    return to;
  }

  const Affine& rows_;
  Form form_;
  const Kernels& kernels_;
  float* buffer_;
  int64_t slots_, slot_ = 0, group_ = -1;
  const void* current_ = nullptr;
};

// The map of those that have several rows, which have them alike.
inline const Affine& map_of(const Modulation& m) {
  return m.gate.groups > 1 ? m.gate : m.scale.groups > 1 ? m.scale : m.shift;
}

// Those of a call, from row `begin` of x on.
class ModulationCursor {
 public:
  ModulationCursor(const RowNorm& norm, Layout layout, int64_t block_rows, int64_t begin,
                   const Kernels& kernels, float* buffer)
      : has_gate_(norm.modulation.gate.data),
        has_shift_(norm.modulation.shift.data),
        groups_(map_of(norm.modulation), Affine{}, begin),
        gate_(norm.modulation.gate, {norm.n, Layout::kNatural, 0.f, false}, block_rows, kernels,
              buffer),
        scale_(norm.modulation.scale, {norm.n, layout, 1.f, norm.modulation.round_each}, block_rows,
               kernels, buffer),
        shift_(norm.modulation.shift, {norm.n, layout, 0.f, false}, block_rows, kernels, buffer) {}

  static int64_t floats(const RowNorm& norm, int64_t block_rows) {
    const Modulation& m = norm.modulation;
    int64_t rows = 0;
    for (const Affine* of : {&m.gate, &m.scale, &m.shift})
      rows += ModulationRows::slots(*of, block_rows);
    return rows * padded(norm.n);
  }

  // The rows of a block get those of the next rows of x.
  void fill(Block& b) {
    for (int r = 0; r < b.rows; ++r, groups_.next()) {
      const int64_t group = groups_.group();
      b.gate[r] = has_gate_ ? gate_.row(group) : nullptr;
      b.scale[r] = scale_.row(group);
      b.shift[r] = has_shift_ ? shift_.row(group) : nullptr;
    }
  }

 private:
  bool has_gate_, has_shift_;
  GroupCursor groups_;
  ModulationRows gate_, scale_, shift_;
};

}  // namespace normkit::cpu
