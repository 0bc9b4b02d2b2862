// AVX-512 (F, BW, VL, DQ), with the bfloat16 conversion of AVX512_BF16 where NORMKIT_AVX512_BF16 is
// defined.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "kernels.h"

namespace normkit::cpu {
namespace {

using V = __m512;
constexpr int kWidth = 16;

inline V zero() { return _mm512_setzero_ps(); }
inline V set1(float a) { return _mm512_set1_ps(a); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V bits_and(V a, V b) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
inline V div(V a, V b) { return _mm512_div_ps(a, b); }
// v times 2^(the integer in the lowest bits of k).
inline V add_to_exponent(V v, V k) {
  const __m512i shifted = _mm512_slli_epi32(_mm512_castps_si512(k), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(v), shifted));
}
// yes in the lanes where v >= limit, no in others and where v is NaN.
inline V where_at_least(V v, float limit, V yes, V no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(v, set1(limit), _CMP_GE_OQ), no, yes);
}
// The second operand comes back when the first is NaN, so a NaN in v survives both.
inline V clamp(V v, float limit) {
  return _mm512_min_ps(set1(limit), _mm512_max_ps(set1(-limit), v));
}

inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline void stream(float* p, V v) { _mm512_stream_ps(p, v); }
inline void add_to(double* sums, V v) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
  _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), low));
  _mm512_storeu_pd(sums + 8, _mm512_add_pd(_mm512_loadu_pd(sums + 8), high));
}

inline V load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m256i to_half(V v) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline V round_half(V v) { return _mm512_cvtph_ps(to_half(v)); }
inline void store_half(uint16_t* p, V v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_half(v));
}
inline void stream_half(uint16_t* p, V v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_half(v));
}

inline V load_bfloat(const uint16_t* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
// Nearest even by integers, of numbers; the upper half of each lane is the bfloat16.
inline __m512i rounded_numbers(V v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
}
// A NaN would overflow into a number when its payload is all ones, so NaNs are made quiet instead.
inline __m512i rounded_bits(V v) {
  return _mm512_mask_or_epi32(rounded_numbers(v), _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q),
                              _mm512_castps_si512(v), _mm512_set1_epi32(0x00400000));
}
inline V round_bfloat(V v) {
  return _mm512_castsi512_ps(_mm512_and_si512(rounded_bits(v), _mm512_set1_epi32(0xffff0000u)));
}
inline __m256i to_bfloat(V v) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_bits(v), 16));
}
inline void store_bfloat(uint16_t* p, V v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bfloat(v));
}
inline void stream_bfloat(uint16_t* p, V v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bfloat(v));
}

inline void split(__m512i bits, V& even, V& odd) {
  even = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0xffff0000u)));
}
inline void load_split(const uint16_t* p, V& even, V& odd) {
  __m512i bits = _mm512_loadu_si512(p);
  // Keeps the compiler from folding the load into both instructions: loads are the scarce thing
  // here.
  asm("" : "+v"(bits));
  split(bits, even, odd);
}

// The squares of 32 bfloat16, each odd column and then its even neighbour added to one lane.
#ifdef NORMKIT_AVX512_BF16
// The same additions in one instruction; where sums are subnormal it takes them for zero.
inline V add_squares(V sum, const uint16_t* p) {
  const __m512bh pairs = reinterpret_cast<__m512bh>(_mm512_loadu_si512(p));
  return _mm512_dpbf16_ps(sum, pairs, pairs);
}
#else
inline V add_squares(V sum, const uint16_t* p) {
  V even, odd;
  load_split(p, even, odd);
  return fma(even, even, fma(odd, odd, sum));
}
#endif

