// Rows in registers: their loads, their sums, and the store.
#pragma once
#include "access.cuh"
#include "args.cuh"
#include "reduce.cuh"

namespace normkit::cuda {

// `groups` groups of lanes a block, kRows rows a group, kPacks packs a lane; or a row for the
// blocks of a cluster.  A lane has columns in all of its packs, but for the last one of some lanes.
template <class T, class AccessTo, bool kAddsResidual, int kPacksOfLane, int kRowsOfLane>
struct Row {
  using Access = AccessTo;
  static constexpr bool kAdds = kAddsResidual;
  static constexpr int kPacks = kPacksOfLane, kRows = kRowsOfLane;
  static constexpr int kSize = Access::kSize, kQuads = kSize / 4;
  // Registers that packs of x, and of the residual with it, take until they are added.
  static constexpr int kLoadRegisters =
      kPacks * kRows * (4 + (kAdds ? Access::kOperandRegisters : 0));
  using Values = typename Access::Values;
  using Operand = typename Access::Operand;
  // A block has more than half of the packs it may, or fewer blocks would share a row.
  static constexpr bool kMayHavePeers = kPacks > kMostPacks<Access::kMixed> / 2 && kHasClusters;
  using Storage = SumStorage<kQuads, kMayHavePeers>;
  using X = typename Access::X;
  // A sum may be float32 where dtypes are mixed.
  using Kept = std::conditional_t<kAdds && Access::kMixed, Values, X>;

  const RowNormArgs& a;
  int lanes;
  uint32_t column;  // of the first pack
  uint32_t apart;   // columns from a pack to the next
  bool has_last;
  uint32_t number[kRows];
  bool live[kRows];  // not behind the last row
  Place place[kRows];
  const char *x_at[kRows], *residual_at[kRows];
  char *out_at[kRows], *residual_out_at[kRows];
  X loaded[kRows][kPacks];
  Operand residual[kRows][kPacks];
  Kept x[kRows][kPacks];  // what is normalised: x, or the sum x + residual

  // Where everything is: before the wait for the kernel ahead.
  __device__ __forceinline__ explicit Row(const RowNormArgs& args) : a(args) {
    lanes = 1 << a.log2_lanes;
    const int lane = threadIdx.x & (lanes - 1), group = threadIdx.x >> a.log2_lanes;
    const int log2_blocks = kMayHavePeers ? a.log2_cluster : 0;
    const uint32_t block = blockIdx.x >> log2_blocks;
    const int rank = blockIdx.x - (block << log2_blocks);
    column = (rank * lanes + lane) * kSize;
    apart = (lanes << log2_blocks) * kSize;
    has_last = column + (kPacks - 1) * apart < static_cast<uint32_t>(a.n);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      number[r] = (block * kRows + r) * a.groups + group;
      live[r] = number[r] < a.rows;
      place[r] = Place(a, live[r] ? number[r] : 0);
      x_at[r] = begin(r, a.x);
      out_at[r] = begin(r, a.out);
      if constexpr (kAdds) residual_at[r] = begin(r, a.residual);
      if constexpr (kAdds) residual_out_at[r] = begin(r, a.residual_out);
    }
  }
  // The thread's first columns in a tensor of rows, or in a weight or a bias.
  __device__ __forceinline__ char* begin(int r, const LaunchRows& rows) const {
    return place[r].of(rows, a.dims).data + Access::bytes(column, rows.dtype);
  }
  __device__ __forceinline__ const char* begin(int r, const LaunchAffine& affine) const {
    return place[r].of(affine).data + Access::bytes(column, affine.dtype);
  }
  __device__ __forceinline__ uint32_t offset(int p, DType dtype) const {
    return p * Access::bytes(apart, dtype);
  }
  __device__ __forceinline__ bool has_columns(int p) const { return p < kPacks - 1 || has_last; }
  __device__ __forceinline__ bool has(int r, int p) const { return live[r] && has_columns(p); }
  __device__ __forceinline__ bool has_peers() const { return kMayHavePeers && a.log2_cluster > 0; }
  __device__ __forceinline__ bool is_first_lane() const { return column == 0; }

