// Pairs of columns, rotated, for the vector type V of the vec_*.h that stands before this.
#pragma once
#include <type_traits>

#include "chunk.h"

namespace normkit::cpu {
namespace {

template <class Two, class One>
void swap_neighbours(const One* x, int64_t width, One* out) {
  constexpr int kBits = 8 * sizeof(One);
  for (int64_t i = 0; i < width; i += 2) {
    Two pair;
    std::memcpy(&pair, x + i, sizeof pair);
    pair = static_cast<Two>(pair >> kBits | pair << kBits);
    std::memcpy(out + i, &pair, sizeof pair);
  }
}

// Each column of a pair gets the other one's value.
template <class Item>
void exchange(const Item* x, int64_t width, bool interleaved, Item* out) {
  using Two = std::conditional_t<sizeof(Item) == 4, uint64_t, uint32_t>;
  if (interleaved) return swap_neighbours<Two>(x, width, out);
  std::memcpy(out, x + width / 2, width / 2 * sizeof(*x));
  std::memcpy(out + width / 2, x, width / 2 * sizeof(*x));
}

// Each product is rounded to P, and what is behind the pairs stays as it is.
template <class T, class P, class O>
void rotate_row(const RotatedRow& row) {
  const auto* x = static_cast<const typename T::Item*>(row.x);
  auto* partner = static_cast<typename T::Item*>(row.partner);
  auto* out = static_cast<typename O::Item*>(row.out);
  exchange(x, row.width, row.interleaved, partner);
  const auto rotated = [](Chunk c, const Chunk& other, const Chunk& cos, const Chunk& sin) {
    for (int k = 0; k < kVecs; ++k)
      c.v[k] = add(P::round(mul(c.v[k], cos.v[k])), P::round(mul(other.v[k], sin.v[k])));
    return c;
  };
  int64_t i = 0;
  for (; i + kChunk <= row.width; i += kChunk)
    store_chunk<O>(out + i,
                   rotated(load_chunk<T>(x + i), load_chunk<T>(partner + i),
                           load_chunk<Float32>(row.cos + i), load_chunk<Float32>(row.sin + i)));
  if (const int64_t count = row.width - i)
    store_tail<O>(
        out + i,
        rotated(load_tail<T>(x + i, count), load_tail<T>(partner + i, count),
                load_tail<Float32>(row.cos + i, count), load_tail<Float32>(row.sin + i, count)),
        count);
  for (i = row.width; i + kChunk <= row.n; i += kChunk)
    store_chunk<O>(out + i, load_chunk<T>(x + i));
  if (i < row.n) store_tail<O>(out + i, load_tail<T>(x + i, row.n - i), row.n - i);
}

template <class T, class P>
constexpr void fill_rotation(Kernels& k) {
  RotateRow(&of)[3] = k.rotate[int(T::kDType)][int(P::kDType)];
  of[int(DType::kFloat32)] = rotate_row<T, P, Float32>;
  of[int(DType::kFloat16)] = rotate_row<T, P, Float16>;
  of[int(DType::kBFloat16)] = rotate_row<T, P, BFloat16>;
}

}  // namespace
}  // namespace normkit::cpu