struct Joined {
  __m512i a, b;
};
inline __m512i join(__m512i even, __m512i odd) {
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(even, 16), odd);
}
inline Joined join_by_integers(V even_a, V odd_a, V even_b, V odd_b) {
  return {join(rounded_bits(even_a), rounded_bits(odd_a)),
          join(rounded_bits(even_b), rounded_bits(odd_b))};
}
#ifdef NORMKIT_AVX512_BF16
constexpr int kSubnormal = 0x20;  // of vfpclassps
inline bool any_subnormal(V a, V b, V c, V d) {
  const __mmask16 first =
      _kor_mask16(_mm512_fpclass_ps_mask(a, kSubnormal), _mm512_fpclass_ps_mask(b, kSubnormal));
  const __mmask16 second =
      _kor_mask16(_mm512_fpclass_ps_mask(c, kSubnormal), _mm512_fpclass_ps_mask(d, kSubnormal));
  return !_kortestz_mask16_u8(first, second);
}
// The instruction rounds to nearest even but takes subnormals for zero: those go through the
// integers, which take twice as long.  No number from the normal ones on rounds to zero, so only
// where zeros have come out is it asked whether all of them were zero.
inline Joined join(V even_a, V odd_a, V even_b, V odd_b) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i a = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd_a, even_a));
  const __m512i b = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd_b, even_b));
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  if (__builtin_expect(!_kortestz_mask32_u8(_mm512_testn_epi16_mask(a, magnitude),
                                            _mm512_testn_epi16_mask(b, magnitude)),
                       0) &&
      any_subnormal(even_a, odd_a, even_b, odd_b))
    return join_by_integers(even_a, odd_a, even_b, odd_b);
  return {_mm512_permutexvar_epi16(order, a), _mm512_permutexvar_epi16(order, b)};
}
#else
// One question for all four, since to look after NaNs in each takes as long as to round.
inline Joined join(V even_a, V odd_a, V even_b, V odd_b) {
  if (__builtin_expect(!_kortestz_mask16_u8(_mm512_cmp_ps_mask(even_a, odd_a, _CMP_UNORD_Q),
                                            _mm512_cmp_ps_mask(even_b, odd_b, _CMP_UNORD_Q)),
                       0))
    return join_by_integers(even_a, odd_a, even_b, odd_b);
  return {join(rounded_numbers(even_a), rounded_numbers(odd_a)),
          join(rounded_numbers(even_b), rounded_numbers(odd_b))};
}
#endif
inline void store_joined(uint16_t* p, __m512i bits) { _mm512_storeu_si512(p, bits); }
inline void stream_joined(uint16_t* p, __m512i bits) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bits);
}

// Folds in half again and again: 32 partial sums in v[0], v[1], the upper half always onto the
// lower.
inline float fold(const V (&v)[2]) {
  const __m512 a = add(v[0], v[1]);
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1));
  const __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), high);
  const __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  const __m128 d = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}

// A macro, since gcc 12 takes a function that does no more than this for one without effect.
#define NORMKIT_FETCH(p) _mm_prefetch(p, _MM_HINT_T0)

// Partial sums and columns fit 32 registers together, and a sum by itself waits for the
// second-level cache: rms of bfloat16 is 1.4 times as fast at once on Zen 5.  On a Xeon with
// AVX512_BF16 and two vector ports, n = 4096, rms of float16 gains 1.02 to 1.2, and layer norms of
// 16 bits 1.0 to 1.2.  There a row of float32, the next one, y and the weight do not fit the
// first-level cache together, and are 0.84 to 0.95 as fast at once (Zen 5, one noisy run: 1.37);
// around the caches y needs no room, and they are 1.05 to 1.2 as fast.  Without AVX512_BF16 rms of
// bfloat16 has nothing to gain (0.96 to 1.04 by llvm-mca), and its layer norm was not timed.
constexpr Beside next_beside_apply(DType dtype, Statistic) {
  if (dtype == DType::kFloat32) return Beside::kStreamed;
#ifndef NORMKIT_AVX512_BF16
  if (dtype == DType::kBFloat16) return Beside::kNever;
#endif
  return Beside::kAlways;
}
constexpr bool kSumsBesideAdd = true;

}  // namespace
}  // namespace normkit::cpu