  template <class F>
  static __device__ __forceinline__ void for_packs(const F& f) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int p = 0; p < kPacks; ++p) f(r, p);
  }

  // Every load is on its way before the first is used.
  __device__ __forceinline__ void load() {
    for_packs([&](int r, int p) {
      loaded[r][p] = Access::load_x(x_at[r] + offset(p, a.x.dtype), has(r, p));
    });
    if constexpr (kAdds)
      for_packs([&](int r, int p) {
        const char* from = residual_at[r] + offset(p, a.residual.dtype);
        residual[r][p] = Access::load(from, a.residual.dtype, has(r, p));
      });
  }

  __device__ __forceinline__ void add_residual() {
    if constexpr (kDType<T> == DType::kFloat16)
      clamp(DType::kFloat16, loaded,
            [&](int r, int p, const Values& clamped) { loaded[r][p] = Access::packed_x(clamped); });
    for_packs([&](int r, int p) {
      if constexpr (kAdds)
        add(r, p);
      else
        x[r][p] = loaded[r][p];
    });
    if constexpr (kAdds && (Access::kMixed || kDType<T> == DType::kFloat16))
      if (a.options.round_sum)
        clamp(a.residual.dtype, x, [&](int r, int p, const Values& clamped) {
          if constexpr (Access::kMixed)
            x[r][p] = clamped;
          else
            x[r][p] = Access::packed_x(clamped);
        });
  }

  __device__ __forceinline__ Values normalised(int r, int p, float mean, float rstd) const {
    Values v = Access::floats(x[r][p]);
#pragma unroll
    for (int i = 0; i < kSize; ++i) v.v[i] = (v.v[i] - mean) * rstd;
    return v;
  }
  __device__ __forceinline__ void store(int r, int p, const Values& y) const {
    Access::store(out_at[r] + offset(p, a.out.dtype), a.out.dtype, has(r, p), y);
  }

  // f(sum) of what each row adds up to, of x or of (x - mean)^2; every lane gets those of its rows.
  template <bool kSquares, class F>
  __device__ __forceinline__ void reduce(const float (&mean)[kRows], Storage& storage, const F& f,
                                         float (&of_row)[kRows]) {
    Sums<kQuads> sums[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      Sums<kQuads> of_pack[kPacks];
#pragma unroll
      for (int p = 0; p < kPacks; ++p)
        of_pack[p] = sums_of<kSquares>(Access::floats(x[r][p]), mean[r]);
#pragma unroll
      for (int q = 0; q < kQuads; ++q)
        if (!has_last) of_pack[kPacks - 1].quad[q] = 0.f;
      sums[r] = fold_packs(of_pack);
    }
    stay_packed();
    if constexpr (kRows > 1) {
      fold_rows(sums, lanes, f, of_row);
    } else {
      if constexpr (kMayHavePeers)
        if (has_peers()) sums[0] = sum_of_peers(sums[0], 1u << a.log2_cluster, storage);
      of_row[0] = f(sum_of_group(sums[0], lanes, storage));
    }
  }

 private:
  // put(r, p, values) of what clamp_inf asks for.  A branch round all of them: as selects the first
  // uses of packs would stand before the last loads.
  template <class Packs, class F>
  __device__ __forceinline__ void clamp(DType dtype, const Packs& packs, const F& put) {
    branch_if(a.options.clamp_inf && dtype == DType::kFloat16, [&] {
      for_packs([&](int r, int p) {
        Values v = Access::floats(packs[r][p]);
#pragma unroll
        for (int i = 0; i < kSize; ++i) v.v[i] = clamp_half(v.v[i]);
        put(r, p, v);
      });
    });
  }
  __device__ __forceinline__ void add(int r, int p) {
    const DType dtype = Access::kMixed ? a.residual.dtype : kDType<T>;
    Values v = Access::floats(loaded[r][p]);
    const Values addend = Access::floats(residual[r][p], dtype);
#pragma unroll
    for (int i = 0; i < kSize; ++i) v.v[i] += addend.v[i];
    char* const to = residual_out_at[r] + offset(p, a.residual_out.dtype);
    if constexpr (Access::kMixed) {
      const Values rounded = Access::rounded(v, dtype);
      Access::store(to, a.residual_out.dtype, has(r, p), rounded);
      x[r][p] = a.options.round_sum ? rounded : v;
    } else {
      x[r][p] = Access::packed_x(v);
      Access::store_packed(to, has(r, p), x[r][p]);
    }
  }
  // Without this the compiler widens once, and holds twice the registers through the reductions.
  __device__ __forceinline__ void stay_packed() {
    if constexpr (std::is_same_v<Kept, X>) for_packs([&](int r, int p) { keep(x[r][p].bits); });
  }
};

}  // namespace normkit::cuda
