// The backward pass of the row norm: gradients of rows, and partial sums of those of weight and
// bias.
#pragma once
#include "partial_sums.cuh"
#include "rows.cuh"
#include "split.cuh"

namespace normkit::cuda {

struct RowNormBackwardArgs : Grid {
  LaunchRows grad_y, grad_residual_out, x, residual, grad_x, grad_residual;
  LaunchAffine weight, bias;
  const float *rstd, *mean;
  PartialSums weight_sums, bias_sums;
  int64_t sums_stride;  // floats from one slice to the next; a head's sums are `padded` long
  int64_t n, padded;    // padded to whole packs
  float columns;        // what the sums over a row are divided by
  uint32_t slices;
  bool adds;  // to the sums of an earlier launch
  int log2_lanes, groups;
  uint32_t column_blocks;  // of the kernel that only sums up columns
  NormOptions options;     // but for weight_offset, which is as launch_offset() makes it
  DType normalised;        // what round_before_weight rounds to
  bool from_output;
  SplitArgs split;
};

using BackwardKernel = void (*)(RowNormBackwardArgs);

// Some columns of a row, as the formulas of norm_args.h name them.
template <int kSize>
struct Terms {
  Floats<kSize> xhat, grad_y, g;
};

// x: what was normalised, or the output.  bias is for undoing the latter.
template <Statistic kStatistic, class Access>
__device__ __forceinline__ Terms<Access::kSize> terms_of(const RowNormBackwardArgs& a,
                                                         const Floats<Access::kSize>& x,
                                                         const Floats<Access::kSize>& grad_y,
                                                         const Floats<Access::kSize>& weight,
                                                         const Floats<Access::kSize>& bias,
                                                         float rstd, float mean) {
  Terms<Access::kSize> t;
  t.grad_y = grad_y;
#pragma unroll
  for (int i = 0; i < Access::kSize; ++i) {
    t.g.v[i] = grad_y.v[i] * (weight.v[i] + a.options.weight_offset);
    t.xhat.v[i] = kStatistic == Statistic::kLayer ? (x.v[i] - mean) * rstd : x.v[i] * rstd;
  }
  if constexpr (!Access::kWhole)
    branch_if(a.from_output, [&] {
#pragma unroll
      for (int i = 0; i < Access::kSize; ++i) {
        const float w = weight.v[i] + a.options.weight_offset;
        t.xhat.v[i] = w == 0.f ? 0.f : (x.v[i] - bias.v[i]) / w;
      }
    });
  return t;
}

// Where the operands of one row are, for those who read them again and again.
struct RowOperands {
  RowAt x, residual, grad_y, weight, bias;
  float rstd, mean;

  __device__ __forceinline__ RowOperands(const RowNormBackwardArgs& a, uint32_t row, bool exists) {
    const Place place(a, row);
    x = place.of(a.x, a.dims);
    residual = place.of(a.residual, a.dims);
    grad_y = place.of(a.grad_y, a.dims);
    weight = place.of(a.weight);
    bias = place.of(a.bias);
    rstd = exists ? a.rstd[row] : 0.f;
    mean = exists && a.mean ? a.mean[row] : 0.f;
  }

  template <Statistic kStatistic, class Access, class Index>
  __device__ __forceinline__ Terms<Access::kSize> terms(const RowNormBackwardArgs& a, Index column,
                                                        Index end) const {
    constexpr int kSize = Access::kSize;
    const auto load = [&](const RowAt& row) {
      return Access::floats(Access::load(row, column, end));
    };
    Floats<kSize> v = load(x), b{};
    if (!Access::kWhole && a.residual.data) {
      const Floats<kSize> addend = load(residual);
#pragma unroll
      for (int i = 0; i < kSize; ++i) v.v[i] += addend.v[i];
    }
    if (!Access::kWhole && a.from_output && a.bias.data) b = load(bias);
    const Floats<kSize> w = a.weight.data ? load(weight) : filled<kSize>(1.f);
    return terms_of<kStatistic, Access>(a, v, load(grad_y), w, b, rstd, mean);
  }
};

// g and g * xhat, or the latter alone, of a pack: zeros behind a row's end, for grad_y is.
template <Statistic kStatistic>
constexpr int kRowSums = kStatistic == Statistic::kLayer ? 2 : 1;

template <int kSize, int kSums>
__device__ __forceinline__ void row_sums_of(const Terms<kSize>& t, Sums<kSize / 4> (&sums)[kSums]) {
#pragma unroll
  for (int s = 0; s < kSums; ++s) sums[s] = {};
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    sums[0].quad[i / 4] = fmaf(t.g.v[i], t.xhat.v[i], sums[0].quad[i / 4]);
    if constexpr (kSums == 2) sums[1].quad[i / 4] += t.g.v[i];
  }
}

