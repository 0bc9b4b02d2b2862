// From the arguments of a call to a RowNorm, or to the reason why no kernel here runs it.  A
// Refusal is no error message for users: Python looks at a refused call again, raises where
// something is wrong, and runs what is valid elsewhere.  So every message stands in one place, and
// this one is quick.
#pragma once
#include "overlap.h"

namespace normkit {

struct Arguments {
  Tensor x{"x"}, residual{"residual"}, weight{"weight"}, bias{"bias"}, out{"out"},
      residual_out{"residual_out"}, gate{"gate"}, scale{"scale"}, shift{"shift"}, z{"z"},
      next_weight{"next_weight"}, next_bias{"next_bias"}, cos{"cos"}, sin{"sin"}, cache{"cache"};
  Indices positions{{"positions"}}, slots{{"slots"}};
  Statistic statistic;
  bool per_head, adds = false, gated = false, post = false, rotated = false, interleaved = false;
  NormOptions options;
  bool round_each = false;
  Activation activation = Activation::kSilu;  // of z
  bool norm_before_gate = true;
  float next_eps = 0.f, alpha = 1.f, beta = 1.f;
  bool round_norm = true;
  std::optional<DType> out_dtype;  // none: that of out, or x's
  bool memory_efficient = false;   // of gradients alone

