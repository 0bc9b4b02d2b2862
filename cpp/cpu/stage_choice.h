// Which stages a call is made of.
#pragma once
#include "affine.h"
#include "before.h"
#include "columns.h"
#include "memory.h"
#include "row_norm.h"

namespace normkit::cpu {

// Whether y takes the place of weight or bias, as in a norm of x by itself: they are copied then,
// before anything is stored, since the last chunk of a row repeats columns of the one before it.
inline bool is_overwritten(const RowNorm& norm) {
  const char* const out = norm.out.data;
  return out && (out == norm.weight.data || out == norm.bias.data);
}

// Whether weight and bias are read as stored: they are of the one 16-bit type of source and output,
// need no offset, and a widened copy does not pay.  It does not for a few rows (Zen 4, n = 4096:
// 0.14 us to make, 0.02 us saved a row in bfloat16, 0.08 us in float16), nor where it crowds x and
// y out of the first-level cache, which only bfloat16 minds: widening float16 again costs more than
// a longer way to the weight.
inline bool affine_as_stored(const RowNorm& norm, DType source, DType out) {
  if (is_overwritten(norm)) return false;
  const bool few = norm.rows < 4 * groups_of(norm.weight, norm.bias);
  const bool crowding = source == DType::kBFloat16 && norm.n * (norm.bias.data ? 2 : 1) > 2048;
  return (few || crowding) && source != DType::kFloat32 && out == source &&
         norm.options.weight_offset == 0.f && norm.weight.data && norm.weight.dtype == source &&
         (!norm.bias.data || norm.bias.dtype == source);
}

struct Stages {
  Stage clamp_x = nullptr;    // wide = clamped x, which stands for x from here on
  Stage gate = nullptr;       // wide = gate * x, likewise
  Stage add = nullptr;        // residual_out = x + residual, or the sum of their multiples
  Stage clamp_sum = nullptr;  // wide = clamped residual_out
  Stage sum = nullptr;        // layer norm only
  Stage squares = nullptr;
  RstdStage rstd = nullptr;
  Stage apply = nullptr;
  // apply, which does for the next rows what sum, or else squares, would do; null: it does not
  Stage apply_and_sum = nullptr;
  bool add_sums = false;  // add does it for its own rows
  // y from what the norm itself gives, where one stage cannot take weight and bias and scale and
  // shift; or has_scale: apply takes scale and shift for weight and bias.
  Stage modulate = nullptr;
  bool has_scale = false;
  // has_scale, and weight goes into the scale: y = xhat * (weight * act(z)).
  bool scale_has_weight = false;
  RotateRow rotate = nullptr;  // y from what the norm itself gives, which is of this type
  DType of_norm = DType::kFloat32;
  bool wide = false;       // the row that is normalised is kept as float32
  bool keeps_sum = false;  // or as what it is rounded to, while it goes around the caches
  bool affine_as_stored = false;
  Layout layout = Layout::kNatural;
  Layout modulation_layout = Layout::kNatural;
};

inline void choose_rotation(Stages& s, const RowNorm& norm, const Kernels& kernels) {
  const Rotation& rotation = norm.rotation;
  if (rotation.round_norm) s.of_norm = norm.x.dtype;
  const DType product =
      rotation.round_each ? promoted(s.of_norm, rotation.cos.dtype) : DType::kFloat32;
  s.rotate = kernels.rotate[int(s.of_norm)][int(product)][int(norm.out.dtype)];
}

inline void choose_apply(Stages& s, const RowNorm& norm, DType source, const Kernels& kernels) {
  const Modulation& m = norm.modulation;
  const DType out = norm.out.dtype, normalised = normalised_dtype(norm);
  const bool layer = norm.statistic == Statistic::kLayer;
  const bool gated = norm.gating.is_behind_norm();
  const bool modulated = m.scale.data || m.shift.data || gated;
  // What the norm itself gives, and its product with 1 + scale.
  const bool rounds_norm = gated ? norm.gating.round_norm : m.round_each;
  const DType of_norm = rounds_norm ? normalised : DType::kFloat32;
  const DType product = promoted(of_norm, m.scale.dtype);
  const bool rounds_product = m.round_each && m.scale.data && m.shift.data;
  DType rounded = norm.options.round_before_weight ? normalised : DType::kFloat32;
  if (norm.rotation) choose_rotation(s, norm, kernels);
  s.scale_has_weight = gated && !rounds_norm && norm.weight.data && !norm.bias.data;
  if (modulated && (s.scale_has_weight || !norm.weight.data) && !norm.bias.data) {
    const DType xhat = rounds_norm ? normalised : rounded;
    if (!rounds_product)
      s.apply = kernels.apply[int(source)][int(xhat)][int(out)][0][layer];
    else if (source == of_norm)
      s.apply = kernels.modulate[int(source)][int(product)][int(out)][layer];
    s.has_scale = s.apply;
    s.layout = s.modulation_layout = layout_of(source, out);
    if (s.has_scale) return;
  }
  const DType to = modulated ? of_norm : norm.rotation ? s.of_norm : out;
  // For statistics there is none, and it need not be prepared.
  s.affine_as_stored = norm.split.step == Step::kStatistics || affine_as_stored(norm, source, to);
  s.apply = kernels.apply[int(source)][int(rounded)][int(to)][s.affine_as_stored][layer];
  s.layout = layout_of(source, to);
  if (!modulated) return;
  s.modulation_layout = layout_of(of_norm, out);
  s.modulate =
      rounds_product
          ? kernels.modulate[int(of_norm)][int(product)][int(out)][int(Statistic::kRms)]
          : kernels.apply[int(of_norm)][int(DType::kFloat32)][int(out)][0][int(Statistic::kRms)];
}

// From this many columns on the first sum of a row is taken beside other work (Zen 3: with 1024 it
// is 0.94 to 1.03 as fast).
constexpr int64_t kBesideColumns = 2048;

// Whether the sum goes around the caches where y does, kept beside for the norm: its lines need not
// be read before they are written (Xeon, 2048x4096 to 4096x4096: 1.02 to 1.24 times as fast).  A
// residual in place is read anyway, and what is kept has to stay in a cache.
inline bool sum_goes_around(const RowNorm& norm) {
  constexpr int64_t kKeptBytes = 128 << 10;
  const char* const sum = norm.residual_out.data;
  return sum != norm.residual.data && sum != norm.x.data &&
         norm.n * item_size(norm.residual.dtype) <= kKeptBytes &&
         on_cache_lines(norm.residual_out, norm.outer_dims, norm.n);
}

// Where the first pass over a row is a part of another stage.
inline void choose_sums(Stages& s, const RowNorm& norm, const Plan& plan, const Kernels& kernels) {
  if (norm.n < kBesideColumns || norm.n % (2 * kChunk) != 0 || !norm.out.data || s.wide || s.gate ||
      norm.before || norm.cache || norm.split.step != Step::kWhole || norm.options.as_is ||
      has_strided_columns(norm))
    return;
  const int x = int(norm.x.dtype), statistic = int(norm.statistic);
  if (norm.residual.data) {
    if (norm.residual.dtype != norm.x.dtype || !kernels.add_and_sum[x][0][statistic]) return;
    s.keeps_sum = plan.stream && sum_goes_around(norm);
    s.add = kernels.add_and_sum[x][s.keeps_sum][statistic];
    s.add_sums = true;
    return;
  }
  const Beside least = plan.stream  ? Beside::kStreamed
                       : plan.fetch ? Beside::kFromMemory
                                    : Beside::kAlways;
  if (norm.x.dtype != norm.out.dtype || norm.modulation || norm.gating || norm.rotation ||
      (norm.bias.data && norm.statistic == Statistic::kRms) ||
      kernels.next_beside_apply[x][statistic] < least)
    return;
  const bool rounds = norm.options.round_before_weight && norm.x.dtype != DType::kFloat32;
  s.apply_and_sum = kernels.apply_and_sum[x][rounds][s.affine_as_stored][statistic];
}

// Those of a call without a norm at its end: there is nothing to prepare.
inline Stages without_norm(Stages s) {
  s.clamp_sum = nullptr;
  s.wide = false;
  s.affine_as_stored = true;
  return s;
}

inline Stages stages_of(const RowNorm& norm, const Plan& plan, const Kernels& kernels) {
  Stages s;
  DType x = norm.x.dtype;
  const DType normalised = normalised_dtype(norm);
  if (norm.before) {
    x = dtype_before_sum(norm);
  } else if (norm.options.clamp_inf && x == DType::kFloat16) {
    s.clamp_x = kernels.clamp;
    s.wide = true;
    x = DType::kFloat32;
  }
  if (norm.modulation.gate.data) {
    const DType product = norm.modulation.round_each
                              ? promoted(norm.x.dtype, norm.modulation.gate.dtype)
                              : DType::kFloat32;
    s.gate = kernels.gate[int(x)][int(product)];
    x = DType::kFloat32;
  }
  if (norm.gating.is_before_norm()) {
    s.gate = kernels.gate[int(x)][int(DType::kFloat32)];
    s.wide = true;
  }
  if (norm.residual.data) {
    const int residual = int(norm.residual.dtype);
    s.add = norm.before.scales() ? kernels.combine[int(x)][residual][norm.before.round_norm]
                                 : kernels.add[int(x)][residual][!norm.options.round_sum];
    s.wide = !norm.options.round_sum;
    if (norm.options.round_sum && norm.options.clamp_inf && normalised == DType::kFloat16) {
      s.clamp_sum = kernels.clamp;
      s.wide = true;
    }
  }
  if ((norm.before || norm.cache) && !norm.out.data) return without_norm(s);
  const DType source = s.wide ? DType::kFloat32 : normalised;
  const bool layer = norm.statistic == Statistic::kLayer;
  if (layer) s.sum = kernels.sum[int(source)];
  s.squares = kernels.squares[int(source)][layer];
  s.rstd = kernels.rstd;
  choose_apply(s, norm, source, kernels);
  choose_sums(s, norm, plan, kernels);
  return s;
}

}  // namespace normkit::cpu
