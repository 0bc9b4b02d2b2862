// Batches of norms whose rows may be rotated and go to a cache, on the emulation: held bit for bit
// against the norm of the same kernels by itself, to which C++ does the rest, and against the same
// norms in launches of their own.  All memory counts, that between rows and behind them too.
#include "../../cuda/launch.h"
#include "sweep.hpp"

namespace sweep {
namespace {

enum Angles { kNone, kOfTokens, kOfPositions };
enum Paged { kNoCache, kTokensFirst, kHeadsFirst };

struct Case {
  Statistic statistic;
  NormOptions options;
  bool weight, bias, per_head, in_place, no_out, heads_first, deep;
  DType x, out, weights, cos, cache;
  Angles angles;
  bool interleaved, round_norm, round_each, shared, wide_positions;
  Paged paged;
  bool wide_slots, huge;
  int64_t page_slots, sequences, tokens, heads, n, width, pad, offset;
  uint64_t seed;

  int64_t rows() const { return sequences * tokens * heads; }
  bool rounds_norm() const { return width > 0 && (round_norm || round_each); }
};

std::string name(const Case& c) {
  const auto n = [](int64_t v) { return " " + std::to_string(v); };
  const NormOptions& o = c.options;
  return "rotation, statistic" + n(int(c.statistic)) + " as is" + n(o.as_is) + " options" +
         n(o.round_before_weight) + n(o.clamp_inf) + n(o.round_rstd) + n(o.of_sum) +
         n(o.eps_outside) + n(o.round_weight) + " offset of weight" + n(int(o.weight_offset)) +
         " weight" + n(c.weight) + " bias" + n(c.bias) + " per head" + n(c.per_head) + " in place" +
         n(c.in_place) + " no out" + n(c.no_out) + " heads first" + n(c.heads_first) + " deep" +
         n(c.deep) + " dtypes" + n(int(c.x)) + n(int(c.out)) + n(int(c.weights)) + n(int(c.cos)) +
         n(int(c.cache)) + " angles" + n(c.angles) + " interleaved" + n(c.interleaved) + " rounds" +
         n(c.round_norm) + n(c.round_each) + " shared" + n(c.shared) + " paged" + n(c.paged) +
         " wide" + n(c.wide_positions) + n(c.wide_slots) + " huge" + n(c.huge) + " page" +
         n(c.page_slots) + " sequences" + n(c.sequences) + " tokens" + n(c.tokens) + " heads" +
         n(c.heads) + " n" + n(c.n) + " width" + n(c.width) + " pad" + n(c.pad) + " offset" +
         n(c.offset) + " seed" + n(static_cast<int64_t>(c.seed));
}

// NaN of any sign is NaN.
bool same(float a, float b) {
  return (std::isnan(a) && std::isnan(b)) || std::memcmp(&a, &b, sizeof a) == 0;
}

// Integers of either size, in memory of exactly theirs.
struct Integers {
  std::vector<int64_t> values;
  std::vector<char> memory;
  int64_t size;  // of one, in bytes

  Integers(std::vector<int64_t> given, bool wide) : values(std::move(given)), size(wide ? 8 : 4) {
    memory.resize(values.size() * size);
    for (size_t i = 0; i < values.size(); ++i) {
      const int32_t narrow = static_cast<int32_t>(values[i]);
      if (wide)
        std::memcpy(&memory[i * size], &values[i], size);
      else
        std::memcpy(&memory[i * size], &narrow, size);
    }
  }
};

// Number i of the integers that stand for none of so many things.
int64_t none_of(int64_t count, bool wide, uint64_t i) {
  const int64_t none[] = {
      -1, count, count + 3, INT32_MIN, wide ? INT64_MIN : -2, wide ? int64_t{1} << 32 : INT32_MAX};
  return none[i % 6];
}

constexpr int64_t kPositions = 11;

// A norm and all of its memory.
struct Problem {
  Case c;
  Rows x, out, weight, bias, cos, sin, cache;
  Integers positions, slots;
  std::vector<float> rstd, mean;  // as they are kept for the backward pass

