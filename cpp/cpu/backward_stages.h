// The stages of a row norm's backward pass; included behind vec_*.h as stages.h is.
//
// A row of a 16-bit or float32 type is read twice, the second time from the caches: once for its
// two means, and once for grad_x and for what it adds to the gradients of weight and bias.  Rows
// of one weight are taken together there: it is loaded once for all, and those sums are added to
// memory once for four.
#pragma once
#include <iterator>

#include "activation.h"
#include "stages.h"

namespace normkit::cpu {
namespace {

template <class T, int kCount>
NORMKIT_INLINE Vecs<kCount> rounded_to(Vecs<kCount> c) {
  for (V& v : c.v) v = T::round(v);
  return c;
}

template <int kCount>
NORMKIT_INLINE Vecs<kCount> rounded_to(const Vecs<kCount>& c, DType dtype) {
  if (dtype == DType::kFloat16) return rounded_to<Float16>(c);
  if (dtype == DType::kBFloat16) return rounded_to<BFloat16>(c);
  return c;
}

struct TwoSums {
  Chunk g, gx;
};
NORMKIT_INLINE void add_to(TwoSums& a, const TwoSums& b) {
  add_to(a.g, b.g);
  add_to(a.gx, b.gx);
}

template <class T, bool kLayer>
struct Backward {
  using Item = typename T::Item;
  static constexpr bool kSplitLanes = backward_layout(T::kDType) == Layout::kSplit;

  // One row of a block, and the numbers that stay the same along it.
  struct Row {
    const Item* x;
    const Item* grad_y;
    const float* weight;
    V mean, scale;
    Row(const BackwardBlock& b, int r)
        : x(static_cast<const Item*>(b.x[r])),
          grad_y(static_cast<const Item*>(b.grad_y[r])),
          weight(b.weight[r]),
          mean(set1(b.mean[r])),
          scale(set1(b.scale[r])) {}
  };

  // Columns that are worked on together: a part of a chunk, so that they stay in registers beside
  // the sums for weight and bias; whole chunks in split order, and at the end of a row.
  static constexpr int kPart = kSplitLanes || kVecs < 8 ? kVecs : kHalf;
  template <bool kTail>
  using Columns = Vecs<kTail ? kVecs : kPart>;

  // At the end of a row there are count columns, and zeros behind.
  template <bool kTail>
  static NORMKIT_INLINE Columns<kTail> load(const Item* p, int64_t count) {
    if constexpr (kTail) {
      return load_tail<T, kSplitLanes>(p, count);
    } else if constexpr (kSplitLanes) {
      return load_chunk<T, kSplitLanes>(p);
    } else {
      Columns<kTail> c;
      for (int k = 0; k < kPart; ++k) c.v[k] = T::load(p + k * kWidth);
      return c;
    }
  }
  // Rows in split order are whole chunks, those in natural order may be the caller's own.
  template <bool kTail>
  static NORMKIT_INLINE Columns<kTail> load_weight(const float* p, int64_t count) {
    if constexpr (kTail && !kSplitLanes) {
      return load_tail<Float32>(p, count);
    } else {
      Columns<kTail> c;
      for (V& v : c.v) v = cpu::load(p), p += kWidth;
      return c;
    }
  }

  template <int kCount>
  static NORMKIT_INLINE Vecs<kCount> normalised(const Row& row, Vecs<kCount> x) {
    for (V& v : x.v) {
      if constexpr (kLayer) v = sub(v, row.mean);
      v = mul(v, row.scale);
    }
    return x;
  }

  // Adds the terms of some columns to the partial sums of these.
  template <bool kTail>
  static NORMKIT_INLINE void add_terms(V* g_sums, V* gx_sums, const Row& row, int64_t i,
                                       int64_t count) {
    const Columns<kTail> xhat = normalised(row, load<kTail>(row.x + i, count));
    const Columns<kTail> grad_y = load<kTail>(row.grad_y + i, count);
    const Columns<kTail> weight = load_weight<kTail>(row.weight + i, count);
    for (size_t k = 0; k < std::size(xhat.v); ++k) {
      const V g = mul(grad_y.v[k], weight.v[k]);
      if constexpr (kLayer) g_sums[k] = add(g_sums[k], g);
      gx_sums[k] = fma(g, xhat.v[k], gx_sums[k]);
    }
  }