// The gradient of some columns of a row goes where it is wanted; means are of g * xhat and of g.
template <Statistic kStatistic, class Access, class Index>
__device__ __forceinline__ void store_gradient(const RowNormBackwardArgs& a, const Place& place,
                                               const Terms<Access::kSize>& t, float rstd,
                                               const float (&means)[kRowSums<kStatistic>],
                                               Floats<Access::kSize> grad_residual_out,
                                               Index column, Index end) {
  Floats<Access::kSize>& v = grad_residual_out;
#pragma unroll
  for (int i = 0; i < Access::kSize; ++i) {
    float g = t.g.v[i];
    if constexpr (kStatistic == Statistic::kLayer) g -= means[1];
    v.v[i] = fmaf(rstd, fmaf(-t.xhat.v[i], means[0], g), v.v[i]);
  }
  if (a.grad_x.data) Access::store(place.of(a.grad_x, a.dims), column, end, v);
  if (!Access::kWhole && a.grad_residual.data)
    Access::store(place.of(a.grad_residual, a.dims), column, end, v);
}

// What a thread has added up for the gradients of weight and bias in its columns.
template <int kPacks, int kSize, bool kBias>
struct ColumnSums {
  Floats<kSize> weight[kPacks], bias[kBias ? kPacks : 1];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      weight[p] = {};
      if constexpr (kBias) bias[p] = {};
    }
  }
  template <class Access>
  __device__ __forceinline__ void add(const RowNormBackwardArgs& a, int p, const Terms<kSize>& t) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      float xhat = t.xhat.v[i];
      if (a.options.round_before_weight) xhat = Access::rounded(a.normalised, xhat);
      weight[p].v[i] = fmaf(t.grad_y.v[i], xhat, weight[p].v[i]);
      if constexpr (kBias) bias[p].v[i] += t.grad_y.v[i];
    }
  }
};

// Rows whose packs are spread over the lanes of a group.  A block walks the rows of one slice of
// one head, a group at a time each, and adds up what they mean for weight and bias.
template <Statistic kStatistic, class Access, int kPacks>
__global__ void __launch_bounds__(kPacks == 1 ? kThreads : kMostLanes,
                                  Access::kWhole&& kPacks == 1 ? kBackwardBlocks : 1)
    row_norm_backward_kernel(RowNormBackwardArgs a) {
  constexpr int kSize = Access::kSize, kQuads = kSize / 4, kSums = kRowSums<kStatistic>;
  using Pack = typename Access::Pack;
  // In an RMSNorm a bias is rare, and its sums are left to the kernels for any access.
  constexpr bool kBias = !Access::kWhole || kStatistic == Statistic::kLayer;
  // As float32 values there is no room for rows beside the sums: they are read again, from a cache.
  // So are four packs.  Of kept rows the next one is loaded ahead of its turn.
  constexpr bool kKeeps = Access::kWhole && kPacks <= 2;
  // With x, where there is room.
  constexpr bool kAddendEarly = kKeeps && (kPacks == 1 || (kPacks == 2 && !kBias));
  using Storage = WarpSums<kSums>[2];
  NORMKIT_SHARED(Storage, sums_storage);
  NORMKIT_SHARED(GroupStorage<kSize>, group_storage);

  const int lanes = 1 << a.log2_lanes;
  const int lane = threadIdx.x & (lanes - 1), group = threadIdx.x >> a.log2_lanes;
  const int end = static_cast<int>(a.n);
  const uint32_t slice = a.heads.divide(blockIdx.x);
  const uint32_t head = blockIdx.x - slice * a.heads.value, of_head = a.heads.divide(a.rows);
  const auto column = [&](int p) { return (p * lanes + lane) * kSize; };
  // Whether any lane has columns in that pack.
  const auto has = [&](int p) { return Access::kWhole || p * lanes * kSize < end; };

  struct Row {
    Pack x[kKeeps ? kPacks : 1], grad_y[kKeeps ? kPacks : 1];
    float rstd, mean;
  };
  const auto load = [&](uint32_t first) {
    Row row;
    const bool exists = first + group < of_head;
    const uint32_t number = exists ? head + a.heads.value * (first + group) : 0;
    const Place place(a, number);
    const RowAt x = place.of(a.x, a.dims), grad_y = place.of(a.grad_y, a.dims);
    const int live = exists ? end : 0;
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      row.x[p] = Access::load(x, column(p), live);
      row.grad_y[p] = Access::load(grad_y, column(p), live);
    }
    row.rstd = exists ? a.rstd[number] : 0.f;
    row.mean = kStatistic == Statistic::kLayer && exists ? a.mean[number] : 0.f;
    return row;
  };

  wait_for_previous_kernel();
  Pack weight[kKeeps ? kPacks : 1];
  if constexpr (kKeeps) {
    const LaunchAffine& from = a.weight;
    const RowAt row{const_cast<char*>(from.data) + head * from.row_stride, from.dtype, from.wide};
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
      weight[p] = from.data ? Access::load(row, column(p), end) : Access::pack(filled<kSize>(1.f));
  }
  ColumnSums<kPacks, kSize, kBias> sums;
  sums.clear();
  const auto flush = [&](Floats<kSize>& v, const PartialSums& partial, int p, bool adds) {
    if (a.groups > 1) fold_groups(v, lanes, a.groups, group_storage);
    if (group == 0 && column(p) < end)
      add_to_partial(partial, slice * a.sums_stride + head * a.padded + column(p), adds, v);
    v = {};
  };
  const auto flush_all = [&](bool adds) {
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (!has(p)) break;
      if (a.weight_sums.sum) flush(sums.weight[p], a.weight_sums, p, adds);
      if constexpr (kBias)
        if (a.bias_sums.sum) flush(sums.bias[p], a.bias_sums, p, adds);
    }
  };

  const uint32_t step = a.slices * a.groups;
  uint32_t first = slice * a.groups, walked = 0;
  Row ahead;
  if constexpr (kKeeps) ahead = load(first);
