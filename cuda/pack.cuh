// Packs: one thread's consecutive elements, 16 bytes of x's dtype, in memory and as float32.
#pragma once
#include <cstring>
#include <type_traits>

#include "../cpp/norm_args.h"
#include "portable.cuh"

namespace normkit::cuda {

// Columns are int where a row fits into registers, and int64_t where it may not: Index below.

using Half = __half;
using BFloat16 = __nv_bfloat16;

template <class T>
constexpr DType kDType = DType::kFloat32;
template <>
constexpr DType kDType<Half> = DType::kFloat16;
template <>
constexpr DType kDType<BFloat16> = DType::kBFloat16;

// For the type of x where only its dtype code tells.
struct Coded {};

template <class T>
constexpr int kPackSize = 16 / int(sizeof(T));

template <int kSize>
struct Floats {
  float v[kSize];
};

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(Half v) { return __half2float(v); }
__device__ __forceinline__ float widen(BFloat16 v) { return __bfloat162float(v); }

// Two at a time, as the processor rounds them.
__device__ __forceinline__ void narrow(float a, float b, float* to) { to[0] = a, to[1] = b; }
__device__ __forceinline__ void narrow(float a, float b, Half* to) {
  const __half2 both = __floats2half2_rn(a, b);
  to[0] = __low2half(both), to[1] = __high2half(both);
}
__device__ __forceinline__ void narrow(float a, float b, BFloat16* to) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
  to[0] = __low2bfloat16(both), to[1] = __high2bfloat16(both);
}
template <class T>
__device__ __forceinline__ T narrow(float v) {
  T both[2];
  narrow(v, v, both);
  return both[0];
}

// f(T{}) for the type that dtype names: one branch, the same for the whole grid.
template <class F>
__device__ __forceinline__ void with_type(DType dtype, const F& f) {
  if (dtype == DType::kFloat32)
    f(float{});
  else if (dtype == DType::kFloat16)
    f(Half{});
  else
    f(BFloat16{});
}

__device__ __forceinline__ float round_to(DType dtype, float v) {
  if (dtype == DType::kFloat16) return widen(narrow<Half>(v));
  if (dtype == DType::kBFloat16) return widen(narrow<BFloat16>(v));
  return v;
}

// A float16 infinity counts as the largest float16; NaN stays.
__device__ __forceinline__ float clamp_half(float v) {
  return v > 65504.f ? 65504.f : v < -65504.f ? -65504.f : v;
}

// Where a row of some tensor begins, and how it may be reached.
struct RowAt {
  char* data;
  DType dtype;
  bool wide;  // whole packs at a time
};

// All of T, in whole packs: n is a multiple of the pack, and everything is aligned to 16 bytes.
template <class T>
struct Uniform {
  static constexpr int kSize = kPackSize<T>;
  static constexpr bool kWhole = true;
  struct Pack {
    uint4 bits;
  };

  template <class Index>
  static __device__ __forceinline__ Pack load(const RowAt& row, Index column, Index end) {
    Pack pack{};
    if (column < end)
      pack.bits = load_once(reinterpret_cast<const uint4*>(row.data + column * int64_t{sizeof(T)}));
    return pack;
  }
  template <class Index>
  static __device__ __forceinline__ Pack load_x(const RowAt& row, Index column, Index end) {
    return load(row, column, end);
  }
  static __device__ __forceinline__ Floats<kSize> floats(const Pack& pack) {
    T item[kSize];
    memcpy(static_cast<void*>(item), &pack.bits, 16);
    Floats<kSize> f;
#pragma unroll
    for (int i = 0; i < kSize; ++i) f.v[i] = widen(item[i]);
    return f;
  }
  static __device__ __forceinline__ Pack pack(const Floats<kSize>& f) {
    T item[kSize];
#pragma unroll
    for (int i = 0; i < kSize; i += 2) narrow(f.v[i], f.v[i + 1], item + i);
    Pack pack;
    memcpy(&pack.bits, item, 16);
    return pack;
  }
  // Without this the compiler widens once, and holds twice the registers through the reductions.
  static __device__ __forceinline__ void stay_packed(Pack& pack) { keep(pack.bits); }
  template <class Index>
  static __device__ __forceinline__ void store(const RowAt& row, Index column, Index end,
                                               const Floats<kSize>& f) {
    if (column >= end) return;
    cuda::store(reinterpret_cast<uint4*>(row.data + column * int64_t{sizeof(T)}), pack(f).bits);
  }
  static __device__ __forceinline__ float rounded(DType, float v) { return widen(narrow<T>(v)); }
};