  bool is_modulated() const { return gate || scale || shift; }
  bool is_fused() const { return is_modulated() || z || post || cos || cache; }
  // Columns of x and out may have a stride: nothing else stands around the norm.
  bool is_plain() const { return !is_fused() && !adds && !residual && !options.as_is; }
  // y is the sum, of residual's dtype.
  bool is_sum() const { return post && !adds; }
  DType out_dtype_of() const { return is_sum() ? residual.dtype : out_dtype.value_or(x.dtype); }
};

inline bool is_dense(const Tensor& t) {
  int64_t dense = 1;
  for (int d = t.ndim - 1; d >= 0; --d) {
    if (t.shape[d] > 1 && t.strides[d] != dense) return false;
    dense *= t.shape[d] > 0 ? t.shape[d] : 1;  // as torch counts
  }
  return true;
}

// Whether every stride is that of a new tensor, also of dimensions of size 1, which is_dense()
// skips.
inline bool is_packed(const Tensor& t) {
  int64_t packed = 1;
  for (int d = t.ndim - 1; d >= 0; --d) {
    if (t.strides[d] != packed) return false;
    packed *= t.shape[d] > 0 ? t.shape[d] : 1;  // as torch counts
  }
  return true;
}

// of_strides: kStrides for an input, of which a copy can be made.  may_step: columns may be further
// apart than an element, if they do not share memory.
[[gnu::always_inline]] inline Refusal check_rows(const Tensor& t, const Tensor& x,
                                                 Refusal::Kind of_strides, bool may_step = false) {
  if (!t) return {};
  if (!same_shape(t, x)) return {t.name, "does not have x's shape", Refusal::kShape};
  if (has_strided_columns(t) && !(may_step && t.stride(1) > 1))
    return {t.name, "has a last stride other than 1", of_strides};
  return {};
}

[[gnu::always_inline]] inline Refusal check_affine(const Tensor& t, const Tensor& x,
                                                   bool per_head) {
  if (!t) return {};
  const bool row = t.ndim == 1 && t.size(1) == x.size(1);
  const bool row_per_head =
      per_head && t.ndim == 2 && x.ndim >= 2 && t.size(1) == x.size(1) && t.size(2) == x.size(2);
  if (!row && !row_per_head) return {t.name, "does not fit x's shape", Refusal::kShape};
  if (t.size(1) > 1 && t.stride(1) != 1)
    return {t.name, "has a last stride other than 1", Refusal::kStrides};
  return {};
}

[[gnu::always_inline]] inline Refusal check_device(const Tensor& t, const Tensor& x) {
  if (!t ||
      (t.device.device_type == x.device.device_type && t.device.device_id == x.device.device_id))
    return {};
  return {t.name, "is on another device than x", Refusal::kDevice};
}

// The rows of a gate, scale or shift, which has x's first dimensions, or ones in their place, and
// its last: row r of x takes row r / inner % groups.  False where none of them says it.
inline bool find_rows(const Tensor& t, const Tensor& x, Affine& map) {
  map = {t.data, t.dtype, 0, 1, 1};
  bool is_outside = false;  // of a dimension that t has, and that was not the outermost one
  for (int d = x.ndim - 2; d >= 0; --d) {
    if (x.shape[d] <= 1) continue;  // 0: there are no rows to have any
    if (d >= t.ndim - 1 || t.shape[d] == 1) {
      if (map.groups == 1) map.inner *= x.shape[d];
      is_outside = map.groups != 1;
      continue;
    }
    const int64_t stride = t.strides[d] * item_size(t.dtype);
    if (map.groups == 1) map.stride = stride;
    if (is_outside || stride != map.stride * map.groups) return false;
    map.groups *= t.shape[d];
  }
  return true;
}

// All of them that have several rows are to have them alike.
inline Refusal check_modulation(const Arguments& a) {
  Affine alike;
  for (const Tensor* t : {&a.gate, &a.scale, &a.shift}) {
    if (!*t) continue;
    bool fits = t->ndim >= 1 && t->ndim <= a.x.ndim && t->size(1) == a.x.size(1);
    for (int d = 0; fits && d < t->ndim - 1; ++d)
      fits = t->shape[d] == 1 || t->shape[d] == a.x.shape[d];
    if (!fits) return {t->name, "does not fit x's shape", Refusal::kShape};
    Affine map;
    if ((t->size(1) > 1 && t->stride(1) != 1) || !find_rows(*t, a.x, map))
      return {t->name, "has rows of strides that no kernel takes", Refusal::kStrides};
    if (map.groups == 1) continue;
    if (alike.groups != 1 && (map.groups != alike.groups || map.inner != alike.inner))
      return {t->name, "has other rows than another of them", Refusal::kStrides};
    alike = map;
  }
  // A CUDA kernel counts them in 32 bits.
  constexpr int64_t kMostRows = int64_t{1} << 30;
  if (alike.groups > 1 && alike.inner * alike.groups > kMostRows)
    return {"x", "has too many rows to be modulated", Refusal::kShape};
  return {};
}

// Where round_each of a modulated norm rounds y to 16 bits, it has to be stored so, and the product
// with it; without a scale and a shift no kernel rounds anything before it stores y.
inline Refusal check_roundings(const Arguments& a) {
  if (!a.round_each || a.gated || a.rotated) return {};
  DType dtype = a.residual && a.options.round_sum ? a.residual.dtype : a.x.dtype;
  if (a.scale) dtype = promoted(dtype, a.scale.dtype);
  if (a.scale && a.shift && dtype != DType::kFloat32 && a.shift.dtype != dtype)
    return {"shift", "is not of the dtype of the product with scale", Refusal::kDtype};
  if (a.shift) dtype = promoted(dtype, a.shift.dtype);
  const DType out = a.out ? a.out.dtype : a.out_dtype.value_or(a.x.dtype);
  if (dtype != DType::kFloat32 && out != dtype)
    return {"the output", "is not of the dtype that round_each rounds it to", Refusal::kDtype};
  return {};
}

inline bool is_finite(float number) { return number - number == 0.f; }

inline Refusal check_post_norm(const Arguments& a) {
  for (const Tensor* t : {&a.next_weight, &a.next_bias}) {
    if (const Refusal no = check_device(*t, a.x)) return no;
    if (const Refusal no = check_affine(*t, a.x, false)) return no;
  }
  if (a.is_modulated() || a.per_head)
    return {"x", "is normalised in front of a sum, and no kernel modulates that", Refusal::kOption};
  if (!(a.next_eps >= 0.f && is_finite(a.next_eps)))
    return {"next_eps", "is not a finite number >= 0", Refusal::kOption};
  if (!is_finite(a.alpha)) return {"alpha", "is not finite", Refusal::kOption};
  if (!is_finite(a.beta)) return {"beta", "is not finite", Refusal::kOption};
  return {};
}

// Whether a tensor has the dimensions of x's tokens, of which the first may be left out or 1.
inline bool is_per_token(const Tensor& t, int ndim, const Tensor& x) {
  const int ahead = x.ndim - 2 - ndim;
  if (ahead < 0) return false;
  for (int d = 0; d < ndim; ++d)
    if (t.shape[d] != 1 && t.shape[d] != x.shape[ahead + d]) return false;
  return true;
}

[[gnu::noinline]] inline Refusal check_rotation(const Arguments& a) {
  if (a.is_modulated() || a.z || a.post || a.residual || !a.per_head)
    return {"x", "is rotated, and no kernel does more than that", Refusal::kOption};
  for (const Tensor* t : {&a.cos, &a.sin}) {
    if (!*t) return {t->name, "is None", Refusal::kOption};
    if (const Refusal no = check_device(*t, a.x)) return no;
    const bool fits = t->ndim >= 1 && 2 * t->size(1) <= a.x.size(1) &&
                      (a.positions ? t->ndim == 2 : is_per_token(*t, t->ndim - 1, a.x));
    if (!fits) return {t->name, "does not fit x's shape", Refusal::kShape};
    if (t->size(1) > 1 && t->stride(1) != 1)
      return {t->name, "has a last stride other than 1", Refusal::kStrides};
  }
  if (!same_shape(a.cos, a.sin)) return {"sin", "does not have cos's shape", Refusal::kShape};
  if (a.cos.dtype != a.sin.dtype) return {"sin", "does not have cos's dtype", Refusal::kDtype};
  // Kernels that rotate nothing do not round what they would.
  if (a.cos.size(1) == 0 && (a.round_norm || a.round_each))
    return {"cos", "has no columns, and no kernel rounds what it does not rotate",
            Refusal::kOption};
  if (const Refusal no = check_device(a.positions, a.x)) return no;
  if (a.positions && !is_per_token(a.positions, a.positions.ndim, a.x))
    return {"positions", "does not fit x's shape", Refusal::kShape};
  return {};
}

// (pages, slots of a page, heads, head_dim), at any strides but the last.
[[gnu::noinline]] inline Refusal check_cache(const Arguments& a) {
  const Tensor& c = a.cache;
  if (a.is_modulated() || a.z || a.post || a.residual)
    return {"cache", "is not None", Refusal::kOption};
  if (!a.slots) return {"slots", "is None", Refusal::kOption};
  for (const Tensor* t : {&c, static_cast<const Tensor*>(&a.slots)})
    if (const Refusal no = check_device(*t, a.x)) return no;
  if (c.ndim != 4 || a.x.ndim < 2 || c.size(1) != a.x.size(1) || c.size(2) != a.x.size(2))
    return {"cache", "does not fit x's shape", Refusal::kShape};
  if (has_strided_columns(c)) return {"cache", "has a last stride other than 1", Refusal::kMemory};
  if (!elements_are_apart(c)) return {"cache", "may overlap itself", Refusal::kMemory};
  if (c.dtype != (a.out ? a.out.dtype : a.out_dtype_of()))
    return {"cache", "is not of y's dtype", Refusal::kDtype};
  bool fits = a.slots.ndim == a.x.ndim - 2;
  for (int d = 0; fits && d < a.slots.ndim; ++d) fits = a.slots.shape[d] == a.x.shape[d];
  if (!fits) return {"slots", "does not fit x's shape", Refusal::kShape};
  return {};
}

// Out of line, where it costs other calls nothing.
[[gnu::noinline]] inline Refusal check_memory_of_rotation(const Arguments& a) {
  // Rows of x share these, and other rows are read when one is written.
  for (const Tensor* table : {&a.cos, &a.sin})
    if (share_memory(a.out, *table)) return {table->name, "overlaps the output", Refusal::kMemory};
  for (const Indices* t : {&a.positions, &a.slots})
    if (share_memory(a.out, *t) || share_memory(a.cache, *t))
      return {t->name, "overlaps what is written", Refusal::kMemory};
  if (a.cache)
    for (const Tensor* t : {&a.x, &a.weight, &a.bias, &a.cos, &a.sin, &a.out})
      if (share_memory(a.cache, *t)) return {"cache", "overlaps another tensor", Refusal::kMemory};
  return {};
}

inline Refusal check_memory(const Arguments& a) {
  const Tensor* inputs[] = {&a.x, &a.residual, &a.weight, &a.bias, &a.z};
  for (const Tensor* written : {&a.out, &a.residual_out}) {
    if (!*written) continue;
    if (!rows_are_apart(*written)) return {written->name, "may overlap itself", Refusal::kMemory};
    for (const Tensor* input : inputs)
      if (may_overlap(*written, *input))
        return {written->name, "may overlap an input", Refusal::kMemory};
  }
  // The sum is written before weight and bias are read: not even one memory of one row is harmless.
  for (const Tensor* affine : {&a.weight, &a.bias})
    if (share_memory(a.residual_out, *affine))
      return {"residual_out", "overlaps weight or bias", Refusal::kMemory};
  // Rows of x share them.
  if (a.is_modulated())
    for (const Tensor* rows : {&a.gate, &a.scale, &a.shift})
      if (share_memory(a.out, *rows) || share_memory(a.residual_out, *rows))
        return {rows->name, "overlaps an output", Refusal::kMemory};
  // Other rows still read the weights when the sum of one, or its y, is written.
  if (a.post)
    for (const Tensor* affine : {&a.weight, &a.bias, &a.next_weight, &a.next_bias})
      if (share_memory(a.out, *affine) || share_memory(a.residual_out, *affine))
        return {affine->name, "overlaps an output", Refusal::kMemory};
  if (a.rotated || a.cache)
    if (const Refusal no = check_memory_of_rotation(a)) return no;
  if (share_memory(a.out, a.residual_out))
    return {a.out.name, "may overlap residual_out", Refusal::kMemory};
  return {};
}

// memory_checked: the caller knows that what is written overlaps nothing.
inline Refusal check(const Arguments& a, bool memory_checked) {
  // Those of a gated norm may be heads.
  if (a.x.ndim < (a.per_head && !a.gated ? 2 : 1))
    return {"x", "has too few dimensions", Refusal::kShape};
  if (a.x.size(1) < 1) return {"x", "has rows of no elements", Refusal::kShape};
  if (bool(a.residual) != (a.adds || a.post))
    return {"residual", a.residual ? "is not None" : "is None", Refusal::kOption};
  for (const Tensor* t : {&a.residual, &a.weight, &a.bias, &a.out, &a.residual_out})
    if (const Refusal no = check_device(*t, a.x)) return no;
  if (a.is_modulated()) {
    for (const Tensor* t : {&a.gate, &a.scale, &a.shift})
      if (const Refusal no = check_device(*t, a.x)) return no;
    if (a.gate && !a.residual) return {"gate", "is not None", Refusal::kOption};
    if (const Refusal no = check_modulation(a)) return no;
  }
  if (const Refusal no = check_roundings(a)) return no;
  if (bool(a.z) != a.gated) return {"z", a.z ? "is not None" : "is None", Refusal::kOption};
  if (const Refusal no = check_device(a.z, a.x)) return no;
  if (const Refusal no = check_rows(a.z, a.x, Refusal::kStrides)) return no;
  if (a.post)
    if (const Refusal no = check_post_norm(a)) return no;
  if (a.rotated)
    if (const Refusal no = check_rotation(a)) return no;
  if (a.cache)
    if (const Refusal no = check_cache(a)) return no;
  const bool may_step = a.is_plain();
  for (const Tensor* t : {&a.x, &a.residual})
    if (const Refusal no = check_rows(*t, a.x, Refusal::kStrides, may_step)) return no;
  for (const Tensor* t : {&a.out, &a.residual_out})
    if (const Refusal no = check_rows(*t, a.x, Refusal::kMemory, may_step)) return no;
  for (const Tensor* t : {&a.weight, &a.bias})
    if (const Refusal no = check_affine(*t, a.x, a.per_head)) return no;
  const NormOptions& options = a.options;
  if (!(options.eps >= 0.f && options.eps <= 3.4028235e38f))
    return {"eps", "is not a finite number >= 0", Refusal::kOption};
  if (!(options.weight_offset - options.weight_offset == 0.f))
    return {"weight_offset", "is not finite", Refusal::kOption};
  if (a.out && a.out.dtype != (a.is_sum() ? a.residual.dtype : a.out_dtype.value_or(a.out.dtype)))
    return {"out", "is not of out_dtype", Refusal::kDtype};
  if (a.residual_out && a.residual_out.dtype != a.residual.dtype)
    return {"residual_out", "is not of residual's dtype", Refusal::kDtype};
  return memory_checked ? Refusal{} : check_memory(a);
}

// The outer dimensions of all tensors at once: those of size 1 dropped, neighbours merged where
// every tensor allows it.  x is the one whose shape counts; Job is RowNorm or RowNormBackward.
template <class Job, int kTensors>
inline void lay_out_rows(const Tensor& x, const Tensor* const (&tensors)[kTensors],
                         RowsOf* const (&rows)[kTensors], Job& job) {
  for (int t = 0; t < kTensors; ++t) {
    rows[t]->data = tensors[t]->data;
    rows[t]->dtype = tensors[t]->dtype;
  }
  job.rows = 1;
  job.outer_dims = 0;
  for (int d = 0; d < x.ndim - 1; ++d) {
    const int64_t size = x.shape[d];
    job.rows *= size;
    if (size == 1) continue;
    const int last = job.outer_dims - 1;
    bool merges = last >= 0;
    for (int t = 0; t < kTensors && merges; ++t)
      merges = !*tensors[t] ||
               rows[t]->stride[last] == size * tensors[t]->strides[d] * item_size(rows[t]->dtype);
    const int at = merges ? last : job.outer_dims++;
    job.outer_size[at] = merges ? job.outer_size[at] * size : size;
    for (int t = 0; t < kTensors; ++t)
      rows[t]->stride[at] = *tensors[t] ? tensors[t]->strides[d] * item_size(rows[t]->dtype) : 0;
    if (job.rows == 0) return;
  }
}

inline int64_t column_stride_of(const Tensor& t) {
  return has_strided_columns(t) ? t.stride(1) * item_size(t.dtype) : 0;
}

inline Affine affine_of(const Tensor& t) {
  Affine map;
  map.data = t.data;
  map.dtype = t.dtype;
  if (t.ndim == 2) {
    map.stride = t.stride(2) * item_size(t.dtype);
    map.groups = t.size(2);
  }
  return map;
}

inline void lay_out_gated(const Arguments& a, RowNorm& norm) {
  Gating& g = norm.gating;
  g.activation = a.activation;
  g.norm_first = a.norm_before_gate;
  g.round_norm = a.round_each;
  const Tensor* const tensors[] = {&a.x, &a.residual, &a.out, &a.residual_out, &a.z};
  RowsOf* const rows[] = {&norm.x, &norm.residual, &norm.out, &norm.residual_out, &g.z};
  lay_out_rows(a.x, tensors, rows, norm);
}

// The norm behind the sum is the norm of the job, and the one in front of it stands before that;
// without one behind it, y is the sum.
inline void lay_out_post_norm(const Arguments& a, RowNorm& norm) {
  norm.before = {true,
                 affine_of(a.weight),
                 affine_of(a.bias),
                 a.options.eps,
                 a.weight ? a.options.weight_offset : 0.f,
                 a.alpha,
                 a.beta,
                 a.round_norm};
  norm.weight = affine_of(a.next_weight);
  norm.bias = affine_of(a.next_bias);
  norm.options.eps = a.next_eps;
  norm.options.weight_offset = a.next_weight ? a.options.weight_offset : 0.f;
  norm.options.round_sum = true;
  const Tensor none{"out"};
  const Tensor* const tensors[] = {&a.x, &a.residual, a.is_sum() ? &none : &a.out,
                                   a.is_sum() ? &a.out : &a.residual_out};
  RowsOf* const rows[] = {&norm.x, &norm.residual, &norm.out, &norm.residual_out};
  lay_out_rows(a.x, tensors, rows, norm);
}

// A tensor of x's tokens as one of its rows, whose heads share them.
class PerToken : public Tensor {
 public:
  // ndim: of the dimensions that are tokens.  units: of stride, to an element.
  PerToken(const Tensor& t, int ndim, const Tensor& x, int64_t units) : Tensor(t) {
    const int ahead = x.ndim - 2 - ndim;
    for (int d = 0; d < x.ndim - 1; ++d) {
      const bool steps = d >= ahead && d < x.ndim - 2 && t.shape[d - ahead] > 1;
      strides_[d] = steps ? t.strides[d - ahead] * units : 0;
    }
    strides = strides_;
  }
  // Of a table, where rows do not say which of its rows they take; or none.
  explicit PerToken(const Tensor& t) : Tensor(t) { strides = strides_; }
  PerToken(const PerToken&) = delete;
  PerToken& operator=(const PerToken&) = delete;

