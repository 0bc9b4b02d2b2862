// What stands behind a norm of heads: the rotation of its columns, and the cache that gets them
// too.
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>

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
    swapped_ = sin_ + width;
  }
  static int64_t floats(const RowNorm& norm) { return 3 * padded(norm.rotation.width); }

  void rotate(const void* x, const char* cos, const char* sin, void* out) {
    // Heads of one token follow each other.
    if (!has_factors_ || cos != of_cos_ || sin != of_sin_) take_factors(cos, sin);
    stage_({x, n_, rotation_.width, rotation_.interleaved, cos_, sin_, swapped_, out});
  }

 private:
  void take_factors(const char* cos, const char* sin) {
    widen(rotation_.cos, cos, cos_);
    widen(rotation_.sin, sin, sin_);
    if (rotation_.interleaved) {
      repeat(cos_, 1.f);
      repeat(sin_, -1.f);
    }
    of_cos_ = cos;
    of_sin_ = sin;
    has_factors_ = true;
  }

  void widen(const RowsOf& rows, const char* row, float* out) const {
    const int64_t half = rotation_.width / 2;
    if (row)
      kernels_.affine[int(rows.dtype)][int(Layout::kNatural)](row, half, -0.f, false, out);
    else
      std::fill_n(out, half, std::numeric_limits<float>::quiet_NaN());
  }

  // That of a pair becomes that of both its columns, of the first one times `sign`.
  void repeat(float* factors, float sign) const {
    for (int64_t i = rotation_.width / 2 - 1; i >= 0; --i) {
      const float factor = factors[i];
      factors[2 * i] = sign * factor;
      factors[2 * i + 1] = factor;
    }
  }

  const Rotation& rotation_;
  RotateRow stage_;
  const Kernels& kernels_;
  int64_t n_;
  float *cos_, *sin_, *swapped_;
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
