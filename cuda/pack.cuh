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

template <class T>
constexpr int kPackSize = 16 / int(sizeof(T));

template <int kSize>
struct Floats {
  float v[kSize];
};

template <int kSize>
__device__ __forceinline__ Floats<kSize> filled(float v) {
  Floats<kSize> f;
#pragma unroll
  for (int i = 0; i < kSize; ++i) f.v[i] = v;
  return f;
}

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

// The values of 16 bytes, and back.
template <class T>
__device__ __forceinline__ Floats<kPackSize<T>> unpacked(const uint4& bits) {
  Floats<kPackSize<T>> f;
  if constexpr (std::is_same_v<T, BFloat16>) {
    // One instruction a value; of __bfloat162float the compiler makes two for every second one.
    const uint32_t pair[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      f.v[2 * i] = float_of_bits(pair[i] << 16);
      f.v[2 * i + 1] = float_of_bits(pair[i] & 0xffff0000u);
    }
  } else {
    T item[kPackSize<T>];
    memcpy(static_cast<void*>(item), &bits, sizeof bits);
#pragma unroll
    for (int i = 0; i < kPackSize<T>; ++i) f.v[i] = widen(item[i]);
  }
  return f;
}
template <class T>
__device__ __forceinline__ uint4 packed(const Floats<kPackSize<T>>& f) {
  T item[kPackSize<T>];
#pragma unroll
  for (int i = 0; i < kPackSize<T>; i += 2) narrow(f.v[i], f.v[i + 1], item + i);
  uint4 bits;
  memcpy(&bits, item, sizeof bits);
  return bits;
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
      pack.bits = *reinterpret_cast<const uint4*>(row.data + column * int64_t{sizeof(T)});
    return pack;
  }
  static __device__ __forceinline__ Floats<kSize> floats(const Pack& pack) {
    return unpacked<T>(pack.bits);
  }
  static __device__ __forceinline__ Pack pack(const Floats<kSize>& f) { return {packed<T>(f)}; }
  // Without this the compiler widens once, and holds twice the registers through the reductions.
  static __device__ __forceinline__ void stay_packed(Pack& pack) { keep(pack.bits); }
  template <class Index>
  static __device__ __forceinline__ void store(const RowAt& row, Index column, Index end,
                                               const Floats<kSize>& f) {
    if (column >= end) return;
    *reinterpret_cast<uint4*>(row.data + column * int64_t{sizeof(T)}) = packed<T>(f);
  }
  static __device__ __forceinline__ float rounded(DType, float v) { return widen(narrow<T>(v)); }
};

// Columns of the two runs that make a pack.
struct OfRuns {
  int64_t run[2];
};

__device__ __forceinline__ int64_t column_of(const OfRuns& columns, int run) {
  return columns.run[run];
}
template <class Index>
__device__ __forceinline__ Index column_of(Index column, int) {
  return column;
}

// Each tensor of its own dtype, in packs of one number of columns; whole packs where its memory
// allows, and element by element at a row's end or where it does not.  A pack may be of two runs,
// which are in different places of the row: then column and end are OfRuns.
template <int kColumns, int kRuns = 1>
struct Any {
  static constexpr int kSize = kColumns;
  static constexpr int kRun = kSize / kRuns;
  static constexpr bool kWhole = false;
  using Pack = Floats<kSize>;
  using Narrow = std::conditional_t<kRun == 4, uint2, uint4>;  // a run of 16 bits

