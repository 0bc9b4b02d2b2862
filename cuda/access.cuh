// How rows that stay in registers are reached: in whole packs, 16 bytes of x at a time.
#pragma once
#include "pack.cuh"

namespace normkit::cuda {

// x is of T.  So is everything else; or, where dtypes are mixed, weight, bias, residual and the
// outputs may also be float32 beside a T of 16 bits, and of any dtype beside float32.
template <class T, bool kMixedDtypes>
struct Wide {
  static constexpr int kSize = kPackSize<T>;
  static constexpr bool kMixed = kMixedDtypes;
  static constexpr DType kDTypeOfX = kDType<T>;
  using Values = Floats<kSize>;
  static constexpr int kOperandRegisters = !kMixed ? 4 : kSize == 8 ? 8 : 6;

  struct X {
    uint4 bits;
  };
  // Of another tensor.  Only what its dtype needs is loaded.
  struct Operand {
    uint4 bits;  // the whole pack, or the first half of it
    uint4 rest;  // the second half of float32 beside 16 bits
    uint2 half;  // a pack of 16 bits beside float32
  };

  static __device__ __forceinline__ bool is_float32(DType dtype) {
    return kMixed ? dtype == DType::kFloat32 : kDType<T> == DType::kFloat32;
  }
  static __device__ __forceinline__ uint32_t bytes(uint32_t columns, DType dtype) {
    return columns << (is_float32(dtype) ? 2 : 1);
  }
  static __device__ __forceinline__ X load_x(const char* from, bool wanted) {
    return {load_if(from, wanted)};
  }
  static __device__ __forceinline__ Operand load(const char* from, DType dtype, bool wanted) {
    Operand operand;
    if constexpr (!kMixed) {
      operand.bits = load_if(from, wanted);
    } else if constexpr (kSize == 8) {
      operand.bits = load_if(from, wanted);
      operand.rest = load_if(from + 16, wanted && is_float32(dtype));
    } else {
      operand.bits = load_if(from, wanted && is_float32(dtype));
      operand.half = load_half_if(from, wanted && !is_float32(dtype));
    }
    return operand;
  }

  static __device__ __forceinline__ Values floats(const X& x) { return unpacked<T>(x.bits); }
  static __device__ __forceinline__ const Values& floats(const Values& values) { return values; }
  static __device__ __forceinline__ Values floats(const Operand& operand, DType dtype) {
    if constexpr (!kMixed) {
      return unpacked<T>(operand.bits);
    } else {
      Values values = narrow_floats(operand, dtype);
      Values wide;
      memcpy(wide.v, &operand.bits, 16);
      if constexpr (kSize == 8) memcpy(wide.v + 4, &operand.rest, 16);
#pragma unroll
      for (int i = 0; i < kSize; ++i) values.v[i] = is_float32(dtype) ? wide.v[i] : values.v[i];
      return values;
    }
  }
  // One value in the place of an operand that is absent, and then counts as float32 where dtypes
  // are mixed.
  static __device__ __forceinline__ Operand filled(float value) {
    const Values values = normkit::cuda::filled<kSize>(value);
    Operand operand{};
    if constexpr (kMixed) {
      memcpy(&operand.bits, values.v, sizeof operand.bits);
      operand.rest = operand.bits;
    } else {
      operand.bits = packed<T>(values);
    }
    return operand;
  }
  static __device__ __forceinline__ X packed_x(const Values& values) { return {packed<T>(values)}; }

  static __device__ __forceinline__ void store_packed(char* to, bool wanted, const X& x) {
    store_if(to, wanted, x.bits);
  }
  static __device__ __forceinline__ void store(char* to, DType dtype, bool wanted,
                                               const Values& values) {
    if constexpr (!kMixed) {
      store_if(to, wanted, packed<T>(values));
    } else if (is_float32(dtype)) {
#pragma unroll
      for (int i = 0; i < kSize; i += 4) {
        uint4 bits;
        memcpy(&bits, values.v + i, sizeof bits);
        store_if(to + 4 * i, wanted, bits);
      }
    } else if constexpr (kSize == 8) {
      store_if(to, wanted, packed<T>(values));
    } else if (dtype == DType::kFloat16) {
      store_narrow<Half>(to, wanted, values);
    } else {
      store_narrow<BFloat16>(to, wanted, values);
    }
  }

  // As a tensor of that dtype would hold them.
  static __device__ __forceinline__ Values rounded(const Values& values, DType dtype) {
    if constexpr (!kMixed) {
      return unpacked<T>(packed<T>(values));
    } else if constexpr (kSize == 8) {
      return is_float32(dtype) ? values : unpacked<T>(packed<T>(values));
    } else {
      Values v = values;
#pragma unroll
      for (int i = 0; i < kSize; ++i) v.v[i] = round_to(dtype, v.v[i]);
      return v;
    }
  }
  static __device__ __forceinline__ float rounded(float value, DType dtype) {
    return kMixed ? round_to(dtype, value) : widen(narrow<T>(value));
  }

 private:
  // The values where the operand has 16 bits.
  static __device__ __forceinline__ Values narrow_floats(const Operand& operand, DType dtype) {
    if constexpr (kSize == 8) {
      return unpacked<T>(operand.bits);
    } else {
      const uint4 twice{operand.half.x, operand.half.y, operand.half.x, operand.half.y};
      const Floats<8> as_half = unpacked<Half>(twice), as_bfloat16 = unpacked<BFloat16>(twice);
      Values values;
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        values.v[i] = dtype == DType::kFloat16 ? as_half.v[i] : as_bfloat16.v[i];
      return values;
    }
  }
  template <class S>
  static __device__ __forceinline__ void store_narrow(char* to, bool wanted, const Values& values) {
    S item[kSize];
#pragma unroll
    for (int i = 0; i < kSize; i += 2) narrow(values.v[i], values.v[i + 1], item + i);
    uint2 bits;
    memcpy(&bits, item, sizeof bits);
    store_if(to, wanted, bits);
  }
};

}  // namespace normkit::cuda
