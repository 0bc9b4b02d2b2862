// From a call to launches: what the forward and the backward pass share of it.
#pragma once
#include <algorithm>
#include <type_traits>

#include "rows.cuh"

namespace normkit::cuda {

// Below 2^31 threads and blocks in every plan.  The emulation splits earlier, to see it done.
#ifndef NORMKIT_MAX_LAUNCH_ROWS
#define NORMKIT_MAX_LAUNCH_ROWS (int64_t{1} << 27)
#endif
constexpr int64_t kMaxLaunchRows = NORMKIT_MAX_LAUNCH_ROWS;

inline bool aligned(int64_t offset, DType dtype, int64_t pack) {
  return offset % std::min<int64_t>(16, pack * item_size(dtype)) == 0;
}

// Whether packs of every row begin where 16 bytes (8 where the pack has no more) may be moved at
// once.
template <class Norm>
bool is_wide(const Norm& norm, const RowsOf& rows, int64_t pack) {
  bool wide = aligned(reinterpret_cast<intptr_t>(rows.data), rows.dtype, pack);
  for (int d = 0; d < norm.outer_dims; ++d)
    wide = wide && aligned(rows.stride[d], rows.dtype, pack);
  return wide;
}

template <class Norm>
bool is_wide(const Norm&, const Affine& affine, int64_t pack) {
  return aligned(reinterpret_cast<intptr_t>(affine.data), affine.dtype, pack) &&
         aligned(affine.stride, affine.dtype, pack);
}

// factor = ceil(2^(32 + shift) / value) with 2^shift < value <= 2^(shift + 1): exact below 2^31.
inline Divisor divisor(int64_t value) {
  Divisor d{static_cast<uint32_t>(value), 0, 0};
  if (value <= 1) return {1, 0, 0};
  while ((int64_t{2} << d.shift) < value) ++d.shift;
  const uint64_t power = uint64_t{1} << (32 + d.shift);
  d.factor = static_cast<uint32_t>((power + d.value - 1) / d.value);
  return d;
}

// Into the kernel's arguments, whatever pass they are of.
template <class Norm>
LaunchRows launch_rows(const Norm& norm, const RowsOf& from, int64_t pack) {
  LaunchRows to{from.data, {}, from.dtype, from.data && is_wide(norm, from, pack)};
  for (int d = 0; d < norm.outer_dims; ++d)
    to.stride[kLaunchDims - norm.outer_dims + d] = from.stride[d];
  return to;
}

template <class Norm>
LaunchAffine launch_affine(const Norm& norm, const Affine& from, int64_t pack) {
  return {from.data, from.groups > 1 ? from.stride : 0, from.data ? from.dtype : DType::kFloat32,
          from.data && is_wide(norm, from, pack)};
}

// Rows of weight and bias, or of what modulates, that a launch walks: all that have several have
// them alike.
inline Affine map_of(const RowNorm& norm) {
  const Modulation& m = norm.modulation;
  for (const Affine* of : {&norm.weight, &norm.bias, &m.gate, &m.scale, &m.shift})
    if (of->groups > 1) return *of;
  return {};
}
inline Affine map_of(const RowNormBackward& norm) {
  return norm.weight.groups > 1 ? norm.weight : norm.bias.groups > 1 ? norm.bias : Affine{};
}
template <class Norm>
int64_t heads_of(const Norm& norm) {
  return std::max<int64_t>(map_of(norm).groups, 1);  // there may be none, where there are no rows
}

template <class Norm>
Grid grid_of(const Norm& norm) {
  Grid grid{};
  for (int d = 0; d < 2; ++d) {
    const int from = norm.outer_dims - 2 + d;
    grid.size[d] = divisor(from >= 0 ? norm.outer_size[from] : 1);
  }
  const Affine map = map_of(norm);
  grid.heads = divisor(heads_of(norm));
  grid.inner = divisor(map.inner);
  if constexpr (std::is_same_v<Norm, RowNorm>)
    grid.first = static_cast<uint32_t>(norm.first_row % (map.inner * heads_of(norm)));
  grid.rows = static_cast<uint32_t>(norm.rows);
  grid.dims = norm.outer_dims;
  return grid;
}

// The offset that is added to a weight: adding -0 changes nothing, adding +0 would make +0 of -0.
inline float launch_offset(float weight_offset) {
  return weight_offset == 0.f ? -0.f : weight_offset;
}

// f(rows) for each tensor of rows.
template <class F>
void for_rows(RowNorm& norm, const F& f) {
  for (RowsOf* t : {&norm.x, &norm.residual, &norm.out, &norm.residual_out, &norm.gating.z}) f(*t);
  if (Rotation& r = norm.rotation)
    for (RowsOf* t : {&r.cos, &r.sin, &r.position.at}) f(*t);
  if (Cache& c = norm.cache)
    for (RowsOf* t : {&c.rows, &c.slot.at}) f(*t);
}
template <class F>
void for_rows(RowNormBackward& norm, const F& f) {
  for (RowsOf* t : {&norm.grad_y, &norm.grad_residual_out, &norm.x, &norm.residual, &norm.grad_x,
                    &norm.grad_residual})
    f(*t);
}

// The rows [begin, begin + count) of the first dimension, or those of one index of it.
template <class Norm>
Norm slice(const Norm& norm, int64_t begin, int64_t count) {
  Norm part = norm;
  const int64_t inside = norm.rows / norm.outer_size[0];
  for_rows(part, [&](RowsOf& t) {
    if (t.data) t.data += begin * t.stride[0];
  });
  if (part.rstd) part.rstd += begin * inside;
  if (part.mean) part.mean += begin * inside;
  if (part.split.statistics) part.split.statistics += begin * inside;
  if (part.split.gathered) part.split.gathered += begin * inside;
  if constexpr (std::is_same_v<Norm, RowNorm>) part.first_row += begin * inside;
  part.rows = inside * count;
  part.outer_size[0] = count;
  return part;
}

template <class Norm>
Norm drop_first_dimension(const Norm& norm, int64_t index) {
  Norm part = slice(norm, index, 1);
  --part.outer_dims;
  std::copy_n(norm.outer_size + 1, part.outer_dims, part.outer_size);
  for_rows(part, [&](RowsOf& t) { std::copy_n(t.stride + 1, part.outer_dims, t.stride); });
  return part;
}

template <class Norm>
bool is_one_launch(const Norm& norm) {
  return norm.outer_dims <= kLaunchDims && norm.rows <= kMaxLaunchRows;
}

// f(part) for parts that one launch can do.
template <class Norm, class F>
void for_launches(const Norm& norm, const F& f) {
  if (is_one_launch(norm)) return f(norm);
  if (norm.outer_dims > kLaunchDims) {
    for (int64_t i = 0; i < norm.outer_size[0]; ++i) for_launches(drop_first_dimension(norm, i), f);
    return;
  }
  const int64_t size = norm.outer_size[0], inside = norm.rows / size;
  if (inside > kMaxLaunchRows) {
    for (int64_t i = 0; i < size; ++i) for_launches(drop_first_dimension(norm, i), f);
    return;
  }
  int64_t step = kMaxLaunchRows / inside;
  if constexpr (std::is_same_v<Norm, RowNorm>) {
    for (int64_t i = 0; i < size; i += step) f(slice(norm, i, std::min(step, size - i)));
    return;
  }
  const int64_t heads = heads_of(norm);
  if (norm.outer_dims > 1 || heads <= step) {
    if (norm.outer_dims == 1) step -= step % heads;  // so that each part begins at head 0
    for (int64_t i = 0; i < size; i += step) f(slice(norm, i, std::min(step, size - i)));
    return;
  }
  for (int64_t i = 0; i < size; i += step) {
    const int64_t head = i % heads;
    step = std::min({kMaxLaunchRows, heads - head, size - i});
    Norm part = slice(norm, i, step);
    for (Affine* affine : {&part.weight, &part.bias}) {
      if (affine->groups <= 1) continue;
      affine->data += head * affine->stride;
      affine->groups = step;
    }
    f(part);
  }
}

}  // namespace normkit::cuda
