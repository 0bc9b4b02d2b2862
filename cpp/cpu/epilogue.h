// From a normalised row to the output: rounding, weight and bias, and the store.
#pragma once
#include <type_traits>

#include "sums.h"

namespace normkit::cpu {
namespace {

// The product with the weight and the sum with the bias are one operation.
struct Fused {};

// S is normalised, its normalised value rounded to T before the weight, the result stored as O. The
// weight and the bias are of type W: float32 prepared by affine_row, or as stored, which spares a
// short call the preparation and a long one half of their room in the first-level cache.  Their
// product is rounded to P before the bias is added, unless that is Fused.
template <class S, class T, class O, class W, bool kLayer, class P = Fused>
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
    round<T>(c);
  }
  template <class To>
  static NORMKIT_INLINE void round(Chunk& c) {
    if constexpr (kSplitLanes && To::kDType == DType::kBFloat16) {
      for (int k = 0; k < kQuarter; ++k) {
        const Joined joined = join(c, k);
        split(joined.a, c.v[k], c.v[k + kQuarter]);
        split(joined.b, c.v[k + kHalf], c.v[k + kHalf + kQuarter]);
      }
    } else {
      for (int k = 0; k < kVecs; ++k) c.v[k] = To::round(c.v[k]);
    }
  }
  static NORMKIT_INLINE void scale(Chunk& c, const Chunk& weight) {
    for (int k = 0; k < kVecs; ++k) c.v[k] = mul(c.v[k], weight.v[k]);
  }
  static NORMKIT_INLINE void scale_and_shift(Chunk& c, const Chunk& weight, const Chunk& bias) {
    if constexpr (std::is_same_v<P, Fused>) {
      for (int k = 0; k < kVecs; ++k) c.v[k] = fma(c.v[k], weight.v[k], bias.v[k]);
    } else {
      scale(c, weight);
      round<P>(c);
      for (int k = 0; k < kVecs; ++k) c.v[k] = add(c.v[k], bias.v[k]);
    }
  }

  struct Row {
    const typename S::Item* x;
    const Affine* weight;
    const Affine* bias;
    typename O::Item* out;
    const char* next;  // null: none
  };

  static Row row_of(const Block& b, int r) {
    return {static_cast<const typename S::Item*>(b.source[r]),
            static_cast<const Affine*>(b.weight[r]), static_cast<const Affine*>(b.bias[r]),
            static_cast<typename O::Item*>(b.out[r]), static_cast<const char*>(b.next[r])};
  }
  static Apply of(const Block& b, int r) { return {set1(b.rstd[r]), set1(b.mean[r])}; }

  // Weight and bias of the columns in c; the bias may be left out.
  template <bool kBias>
  static NORMKIT_INLINE void affine(Chunk& c, const Chunk& weight, const Affine* bias) {
    if constexpr (kBias)
      scale_and_shift(c, weight, load_chunk<W, kSplitAffine>(bias));
    else
      scale(c, weight);
  }

  template <int64_t kColumns = kChunk>
  static NORMKIT_INLINE void fetch_next(const Row& row, int64_t i) {
    if (row.next)
      for (size_t line = 0; line < kColumns * sizeof(*row.x); line += 64)
        NORMKIT_FETCH(row.next + i * sizeof(*row.x) + line);
  }

  // From c, the columns from i on, to the output.
  template <bool kBias, bool kStream>
  NORMKIT_INLINE void finish(Chunk c, const Row& row, int64_t i, int64_t affine_at) const {
    normalise(c);
    // Prepared rows in split order have whole chunks, the last one of the last columns.
    const int64_t at = kSplitLanes && !kSplitAffine ? affine_at : i;
    affine<kBias>(c, load_chunk<W, kSplitAffine>(row.weight + at), row.bias + at);
    store_chunk<O, kSplitLanes, kStream>(row.out + i, c);
  }

  // A row of at least one chunk.  The last chunk ends where the row does: what it repeats of the
  // one before it gets the same values again.
  //
  // Each chunk is loaded before the one in front of it is stored: x may be what is stored, and out
  // often begins a line behind x, modulo 4096, where a load so close behind a store of the same low
  // address bits waits for it (Zen 4: 10 % of the whole norm).
  template <bool kBias, bool kStream>
  NORMKIT_INLINE void along(const Row& row, int64_t n) const {
    const int64_t last = n - kChunk;
    Chunk c = load_chunk<S, kSplitLanes>(row.x);
    for (int64_t i = 0, affine_at = 0;; affine_at += kChunk) {
      const int64_t following_at = i + kChunk < last ? i + kChunk : last;
      const Chunk following = load_chunk<S, kSplitLanes>(row.x + following_at);
      fetch_next(row, i);
      finish<kBias, kStream>(c, row, i, affine_at);
      if (i == last) break;
      i = following_at;
      c = following;
    }
  }

  // The same of a row of whole pairs of chunks, and the first sum of the next one.
  template <bool kBias, bool kStream>
  NORMKIT_INLINE float along_and_sum(const Row& row, const typename S::Item* next,
                                     int64_t n) const {
    Chunk c = load_chunk<S, kSplitLanes>(row.x);
    const auto piece = [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
      fetch_next<kPiece>(row, begin);
      for (int64_t i = begin; i < end; i += kChunk) {
        const int64_t following_at = i + kChunk < n ? i + kChunk : i;
        const Chunk following = load_chunk<S, kSplitLanes>(row.x + following_at);
        finish<kBias, kStream>(c, row, i, i);
        c = following;
      }
    };
    return sum_row_beside<S, std::conditional_t<kLayer, Plain, Squares>>(next, n, piece);
  }