  Problem(const Case& of, std::mt19937_64& random)
      : c(of),
        x(made(c.x, c.rows(), c.n, 0.7f, random)),
        out(made(c.out, c.rows(), c.n, 0, random)),
        weight(made(c.weights, c.heads, c.n, 1.5f, random)),
        bias(made(c.weights, c.heads, c.n, 0.3f, random)),
        cos(made(c.cos, angles(), c.width / 2, 0, random)),
        sin(made(c.cos, angles(), c.width / 2, 0, random)),
        cache(made(c.cache, of_cache(), c.n, 0, random)),
        positions(some_positions(random), c.wide_positions),
        slots(some_slots(random), c.wide_slots),
        rstd(c.rows(), -1.f),
        mean(c.rows(), -1.f) {
    if (c.options.clamp_inf && c.x == DType::kFloat16 && c.rows())
      write(c.x, x.at(c.rows() / 2, c.n / 2), 1e30f);
  }

  // Row r is of that head of that token of that sequence.
  int64_t head(int64_t r) const { return r % c.heads; }
  int64_t token(int64_t r) const { return r / c.heads % c.tokens; }
  int64_t sequence(int64_t r) const { return r / c.heads / c.tokens; }
  // The number of what all heads share.
  int64_t of_token(int64_t r, bool shared) const {
    return (shared ? 0 : sequence(r) * c.tokens) + token(r);
  }
  int64_t at_row(int64_t r) const {
    if (!c.heads_first) return r;
    return (sequence(r) * c.heads + head(r)) * c.tokens + token(r);
  }
  // Of the cache; less than 0 where a row has none.
  int64_t cache_row(int64_t r) const {
    const int64_t slot = slots.values[of_token(r, false)];
    if (slot < 0 || slot >= of_slots()) return -1;
    if (c.huge) return slot / c.page_slots;
    if (c.paged == kTokensFirst) return slot * c.heads + head(r);
    return (slot / c.page_slots * c.heads + head(r)) * c.page_slots + slot % c.page_slots;
  }
  int64_t pages() const { return (c.sequences * c.tokens) / c.page_slots + 2; }
  int64_t of_slots() const { return c.paged ? pages() * c.page_slots : 0; }

  // Strides are those of a sequence, a token and a head.
  void lay_out(RowsOf& rows, char* data, DType dtype, int64_t sequence, int64_t token,
               int64_t head) const {
    rows.data = data;
    rows.dtype = dtype;
    const int64_t strides[] = {sequence * c.sequences / 2, sequence, token, head};
    std::copy(strides + first_dimension(), strides + 4, rows.stride);
  }
  void lay_out(RowsOf& rows, Rows& t) const {
    const int64_t step = t.row_stride;
    if (c.heads_first)
      lay_out(rows, t.data(), t.dtype, c.heads * c.tokens * step, step, c.tokens * step);
    else
      lay_out(rows, t.data(), t.dtype, c.heads * c.tokens * step, c.heads * step, step);
  }
  void lay_out(IndexOf& index, Integers& of, bool shared) const {
    index.wide = of.size == 8;
    lay_out(index.at, of.memory.data(), DType::kFloat32, shared ? 0 : c.tokens * of.size, of.size,
            0);
  }

  void lay_out_norm(RowNorm& norm) {
    norm = {};
    norm.statistic = c.statistic;
    norm.options = c.options;
    norm.rows = c.rows();
    norm.n = c.n;
    const int64_t sizes[] = {2, c.deep ? c.sequences / 2 : c.sequences, c.tokens, c.heads};
    norm.outer_dims = 4 - first_dimension();
    std::copy(sizes + first_dimension(), sizes + 4, norm.outer_size);
    lay_out(norm.x, x);
    if (!c.no_out) lay_out(norm.out, c.in_place ? x : out);
    const auto map = [&](Rows& t) {
      return Affine{t.data(), t.dtype, t.row_stride, 1, c.per_head ? c.heads : 1};
    };
    if (c.weight) norm.weight = map(weight);
    if (c.bias) norm.bias = map(bias);
    if (c.angles) lay_out_rotation(norm.rotation);
    if (c.paged) lay_out_cache(norm.cache);
    if (!c.options.as_is) norm.rstd = rstd.data();
    if (!c.options.as_is && c.statistic == Statistic::kLayer) norm.mean = mean.data();
  }

 private:
  int first_dimension() const { return c.deep ? 0 : c.sequences > 1 ? 1 : 2; }

