// Columns of a row in registers: loads, stores and roundings of every element type, for the vector
// type V of the vec_*.h that stands before this.
#pragma once
#include <cstring>

#include "kernels.h"

namespace normkit::cpu {
namespace {

// Chunks have to live in registers, and the compiler takes these functions for too large to inline
// on its own: out of line they take twice as long.
#define NORMKIT_INLINE inline __attribute__((always_inline))

constexpr int kVecs = kChunk / kWidth;

template <int kCount>
struct Vecs {
  V v[kCount];
};
using Chunk = Vecs<kVecs>;

// Element types: what is stored, and how a vector of it becomes float32 lanes and back.
struct Float32 {
  using Item = float;
  static constexpr DType kDType = DType::kFloat32;
  static V load(const float* p) { return cpu::load(p); }
  static void store(float* p, V v) { cpu::store(p, v); }
  static void stream(float* p, V v) { cpu::stream(p, v); }
  static V round(V v) { return v; }
};
struct Float16 {
  using Item = uint16_t;
  static constexpr DType kDType = DType::kFloat16;
  static V load(const uint16_t* p) { return load_half(p); }
  static void store(uint16_t* p, V v) { store_half(p, v); }
  static void stream(uint16_t* p, V v) { stream_half(p, v); }
  static V round(V v) { return round_half(v); }
};
struct BFloat16 {
  using Item = uint16_t;
  static constexpr DType kDType = DType::kBFloat16;
  static V load(const uint16_t* p) { return load_bfloat(p); }
  static void store(uint16_t* p, V v) { store_bfloat(p, v); }
  static void stream(uint16_t* p, V v) { stream_bfloat(p, v); }
  static V round(V v) { return round_bfloat(v); }
};

constexpr int64_t split_lane(int64_t i) { return column_in(Layout::kSplit, i); }

// In split order each 32 columns fill half a chunk: first the even ones, then the odd ones.
constexpr int kHalf = kVecs / 2, kQuarter = kVecs / 4;

template <class T, bool kSplitLanes = false>
NORMKIT_INLINE Chunk load_chunk(const typename T::Item* p) {
  Chunk c;
  if constexpr (kSplitLanes) {
    for (int h = 0; h < kVecs; h += kHalf)
      for (int k = h; k < h + kQuarter; ++k)
        load_split(p + (2 * k - h) * kWidth, c.v[k], c.v[k + kQuarter]);
  } else {
    for (int k = 0; k < kVecs; ++k) c.v[k] = T::load(p + k * kWidth);
  }
  return c;
}

// Lanes k and k + kQuarter of both halves of a chunk in split order, as bfloat16.
NORMKIT_INLINE Joined join(const Chunk& c, int k) {
  return join(c.v[k], c.v[k + kQuarter], c.v[k + kHalf], c.v[k + kHalf + kQuarter]);
}

template <class T, bool kSplitLanes = false, bool kStream = false>
NORMKIT_INLINE void store_chunk(typename T::Item* p, const Chunk& c) {
  if constexpr (kSplitLanes) {
    for (int k = 0; k < kQuarter; ++k) {
      const Joined joined = join(c, k);
      (kStream ? stream_joined : store_joined)(p + 2 * k * kWidth, joined.a);
      (kStream ? stream_joined : store_joined)(p + 2 * k * kWidth + kChunk / 2, joined.b);
    }
  } else {
    for (int k = 0; k < kVecs; ++k) (kStream ? T::stream : T::store)(p + k * kWidth, c.v[k]);
  }
}

// The last count < 64 elements of a row, zeros after them.  Out of line, as is its counterpart:
// there are many callers, and few rows have such an end.
template <class T, bool kSplitLanes = false>
[[gnu::noinline]] Chunk load_tail(const typename T::Item* p, int64_t count) {
  // What one step loads: one vector, or the even and the odd columns of two.
  constexpr int kStep = kSplitLanes ? 2 : 1;
  constexpr int64_t kItems = kStep * kWidth;
  const auto load = [](Chunk& c, int step, const typename T::Item* from) {
    if constexpr (kSplitLanes) {
      const int k = step / kQuarter * kHalf + step % kQuarter;
      load_split(from, c.v[k], c.v[k + kQuarter]);
    } else {
      c.v[step] = T::load(from);
    }
  };
  const typename T::Item none[kItems] = {};
  typename T::Item rest[kItems] = {};
  std::memcpy(rest, p + count / kItems * kItems, count % kItems * sizeof(*p));
  Chunk c;
  for (int step = 0; step < kVecs / kStep; ++step) {
    const int64_t left = count - step * kItems;
    load(c, step, left >= kItems ? p + step * kItems : left > 0 ? rest : none);
  }
  return c;
}

template <class T, bool kSplitLanes = false>
[[gnu::noinline]] void store_tail(typename T::Item* p, const Chunk& c, int64_t count) {
  alignas(64) typename T::Item item[kChunk];
  store_chunk<T, kSplitLanes>(item, c);
  std::memcpy(p, item, count * sizeof(*p));
}

// All ones in the lanes of the first count columns, for sums that a zero column must not enter.
template <bool kSplitLanes>
NORMKIT_INLINE Chunk first_columns(int64_t count) {
  uint32_t bits[2 * kWidth] = {};
  std::memset(bits, 0xff, sizeof bits / 2);
  float mask[2 * kWidth];
  std::memcpy(mask, bits, sizeof mask);
  Chunk c;
  for (int k = 0; k < kVecs; ++k) {
    // In split order the lanes from `lane` on have every other column from `first` on.
    const int64_t lane = int64_t{k} * kWidth;
    const int64_t first = kSplitLanes ? lane / 32 * 32 + lane % 16 * 2 + lane % 32 / 16 : lane;
    const int64_t lanes = kSplitLanes ? (count - first + 1) / 2 : count - first;
    c.v[k] = load(mask + kWidth - (lanes < 0 ? 0 : lanes < kWidth ? lanes : kWidth));
  }
  return c;
}

}  // namespace
}  // namespace normkit::cpu
