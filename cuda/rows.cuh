// Where the rows of a launch are.
#pragma once
#include "pack.cuh"

namespace normkit::cuda {

// Division by a number that is known at launch; of numbers below 2^31.
struct Divisor {
  uint32_t value, factor, shift;
  __device__ __forceinline__ uint32_t divide(uint32_t a) const {
    return value == 1 ? a : static_cast<uint32_t>((uint64_t{a} * factor) >> 32) >> shift;
  }
};

// Dimensions of rows that one launch walks; calls with more are several launches.
constexpr int kLaunchDims = 3;

struct LaunchRows {
  char* data;
  int64_t stride[kLaunchDims];  // bytes; the last runs fastest
  DType dtype;
  bool wide;
};

struct LaunchAffine {
  const char* data;
  int64_t row_stride;  // bytes
  DType dtype;
  bool wide;
};

// The rows of a launch.
struct Grid {
  Divisor size[2];  // of the second and the last dimension
  Divisor heads;    // row (first + row) / inner % heads of weight and bias is that of a row
  Divisor inner;
  uint32_t first;
  uint32_t rows;
  int dims;
};

// A row's place in every dimension; `row` is below the number of rows.
struct Place {
  uint32_t at[kLaunchDims];
  uint32_t head;

  Place() = default;
  __device__ __forceinline__ Place(const Grid& a, uint32_t row) : at{0, 0, row} {
    head = 0;
    if (a.heads.value != 1) {
      const uint32_t at_head = a.inner.divide(a.first + row);
      head = at_head - a.heads.divide(at_head) * a.heads.value;
    }
    if (a.dims == 1) return;
    const uint32_t outer = a.size[1].divide(row);
    at[2] = row - outer * a.size[1].value;
    at[0] = a.size[0].divide(outer);
    at[1] = outer - at[0] * a.size[0].value;
  }
  __device__ __forceinline__ RowAt of(const LaunchRows& rows, int dims) const {
    int64_t offset = at[2] * rows.stride[2];
    if (dims > 1) offset += at[1] * rows.stride[1] + at[0] * rows.stride[0];
    return {rows.data + offset, rows.dtype, rows.wide};
  }
  __device__ __forceinline__ RowAt of(const LaunchAffine& affine) const {
    return {const_cast<char*>(affine.data) + head * affine.row_stride, affine.dtype, affine.wide};
  }
};

}  // namespace normkit::cuda
