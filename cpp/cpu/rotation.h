// What stands behind a norm of heads: the rotation of its columns, and the cache that gets them
// too.
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>

#include "affine.h"
#include "cursor.h"

namespace normkit::cpu {

inline int64_t index_at(const char* at, bool wide) {
  if (!wide) {
    int32_t index;
    std::memcpy(&index, at, sizeof index);
    return index;
  }
  int64_t index;
  std::memcpy(&index, at, sizeof index);
  return index;
}

// Walks the rows of a call, and says which cos and sin each of them has.
class RotationCursor {
 public:
  RotationCursor(const RowNorm& norm, int64_t begin)
      : rotation_(norm.rotation),
        cursor_({&norm.rotation.cos, &norm.rotation.sin, &norm.rotation.position.at},
                norm.outer_dims, norm.outer_size, begin) {}

  // Null where a row's position is outside of the tables.
  void fill(Block& b) {
    for (int r = 0; r < b.rows; ++r, cursor_.next()) {
      b.cos[r] = cursor_.at(0);
      b.sin[r] = cursor_.at(1);
      if (!rotation_.position) continue;
      const int64_t position = index_at(cursor_.at(2), rotation_.position.wide);
      const bool inside = position >= 0 && position < rotation_.positions;
      b.cos[r] = inside ? b.cos[r] + position * rotation_.cos_stride : nullptr;
      b.sin[r] = inside ? b.sin[r] + position * rotation_.sin_stride : nullptr;
    }
  }

 private:
  const Rotation& rotation_;
  Cursor<3> cursor_;
};

// Rotates the rows of blocks, one after the other.
class Rotator {
 public:
  Rotator(const RowNorm& norm, RotateRow stage, const Kernels& kernels, float* buffer)
      : rotation_(norm.rotation), stage_(stage), kernels_(kernels), n_(norm.n) {
    const int64_t width = padded(rotation_.width);
    cos_ = buffer;
    sin_ = cos_ + width;
    half_ = sin_ + width;
    partner_ = half_ + width;
  }
  static int64_t floats(const RowNorm& norm) { return 4 * padded(norm.rotation.width); }

  void rotate(const void* x, const char* cos, const char* sin, void* out) {
    // Heads of one token follow each other.
    if (!has_factors_ || cos != of_cos_ || sin != of_sin_) take_factors(cos, sin);
    stage_({x, n_, rotation_.width, rotation_.interleaved, cos_, sin_, partner_, out});
  }

 private:
  void take_factors(const char* cos, const char* sin) {
    spread(rotation_.cos, cos, 1.f, cos_);
    spread(rotation_.sin, sin, -1.f, sin_);
    of_cos_ = cos;
    of_sin_ = sin;
    has_factors_ = true;
  }

  // What multiplies each column: that of the first of a pair times `sign`, and that of the second.
  void spread(const RowsOf& rows, const char* row, float sign, float* factors) {
    const int64_t half = rotation_.width / 2;
    if (row)
      kernels_.affine[int(rows.dtype)][int(Layout::kNatural)](row, half, -0.f, false, half_);
    else
      std::fill_n(half_, half, std::numeric_limits<float>::quiet_NaN());
    const int64_t step = rotation_.interleaved ? 2 : 1, second = rotation_.interleaved ? 1 : half;
    for (int64_t i = 0; i < half; ++i) {
      factors[step * i] = sign * half_[i];
      factors[step * i + second] = half_[i];
    }
  }

  const Rotation& rotation_;
  RotateRow stage_;
  const Kernels& kernels_;
  int64_t n_;
  float *cos_, *sin_, *half_, *partner_;
  const char *of_cos_ = nullptr, *of_sin_ = nullptr;
  bool has_factors_ = false;
};

// Walks the rows of a call, and copies what has been stored, or x where nothing is, to the slots of
// a cache.
class CacheCursor {
 public:
  CacheCursor(const RowNorm& norm, int64_t begin)
      : cache_(norm.cache),
        bytes_(norm.n * item_size(norm.cache.rows.dtype)),
        cursor_({&norm.cache.rows, &norm.cache.slot.at}, norm.outer_dims, norm.outer_size, begin) {}

  void store(const Block& b) {
    for (int r = 0; r < b.rows; ++r, cursor_.next()) {
      const int64_t slot = index_at(cursor_.at(1), cache_.slot.wide);
      if (slot < 0 || slot >= cache_.slots) continue;
      char* const row = cursor_.at(0) + slot / cache_.page_slots * cache_.page_stride +
                        slot % cache_.page_slots * cache_.slot_stride;
      std::memcpy(row, b.out[r] ? b.out[r] : b.x[r], bytes_);
    }
  }

 private:
  const Cache& cache_;
  int64_t bytes_;
  Cursor<2> cursor_;
};

}  // namespace normkit::cpu
