// The stages of a row norm, written once for every vector width.  Included by one source file per
// instruction set, after the vec_*.h that defines V, kWidth and the conversions; everything has
// internal linkage, so that the linker cannot hand one file's AVX-512 code to another.
#pragma once
#include <cmath>

#include "epilogue.h"
#include "rotate_stage.h"

namespace normkit::cpu {
namespace {

template <class T>
void sum_stage(Block& b) {
  for (int r = 0; r < b.rows; ++r) b.sum[r] = sum_row<T>(b.source[r], b.n, Plain{});
}

template <class T, bool kCentred>
void squares_stage(Block& b) {
  for (int r = 0; r < b.rows; ++r) {
    if constexpr (kCentred)
      b.sum[r] = sum_row<T>(b.source[r], b.n, CentredSquares{set1(b.mean[r])});
    else
      b.sum[r] = sum_row<T>(b.source[r], b.n, Squares{});
  }
}

// In double, for one rounding in the place of four: in float32 some elements of a layer norm broke
// the bound of docs/numerics.md, one in 10^8.  Here, and so as wide as the instruction set has it:
// of rows of 128 columns these two instructions are a quarter of the time.
void rstd_stage(Block& b, double inverse_n, double eps, double least) {
  for (int r = 0; r < b.rows; ++r) {
    const double statistic = b.sum[r] * inverse_n + eps;
    b.rstd[r] = static_cast<float>(1.0 / std::sqrt(statistic < least ? least : statistic));
  }
}

void clamp_stage(Block& b) {
  const auto clamped = [](Chunk c) {
    for (int k = 0; k < kVecs; ++k) c.v[k] = clamp(c.v[k], 65504.f);
    return c;
  };
  for (int r = 0; r < b.rows; ++r) {
    const auto* x = static_cast<const uint16_t*>(b.x[r]);
    float* wide = b.wide[r];
    int64_t i = 0;
    for (; i + kChunk <= b.n; i += kChunk)
      store_chunk<Float32>(wide + i, clamped(load_chunk<Float16>(x + i)));
    if (i < b.n)
      store_tail<Float32>(wide + i, clamped(load_tail<Float16>(x + i, b.n - i)), b.n - i);
  }
}

// Weight or bias as float32 lanes, padded to whole chunks with zeros; rounds: weight + offset is
// rounded to what the weight is of.
template <class T, Layout kLayout>
void affine_row(const void* row, int64_t n, float offset, bool rounds, float* out) {
  const auto* item = static_cast<const typename T::Item*>(row);
  constexpr bool kSplitLanes = kLayout == Layout::kSplit && T::kDType == DType::kBFloat16;
  for (int64_t i = 0; i < n; i += kChunk, out += kChunk) {
    Chunk c = n - i < kChunk ? load_tail<T, kSplitLanes>(item + i, n - i)
                             : load_chunk<T, kSplitLanes>(item + i);
    for (int k = 0; k < kVecs; ++k) c.v[k] = add(c.v[k], set1(offset));
    if (rounds)
      for (int k = 0; k < kVecs; ++k) c.v[k] = T::round(c.v[k]);
    if constexpr (kLayout == Layout::kNatural || kSplitLanes) {
      store_chunk<Float32>(out, c);
    } else {
      alignas(64) float natural[kChunk];
      store_chunk<Float32>(natural, c);
      for (int k = 0; k < kChunk; ++k) out[split_lane(k)] = natural[k];
    }
  }
}

// wide = gate * x, rounded to R.  x may be wide itself.
template <class X, class R>
void gate_stage(Block& b) {
  const auto product = [](Chunk c, const Chunk& gate) {
    for (int k = 0; k < kVecs; ++k) c.v[k] = R::round(mul(c.v[k], gate.v[k]));
    return c;
  };
  for (int r = 0; r < b.rows; ++r) {
    const auto* x = static_cast<const typename X::Item*>(b.x[r]);
    const auto* gate = static_cast<const float*>(b.gate[r]);
    float* wide = b.wide[r];
    int64_t i = 0;
    for (; i + kChunk <= b.n; i += kChunk)
      store_chunk<Float32>(wide + i, product(load_chunk<X>(x + i), load_chunk<Float32>(gate + i)));
    if (i < b.n) {
      const int64_t count = b.n - i;
      const Chunk c = product(load_tail<X>(x + i, count), load_tail<Float32>(gate + i, count));
      store_tail<Float32>(wide + i, c, count);
    }
  }
}

struct NoTerm {};

// Term: how the sums enter those of their row, of whole pairs of chunks; NoTerm: they do not.
// kStream: they go around the caches, and to b.wide as what they are rounded to, for the norm.
template <class X, class R, bool kKeep, class Term = NoTerm, bool kStream = false>
void add_stage(Block& b) {
  static_assert(!kStream || (!kKeep && !std::is_same_v<Term, NoTerm>));
  constexpr bool kSplitLanes = !kKeep && layout_of(X::kDType, R::kDType) == Layout::kSplit;
  const auto sum = [](const Chunk& x, const Chunk& residual) {
    Chunk c;
    for (int k = 0; k < kVecs; ++k) c.v[k] = add(x.v[k], residual.v[k]);
    return c;
  };
  for (int r = 0; r < b.rows; ++r) {
    const auto* x = static_cast<const typename X::Item*>(b.x[r]);
    const auto* residual = static_cast<const typename R::Item*>(b.residual[r]);
    auto* residual_out = static_cast<typename R::Item*>(b.residual_out[r]);
    [[maybe_unused]] auto* const kept =
        kStream ? reinterpret_cast<typename R::Item*>(b.wide[r]) : nullptr;
    const auto piece = [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
      for (int64_t i = begin; i + kChunk <= end; i += kChunk) {
        const Chunk c =
            sum(load_chunk<X, kSplitLanes>(x + i), load_chunk<R, kSplitLanes>(residual + i));
        store_chunk<R, kSplitLanes, kStream>(residual_out + i, c);
        if constexpr (kKeep) store_chunk<Float32>(b.wide[r] + i, c);
        if constexpr (kStream) store_chunk<R, kSplitLanes>(kept + i, c);
      }
    };
    if constexpr (!std::is_same_v<Term, NoTerm>) {
      // What has just been stored is rounded, and in a cache.
      b.sum[r] = sum_row_beside<R, Term>(kStream ? kept : residual_out, b.n, piece);
      continue;
    }
    piece(0, b.n);
    if (const int64_t i = b.n / kChunk * kChunk; i < b.n) {
      const int64_t count = b.n - i;
      const Chunk c = sum(load_tail<X, kSplitLanes>(x + i, count),
                          load_tail<R, kSplitLanes>(residual + i, count));
      store_tail<R, kSplitLanes>(residual_out + i, c, count);
      if constexpr (kKeep) store_tail<Float32>(b.wide[r] + i, c, count);
    }
  }
}

template <class X, class R, bool kRounds>
void combine_stage(Block& b) {
  const V alpha = set1(b.alpha), beta = set1(b.beta);
  const auto sum = [&](const Chunk& x, const Chunk& residual) {
    Chunk c;
    for (int k = 0; k < kVecs; ++k) {
      V first = mul(x.v[k], beta), second = mul(residual.v[k], alpha);
      if constexpr (kRounds) first = X::round(first), second = R::round(second);
      c.v[k] = add(first, second);
    }
    return c;
  };
  for (int r = 0; r < b.rows; ++r) {
    const auto* x = static_cast<const typename X::Item*>(b.x[r]);
    const auto* residual = static_cast<const typename R::Item*>(b.residual[r]);
    auto* residual_out = static_cast<typename R::Item*>(b.residual_out[r]);
    int64_t i = 0;
    for (; i + kChunk <= b.n; i += kChunk)
      store_chunk<R>(residual_out + i, sum(load_chunk<X>(x + i), load_chunk<R>(residual + i)));
    if (i < b.n) {
      const int64_t count = b.n - i;
      const Chunk c = sum(load_tail<X>(x + i, count), load_tail<R>(residual + i, count));
      store_tail<R>(residual_out + i, c, count);
    }
  }
}

template <class S, class O>
constexpr void fill_source_and_out(Kernels& k) {
  fill_apply<S, Float32, O>(k);
  // A float32 source stands for a float16 or bfloat16 one where the row is kept widened.
  if constexpr (S::kDType != DType::kBFloat16) fill_apply<S, Float16, O>(k);
  if constexpr (S::kDType != DType::kFloat16) fill_apply<S, BFloat16, O>(k);
}

template <class S, class T>
constexpr void fill_sums_beside_apply(Kernels& k) {
  fill_apply_and_sum<S, T, Statistic::kRms>(k);
  fill_apply_and_sum<S, T, Statistic::kLayer>(k);
}

template <class X, class R>
constexpr void fill_add(Kernels& k) {
  k.add[int(X::kDType)][int(R::kDType)][0] = add_stage<X, R, false>;
  k.add[int(X::kDType)][int(R::kDType)][1] = add_stage<X, R, true>;
  k.combine[int(X::kDType)][int(R::kDType)][0] = combine_stage<X, R, false>;
  k.combine[int(X::kDType)][int(R::kDType)][1] = combine_stage<X, R, true>;
}

template <class T>
constexpr void fill_modulation(Kernels& k) {
  k.gate[int(T::kDType)][int(T::kDType)] = gate_stage<T, T>;
  fill_modulate<T, T, T>(k);
  if constexpr (T::kDType == DType::kFloat32) {
    fill_modulate<T, T, Float16>(k);
    fill_modulate<T, T, BFloat16>(k);
  } else {
    k.gate[int(T::kDType)][int(DType::kFloat32)] = gate_stage<T, Float32>;
    k.gate[int(DType::kFloat32)][int(T::kDType)] = gate_stage<Float32, T>;  // of a clamped x
    fill_modulate<T, Float32, Float32>(k);
    fill_modulate<T, Float32, Float16>(k);
    fill_modulate<T, Float32, BFloat16>(k);
  }
}

template <class T>
constexpr void fill_forward(Kernels& k) {
  const int t = int(T::kDType);
  k.affine[t][int(Layout::kNatural)] = affine_row<T, Layout::kNatural>;
  k.affine[t][int(Layout::kSplit)] = affine_row<T, Layout::kSplit>;
  k.sum[t] = sum_stage<T>;
  k.squares[t][0] = squares_stage<T, false>;
  k.squares[t][1] = squares_stage<T, true>;
  fill_add<T, Float32>(k);
  fill_add<T, Float16>(k);
  fill_add<T, BFloat16>(k);
  fill_sums_beside_apply<T, Float32>(k);
  if constexpr (T::kDType != DType::kFloat32) fill_sums_beside_apply<T, T>(k);
  fill_source_and_out<T, Float32>(k);
  fill_source_and_out<T, Float16>(k);
  fill_source_and_out<T, BFloat16>(k);
  if constexpr (kSumsBesideAdd) {
    k.add_and_sum[t][0][int(Statistic::kRms)] = add_stage<T, T, false, Squares>;
    k.add_and_sum[t][0][int(Statistic::kLayer)] = add_stage<T, T, false, Plain>;
    k.add_and_sum[t][1][int(Statistic::kRms)] = add_stage<T, T, false, Squares, true>;
    k.add_and_sum[t][1][int(Statistic::kLayer)] = add_stage<T, T, false, Plain, true>;
  }
  fill_modulation<T>(k);
  fill_rotation<T, T>(k);
  if constexpr (T::kDType != DType::kFloat32) fill_rotation<T, Float32>(k);
}

}  // namespace
}  // namespace normkit::cpu