  template <class Index>
  static __device__ __forceinline__ Pack load(const RowAt& row, Index column, Index end) {
    Pack pack{};
    if (row.dtype == DType::kFloat32)
      load_items<uint4>(row, column, end, pack.v);
    else
      pack = load_narrow(row, column, end);
    return pack;
  }
  static __device__ __forceinline__ const Floats<kSize>& floats(const Pack& pack) { return pack; }
  static __device__ __forceinline__ const Pack& pack(const Floats<kSize>& f) { return f; }
  template <class Index>
  static __device__ __forceinline__ void store(const RowAt& row, Index column, Index end,
                                               const Floats<kSize>& f) {
    if (kRuns == 1 && column_of(column, 0) >= column_of(end, 0)) return;
    if (row.dtype == DType::kFloat32) return store_items<uint4>(row, column, end, f.v);
    uint16_t item[kSize];
    if (row.dtype == DType::kFloat16)
      narrow_items<Half>(f, item);
    else
      narrow_items<BFloat16>(f, item);
    store_items<Narrow>(row, column, end, item);
  }
  static __device__ __forceinline__ float rounded(DType dtype, float v) {
    return round_to(dtype, v);
  }

 private:
  template <class Unit, class Index, class Item>
  static __device__ __forceinline__ void load_run(const RowAt& row, Index column, Index end,
                                                  Item* item) {
    const Item* from = reinterpret_cast<const Item*>(row.data) + column;
    if (row.wide && column + kRun <= end) {
#pragma unroll
      for (int i = 0; i < kRun * int(sizeof(Item)) / int(sizeof(Unit)); ++i) {
        const Unit bits = reinterpret_cast<const Unit*>(from)[i];
        memcpy(reinterpret_cast<char*>(item) + i * sizeof bits, &bits, sizeof bits);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRun; ++i)
        if (column + i < end) item[i] = from[i];
    }
  }
  template <class Unit, class Index, class Item>
  static __device__ __forceinline__ void store_run(const RowAt& row, Index column, Index end,
                                                   const Item* item) {
    Item* to = reinterpret_cast<Item*>(row.data) + column;
    if (row.wide && column + kRun <= end) {
#pragma unroll
      for (int i = 0; i < kRun * int(sizeof(Item)) / int(sizeof(Unit)); ++i) {
        Unit bits;
        memcpy(&bits, reinterpret_cast<const char*>(item) + i * sizeof bits, sizeof bits);
        reinterpret_cast<Unit*>(to)[i] = bits;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRun; ++i)
        if (column + i < end) to[i] = item[i];
    }
  }
  template <class Unit, class Index, class Item>
  static __device__ __forceinline__ void load_items(const RowAt& row, Index column, Index end,
                                                    Item (&item)[kSize]) {
#pragma unroll
    for (int run = 0; run < kRuns; ++run)
      load_run<Unit>(row, column_of(column, run), column_of(end, run), item + run * kRun);
  }
  template <class Unit, class Index, class Item>
  static __device__ __forceinline__ void store_items(const RowAt& row, Index column, Index end,
                                                     const Item (&item)[kSize]) {
#pragma unroll
    for (int run = 0; run < kRuns; ++run)
      store_run<Unit>(row, column_of(column, run), column_of(end, run), item + run * kRun);
  }
  template <class Index>
  static __device__ __forceinline__ Pack load_narrow(const RowAt& row, Index column, Index end) {
    uint16_t item[kSize] = {};
    load_items<Narrow>(row, column, end, item);
    Pack pack;
#pragma unroll
    for (int i = 0; i < kSize; ++i) pack.v[i] = float_of_bits(uint32_t{item[i]} << 16);
    branch_if(row.dtype == DType::kFloat16, [&] {
      Half half[kSize];
      memcpy(static_cast<void*>(half), item, sizeof item);
#pragma unroll
      for (int i = 0; i < kSize; ++i) pack.v[i] = widen(half[i]);
    });
    return pack;
  }
  template <class T>
  static __device__ __forceinline__ void narrow_items(const Floats<kSize>& f,
                                                      uint16_t (&item)[kSize]) {
    T narrowed[kSize];
#pragma unroll
    for (int i = 0; i < kSize; i += 2) narrow(f.v[i], f.v[i + 1], narrowed + i);
    memcpy(item, narrowed, sizeof item);
  }
};

}  // namespace normkit::cuda