  static NORMKIT_INLINE TwoSums sum_run(const Row& row, int64_t begin, int64_t count) {
    TwoSums sums{zeros(), zeros()};
    int64_t i = begin;
    const int64_t end = begin + count;
    for (; i + kChunk <= end; i += kChunk)
      for (int k = 0; k < kVecs; k += kPart)
        add_terms<false>(sums.g.v + k, sums.gx.v + k, row, i + k * kWidth, kChunk);
    if (i < end) add_terms<true>(sums.g.v, sums.gx.v, row, i, end - i);
    return sums;
  }

  [[gnu::noinline]] static TwoSums sum_long_row(const Row& row, int64_t n) {
    return sum_runs<TwoSums>(n, [&](int64_t i, int64_t count) __attribute__((always_inline)) {
      return sum_run(row, i, count);
    });
  }

  static void sums_stage(BackwardBlock& b) {
    const float n = b.columns;
    for (int r = 0; r < b.rows; ++r) {
      const Row row(b, r);
      const TwoSums sums = b.n <= kRun ? sum_run(row, 0, b.n) : sum_long_row(row, b.n);
      b.g_mean[r] = kLayer ? fold(sums.g) / n : 0.f;
      b.gx_mean[r] = fold(sums.gx) / n;
    }
  }

  // What up to kBackwardRows rows add to the gradients of weight and bias in some columns, as
  // float32: of a bias three roundings, of a weight four, and none after that.
  template <int kCount>
  struct AffineGradients {
    Vecs<kCount> weight = zeros<kCount>(), bias = zeros<kCount>();

    NORMKIT_INLINE void add_to(const BackwardBlock& b, int r, int64_t i) const {
      if (b.grad_weight[r]) add_to(b.grad_weight[r] + i, weight);
      if (b.grad_bias[r]) add_to(b.grad_bias[r] + i, bias);
    }
    static NORMKIT_INLINE void add_to(double* sums, const Vecs<kCount>& c) {
      for (int k = 0; k < kCount; ++k, sums += kWidth) cpu::add_to(sums, c.v[k]);
    }
  };

  // What is known of a block before its columns are walked.  The usual case has all rows share one
  // weight and nothing rounded; any other asks as it goes.
  template <bool kUsual, bool kBias, bool kAdds, bool kStream>
  struct Walk {
    template <bool kTail>
    using Sums = AffineGradients<kTail ? kVecs : kPart>;

    template <bool kTail>
    static NORMKIT_INLINE void chunk(const BackwardBlock& b, int r, int64_t i, int64_t count,
                                     const Columns<kTail>& weight, Sums<kTail>& sums) {
      const Row row(b, r);
      const Columns<kTail> xhat = normalised(row, load<kTail>(row.x + i, count));
      const Columns<kTail> grad_y = load<kTail>(row.grad_y + i, count);
      const Columns<kTail> forward = kUsual ? xhat : rounded_to(xhat, b.rounded);
      for (size_t k = 0; k < std::size(xhat.v); ++k) {
        sums.weight.v[k] = fma(grad_y.v[k], forward.v[k], sums.weight.v[k]);
        if constexpr (kBias) sums.bias.v[k] = add(sums.bias.v[k], grad_y.v[k]);
      }
      if (!b.grad_x[r]) return;
      const V rstd = set1(b.rstd[r]);
      const V g_shift = set1(b.g_shift[r]), gx_scale = set1(b.gx_scale[r]);
      Columns<kTail> grad_x;
      for (size_t k = 0; k < std::size(xhat.v); ++k) {
        const V along_xhat = kLayer ? fma(xhat.v[k], gx_scale, g_shift) : mul(xhat.v[k], gx_scale);
        grad_x.v[k] = fma(mul(grad_y.v[k], weight.v[k]), rstd, along_xhat);
      }
      if constexpr (kAdds)
        cpu::add_to(grad_x,
                    load<kTail>(static_cast<const Item*>(b.grad_residual_out[r]) + i, count));
      Item* out = static_cast<Item*>(b.grad_x[r]) + i;
      if constexpr (kTail)
        store_tail<T, kSplitLanes>(out, grad_x, count);
      else if constexpr (kSplitLanes)
        store_chunk<T, kSplitLanes, kStream>(out, grad_x);
      else
        for (int k = 0; k < kPart; ++k)
          (kStream ? T::stream : T::store)(out + k * kWidth, grad_x.v[k]);
    }

