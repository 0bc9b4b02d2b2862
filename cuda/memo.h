// The launches that a thread has made last, so that another call of the same kind only has to say
// where its tensors are.  A model has a handful of kinds of norms, and calls them in turns.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../cpp/norm_args.h"
#include "../cpp/plan.h"
#include "rows.cuh"

namespace normkit::cuda {

// All that the launch of a call depends on, but for where exactly its tensors are: of an address it
// has whether there is one, and how it is aligned.
struct LaunchKey {
  uint64_t addresses[2];  // a byte each
  uint64_t types;         // likewise, with all else that fits into one
  uint64_t device;
  int64_t rows, n;
  uint64_t options[2];
  int64_t size[kLaunchDims], stride[4][kLaunchDims];
  int64_t map[2][3];
  int64_t parts, plane;

  bool operator==(const LaunchKey& other) const {
    static_assert(std::has_unique_object_representations_v<LaunchKey>, "there are no gaps");
    return addresses[0] == other.addresses[0] && std::memcmp(this, &other, sizeof(other)) == 0;
  }
};

template <class... Values>
uint64_t bytes_of(Values... values) {
  static_assert(sizeof...(Values) <= 8);
  uint64_t word = 0;
  int shift = 0;
  ((word |= uint64_t{static_cast<uint8_t>(values)} << shift, shift += 8), ...);
  return word;
}

inline uint8_t seen_of(const void* address) {
  constexpr uintptr_t kAlignment = 128;  // more than any access is wide
  return static_cast<uint8_t>(reinterpret_cast<uintptr_t>(address) % kAlignment |
                              (address ? kAlignment : 0));
}

// Of a call that is one launch of a kernel that keeps its rows in registers, or could.  Structs are
// taken apart by the number of their fields: one that is added does not compile until it has found
// its place here.
inline LaunchKey key_of(const RowNorm& norm, const Device& device, int index) {
  const auto& [statistic, first_row, rows, n, outer_dims, outer_size, x, residual, out,
               residual_out, weight, bias, modulation, gating, before, rotation, cache, options,
               rstd, mean, split] = norm;
  const auto& [step, statistics, gathered, parts, plane] = split;
  const auto& [processors, clusters, programmatic] = device;
  LaunchKey key{};
  key.addresses[0] = bytes_of(seen_of(x.data), seen_of(residual.data), seen_of(out.data),
                              seen_of(residual_out.data), seen_of(weight.data), seen_of(bias.data));
  key.addresses[1] = bytes_of(seen_of(rstd), seen_of(mean), seen_of(statistics), seen_of(gathered),
                              statistic, step, outer_dims);
  key.types = bytes_of(x.dtype, residual.dtype, out.dtype, residual_out.dtype, weight.dtype,
                       bias.dtype, clusters, programmatic);
  key.device = uint64_t(processors) << 32 | uint32_t(index);
  key.rows = rows;
  key.n = n;
  const auto& [eps, weight_offset, round_before_weight, round_sum, clamp_inf, round_rstd, of_sum,
               eps_outside, round_weight, as_is] = options;
  const float numbers[] = {eps, weight_offset};
  std::memcpy(&key.options[0], numbers, sizeof(numbers));
  key.options[1] = bytes_of(round_before_weight, round_sum, clamp_inf, round_rstd, of_sum,
                            eps_outside, round_weight, as_is);
  const RowsOf* const tensors[] = {&x, &residual, &out, &residual_out};
  for (int d = 0; d < outer_dims; ++d) {
    key.size[d] = outer_size[d];
    for (int t = 0; t < 4; ++t) {
      const auto& [data, dtype, stride, column_stride] = *tensors[t];
      key.stride[t][d] = data ? stride[d] : 0;
    }
  }
  const Affine* const maps[] = {&weight, &bias};
  for (int m = 0; m < 2; ++m) {
    const auto& [data, dtype, stride, inner, groups] = *maps[m];
    key.map[m][0] = stride;
    key.map[m][1] = inner;
    key.map[m][2] = groups;
  }
  key.parts = parts;
  key.plane = plane;
  return key;
}

// The last values, by their keys.
template <class Value>
class Memo {
 public:
  // Null where there is none.  Looks at the last one found first, then at those that were added
  // behind it, since calls come in the same turns again and again.
  Value* find(const LaunchKey& key) {
    for (int i = 0; i < kEntries; ++i) {
      const int at = (last_ + i) % kEntries;
      if (!(keys_[at] == key)) continue;
      last_ = at;
      return &values_[at];
    }
    return nullptr;
  }

  Value& add(const LaunchKey& key, const Value& value) {
    last_ = next_;
    next_ = (next_ + 1) % kEntries;
    keys_[last_] = key;
    return values_[last_] = value;
  }

 private:
  static constexpr int kEntries = 8;
  LaunchKey keys_[kEntries] = {};  // of no call: none is without rows
  Value values_[kEntries] = {};
  int last_ = 0, next_ = 0;
};

}  // namespace normkit::cuda
