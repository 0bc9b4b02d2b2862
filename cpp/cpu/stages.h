// The stages of a row norm, written once for every vector width.  Included by one source file per
// instruction set, after the vec_*.h that defines V, kWidth and the conversions; everything has
// internal linkage, so that the linker cannot hand one file's AVX-512 code to another.
//
// The order of additions is the same on every instruction set: column i adds to partial sum i % 64,
// runs of 1024 columns are added pairwise, and the 64 partial sums are folded in half.  Pairwise
// runs keep the error of the sum at 16 + log2(n / 1024) roundings however long the row is; with 64
// running sums a row of a million float32 would break the bound of docs/numerics.md.
#pragma once
#include <cmath>
#include <cstring>

#include "epilogue.h"
#include "rotate_stage.h"

namespace normkit::cpu {
namespace {

constexpr int64_t kRun = 1024;

template <int kCount = kVecs>
NORMKIT_INLINE Vecs<kCount> zeros() {
  Vecs<kCount> c;
  for (V& v : c.v) v = zero();
  return c;
}

template <int kCount>
NORMKIT_INLINE void add_to(Vecs<kCount>& a, const Vecs<kCount>& b) {
  for (int k = 0; k < kCount; ++k) a.v[k] = add(a.v[k], b.v[k]);
}

// The 64 partial sums of a chunk, folded in half again and again.
NORMKIT_INLINE float fold(const Chunk& c) {
  V v[kHalf];
  for (int k = 0; k < kHalf; ++k) v[k] = add(c.v[k], c.v[k + kHalf]);
  return fold(v);
}

// How a chunk enters a sum.
struct Plain {
  static constexpr bool kCentred = false;
  NORMKIT_INLINE void operator()(Chunk& acc, const Chunk& c) const {
    for (int k = 0; k < kVecs; ++k) acc.v[k] = add(acc.v[k], c.v[k]);
  }
};
struct Squares {
  static constexpr bool kCentred = false;
  NORMKIT_INLINE void operator()(Chunk& acc, const Chunk& c) const {
    for (int k = 0; k < kVecs; ++k) acc.v[k] = fma(c.v[k], c.v[k], acc.v[k]);
  }
};
struct CentredSquares {
  static constexpr bool kCentred = true;
  V mean;
  NORMKIT_INLINE void operator()(Chunk& acc, const Chunk& c) const {
    for (int k = 0; k < kVecs; ++k) {
      const V d = sub(c.v[k], mean);
      acc.v[k] = fma(d, d, acc.v[k]);
    }
  }
};

template <class T>
constexpr bool kSplitSum = T::kDType == DType::kBFloat16;

// The partial sums of n <= kRun columns.
template <class T, class Term>
NORMKIT_INLINE Chunk sum_run(const typename T::Item* x, int64_t n, const Term& term) {
  Chunk acc = zeros();
  int64_t i = 0;
  for (; i + kChunk <= n; i += kChunk) {
    term(acc, load_chunk<T, kSplitSum<T>>(x + i));
  }
  if (i < n) {
    const Chunk c = load_tail<T, kSplitSum<T>>(x + i, n - i);
    Chunk tail = zeros();
    term(tail, c);
    if constexpr (Term::kCentred) {  // the zeros behind the row are not at the mean
      const Chunk kept = first_columns<kSplitSum<T>>(n - i);
      for (int k = 0; k < kVecs; ++k) tail.v[k] = bits_and(tail.v[k], kept.v[k]);
    }
    add_to(acc, tail);
  }
  return acc;
}

// The squares of bfloat16 rows are added in pairs of columns, as the dot product of AVX512_BF16
// adds them: columns 2j and 2j + 1 of each 128 to partial sum j.
template <>
NORMKIT_INLINE Chunk sum_run<BFloat16, Squares>(const uint16_t* x, int64_t n, const Squares&) {
  Chunk acc = zeros();
  const auto add_pairs = [&acc](const uint16_t* p) __attribute__((always_inline)) {
    for (int k = 0; k < kVecs; ++k) acc.v[k] = add_squares(acc.v[k], p + 2 * k * kWidth);
  };
  int64_t i = 0;
  for (; i + 2 * kChunk <= n; i += 2 * kChunk) add_pairs(x + i);
  if (i < n) {
    constexpr int64_t kPairs = 2 * kWidth;
    uint16_t rest[kPairs] = {};
    if (const int64_t count = n % kPairs) std::memcpy(rest, x + n - count, count * sizeof(*x));
    for (int k = 0; k < kVecs && i < n; ++k, i += kPairs)
      acc.v[k] = add_squares(acc.v[k], n - i < kPairs ? rest : x + i);
  }
  return acc;
}

// Partial sums of n columns, of which run(i, count) makes those of columns [i, i + count): level k
// holds the sum of 2^k runs; equal levels merge, as in binary counting.
template <class Sums, class Run>
NORMKIT_INLINE Sums sum_runs(int64_t n, const Run& run) {
  Sums level[48];
  int64_t runs = 0;
  for (int64_t i = 0; i < n; i += kRun, ++runs) {
    Sums sum = run(i, n - i < kRun ? n - i : kRun);
    int k = 0;
    for (int64_t carry = runs; carry & 1; carry >>= 1) add_to(sum, level[k++]);
    level[k] = sum;
  }
  int k = 0;
  while (!(runs >> k & 1)) ++k;
  Sums total = level[k];
  for (++k; runs >> k; ++k)
    if (runs >> k & 1) add_to(total, level[k]);
  return total;
}

// Kept out of line: its levels would cost a short row their place on the stack.
template <class T, class Term>
[[gnu::noinline]] float sum_long_row(const typename T::Item* x, int64_t n, const Term& term) {
  return fold(sum_runs<Chunk>(n, [=](int64_t i, int64_t count) __attribute__((always_inline)) {
    return sum_run<T>(x + i, count, term);
  }));
}

template <class T, class Term>
NORMKIT_INLINE float sum_row(const void* row, int64_t n, const Term& term) {
  const auto* x = static_cast<const typename T::Item*>(row);
  return n <= kRun ? fold(sum_run<T>(x, n, term)) : sum_long_row<T>(x, n, term);
}

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

template <class X, class R, bool kKeep>
void add_stage(Block& b) {
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
    int64_t i = 0;
    for (; i + kChunk <= b.n; i += kChunk) {
      const Chunk c =
          sum(load_chunk<X, kSplitLanes>(x + i), load_chunk<R, kSplitLanes>(residual + i));
      store_chunk<R, kSplitLanes>(residual_out + i, c);
      if constexpr (kKeep) store_chunk<Float32>(b.wide[r] + i, c);
    }
    if (i < b.n) {
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
  fill_source_and_out<T, Float32>(k);
  fill_source_and_out<T, Float16>(k);
  fill_source_and_out<T, BFloat16>(k);
  fill_modulation<T>(k);
  fill_rotation<T, T>(k);
  if constexpr (T::kDType != DType::kFloat32) fill_rotation<T, Float32>(k);
}

}  // namespace
}  // namespace normkit::cpu
