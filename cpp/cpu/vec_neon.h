// Advanced SIMD of AArch64, which converts float16 in its base form.
#pragma once
#include <arm_neon.h>

#include <cstdint>

#include "kernels.h"

namespace normkit::cpu {
namespace {

using V = float32x4_t;
constexpr int kWidth = 4;

inline V zero() { return vdupq_n_f32(0.f); }
inline V set1(float a) { return vdupq_n_f32(a); }
inline V add(V a, V b) { return vaddq_f32(a, b); }
inline V sub(V a, V b) { return vsubq_f32(a, b); }
inline V mul(V a, V b) { return vmulq_f32(a, b); }
inline V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
inline uint32x4_t bits_of(V v) { return vreinterpretq_u32_f32(v); }
inline V of_bits(uint32x4_t bits) { return vreinterpretq_f32_u32(bits); }
inline V bits_and(V a, V b) { return of_bits(vandq_u32(bits_of(a), bits_of(b))); }
inline V div(V a, V b) { return vdivq_f32(a, b); }
// v times 2^(the integer in the lowest bits of k).
inline V add_to_exponent(V v, V k) {
  return of_bits(vaddq_u32(bits_of(v), vshlq_n_u32(bits_of(k), 23)));
}
// yes in the lanes where v >= limit, no in others and where v is NaN.
inline V where_at_least(V v, float limit, V yes, V no) {
  return vbslq_f32(vcgeq_f32(v, set1(limit)), yes, no);
}
// vminq and vmaxq hand a NaN on.
inline V clamp(V v, float limit) { return vminq_f32(set1(limit), vmaxq_f32(set1(-limit), v)); }

inline V load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, V v) { vst1q_f32(p, v); }
inline void stream(float* p, V v) { store(p, v); }
inline void add_to(double* sums, V v) {
  vst1q_f64(sums, vaddq_f64(vld1q_f64(sums), vcvt_f64_f32(vget_low_f32(v))));
  vst1q_f64(sums + 2, vaddq_f64(vld1q_f64(sums + 2), vcvt_high_f64_f32(v)));
}

inline V load_half(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline uint16x4_t to_half(V v) { return vreinterpret_u16_f16(vcvt_f16_f32(v)); }
inline V round_half(V v) { return vcvt_f32_f16(vcvt_f16_f32(v)); }
inline void store_half(uint16_t* p, V v) { vst1_u16(p, to_half(v)); }
inline void stream_half(uint16_t* p, V v) { store_half(p, v); }

inline V load_bfloat(const uint16_t* p) { return of_bits(vshll_n_u16(vld1_u16(p), 16)); }
// Nearest even by integers; the upper half of each lane is the bfloat16.  A NaN would overflow into
// a number when its payload is all ones, so NaNs are made quiet first.
inline uint32x4_t rounded_bits(V v) {
  const uint32x4_t bits = bits_of(v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t up = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x00400000));
  return vbslq_u32(vceqq_f32(v, v), up, quiet);
}
inline V round_bfloat(V v) { return of_bits(vandq_u32(rounded_bits(v), vdupq_n_u32(0xffff0000u))); }
inline void store_bfloat(uint16_t* p, V v) { vst1_u16(p, vshrn_n_u32(rounded_bits(v), 16)); }
inline void stream_bfloat(uint16_t* p, V v) { store_bfloat(p, v); }

inline void split(uint32x4_t bits, V& even, V& odd) {
  even = of_bits(vshlq_n_u32(bits, 16));
  odd = of_bits(vandq_u32(bits, vdupq_n_u32(0xffff0000u)));
}
inline void load_split(const uint16_t* p, V& even, V& odd) {
  split(vreinterpretq_u32_u16(vld1q_u16(p)), even, odd);
}

// The squares of 8 bfloat16, each odd column and then its even neighbour added to one lane.
inline V add_squares(V sum, const uint16_t* p) {
  V even, odd;
  load_split(p, even, odd);
  return fma(even, even, fma(odd, odd, sum));
}

struct Joined {
  uint32x4_t a, b;
};
inline uint32x4_t join(V even, V odd) {
  return vsriq_n_u32(rounded_bits(odd), rounded_bits(even), 16);
}
inline Joined join(V even_a, V odd_a, V even_b, V odd_b) {
  return {join(even_a, odd_a), join(even_b, odd_b)};
}
inline void store_joined(uint16_t* p, uint32x4_t bits) {
  vst1q_u16(p, vreinterpretq_u16_u32(bits));
}
inline void stream_joined(uint16_t* p, uint32x4_t bits) { store_joined(p, bits); }

// Folds in half again and again: 32 partial sums in v[0..7], the upper half always onto the lower.
inline float fold(const V (&v)[8]) {
  const V a0 = add(v[0], v[4]), a1 = add(v[1], v[5]), a2 = add(v[2], v[6]), a3 = add(v[3], v[7]);
  const V c = add(add(a0, a2), add(a1, a3));
  const float32x2_t d = vadd_f32(vget_low_f32(c), vget_high_f32(c));
  return vget_lane_f32(d, 0) + vget_lane_f32(d, 1);
}

#define NORMKIT_FETCH(p) __builtin_prefetch(p, 0)

// The partial sums of a chunk are 16 registers, and its columns as many: that is all there are.
constexpr Beside next_beside_apply(DType, Statistic) { return Beside::kNever; }
constexpr bool kSumsBesideAdd = false;

}  // namespace
}  // namespace normkit::cpu
