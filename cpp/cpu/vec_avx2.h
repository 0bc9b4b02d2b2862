// AVX2 with FMA and F16C.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "kernels.h"

namespace normkit::cpu {
namespace {

using V = __m256;
constexpr int kWidth = 8;

inline V zero() { return _mm256_setzero_ps(); }
inline V set1(float a) { return _mm256_set1_ps(a); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V bits_and(V a, V b) { return _mm256_and_ps(a, b); }
inline V div(V a, V b) { return _mm256_div_ps(a, b); }
// v times 2^(the integer in the lowest bits of k).
inline V add_to_exponent(V v, V k) {
  const __m256i shifted = _mm256_slli_epi32(_mm256_castps_si256(k), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), shifted));
}
// yes in the lanes where v >= limit, no in others and where v is NaN.
inline V where_at_least(V v, float limit, V yes, V no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(v, set1(limit), _CMP_GE_OQ));
}
// The second operand comes back when the first is NaN, so a NaN in v survives both.
inline V clamp(V v, float limit) {
  return _mm256_min_ps(set1(limit), _mm256_max_ps(set1(-limit), v));
}

inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
inline void stream(float* p, V v) { _mm256_stream_ps(p, v); }
inline void add_to(double* sums, V v) {
  const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v));
  const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
  _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), low));
  _mm256_storeu_pd(sums + 4, _mm256_add_pd(_mm256_loadu_pd(sums + 4), high));
}

inline __m128i load_eight(const uint16_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
inline void store_eight(uint16_t* p, __m128i bits) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bits);
}
inline void stream_eight(uint16_t* p, __m128i bits) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), bits);
}

inline V load_half(const uint16_t* p) { return _mm256_cvtph_ps(load_eight(p)); }
inline __m128i to_half(V v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
inline V round_half(V v) { return _mm256_cvtph_ps(to_half(v)); }
inline void store_half(uint16_t* p, V v) { store_eight(p, to_half(v)); }
inline void stream_half(uint16_t* p, V v) { stream_eight(p, to_half(v)); }

inline V load_bfloat(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_eight(p)), 16));
}
// Nearest even by integers, of numbers; the upper half of each lane is the bfloat16.
inline __m256i rounded_numbers(V v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}
// A NaN would overflow into a number when its payload is all ones, so NaNs are made quiet instead.
inline __m256i rounded_bits(V v) {
  const V quiet = _mm256_or_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0x00400000)));
  const V is_nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  return _mm256_castps_si256(
      _mm256_blendv_ps(_mm256_castsi256_ps(rounded_numbers(v)), quiet, is_nan));
}
inline V round_bfloat(V v) {
  return _mm256_castsi256_ps(
      _mm256_and_si256(rounded_bits(v), _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline __m128i to_bfloat(V v) {
  const __m256i high = _mm256_srli_epi32(rounded_bits(v), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
inline void store_bfloat(uint16_t* p, V v) { store_eight(p, to_bfloat(v)); }
inline void stream_bfloat(uint16_t* p, V v) { stream_eight(p, to_bfloat(v)); }

inline void split(__m256i bits, V& even, V& odd) {
  even = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  odd =
      _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline void load_split(const uint16_t* p, V& even, V& odd) {
  __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  // Keeps the compiler from folding the load into both instructions: loads are the scarce thing
  // here.
  asm("" : "+x"(bits));
  split(bits, even, odd);
}
// The squares of 16 bfloat16, each odd column and then its even neighbour added to one lane.
inline V add_squares(V sum, const uint16_t* p) {
  V even, odd;
  load_split(p, even, odd);
  return fma(even, even, fma(odd, odd, sum));
}

struct Joined {
  __m256i a, b;
};
inline __m256i join(__m256i even, __m256i odd) {
  return _mm256_blend_epi16(_mm256_srli_epi32(even, 16), odd, 0xaa);
}
// One question for all four, since to look after NaNs in each takes as long as to round.
inline Joined join(V even_a, V odd_a, V even_b, V odd_b) {
  const V nan = _mm256_or_ps(_mm256_cmp_ps(even_a, odd_a, _CMP_UNORD_Q),
                             _mm256_cmp_ps(even_b, odd_b, _CMP_UNORD_Q));
  if (__builtin_expect(_mm256_movemask_ps(nan), 0))
    return {join(rounded_bits(even_a), rounded_bits(odd_a)),
            join(rounded_bits(even_b), rounded_bits(odd_b))};
  return {join(rounded_numbers(even_a), rounded_numbers(odd_a)),
          join(rounded_numbers(even_b), rounded_numbers(odd_b))};
}
inline void store_joined(uint16_t* p, __m256i bits) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
}
inline void stream_joined(uint16_t* p, __m256i bits) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits);
}

// Folds in half again and again: 32 partial sums in v[0..3], the upper half always onto the lower.
inline float fold(const V (&v)[4]) {
  const V b = add(add(v[0], v[2]), add(v[1], v[3]));
  const __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}

// A macro, since gcc 12 takes a function that does no more than this for one without effect.
#define NORMKIT_FETCH(p) _mm_prefetch(p, _MM_HINT_T0)

// Zen 3, n = 4096.  From a cache only rms of bfloat16 gains, 1.06 to 1.10: of the others the
// partial sums and columns do not fit 16 registers together (rms of float32 and float16 0.90 to
// 0.95, layer 0.98 to 1.04).  From memory these gain too, 1.04 to 1.2, but for rms of float16 (0.95
// to 1.05) and layer of bfloat16 (0.95 to 0.98).
constexpr Beside next_beside_apply(DType dtype, Statistic statistic) {
  const bool rms = statistic == Statistic::kRms;
  if (dtype == DType::kBFloat16) return rms ? Beside::kAlways : Beside::kNever;
  return dtype == DType::kFloat16 && rms ? Beside::kNever : Beside::kFromMemory;
}
// In all dtypes, from a cache and from memory: 1.02 to 1.08.
constexpr bool kSumsBesideAdd = true;

}  // namespace
}  // namespace normkit::cpu
