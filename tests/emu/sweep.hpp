// What the sweeps share: tensors of rows in memory of their own, and how their values are judged.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "../../cuda/pack.cuh"

extern "C" void normkit_emulate_device(int processors, int clusters);

namespace sweep {

using namespace normkit;
using cuda::BFloat16;
using cuda::Half;

inline float read(DType dtype, const char* at) {
  if (dtype == DType::kFloat32) return *reinterpret_cast<const float*>(at);
  if (dtype == DType::kFloat16) return __half2float(*reinterpret_cast<const Half*>(at));
  return __bfloat162float(*reinterpret_cast<const BFloat16*>(at));
}

inline void write(DType dtype, char* at, float v) {
  if (dtype == DType::kFloat32)
    *reinterpret_cast<float*>(at) = v;
  else if (dtype == DType::kFloat16)
    *reinterpret_cast<Half*>(at) = __float2half_rn(v);
  else
    *reinterpret_cast<BFloat16*>(at) = __float2bfloat16_rn(v);
}

inline double rounded(DType dtype, double v) {
  char memory[4] = {};
  write(dtype, memory, static_cast<float>(v));
  return read(dtype, memory);
}

// Half of the distance between neighbours round v.
inline double half_ulp(DType dtype, double v) {
  const int bits = dtype == DType::kFloat32 ? 24 : dtype == DType::kFloat16 ? 11 : 8;
  const int lowest = dtype == DType::kFloat16 ? -14 : -126;
  if (!std::isfinite(v)) return 0;
  const int exponent = std::max(v == 0 ? lowest : std::ilogb(v), lowest);
  return std::ldexp(0.5, exponent - bits + 1);
}

// Rows in memory of exactly their size, so that a step outside meets the sanitizer.
struct Rows {
  std::vector<char> memory;
  DType dtype = DType::kFloat32;
  int64_t row_stride = 0;  // bytes

  Rows(DType type, int64_t rows, int64_t n, int64_t pad, int64_t shift) : dtype(type) {
    const int64_t size = item_size(type);
    row_stride = (n + pad) * size;
    bytes_before = shift * size;
    // The last row ends where the memory ends.
    memory.resize(bytes_before + std::max<int64_t>(rows - 1, 0) * row_stride + n * size);
  }
  int64_t bytes_before;
  char* data() { return memory.data() + bytes_before; }
  char* at(int64_t row, int64_t column) {
    return data() + row * row_stride + column * item_size(dtype);
  }
};

inline void fill(Rows& t, int64_t rows, int64_t n, std::mt19937_64& random, float around) {
  std::normal_distribution<float> normal(around, 1.f);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < n; ++i) write(t.dtype, t.at(r, i), normal(random));
}

// Float32 values of which a kernel may write `count`, between two that it may not.
struct Guarded {
  std::vector<float> memory;
  explicit Guarded(int64_t count) : memory(count + 2, kUntouched) {}
  float* data() { return memory.data() + 1; }
  bool is_intact() const { return memory.front() == kUntouched && memory.back() == kUntouched; }
  static constexpr float kUntouched = -12345.678f;
};

constexpr char kUntouchedByte = 0x5a;

// Every byte that is part of no row.
inline bool is_untouched_outside(Rows& t, int64_t rows, int64_t n) {
  std::vector<bool> written(t.memory.size());
  for (int64_t r = 0; r < rows; ++r)
    std::fill_n(written.begin() + (t.at(r, 0) - t.memory.data()), n * item_size(t.dtype), true);
  for (size_t i = 0; i < written.size(); ++i)
    if (!written[i] && t.memory[i] != kUntouchedByte) return false;
  return true;
}

inline int failures = 0;

inline void report(const std::string& name, const char* what, int64_t row, int64_t column,
                   double got, double want) {
  std::fprintf(stderr, "%s\n  %s at row %lld column %lld: %.9g, expected %.9g\n", name.c_str(),
               what, static_cast<long long>(row), static_cast<long long>(column), got, want);
  if (++failures < 5) return;
  std::fprintf(stderr, "more are not looked for\n");
  std::exit(1);
}

// Cases of the share, or all if that is 0 of 1; how many there would be of these.
uint64_t sweep_backward(uint64_t seed, uint64_t share, uint64_t of);
uint64_t sweep_parts(uint64_t seed, uint64_t share, uint64_t of);
uint64_t sweep_modulated(uint64_t seed, uint64_t share, uint64_t of);
uint64_t sweep_gated(uint64_t seed, uint64_t share, uint64_t of);
uint64_t sweep_post_norm(uint64_t seed, uint64_t share, uint64_t of);
uint64_t sweep_rotation(uint64_t seed, uint64_t share, uint64_t of);
uint64_t sweep_strided(uint64_t seed, uint64_t share, uint64_t of);

}  // namespace sweep