    static NORMKIT_INLINE int row_at(const BackwardBlock& b, int at) {
      return kUsual ? at : b.order[at];
    }

    // Rows of one group.
    template <bool kTail>
    static NORMKIT_INLINE void columns(const BackwardBlock& b, int first, int last, int64_t i) {
      const int64_t count = kTail ? b.n - i : kChunk;
      const int of_group = row_at(b, first);
      const Columns<kTail> weight = load_weight<kTail>(b.weight[of_group] + i, count);
      for (int at = first; at < last;) {
        Sums<kTail> sums;
        const int end = last - at < kBackwardRows ? last : at + kBackwardRows;
        for (; at < end; ++at) chunk<kTail>(b, row_at(b, at), i, count, weight, sums);
        sums.add_to(b, of_group, i);
      }
    }

    // The end of rows that are walked together: of one group.
    static int end_of_walk(const BackwardBlock& b, int first) {
      const int most = b.rows - first < kWalkedRows ? b.rows : first + kWalkedRows;
      if (kUsual) return most;
      int end = first + 1;
      while (end < most && b.group[b.order[end]] == b.group[b.order[first]]) ++end;
      return end;
    }

    static void rows(const BackwardBlock& b) {
      for (int first = 0, last; first < b.rows; first = last) {
        last = end_of_walk(b, first);
        int64_t i = 0;
        for (; i < b.n / kChunk * kChunk; i += kPart * kWidth) columns<false>(b, first, last, i);
        if (i < b.n) columns<true>(b, first, last, i);
      }
    }
  };

  template <bool kUsual, bool kBias, bool kAdds>
  static void walk(const BackwardBlock& b) {
    if constexpr (kUsual)
      if (b.stream) return Walk<kUsual, kBias, kAdds, true>::rows(b);
    Walk<kUsual, kBias, kAdds, false>::rows(b);
  }

  static void apply_stage(BackwardBlock& b) {
    for (int r = 0; r < b.rows; ++r) {
      b.g_shift[r] = -b.rstd[r] * b.g_mean[r];
      b.gx_scale[r] = -b.rstd[r] * b.gx_mean[r];
    }
    const bool adds = b.grad_residual_out[0];
    if (!b.shared || b.rounded != DType::kFloat32)
      return adds ? walk<false, true, true>(b) : walk<false, true, false>(b);
    if (b.grad_bias[0]) return adds ? walk<true, true, true>(b) : walk<true, true, false>(b);
    return adds ? walk<true, false, true>(b) : walk<true, false, false>(b);
  }
};

template <class T>
void narrow_row(const float* row, int64_t n, void* out) {
  auto* item = static_cast<typename T::Item*>(out);
  for (int64_t i = 0; i < n; i += kChunk) {
    if (n - i < kChunk)
      store_tail<T>(item + i, load_tail<Float32>(row + i, n - i), n - i);
    else
      store_chunk<T>(item + i, load_chunk<Float32>(row + i));
  }
}

template <class T>
constexpr void fill_backward(Kernels& k) {
  const int t = int(T::kDType);
  k.backward_sums[t][int(Statistic::kRms)] = Backward<T, false>::sums_stage;
  k.backward_sums[t][int(Statistic::kLayer)] = Backward<T, true>::sums_stage;
  k.backward_apply[t][int(Statistic::kRms)] = Backward<T, false>::apply_stage;
  k.backward_apply[t][int(Statistic::kLayer)] = Backward<T, true>::apply_stage;
  k.narrow[t] = narrow_row<T>;
}

constexpr Kernels make_kernels(const char* name) {
  Kernels k{};
  k.name = name;
  k.clamp = clamp_stage;
  k.rstd = rstd_stage;
  fill_forward<Float32>(k);
  fill_forward<Float16>(k);
  fill_forward<BFloat16>(k);
  fill_activate(k);
  fill_backward<Float32>(k);
  fill_backward<Float16>(k);
  fill_backward<BFloat16>(k);
  return k;
}

}  // namespace
}  // namespace normkit::cpu