  void lay_out_rotation(Rotation& r) {
    for (auto [rows, t] : {std::pair{&r.cos, &cos}, std::pair{&r.sin, &sin}}) {
      const bool by_token = c.angles == kOfTokens;
      const int64_t step = by_token ? t->row_stride : 0;
      lay_out(*rows, t->data(), t->dtype, c.shared ? 0 : c.tokens * step, step, 0);
    }
    if (c.angles == kOfPositions) {
      lay_out(r.position, positions, c.shared);
      r.positions = kPositions;
      r.cos_stride = cos.row_stride;
      r.sin_stride = sin.row_stride;
    }
    r.width = c.width;
    r.interleaved = c.interleaved;
    r.round_norm = c.round_norm || c.round_each;
    r.round_each = c.round_each;
  }
  void lay_out_cache(Cache& to) {
    const int64_t row = cache.row_stride;
    const bool tokens_first = c.paged == kTokensFirst;
    lay_out(to.rows, cache.data(), cache.dtype, 0, 0, tokens_first ? row : c.page_slots * row);
    lay_out(to.slot, slots, false);
    to.on = true;
    to.slots = of_slots();
    to.page_slots = c.page_slots;
    to.slot_stride = c.huge ? 0 : tokens_first ? c.heads * row : row;
    to.page_stride = c.huge ? row : c.page_slots * c.heads * row;
  }