#pragma unroll 1
  for (; first < of_head; first += step) {
    if (walked && walked % kChainRows == 0) flush_all(a.adds || walked > kChainRows);
    const bool exists = first + group < of_head;
    const uint32_t number = exists ? head + a.heads.value * (first + group) : 0;
    const int live = exists ? end : 0;
    const Place place(a, number);
    Row row;
    if constexpr (kKeeps) {
      row = ahead;
      ahead = load(first + step);
    }
    const RowOperands operands(a, number, exists);
    const auto terms = [&](int p) {
      if constexpr (kKeeps)
        return terms_of<kStatistic, Access>(a, Access::floats(row.x[p]),
                                            Access::floats(row.grad_y[p]),
                                            Access::floats(weight[p]), {}, row.rstd, row.mean);
      else
        return operands.template terms<kStatistic, Access>(a, column(p), live);
    };
    const auto load_addend = [&](int p) {
      if (!a.grad_residual_out.data) return Pack{};
      return Access::load(place.of(a.grad_residual_out, a.dims), column(p), live);
    };
    Pack addend[kAddendEarly ? kPacks : 1];
    if constexpr (kAddendEarly)
#pragma unroll
      for (int p = 0; p < kPacks; ++p) addend[p] = load_addend(p);

    Sums<kQuads> of_pack[kSums][kPacks];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      Sums<kQuads> of_terms[kSums] = {};
      if (has(p)) {
        if constexpr (kKeeps) Access::stay_packed(weight[p]);
        const Terms<kSize> t = terms(p);
        sums.template add<Access>(a, p, t);
        row_sums_of(t, of_terms);
      }
#pragma unroll
      for (int s = 0; s < kSums; ++s) of_pack[s][p] = of_terms[s];
    }
    if constexpr (kKeeps)
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        Access::stay_packed(row.x[p]);
        Access::stay_packed(row.grad_y[p]);
        Access::stay_packed(weight[p]);
      }
    float means[kSums];
#pragma unroll
    for (int s = 0; s < kSums; ++s) means[s] = fold<kQuads>(fold_packs(of_pack[s]).quad);
    sum_over_lanes(means, lanes, sums_storage[walked % 2]);
#pragma unroll
    for (int s = 0; s < kSums; ++s) means[s] = means[s] / a.columns;
    // What is read again is not held either, pack by pack.
