// Pairs of columns, rotated, for the vector type V of the vec_*.h that stands before this.
#pragma once
#include <type_traits>

#include "chunk.h"

namespace normkit::cpu {
namespace {

// Each product is rounded to P.
template <class P>
NORMKIT_INLINE Chunk turned(Chunk a, const Chunk& b, const Chunk& cos, const Chunk& sin) {
  for (int k = 0; k < kVecs; ++k)
    a.v[k] = add(P::round(mul(a.v[k], cos.v[k])), P::round(mul(b.v[k], sin.v[k])));
  return a;
}
template <class P>
NORMKIT_INLINE Chunk turned_back(Chunk a, const Chunk& b, const Chunk& cos, const Chunk& sin) {
  for (int k = 0; k < kVecs; ++k)
    a.v[k] = sub(P::round(mul(a.v[k], cos.v[k])), P::round(mul(b.v[k], sin.v[k])));
  return a;
}

// Columns i and width / 2 + i are a pair.
template <class T, class P, class O>
void rotate_halves(const RotatedRow& row) {
  const int64_t half = row.width / 2;
  const auto* a = static_cast<const typename T::Item*>(row.x);
  const auto* b = a + half;
  auto* out = static_cast<typename O::Item*>(row.out);
  int64_t i = 0;
  for (; i + kChunk <= half; i += kChunk) {
    const Chunk first = load_chunk<T>(a + i), second = load_chunk<T>(b + i);
    const Chunk cos = load_chunk<Float32>(row.cos + i), sin = load_chunk<Float32>(row.sin + i);
    store_chunk<O>(out + i, turned_back<P>(first, second, cos, sin));
    store_chunk<O>(out + half + i, turned<P>(second, first, cos, sin));
  }
  if (const int64_t count = half - i) {
    const Chunk first = load_tail<T>(a + i, count), second = load_tail<T>(b + i, count);
    const Chunk cos = load_tail<Float32>(row.cos + i, count),
                sin = load_tail<Float32>(row.sin + i, count);
    store_tail<O>(out + i, turned_back<P>(first, second, cos, sin), count);
    store_tail<O>(out + half + i, turned<P>(second, first, cos, sin), count);
  }
}

// Each column of a pair gets the other one's value.
template <class Item>
void swap_neighbours(const Item* x, int64_t width, Item* out) {
  using Pair = std::conditional_t<sizeof(Item) == 4, uint64_t, uint32_t>;
  constexpr int kBits = 8 * sizeof(Item);
  for (int64_t i = 0; i < width; i += 2) {
    Pair pair;
    std::memcpy(&pair, x + i, sizeof pair);
    pair = static_cast<Pair>(pair >> kBits | pair << kBits);
    std::memcpy(out + i, &pair, sizeof pair);
  }
}

// Columns 2 i and 2 i + 1 are a pair; sin has the sign of the column.
template <class T, class P, class O>
void rotate_neighbours(const RotatedRow& row) {
  const auto* x = static_cast<const typename T::Item*>(row.x);
  auto* other = static_cast<typename T::Item*>(row.swapped);
  auto* out = static_cast<typename O::Item*>(row.out);
  swap_neighbours(x, row.width, other);
  int64_t i = 0;
  for (; i + kChunk <= row.width; i += kChunk)
    store_chunk<O>(out + i,
                   turned<P>(load_chunk<T>(x + i), load_chunk<T>(other + i),
                             load_chunk<Float32>(row.cos + i), load_chunk<Float32>(row.sin + i)));
  if (const int64_t count = row.width - i)
    store_tail<O>(
        out + i,
        turned<P>(load_tail<T>(x + i, count), load_tail<T>(other + i, count),
                  load_tail<Float32>(row.cos + i, count), load_tail<Float32>(row.sin + i, count)),
        count);
}

// What is behind the pairs stays as it is.
template <class T, class P, class O>
void rotate_row(const RotatedRow& row) {
  row.interleaved ? rotate_neighbours<T, P, O>(row) : rotate_halves<T, P, O>(row);
  const auto* x = static_cast<const typename T::Item*>(row.x);
  auto* out = static_cast<typename O::Item*>(row.out);
  int64_t i = row.width;
  for (; i + kChunk <= row.n; i += kChunk) store_chunk<O>(out + i, load_chunk<T>(x + i));
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
