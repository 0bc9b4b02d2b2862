// From what was normalised to what is stored.  An epilogue is made before the wait for the kernel
// ahead, and says where its operands are; load<Load>(row) asks for those of that time; and finish()
// stores every row.
#pragma once
#include "row.cuh"

namespace normkit::cuda {

// When an operand is loaded: with x, where registers allow it.  What is asked for after the
// reduction costs a tenth to a third of a small kernel's time.
enum class Load { kWithX, kBeforeSum, kBetweenSums, kAtStore };

// What packs in flight may take of a thread's registers, next to addresses and arithmetic.
constexpr int kPackRegisters = 80;

// y = xhat * (weight + offset) + bias; weight and bias may be absent.
template <class Row, Statistic kStatistic>
struct Affine {
  static constexpr int kPacks = Row::kPacks, kRows = Row::kRows, kSize = Row::kSize;
  using Access = typename Row::Access;
  using Values = typename Row::Values;
  using Operand = typename Row::Operand;

  // Rows of several weights keep one each, where the plan may ask for that.
  static constexpr int kMaps = Access::kMixed || Row::kAdds ? 1 : kRows;
  static constexpr int kOperand = kPacks * kMaps * Access::kOperandRegisters;
  static constexpr Load kWeight =
      Row::kLoadRegisters + kOperand <= kPackRegisters ? Load::kWithX : Load::kBeforeSum;
  // In an RMSNorm a bias is rare, and a load that is not wanted is an instruction all the same.
  static constexpr bool kExpectsBias = kStatistic == Statistic::kLayer;
  static constexpr Load kBias = !kExpectsBias ? Load::kAtStore
                                : Row::kLoadRegisters + 2 * kOperand <= kPackRegisters
                                    ? Load::kWithX
                                : Row::kAdds && Access::kMixed ? Load::kAtStore
                                                               : Load::kBetweenSums;

  const RowNormArgs& a;
  const char *weight_at[kMaps], *bias_at[kMaps];
  Operand weight[kMaps][kPacks], bias[kMaps][kPacks];

  __device__ __forceinline__ explicit Affine(const Row& row) : a(row.a) {
#pragma unroll
    for (int m = 0; m < kMaps; ++m) {
      weight_at[m] = row.begin(m, a.weight);
      bias_at[m] = row.begin(m, a.bias);
    }
  }

  template <Load kNow>
  __device__ __forceinline__ void load(const Row& row) {
    if constexpr (kWeight == kNow) load(row, a.weight, weight_at, weight);
    if constexpr (kBias == kNow) load(row, a.bias, bias_at, bias);
  }

  // Stores y of every row.  What is usual has code of its own, in which nothing is issued for what
  // is not asked for.
  __device__ __forceinline__ void finish(const Row& row, const float (&mean)[kRows],
                                         const float (&rstd)[kRows]) {
    branch_if(!a.weight.data, [&] { fill(weight, 1.f); });
    const bool plain = !a.options.round_before_weight && a.options.weight_offset == 0.f;
    if (!kExpectsBias && a.bias.data)
      finish<Variant<Maps::kAny, true, kMaps == 1>>(row, mean, rstd);
    else if (plain && share(a) && are_of(kUsual))
      finish<Variant<Maps::kUsual, kExpectsBias, true>>(row, mean, rstd);
    else if (plain && Access::kMixed && Access::kDTypeOfX != kUsual && are_of(Access::kDTypeOfX))
      finish<Variant<Maps::kOfX, kExpectsBias, true>>(row, mean, rstd);
    else if (plain && kMaps > 1)
      finish<Variant<Maps::kUsual, kExpectsBias, false>>(row, mean, rstd);
    else
      finish<Variant<Maps::kAny, kExpectsBias, kMaps == 1>>(row, mean, rstd);
  }

 private:
  // What code is made for: the weight multiplies as it is, without an offset, and nothing is
  // rounded before it; weight and bias are of the dtype that is usual with this access, or of x's.
  enum class Maps { kAny, kUsual, kOfX };
  static constexpr DType kUsual = Access::kMixed ? DType::kFloat32 : Access::kDTypeOfX;
  template <Maps kMapsOf, bool kHasBias, bool kIsShared>
  struct Variant {
    static constexpr bool kPlain = kMapsOf != Maps::kAny;
    static constexpr bool kBias = kHasBias;
    static constexpr bool kShared = kIsShared;  // one weight is that of all rows
    static __device__ __forceinline__ DType dtype(const LaunchAffine& of) {
      return kMapsOf == Maps::kAny     ? of.dtype
             : kMapsOf == Maps::kUsual ? kUsual
                                       : Access::kDTypeOfX;
    }
  };

  __device__ __forceinline__ bool are_of(DType dtype) const {
    return !Access::kMixed || (a.weight.dtype == dtype && (!kExpectsBias || a.bias.dtype == dtype));
  }
  static __device__ __forceinline__ bool share(const RowNormArgs& a) {
    return kMaps == 1 || a.heads.value == 1;
  }
  __device__ __forceinline__ void load(const Row& row, const LaunchAffine& from,
                                       const char* const (&at)[kMaps],
                                       Operand (&to)[kMaps][kPacks]) const {
#pragma unroll
    for (int m = 0; m < kMaps; ++m)
#pragma unroll
      for (int p = 0; p < kPacks; ++p) {
        // Rows behind the last share the weight of those before them.
        const bool wanted = from.data && (m == 0 || !share(a)) && row.has_columns(p);
        to[m][p] = Access::load(at[m] + row.offset(p, from.dtype), from.dtype, wanted);
      }
  }
  static __device__ __forceinline__ void fill(Operand (&operands)[kMaps][kPacks], float value) {
#pragma unroll
    for (int m = 0; m < kMaps; ++m)
#pragma unroll
      for (int p = 0; p < kPacks; ++p) operands[m][p] = Access::filled(value);
  }
  static __device__ __forceinline__ void spread(Operand (&operands)[kMaps][kPacks]) {
#pragma unroll
    for (int m = 1; m < kMaps; ++m)
#pragma unroll
      for (int p = 0; p < kPacks; ++p) operands[m][p] = operands[0][p];
  }

  template <class Variant>
  __device__ __forceinline__ void finish(const Row& row, const float (&mean)[kRows],
                                         const float (&rstd)[kRows]) {
    if constexpr (Variant::kBias && kBias == Load::kAtStore) load(row, a.bias, bias_at, bias);
    if constexpr (kExpectsBias) branch_if(!a.bias.data, [&] { fill(bias, -0.f); });  // v + -0 is v
    if constexpr (!Variant::kShared) branch_if(share(a), [&] { spread(weight), spread(bias); });
    Row::for_packs([&](int r, int p) {
      const int m = Variant::kShared ? 0 : r;
      Values v = row.normalised(r, p, mean[r], rstd[r]);
      if constexpr (!Variant::kPlain)
        branch_if(a.options.round_before_weight, [&] { v = Access::rounded(v, a.normalised); });
      const Values w = Access::floats(weight[m][p], Variant::dtype(a.weight));
      Values b{};
      if constexpr (Variant::kBias) b = Access::floats(bias[m][p], Variant::dtype(a.bias));
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const float factor = Variant::kPlain ? w.v[i] : w.v[i] + a.options.weight_offset;
        v.v[i] = Variant::kBias ? fmaf(v.v[i], factor, b.v[i]) : v.v[i] * factor;
      }
      row.store(r, p, v);
    });
  }
};

}  // namespace normkit::cuda