  Rows made(DType dtype, int64_t count, int64_t n, float around, std::mt19937_64& random) const {
    Rows t(dtype, count, n, c.pad, c.offset);
    std::fill(t.memory.begin(), t.memory.end(), kUntouchedByte);
    if (n > 0) fill(t, count, n, random, around);
    return t;
  }
  int64_t angles() const {
    return c.angles == kOfPositions ? kPositions : c.tokens * (c.shared ? 1 : c.sequences);
  }
  int64_t of_cache() const { return c.huge ? 2 : of_slots() * c.heads; }
  std::vector<int64_t> some_positions(std::mt19937_64& random) const {
    std::vector<int64_t> found(c.sequences * c.tokens);
    for (int64_t& p : found)
      p = random() % 5 ? static_cast<int64_t>(random() % kPositions)
                       : none_of(kPositions, c.wide_positions, random());
    return found;
  }
  std::vector<int64_t> some_slots(std::mt19937_64& random) const {
    if (c.huge) return {c.page_slots + 5};
    std::vector<int64_t> found(of_slots());
    for (size_t i = 0; i < found.size(); ++i) found[i] = static_cast<int64_t>(i);
    std::shuffle(found.begin(), found.end(), random);
    found.resize(c.sequences * c.tokens);
    for (int64_t& slot : found)
      if (random() % 5 == 0) slot = none_of(of_slots(), c.wide_slots, random());
    return found;
  }
};

// x itself, with the weight and the bias.
float as_it_is(Problem& p, int64_t r, int64_t i) {
  const Case& c = p.c;
  const int64_t head = c.per_head ? p.head(r) : 0;
  float x = read(c.x, p.x.at(p.at_row(r), i));
  if (c.options.clamp_inf && c.x == DType::kFloat16) x = std::clamp(x, -65504.f, 65504.f);
  if (!c.weight) return c.bias ? x + read(c.weights, p.bias.at(head, i)) : x;
  float weight = read(c.weights, p.weight.at(head, i));
  if (c.options.weight_offset != 0.f) weight += c.options.weight_offset;
  if (c.options.round_weight) weight = static_cast<float>(rounded(c.weights, weight));
  return c.bias ? std::fmaf(x, weight, read(c.weights, p.bias.at(head, i))) : x * weight;
}

// The norm by itself, of all rows in their order.
Rows norm_of(Problem& p) {
  const Case& c = p.c;
  Rows n(c.rounds_norm() ? c.x : DType::kFloat32, c.rows(), c.n, 0, 0);
  if (c.options.as_is) {
    for (int64_t r = 0; r < c.rows(); ++r)
      for (int64_t i = 0; i < c.n; ++i) write(n.dtype, n.at(r, i), as_it_is(p, r, i));
    return n;
  }
  RowNorm plain;
  p.lay_out_norm(plain);
  plain.rotation = {};
  plain.cache = {};
  const int64_t step = n.row_stride;
  p.lay_out(plain.out, n.data(), n.dtype, c.heads * c.tokens * step, c.heads * step, step);
  cuda::row_norm(plain, 0, nullptr);
  return n;
}

// What becomes of a row of the norm.
void rotate(Problem& p, int64_t r, std::vector<float>& n) {
  const Case& c = p.c;
  const int64_t half = c.width / 2;
  int64_t at = p.of_token(r, c.shared);
  if (c.angles == kOfPositions) at = p.positions.values[at];
  const bool known = c.angles == kOfTokens || (at >= 0 && at < kPositions);
  const DType dtype = c.x == c.cos ? c.x : DType::kFloat32;
  const auto product = [&](float a, float b) {
    const float made = a * b;
    return c.round_each ? static_cast<float>(rounded(dtype, made)) : made;
  };
  for (int64_t i = 0; i < half; ++i) {
    const float cos = known ? read(c.cos, p.cos.at(at, i)) : NAN;
    const float sin = known ? read(c.cos, p.sin.at(at, i)) : NAN;
    float& a = n[c.interleaved ? 2 * i : i];
    float& b = n[c.interleaved ? 2 * i + 1 : half + i];
    const float was_a = a, was_b = b;
    a = product(was_a, cos) + product(-was_b, sin);
    b = product(was_b, cos) + product(was_a, sin);
  }
}

void solve(Problem& p) {
  const Case& c = p.c;
  Rows norm = norm_of(p);
  for (int64_t r = 0; r < c.rows(); ++r) {
    std::vector<float> y(c.n);
    for (int64_t i = 0; i < c.n; ++i) y[i] = read(norm.dtype, norm.at(r, i));
    if (c.width) rotate(p, r, y);
    Rows& out = c.in_place ? p.x : p.out;
    const int64_t in_cache = c.paged ? p.cache_row(r) : -1;
    for (int64_t i = 0; i < c.n; ++i) {
      if (!c.no_out) write(out.dtype, out.at(p.at_row(r), i), y[i]);
      if (in_cache >= 0) write(c.cache, p.cache.at(in_cache, i), y[i]);
    }
  }
}

// Not one element of all memory may differ.
void expect(const char* what, Problem& got, Problem& want) {
  struct Part {
    const char* of;
    Rows &got, &want;
  };
  for (const Part& part : {Part{"x", got.x, want.x}, Part{"out", got.out, want.out},
                           Part{"the cache", got.cache, want.cache}}) {
    const DType dtype = part.got.dtype;
    const int64_t size = item_size(dtype), step = part.got.row_stride / size;
    for (size_t at = 0; at < part.got.memory.size(); at += size) {
      const float mine = read(dtype, &part.got.memory[at]);
      const float right = read(dtype, &part.want.memory[at]);
      if (same(mine, right)) continue;
      const int64_t i = (static_cast<int64_t>(at) - part.got.bytes_before) / size;
      report(name(got.c), (std::string(what) + part.of).c_str(), i / step, i % step, mine, right);
    }
  }
}

void expect_kept(const char* what, const Problem& got, const Problem& want) {
  for (int64_t r = 0; r < got.c.rows(); ++r) {
    if (!same(got.rstd[r], want.rstd[r]))
      report(name(got.c), (std::string(what) + "rstd").c_str(), r, 0, got.rstd[r], want.rstd[r]);
    if (!same(got.mean[r], want.mean[r]))
      report(name(got.c), (std::string(what) + "mean").c_str(), r, 0, got.mean[r], want.mean[r]);
  }
}

void run(const std::vector<Case>& cases, uint64_t seed) {
  std::mt19937_64 random(seed);
  emu::seed(seed);
  std::vector<Problem> together;
  for (const Case& c : cases) together.emplace_back(c, random);
  std::vector<Problem> alone = together, right = together;
  std::vector<RowNorm> norms(cases.size());
  for (size_t i = 0; i < cases.size(); ++i) together[i].lay_out_norm(norms[i]);
  std::vector<const RowNorm*> batch;
  for (const RowNorm& norm : norms) batch.push_back(&norm);
  cuda::row_norms(batch.data(), static_cast<int>(batch.size()), 0, nullptr);
  for (size_t i = 0; i < cases.size(); ++i) {
    solve(right[i]);
    expect("in a batch, ", together[i], right[i]);
    expect_kept("in a batch, ", together[i], right[i]);
    alone[i].lay_out_norm(norms[i]);
    cuda::row_norm(norms[i], 0, nullptr);
    expect("alone, ", alone[i], right[i]);
    expect_kept("alone, ", alone[i], right[i]);
  }
}

struct Sweep {
  std::mt19937_64 random;
  uint64_t share, of, count = 0;

