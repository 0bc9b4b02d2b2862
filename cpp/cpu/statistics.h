// From sums to the statistics of a row; and of a row that is split, what its parts say to each
// other.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels.h"

namespace normkit::cpu {

// To the nearest even number of a dtype; v is not negative, or NaN.
inline float rounded(float v, DType dtype) {
  if (dtype == DType::kFloat32 || std::isnan(v)) return v;
  if (dtype == DType::kFloat16) {
    if (v >= 65520.f) return std::numeric_limits<float>::infinity();
    if (v < 0x1p-14f) return v + 0x1p-1f - 0x1p-1f;  // subnormal: multiples of 2^-24
  }
  const int dropped = dtype == DType::kFloat16 ? 13 : 16;
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  bits += (1u << (dropped - 1)) - 1 + (bits >> dropped & 1);
  bits = bits >> dropped << dropped;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

// b.sum has the sums of squares of whole rows.
inline void take_rstd(Block& b, const RowNorm& norm, RstdStage rstd) {
  const double n = static_cast<double>(norm.n) * static_cast<double>(norm.split.parts);
  const double eps = norm.options.eps;
  const double divisor = norm.options.of_sum ? 1.0 : n;
  norm.options.eps_outside ? rstd(b, 1.0 / divisor, 0.0, eps * eps)
                           : rstd(b, 1.0 / divisor, eps, 0.0);
  if (norm.options.round_rstd)
    for (int r = 0; r < b.rows; ++r) b.rstd[r] = rounded(b.rstd[r], normalised_dtype(norm));
}

// A statistic of each row of a block, as one part has left it.
inline const float* gathered_plane(const Split& split, int planes, int64_t part, int plane,
                                   int64_t row) {
  return split.gathered + (part * planes + plane) * split.plane + row;
}

// Planes of a block whose first row is `row`.
template <class Norm>
inline void save_planes(const Norm& norm, int64_t row, int rows, const float* first,
                        const float* second) {
  float* plane = norm.split.statistics + row;
  std::copy_n(first, rows, plane);
  if (norm.statistic == Statistic::kLayer) std::copy_n(second, rows, plane + norm.split.plane);
}

inline void save_statistics(const Block& b, const RowNorm& norm, int64_t row) {
  save_planes(norm, row, b.rows, b.sum, b.mean);
}

inline void save_statistics(const BackwardBlock& b, const RowNormBackward& norm, int64_t row) {
  save_planes(norm, row, b.rows, b.gx_mean, b.g_mean);
}

// Of whole rows the sum of squares, and the mean, added in the order of the parts.  In double, so
// that many parts lose no more than few.
inline void combine(Block& b, const RowNorm& norm, int64_t row) {
  const Split& split = norm.split;
  const bool layer = norm.statistic == Statistic::kLayer;
  const int planes = planes_of(norm.statistic);
  const double n = static_cast<double>(norm.n), parts = static_cast<double>(split.parts);
  for (int r = 0; r < b.rows; ++r) {
    const auto at = [&](int64_t part, int plane) {
      return static_cast<double>(*gathered_plane(split, planes, part, plane, row + r));
    };
    double mean = 0, squares = 0;
    for (int64_t part = 0; layer && part < split.parts; ++part) mean += at(part, 1);
    mean /= parts;
    for (int64_t part = 0; part < split.parts; ++part) {
      squares += at(part, 0);
      if (!layer) continue;
      const double apart = at(part, 1) - mean;
      squares += n * apart * apart;
    }
    b.mean[r] = static_cast<float>(mean);
    b.sum[r] = static_cast<float>(squares);  // infinite where that of a whole row is
  }
}

inline void combine(BackwardBlock& b, const RowNormBackward& norm, int64_t row) {
  const Split& split = norm.split;
  const int planes = planes_of(norm.statistic);
  const auto mean_of = [&](int plane, int r) {
    double sum = 0;
    for (int64_t part = 0; part < split.parts; ++part)
      sum += static_cast<double>(*gathered_plane(split, planes, part, plane, row + r));
    return static_cast<float>(sum / static_cast<double>(split.parts));
  };
  for (int r = 0; r < b.rows; ++r) {
    b.gx_mean[r] = mean_of(0, r);
    b.g_mean[r] = norm.statistic == Statistic::kLayer ? mean_of(1, r) : 0.f;
  }
}

}  // namespace normkit::cpu