  template <bool kBias, bool kStream>
  static void rows(const Block& b) {
    for (int r = 0; r < b.rows; ++r) of(b, r).template along<kBias, kStream>(row_of(b, r), b.n);
  }

  // Short rows of whole chunks that share weight and bias: these stay in registers from row to row.
  template <bool kBias, bool kStream>
  static void across(const Block& b) {
    const Row first = row_of(b, 0);
    for (int64_t i = 0; i < b.n; i += kChunk) {
      const Chunk weight = load_chunk<W, kSplitAffine>(first.weight + i);
      Chunk bias;
      if constexpr (kBias) bias = load_chunk<W, kSplitAffine>(first.bias + i);
      for (int r = 0; r < b.rows; ++r) {
        const Row row = row_of(b, r);
        Chunk c = load_chunk<S, kSplitLanes>(row.x + i);
        fetch_next(row, i);
        of(b, r).normalise(c);
        if constexpr (kBias)
          scale_and_shift(c, weight, bias);
        else
          scale(c, weight);
        store_chunk<O, kSplitLanes, kStream>(row.out + i, c);
      }
    }
  }

  // Rows of less than a chunk, which go through one of their own.
  template <bool kBias>
  static void short_rows(const Block& b) {
    alignas(64) typename S::Item x[kChunk] = {};
    alignas(64) Affine weight[kChunk] = {}, bias[kChunk] = {};
    alignas(64) typename O::Item out[kChunk];
    // Prepared rows in split order have a whole chunk.
    const int64_t affine_count = kSplitLanes && !kSplitAffine ? kChunk : b.n;
    for (int r = 0; r < b.rows; ++r) {
      Row row = row_of(b, r);
      std::memcpy(x, row.x, b.n * sizeof(*x));
      std::memcpy(weight, row.weight, affine_count * sizeof(*weight));
      if constexpr (kBias) std::memcpy(bias, row.bias, affine_count * sizeof(*bias));
      of(b, r).template along<kBias, false>({x, weight, bias, out, nullptr}, kChunk);
      std::memcpy(row.out, out, b.n * sizeof(*out));
    }
  }

  template <bool kBias>
  static void choose(const Block& b) {
    if (b.n < kChunk) return short_rows<kBias>(b);
    const bool crossing = b.shared && b.n <= kShortRow && b.n % kChunk == 0;
    if (b.stream)
      crossing ? across<kBias, true>(b) : rows<kBias, true>(b);
    else
      crossing ? across<kBias, false>(b) : rows<kBias, false>(b);
  }

  // b.next has a row for each.
  template <bool kBias, bool kStream>
  static void rows_and_sums(Block& b) {
    for (int r = 0; r < b.rows; ++r) {
      const auto* next = static_cast<const typename S::Item*>(b.next[r]);
      Row row = row_of(b, r);
      // Its first columns came with the end of the row before it.
      row.next = b.fetch ? row.next + 2 * kPiece * sizeof(*next) : nullptr;
      b.next_sum[r] = of(b, r).template along_and_sum<kBias, kStream>(row, next, b.n);
    }
  }
  // A bias is usual of layer norms alone.
  static void stage_and_sum(Block& b) {
    if (kLayer && b.has_bias)
      b.stream ? rows_and_sums<kLayer, true>(b) : rows_and_sums<kLayer, false>(b);
    else
      b.stream ? rows_and_sums<false, true>(b) : rows_and_sums<false, false>(b);
  }

  static void stage(Block& b) { b.has_bias ? choose<true>(b) : choose<false>(b); }
  // Without a bias no product is rounded before anything.
  static void modulate(Block& b) { choose<true>(b); }
};

template <class T, class P, class O>
constexpr void fill_modulate(Kernels& k) {
  Stage(&of)[2] = k.modulate[int(T::kDType)][int(P::kDType)][int(O::kDType)];
  of[int(Statistic::kRms)] = Apply<T, T, O, Float32, false, P>::modulate;
  // Of what is usual; the others are normalised first.
  if constexpr (std::is_same_v<T, P> && std::is_same_v<T, O>)
    of[int(Statistic::kLayer)] = Apply<T, T, O, Float32, true, P>::modulate;
}

template <class S, class T, Statistic kStatistic>
constexpr void fill_apply_and_sum(Kernels& k) {
  constexpr int s = int(S::kDType), statistic = int(kStatistic);
  constexpr Beside beside = next_beside_apply(S::kDType, kStatistic);
  constexpr bool kLayer = kStatistic == Statistic::kLayer, kRounds = T::kDType != DType::kFloat32;
  k.next_beside_apply[s][statistic] = beside;
  // Of what is usual: Llama's rounding is of rms, and only bfloat16 leaves the weight of many rows
  // as it is stored.
  if constexpr (beside != Beside::kNever && !(kLayer && kRounds)) {
    Stage(&of)[2][2] = k.apply_and_sum[s][kRounds];
    of[0][statistic] = Apply<S, T, S, Float32, kLayer>::stage_and_sum;
    if constexpr (S::kDType == DType::kBFloat16)
      of[1][statistic] = Apply<S, T, S, S, kLayer>::stage_and_sum;
  }
}

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