  bool chance(int one_in) { return random() % one_in == 0; }
  template <class T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[random() % values.size()];
  }
  DType dtype() { return static_cast<DType>(random() % 3); }

  Case some(DType x, DType cos, int64_t n, int64_t tokens) {
    Case c{};
    c.statistic = static_cast<Statistic>(random() % 2);
    c.x = x;
    c.cos = cos;
    c.out = chance(2) ? x : dtype();
    c.weights = dtype();
    c.cache = chance(2) ? x : dtype();
    c.n = n;
    c.tokens = tokens;
    c.sequences = one_of<int64_t>({1, 1, 2, 4});
    c.heads = one_of<int64_t>({1, 2, 3});
    c.deep = c.sequences > 1 && chance(3);
    c.heads_first = chance(3);
    c.weight = !chance(3);
    c.bias = chance(3);
    c.per_head = chance(2);
    c.in_place = chance(3);
    c.options.eps = chance(2) ? 0.25f : 1e-6f;
    c.options.weight_offset = c.weight && chance(2) ? 1.f : 0.f;
    c.options.round_before_weight = chance(3);
    c.options.clamp_inf = chance(3);
    c.options.round_rstd = chance(4);
    c.options.of_sum = c.statistic == Statistic::kRms && chance(4);
    c.options.eps_outside = c.statistic == Statistic::kRms && chance(4);
    c.options.round_weight = chance(4);
    c.options.as_is = chance(4);
    if (n > 1 && !chance(5)) {
      const int64_t most = n / 2 * 2;
      c.angles = chance(2) ? kOfTokens : kOfPositions;
      c.width = chance(2) ? most : std::min(most, one_of<int64_t>({2, 20, 24, 32, 64, n / 4 * 2}));
      if (c.width == 0) c.width = 2;
      c.interleaved = chance(2);
      c.round_norm = chance(2);
      c.round_each = chance(3);
      c.shared = chance(2);
      c.wide_positions = chance(2);
    }
    if (!chance(3)) {
      c.paged = chance(2) ? kTokensFirst : kHeadsFirst;
      c.page_slots = one_of<int64_t>({1, 4, 5});
      c.wide_slots = chance(2);
      c.no_out = chance(3);
      c.in_place = c.in_place && !c.no_out;
    } else {
      c.page_slots = 1;
    }
    if (chance(30)) c.tokens = 0;
    c.pad = chance(2) ? 8 : static_cast<int64_t>(random() % 9);
    c.offset = chance(2) ? 0 : static_cast<int64_t>(random() % 5);
    return c;
  }

  // A slot whose number has more than 32 bits, and is that of its page but for a few.
  Case huge() {
    Case c = some(DType::kBFloat16, DType::kBFloat16, 64, 1);
    c.sequences = c.heads = c.tokens = 1;
    c.deep = false;
    c.huge = c.wide_slots = true;
    c.paged = kTokensFirst;
    c.page_slots = (int64_t{1} << 32) + 3;
    return c;
  }

  void add(DType x, DType cos, int64_t n, int64_t tokens) {
    if (count++ % of != share) return;
    normkit_emulate_device(chance(3) ? 64 : 1, !chance(4));
    std::vector<Case> batch{some(x, cos, n, tokens)};
    for (uint64_t more = random() % 5; more > 0; --more)
      batch.push_back(some(dtype(), dtype(), one_of<int64_t>({1, 5, 64, 100, 128, 576, 1200}),
                           one_of<int64_t>({1, 3, 9})));
    if (chance(8)) batch.push_back(huge());
    run(batch, random());
  }
};

}  // namespace

uint64_t sweep_rotation(uint64_t seed, uint64_t share, uint64_t of) {
  Sweep sweep{std::mt19937_64(seed), share, of};
  const DType dtypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  for (const DType x : dtypes)
    for (const DType cos : dtypes)
      for (const int64_t n :
           {1, 2, 7, 20, 64, 80, 128, 192, 200, 256, 512, 576, 1024, 2048, 4100, 20000}) {
        sweep.add(x, cos, n, 2);
        if (n < 300) sweep.add(x, cos, n, 50);  // in several launches
        if (n < 300) sweep.add(x, cos, n, 7);
      }
  return sweep.count;
}

}  // namespace sweep
