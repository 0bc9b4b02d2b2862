// The sum of a row, or of its squares.
//
// The order of additions is the same on every instruction set: column i adds to partial sum i % 64,
// runs of 1024 columns are added pairwise, and the 64 partial sums are folded in half.  Pairwise
// runs keep the error of the sum at 16 + log2(n / 1024) roundings however long the row is; with 64
// running sums a row of a million float32 would break the bound of docs/numerics.md.
#pragma once
#include <cstring>
#include <type_traits>

#include "chunk.h"

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

// The squares of bfloat16 rows are added in pairs of columns, as the dot product of AVX512_BF16
// adds them: columns 2j and 2j + 1 of each 128 to partial sum j.
template <class T, class Term>
constexpr bool kInPairs = std::is_same_v<T, BFloat16> && std::is_same_v<Term, Squares>;

// Columns that are added in one step.
template <class T, class Term>
constexpr int64_t kStep = kInPairs<T, Term> ? 2 * kChunk : kChunk;

template <class T, class Term>
NORMKIT_INLINE void add_step(Chunk& acc, const typename T::Item* x, const Term& term) {
  if constexpr (kInPairs<T, Term>)
    for (int k = 0; k < kVecs; ++k) acc.v[k] = add_squares(acc.v[k], x + 2 * k * kWidth);
  else
    term(acc, load_chunk<T, kSplitSum<T>>(x));
}

// The last n < kStep columns of a row.
template <class T, class Term>
NORMKIT_INLINE void add_rest(Chunk& acc, const typename T::Item* x, int64_t n, const Term& term) {
  if constexpr (kInPairs<T, Term>) {
    constexpr int64_t kPairs = 2 * kWidth;
    uint16_t rest[kPairs] = {};
    if (const int64_t count = n % kPairs) std::memcpy(rest, x + n - count, count * sizeof(*x));
    for (int64_t k = 0, i = 0; k < kVecs && i < n; ++k, i += kPairs)
      acc.v[k] = add_squares(acc.v[k], n - i < kPairs ? rest : x + i);
  } else {
    const Chunk c = load_tail<T, kSplitSum<T>>(x, n);
    Chunk tail = zeros();
    term(tail, c);
    if constexpr (Term::kCentred) {  // the zeros behind the row are not at the mean
      const Chunk kept = first_columns<kSplitSum<T>>(n);
      for (int k = 0; k < kVecs; ++k) tail.v[k] = bits_and(tail.v[k], kept.v[k]);
    }
    add_to(acc, tail);
  }
}

// The partial sums of n <= kRun columns.
template <class T, class Term>
NORMKIT_INLINE Chunk sum_run(const typename T::Item* x, int64_t n, const Term& term) {
  Chunk acc = zeros();
  int64_t i = 0;
  for (; i + kStep<T, Term> <= n; i += kStep<T, Term>) add_step<T>(acc, x + i, term);
  if (i < n) add_rest<T>(acc, x + i, n - i, term);
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

// Columns of other work between those of a sum: few enough that both are under way at once, and
// enough to put partial sums away in between where there are 16 registers (128: 2 to 10 % slower
// than 256, by AVX2).
constexpr int64_t kPiece = 256;

// The sum of a row of whole steps, n % (2 * kChunk) == 0, in pieces, each behind work(i, end) on
// those columns of this row or another.
template <class T, class Term, class Work>
NORMKIT_INLINE float sum_row_beside(const typename T::Item* x, int64_t n, const Work& work) {
  const auto run = [&](int64_t begin, int64_t count) __attribute__((always_inline)) {
    Chunk acc = zeros();
    for (int64_t i = begin, end; i < begin + count; i = end) {
      end = i + kPiece < begin + count ? i + kPiece : begin + count;
      work(i, end);
      for (int64_t at = i; at < end; at += kStep<T, Term>) add_step<T>(acc, x + at, Term{});
    }
    return acc;
  };
  return fold(sum_runs<Chunk>(n, run));
}

}  // namespace
}  // namespace normkit::cpu