 private:
  int64_t strides_[kMaxOuterDims + 2] = {};
};

[[gnu::noinline]] inline void lay_out_rotated(const Arguments& a, RowNorm& norm) {
  Rotation& r = norm.rotation;
  r.width = a.rotated ? 2 * a.cos.size(1) : 0;
  r.interleaved = a.interleaved;
  r.round_norm = a.round_norm || a.round_each;
  r.round_each = a.round_each;
  r.position.wide = a.positions.wide;
  if (a.positions) {
    r.positions = a.cos.shape[0];
    r.cos_stride = a.cos.strides[0] * item_size(a.cos.dtype);
    r.sin_stride = a.sin.strides[0] * item_size(a.sin.dtype);
  }
  Cache& c = norm.cache;
  c.slot.wide = a.slots.wide;
  const auto per_token = [&](const Tensor& t) {
    return t && !a.positions ? PerToken(t, t.ndim - 1, a.x, 1) : PerToken(t);
  };
  const auto index = [&](const Indices& t) {
    return t ? PerToken(t, t.ndim, a.x, t.wide ? 2 : 1) : PerToken(t);
  };
  const PerToken cos = per_token(a.cos), sin = per_token(a.sin), positions = index(a.positions),
                 slots = index(a.slots);
  Tensor cache = a.cache;
  int64_t of_heads[kMaxOuterDims + 2] = {};
  c.on = bool(cache);
  if (cache) {
    c.slots = cache.shape[0] * cache.shape[1];
    c.page_slots = cache.shape[1];
    c.page_stride = cache.strides[0] * item_size(cache.dtype);
    c.slot_stride = cache.strides[1] * item_size(cache.dtype);
    of_heads[a.x.ndim - 2] = cache.strides[2];
    cache.strides = of_heads;
  }
  const Tensor* const tensors[] = {&a.x, &a.residual, &a.out, &a.residual_out, &cos,
                                   &sin, &positions,  &cache, &slots};
  RowsOf* const rows[] = {&norm.x, &norm.residual, &norm.out, &norm.residual_out, &r.cos,
                          &r.sin,  &r.position.at, &c.rows,   &c.slot.at};
  lay_out_rows(a.x, tensors, rows, norm);
}

// Not by a return value: the strides of four tensors take 2 KB, and 40 ns to copy.
inline void lay_out(const Arguments& a, RowNorm& norm) {
  norm.weight = affine_of(a.weight);
  norm.bias = affine_of(a.bias);
  norm.statistic = a.statistic;
  norm.n = a.x.size(1);
  norm.options = a.options;
  if (!a.weight) norm.options.weight_offset = 0.f;
  norm.rstd = norm.mean = nullptr;
  norm.before = {};
  norm.modulation = {};
  norm.gating.z.data = nullptr;
  norm.rotation.width = 0;
  norm.cache.on = false;
  if (a.post) return lay_out_post_norm(a, norm);
  if (a.rotated || a.cache) return lay_out_rotated(a, norm);
  if (a.is_modulated()) {
    norm.modulation.round_each = a.round_each;
    if (a.gate) find_rows(a.gate, a.x, norm.modulation.gate);
    if (a.scale) find_rows(a.scale, a.x, norm.modulation.scale);
    if (a.shift) find_rows(a.shift, a.x, norm.modulation.shift);
  }
  if (a.z) return lay_out_gated(a, norm);
  const Tensor* const tensors[] = {&a.x, &a.residual, &a.out, &a.residual_out};
  RowsOf* const rows[] = {&norm.x, &norm.residual, &norm.out, &norm.residual_out};
  lay_out_rows(a.x, tensors, rows, norm);
  norm.x.column_stride = column_stride_of(a.x);
  norm.out.column_stride = a.out ? column_stride_of(a.out) : 0;
}

}  // namespace normkit
