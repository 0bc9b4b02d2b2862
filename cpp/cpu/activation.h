// The activations of a gate, for the vector type V of the vec_*.h that stands before this.
#pragma once
#include <limits>

#include "chunk.h"

namespace normkit::cpu {
namespace {

// exp of numbers within +-kMostExponent, with less than 1.5 ulp of error; NaN stays NaN or becomes
// another number.
constexpr float kMostExponent = 87.33f;  // exp(-87.33) is the least that is no subnormal number

NORMKIT_INLINE V exp(V v) {
  // Added to a number, 1.5 * 2^23 leaves its nearest integer in the lowest bits.
  const V kInteger = set1(12582912.f);
  const V k = fma(v, set1(1.44269504f), kInteger);
  const V n = sub(k, kInteger);
  // ln 2, and what float32 leaves of it
  const V r = fma(n, set1(1.904654299e-9f), fma(n, set1(-0.69314718246f), v));
  // The series: |r| < 0.35, and r^8 / 8! < 2^-27.
  V p = set1(1.f / 5040);
  p = fma(p, r, set1(1.f / 720));
  p = fma(p, r, set1(1.f / 120));
  p = fma(p, r, set1(1.f / 24));
  p = fma(p, r, set1(1.f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.f));
  p = fma(p, r, set1(1.f));
  return add_to_exponent(p, k);
}

// 1 + exp(-z); inf where that is beyond float32 or near its end, and NaN for NaN.
NORMKIT_INLINE V sigmoid_divisor(V z) {
  const V e = exp(sub(zero(), clamp(z, kMostExponent)));
  return add(set1(1.f), where_at_least(z, -kMostExponent, e,
                                       mul(z, set1(-std::numeric_limits<float>::infinity()))));
}

NORMKIT_INLINE V sigmoid(V z) { return div(set1(1.f), sigmoid_divisor(z)); }
// As torch computes it on the CPU, so that of -inf it is NaN.
NORMKIT_INLINE V silu(V z) { return div(z, sigmoid_divisor(z)); }

// A row of whole chunks, each column times that of a weight where there is one.
template <Activation kActivation>
void activate_row(float* row, int64_t n, const float* weight) {
  for (int64_t i = 0; i < n; i += kWidth) {
    const V z = load(row + i);
    V v = kActivation == Activation::kSilu ? silu(z) : sigmoid(z);
    if (weight) v = mul(v, load(weight + i));
    store(row + i, v);
  }
}

constexpr void fill_activate(Kernels& k) {
  k.activate[int(Activation::kSilu)] = activate_row<Activation::kSilu>;
  k.activate[int(Activation::kSigmoid)] = activate_row<Activation::kSigmoid>;
}

}  // namespace
}  // namespace normkit::cpu