#pragma unroll(kKeeps ? kPacks : 1)
    for (int p = 0; p < kPacks; ++p) {
      if (!has(p)) break;
      if constexpr (!kAddendEarly) addend[0] = load_addend(p);
      const Floats<kSize> added = Access::floats(addend[kAddendEarly ? p : 0]);
      store_gradient<kStatistic, Access>(a, place, terms(p), kKeeps ? row.rstd : operands.rstd,
                                         means, added, column(p), live);
    }
    ++walked;
  }
  let_next_kernel_start();
  flush_all(a.adds || walked > kChainRows);
}

// Rows that are longer, or parts of a split norm's: a block a row, for the gradient of the row
// alone.
template <Statistic kStatistic, Step kStep = Step::kWhole>
__global__ void __launch_bounds__(kMostLanes) long_row_backward_kernel(RowNormBackwardArgs a) {
  constexpr int kSize = kLongPack, kQuads = kSize / 4, kSums = kRowSums<kStatistic>;
  using Access = Any<kSize>;
  NORMKIT_SHARED(WarpSums<kSums>, storage);
  const int lanes = 1 << a.log2_lanes;
  const Place place(a, blockIdx.x);
  const auto for_packs = [&](auto&& f) {
    for (int64_t column = int64_t{threadIdx.x} * kSize; column < a.n;
         column += int64_t{lanes} * kSize)
      f(column);
  };
  wait_for_previous_kernel();
  const RowOperands operands(a, blockIdx.x, true);
  float means[kSums];
  if constexpr (kStep == Step::kApply) {
#pragma unroll
    for (int s = 0; s < kSums; ++s) means[s] = mean_of_parts(a.split, s, blockIdx.x);
  } else {
    LongSums<kQuads> sums[kSums];
    for_packs([&](int64_t column) {
      Sums<kQuads> of_pack[kSums];
      row_sums_of(operands.terms<kStatistic, Access>(a, column, a.n), of_pack);
#pragma unroll
      for (int s = 0; s < kSums; ++s) sums[s].add(of_pack[s]);
    });
#pragma unroll
    for (int s = 0; s < kSums; ++s) means[s] = fold<kQuads>(sums[s].sum.quad);
    sum_over_lanes(means, lanes, storage);
#pragma unroll
    for (int s = 0; s < kSums; ++s) means[s] = means[s] / a.columns;
  }
  let_next_kernel_start();
  if constexpr (kStep == Step::kStatistics) {
    if (threadIdx.x == 0) save_statistics(a.split, blockIdx.x, means);
  } else {
    for_packs([&](int64_t column) {
      Floats<kSize> added{};
      if (a.grad_residual_out.data)
        added = Access::load(place.of(a.grad_residual_out, a.dims), column, a.n);
      store_gradient<kStatistic, Access>(a, place,
                                         operands.terms<kStatistic, Access>(a, column, a.n),
                                         operands.rstd, means, added, column, a.n);
    });
  }
}

// And for the gradients of weight and bias: a block some columns of one slice of one head.  Without
// a mean it does for an RMSNorm.
template <class Access>
__global__ void __launch_bounds__(kThreads, kColumnBlocks)
    long_columns_kernel(RowNormBackwardArgs a) {
  constexpr int kSize = Access::kSize;
  const uint32_t unit = blockIdx.x / a.column_blocks, slice = a.heads.divide(unit);
  const uint32_t head = unit - slice * a.heads.value, of_head = a.heads.divide(a.rows);
  const int64_t column =
      (int64_t{blockIdx.x - unit * a.column_blocks} * kThreads + threadIdx.x) * kSize;
  wait_for_previous_kernel();
  if (column < a.n) {
    const int64_t at = slice * a.sums_stride + head * a.padded + column;
    ColumnSums<1, kSize, true> sums;
    sums.clear();
    const auto flush = [&](bool adds) {
      if (a.weight_sums.sum) add_to_partial(a.weight_sums, at, adds, sums.weight[0]);
      if (a.bias_sums.sum) add_to_partial(a.bias_sums, at, adds, sums.bias[0]);
      sums.clear();
    };
    uint32_t walked = 0;
    for (uint32_t of = slice; of < of_head; of += a.slices, ++walked) {
      if (walked && walked % kChainRows == 0) flush(a.adds || walked > kChainRows);
      const RowOperands operands(a, head + a.heads.value * of, true);
      sums.template add<Access>(a, 0,
                                operands.template terms<Statistic::kLayer, Access>(a, column, a.n));
    }
    flush(a.adds || walked > kChainRows);
  }
  let_next_kernel_start();
}

}  // namespace normkit::cuda