// Each tensor of its own dtype, in packs of one number of columns; whole packs where its memory
// allows, and element by element at a row's end or where it does not.
template <class T, int kColumns = kPackSize<T>>
struct Any {
  static constexpr int kSize = kColumns;
  static constexpr bool kWhole = false;
  using Pack = Floats<kSize>;
  // A pack of S goes through memory in units of 16 bytes, or in one of 8.
  template <class S>
  using Unit = std::conditional_t<kSize * sizeof(S) == 8, uint2, uint4>;
  template <class S>
  static constexpr int kUnits = kSize * int(sizeof(S)) / int(sizeof(Unit<S>));

  template <class S, class Index>
  static __device__ __forceinline__ Pack load_as(const RowAt& row, Index column, Index end) {
    Pack pack{};
    const S* from = reinterpret_cast<const S*>(row.data) + column;
    if (row.wide && column + kSize <= end) {
      alignas(16) S item[kSize];
#pragma unroll
      for (int i = 0; i < kUnits<S>; ++i) {
        const Unit<S> bits = reinterpret_cast<const Unit<S>*>(from)[i];
        memcpy(reinterpret_cast<char*>(item) + i * sizeof bits, &bits, sizeof bits);
      }
#pragma unroll
      for (int i = 0; i < kSize; ++i) pack.v[i] = widen(item[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        if (column + i < end) pack.v[i] = widen(from[i]);
    }
    return pack;
  }
  template <class Index>
  static __device__ __forceinline__ Pack load(const RowAt& row, Index column, Index end) {
    Pack pack;
    with_type(row.dtype, [&](auto zero) { pack = load_as<decltype(zero)>(row, column, end); });
    return pack;
  }
  template <class Index>
  static __device__ __forceinline__ Pack load_x(const RowAt& row, Index column, Index end) {
    if constexpr (std::is_same_v<T, Coded>)
      return load(row, column, end);
    else
      return load_as<T>(row, column, end);
  }
  static __device__ __forceinline__ void stay_packed(Pack&) {}
  static __device__ __forceinline__ const Floats<kSize>& floats(const Pack& pack) { return pack; }
  static __device__ __forceinline__ const Pack& pack(const Floats<kSize>& f) { return f; }
  template <class Index>
  static __device__ __forceinline__ void store(const RowAt& row, Index column, Index end,
                                               const Floats<kSize>& f) {
    if (column >= end) return;
    const bool whole = row.wide && column + kSize <= end;
    with_type(row.dtype, [&](auto zero) {
      using S = decltype(zero);
      S* to = reinterpret_cast<S*>(row.data) + column;
      alignas(16) S item[kSize];
#pragma unroll
      for (int i = 0; i < kSize; i += 2) narrow(f.v[i], f.v[i + 1], item + i);
      if (whole) {
#pragma unroll
        for (int i = 0; i < kUnits<S>; ++i) {
          Unit<S> bits;
          memcpy(&bits, reinterpret_cast<const char*>(item) + i * sizeof bits, sizeof bits);
          reinterpret_cast<Unit<S>*>(to)[i] = bits;
        }
      } else {
#pragma unroll
        for (int i = 0; i < kSize; ++i)
          if (column + i < end) to[i] = item[i];
      }
    });
  }
  static __device__ __forceinline__ float rounded(DType dtype, float v) {
    return round_to(dtype, v);
  }
};

}  // namespace normkit::cuda
