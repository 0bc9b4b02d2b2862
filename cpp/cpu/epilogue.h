// From a normalised row to the output: rounding, weight and bias, and the store.
#pragma once
#include "chunk.h"

namespace normkit::cpu {
namespace {

// S is normalised, its normalised value rounded to T before the weight, the result stored as O. The
// weight and the bias are of type W: float32 prepared by affine_row, or as stored, which spares a
// short call the preparation and a long one half of their room in the first-level cache.
template <class S, class T, class O, class W, bool kLayer>
struct Apply {
  static constexpr bool kSplitLanes = layout_of(S::kDType, O::kDType) == Layout::kSplit;
  static constexpr bool kSplitAffine = kSplitLanes && W::kDType == DType::kBFloat16;
  using Affine = typename W::Item;
  V rstd, mean;

  NORMKIT_INLINE void normalise(Chunk& c) const {
    for (int k = 0; k < kVecs; ++k) {
      if constexpr (kLayer) c.v[k] = sub(c.v[k], mean);
      c.v[k] = mul(c.v[k], rstd);
    }
    if constexpr (kSplitLanes && T::kDType == DType::kBFloat16) {
      for (int k = 0; k < kQuarter; ++k) {
        const Joined joined = join(c, k);
        split(joined.a, c.v[k], c.v[k + kQuarter]);
        split(joined.b, c.v[k + kHalf], c.v[k + kHalf + kQuarter]);
      }
    } else {
      for (int k = 0; k < kVecs; ++k) c.v[k] = T::round(c.v[k]);
    }
  }
  static NORMKIT_INLINE void scale(Chunk& c, const Chunk& weight) {
    for (int k = 0; k < kVecs; ++k) c.v[k] = mul(c.v[k], weight.v[k]);
  }
  static NORMKIT_INLINE void scale_and_shift(Chunk& c, const Chunk& weight, const Chunk& bias) {
    for (int k = 0; k < kVecs; ++k) c.v[k] = fma(c.v[k], weight.v[k], bias.v[k]);
  }

  struct Row {
    const typename S::Item* x;
    const Affine* weight;
    const Affine* bias;
    typename O::Item* out;
    const char* next;  // null: none
  };

  template <bool kBias, bool kStream>
  NORMKIT_INLINE void chunk(const Row& row, Chunk c, int64_t i) const {
    if (row.next)
      for (size_t line = 0; line < kChunk * sizeof(*row.x); line += 64)
        fetch(row.next + i * sizeof(*row.x) + line);
    normalise(c);
    const Chunk weight = load_chunk<W, kSplitAffine>(row.weight + i);
    if constexpr (kBias)
      scale_and_shift(c, weight, load_chunk<W, kSplitAffine>(row.bias + i));
    else
      scale(c, weight);
    store_chunk<O, kSplitLanes, kStream>(row.out + i, c);
  }

  template <bool kBias, bool kStream>
  NORMKIT_INLINE void apply(const Row& row, int64_t n) const {
    int64_t i = 0;
    if (kChunk <= n) {
      // Each chunk is loaded before the one in front of it is stored: out often begins a line
      // behind x, modulo 4096, and a load so close behind a store of the same low address bits
      // waits for it (Zen 4: 10 % of the whole norm).
      Chunk c = load_chunk<S, kSplitLanes>(row.x);
      for (; i + 2 * kChunk <= n; i += kChunk) {
        const Chunk following = load_chunk<S, kSplitLanes>(row.x + i + kChunk);
        chunk<kBias, kStream>(row, c, i);
        c = following;
      }
      chunk<kBias, kStream>(row, c, i);
      i += kChunk;
    }
    if (i < n) {
      const int64_t count = n - i;
      Chunk c = load_tail<S, kSplitLanes>(row.x + i, count);
      normalise(c);
      const Chunk weight = affine_tail(row.weight + i, count);
      if constexpr (kBias)
        scale_and_shift(c, weight, affine_tail(row.bias + i, count));
      else
        scale(c, weight);
      store_tail<O, kSplitLanes>(row.out + i, c, count);
    }
  }

  // Prepared rows in split order are whole chunks: their last columns are not their last floats.
  static NORMKIT_INLINE Chunk affine_tail(const Affine* row, int64_t count) {
    if constexpr (kSplitLanes && !kSplitAffine) return load_chunk<W>(row);
    return load_tail<W, kSplitAffine>(row, count);
  }

  template <bool kBias, bool kStream>
  static void rows(const Block& b) {
    for (int r = 0; r < b.rows; ++r) {
      const Row row{static_cast<const typename S::Item*>(b.source[r]),
                    static_cast<const Affine*>(b.weight[r]), static_cast<const Affine*>(b.bias[r]),
                    static_cast<typename O::Item*>(b.out[r]), static_cast<const char*>(b.next[r])};
      Apply{set1(b.rstd[r]), set1(b.mean[r])}.template apply<kBias, kStream>(row, b.n);
    }
  }

  static void stage(Block& b) {
    if (b.stream) {
      b.has_bias ? rows<true, true>(b) : rows<false, true>(b);
      end_of_stream();
    } else {
      b.has_bias ? rows<true, false>(b) : rows<false, false>(b);
    }
  }
};

template <class S, class T, class O>
constexpr void fill_apply(Kernels& k) {
  Stage(&prepared)[2] = k.apply[int(S::kDType)][int(T::kDType)][int(O::kDType)][0];
  prepared[int(Statistic::kRms)] = Apply<S, T, O, Float32, false>::stage;
  prepared[int(Statistic::kLayer)] = Apply<S, T, O, Float32, true>::stage;
  if constexpr (S::kDType == O::kDType && S::kDType != DType::kFloat32) {
    Stage(&stored)[2] = k.apply[int(S::kDType)][int(T::kDType)][int(O::kDType)][1];
    stored[int(Statistic::kRms)] = Apply<S, T, O, S, false>::stage;
    stored[int(Statistic::kLayer)] = Apply<S, T, O, S, true>::stage;
  }
}

}  // namespace
}  // namespace normkit::cpu
