#include "row_norm.h"

#include <algorithm>

#include "columns.h"
#include "cursor.h"
#include "memory.h"
#include "modulation.h"
#include "rotation.h"
#include "stage_choice.h"
#include "statistics.h"
#include "threads.h"

namespace normkit::cpu {
namespace {

// ---------------------------------------------------------------- memory

// Rows that fit here stay in the first-level cache from one stage to the next, with the output and
// the weight.
constexpr int64_t kBlockBytes = 8 << 10;
// Where rows come from memory it pays to fetch the next ones while these are stored (AVX2, Zen 3,
// 2048x4096: rms a tenth to a quarter faster).  From the caches it costs as much, and with a
// residual, of which nothing is fetched, up to a tenth.
constexpr int64_t kFetchBytes = 8 << 20;

thread_local Scratch affine_scratch;
thread_local Scratch wide_scratch;
thread_local Scratch modulation_scratch;
thread_local Scratch before_scratch;
thread_local Scratch columns_scratch;

// ---------------------------------------------------------------- one call

// A row of float32 for each row of a block becomes act(z), in some layout; times the row's weight,
// where that is in the same layout.
void activate(Block& b, const RowNorm& norm, Layout layout, bool has_weight,
              const Kernels& kernels) {
  const int64_t n = padded(norm.n);
  for (int r = 0; r < b.rows; ++r) {
    const Affine z{static_cast<const char*>(b.z[r]), norm.gating.z.dtype};
    kernels.affine[int(z.dtype)][int(layout)](z.data, norm.n, -0.f, false, b.factor[r]);
    add_last_chunk(z, 0, norm.n, layout, 0.f, false, kernels, b.factor[r]);
    kernels.activate[int(norm.gating.activation)](
        b.factor[r], n, has_weight ? static_cast<const float*>(b.weight[r]) : nullptr);
    b.gate[r] = b.scale[r] = b.factor[r];
    b.shift[r] = nullptr;
  }
}

// b.source becomes what is normalised.
void prepare(Block& b, const Stages& s, const RowNorm& norm, const Kernels& kernels) {
  if (s.clamp_x) {
    s.clamp_x(b);
    for (int r = 0; r < b.rows; ++r) b.x[r] = b.wide[r];
  }
  if (norm.gating.is_before_norm()) activate(b, norm, Layout::kNatural, false, kernels);
  if (s.gate) {
    s.gate(b);
    for (int r = 0; r < b.rows; ++r) b.x[r] = b.wide[r];
  }
  if (s.add) s.add(b);
  if (s.clamp_sum) {
    for (int r = 0; r < b.rows; ++r) b.x[r] = b.residual_out[r];
    s.clamp_sum(b);
  }
  if (s.wide || s.keeps_sum)
    std::copy_n(b.wide, b.rows, b.source);
  else if (s.add)
    std::copy_n(b.residual_out, b.rows, b.source);
  else
    std::copy_n(b.x, b.rows, b.source);
}

// b.sum becomes the sum of squares, about b.mean where there is one.
void add_up(Block& b, const Stages& s) {
  if (!b.has_sum) (s.sum ? s.sum : s.squares)(b);
  if (!s.sum) return;
  const float n = static_cast<float>(b.n);
  for (int r = 0; r < b.rows; ++r) b.mean[r] = b.sum[r] / n;
  s.squares(b);
}

// 1 + scale and shift become weight and bias.
void take_modulation(Block& b) {
  b.has_bias = b.shift[0];
  std::copy_n(b.scale, b.rows, b.weight);
  std::copy_n(b.shift, b.rows, b.bias);
  const auto is_first = [](const void* const(&rows)[kMaxBlockRows], int count) {
    return std::all_of(rows, rows + count, [&](const void* row) { return row == rows[0]; });
  };
  b.shared = is_first(b.weight, b.rows) && is_first(b.bias, b.rows);
}

// The norm goes to memory of this thread, and as the row of a norm whose rstd is 1 from there to
// the output.
void apply_and_modulate(Block& b, const Stages& s) {
  const bool stream = b.stream;
  b.stream = false;
  for (int r = 0; r < b.rows; ++r) std::swap(b.out[r], b.normalised[r]);
  s.apply(b);
  b.stream = stream;
  take_modulation(b);
  for (int r = 0; r < b.rows; ++r) {
    b.source[r] = b.out[r];
    b.out[r] = b.normalised[r];
    b.next[r] = nullptr;
    b.rstd[r] = 1.f;
  }
  s.modulate(b);
}

// The norm goes to memory of this thread, and rotated from there to the output.
void apply_and_rotate(Block& b, const Stages& s, Rotator& rotator) {
  for (int r = 0; r < b.rows; ++r) std::swap(b.out[r], b.normalised[r]);
  s.apply(b);
  for (int r = 0; r < b.rows; ++r) {
    std::swap(b.out[r], b.normalised[r]);
    rotator.rotate(b.normalised[r], b.cos[r], b.sin[r], b.out[r]);
  }
}

// The block's first row is `row`.
void run(Block& b, const Stages& s, const RowNorm& norm, const Kernels& kernels, int64_t row,
         Rotator* rotator = nullptr) {
  prepare(b, s, norm, kernels);
  if (!s.squares) return;
  if (norm.options.as_is) {
    std::fill_n(b.mean, b.rows, 0.f);
    std::fill_n(b.rstd, b.rows, 1.f);
  } else {
    if (norm.split.step == Step::kApply) {
      combine(b, norm, row);
    } else {
      add_up(b, s);
      if (norm.split.step == Step::kStatistics) return save_statistics(b, norm, row);
    }
    take_rstd(b, norm, s.rstd);
  }
  if (norm.rstd) std::copy_n(b.rstd, b.rows, norm.rstd + row);
  if (norm.mean) std::copy_n(b.mean, b.rows, norm.mean + row);
  if (norm.gating.is_behind_norm()) {
    activate(b, norm, s.modulation_layout, s.scale_has_weight, kernels);
    if (s.has_scale) take_modulation(b);
  }
  if (rotator) return apply_and_rotate(b, s, *rotator);
  if (b.sums_next) return s.apply_and_sum(b);
  s.modulate ? apply_and_modulate(b, s) : s.apply(b);
}

// A norm in front of the sum.
struct First {
  RowNorm norm;
  Stages stages;
  float* memory;  // floats for each part: weight and bias as prepared, and the rows of a block
  int64_t floats;
};

struct Job {
  const RowNorm& norm;
  Plan plan;
  Stages stages;
  const Kernels& kernels;
  float* affine;  // affine_floats for each part, where weight and bias are not used as stored
  int64_t affine_floats;
  float* wide;  // block_rows rows for each part
  // modulation_floats for each part: ModulationCursor's, Rotator's, or those of act(z); and
  // normalised rows
  float* modulation;
  int64_t modulation_floats;
  float* columns = nullptr;  // columns_floats for each part, where columns are strided
  int64_t columns_floats = 0;
  First* first = nullptr;
};

struct AffinePair {
  AffineRows weight, bias;
};

AffineRows prepared_to_apply(const Affine& affine, const RowNorm& norm, const Stages& s,
                             float offset, bool rounds, const Kernels& kernels, float*& buffer) {
  const Layout layout = s.layout;
  const int64_t n = norm.n;
  float* row = buffer;
  // An activation works on whole chunks, and so it reads the weight.
  const bool copies = is_overwritten(norm) || (s.scale_has_weight && n % kChunk != 0);
  const AffineRows rows = prepared(affine, n, layout, offset, rounds, copies, kernels, buffer);
  if (affine.data && (copies || !is_as_read(affine, layout, offset)))
    for (int64_t group = 0; group < affine.groups; ++group, row += padded(n))
      add_last_chunk(affine, group, n, layout, offset, rounds, kernels, row);
  return rows;
}

// Each part prepares its own: to read what another core has just written takes longer than to write
// it again (4096 columns on Zen 4: 0.14 us to write, 8 us to fetch).
AffinePair affine_of(const RowNorm& norm, const Stages& s, const Kernels& kernels, float* buffer) {
  if (s.has_scale && !s.scale_has_weight) return {};
  if (s.affine_as_stored) return {stored(norm.weight), stored(norm.bias)};
  AffinePair pair;
  pair.weight = prepared_to_apply(norm.weight, norm, s, norm.options.weight_offset,
                                  norm.options.round_weight, kernels, buffer);
  if (norm.bias.data)
    pair.bias = prepared_to_apply(norm.bias, norm, s, 0.f, false, kernels, buffer);
  return pair;
}

int64_t affine_floats(const RowNorm& norm) {
  return padded(norm.n) * (norm.weight.groups + norm.bias.groups);
}

// A row's weight and bias, of those that all rows share.
void take_affine(Block& b, const AffinePair& affine) {
  b.has_bias = affine.bias.data != nullptr;
  std::fill_n(b.weight, b.rows, affine.weight.data);
  std::fill_n(b.bias, b.rows, affine.bias.data);
}

// b.x becomes the norm of x, in memory of this thread from `rows` on.
void normalise_first(Block& b, const First& first, const AffinePair& affine, const Kernels& kernels,
                     float* rows, int64_t row) {
  void* out[kMaxBlockRows];
  for (int r = 0; r < b.rows; ++r) {
    out[r] = b.out[r];
    b.out[r] = rows + r * padded(b.n);
  }
  const bool stream = b.stream;
  b.stream = false;
  take_affine(b, affine);
  run(b, first.stages, first.norm, kernels, row);
  b.stream = stream;
  for (int r = 0; r < b.rows; ++r) {
    b.x[r] = b.out[r];
    b.out[r] = out[r];
  }
}

void run_part(void* context, int part) {
  const Job& job = *static_cast<const Job*>(context);
  const RowNorm& norm = job.norm;
  // Parts are whole blocks, so that only the last block of all is short.
  const int64_t blocks = (norm.rows + job.plan.block_rows - 1) / job.plan.block_rows;
  const int64_t begin = blocks * part / job.plan.threads * job.plan.block_rows;
  const int64_t end =
      std::min(norm.rows, blocks * (part + 1) / job.plan.threads * job.plan.block_rows);
  if (begin >= end) return;
  float* const prepared_at = job.affine ? job.affine + part * job.affine_floats : nullptr;
  const AffinePair affine = affine_of(norm, job.stages, job.kernels, prepared_at);
  AffinePair affine_first;
  float* normalised_first = nullptr;
  if (job.first) {
    float* const memory = job.first->memory + part * job.first->floats;
    affine_first = affine_of(job.first->norm, job.first->stages, job.kernels, memory);
    normalised_first = memory + affine_floats(job.first->norm);
  }
  float* wide = job.wide ? job.wide + part * job.plan.block_rows * padded(norm.n) : nullptr;
  enum { kX, kResidual, kOut, kResidualOut };
  const RowsOf* const tensors[] = {&norm.x, &norm.residual, &norm.out, &norm.residual_out};
  Cursor cursor(tensors, norm.outer_dims, norm.outer_size, begin);
  GroupCursor affine_cursor(norm.weight, norm.bias, begin);
  Room<ModulationCursor> modulation_cursor;
  Room<Cursor<1>> z_cursor;
  float* const memory = job.modulation ? job.modulation + part * job.modulation_floats : nullptr;
  float* normalised = memory;
  Room<RotationCursor> rotation_cursor;
  Room<Rotator> rotator;
  Room<CacheCursor> cache_cursor;
  if (norm.cache) cache_cursor.emplace(norm, begin);
  if (norm.gating) {
    const RowsOf* const z[] = {&norm.gating.z};
    z_cursor.emplace(z, norm.outer_dims, norm.outer_size, begin);
  } else if (norm.rotation) {
    rotation_cursor.emplace(norm, begin);
    rotator.emplace(norm, job.stages.rotate, job.kernels, memory);
    normalised = memory + Rotator::floats(norm);
  } else if (memory) {
    normalised = memory + ModulationCursor::floats(norm, job.plan.block_rows);
    modulation_cursor.emplace(norm, job.stages.modulation_layout, job.plan.block_rows, begin,
                              job.kernels, memory);
  }
  const auto fill = [&](Block& b, int64_t row) {
    b.n = norm.n;
    b.rows = static_cast<int>(std::min(job.plan.block_rows, end - row));
    b.has_bias = affine.bias.data != nullptr;
    b.shared = groups_of(norm.weight, norm.bias) == 1;
    b.stream = job.plan.stream;
    b.fetch = job.plan.fetch;
    b.has_sum = job.stages.add_sums;
    b.alpha = norm.before.alpha, b.beta = norm.before.beta;
    for (int64_t r = 0, run; r < b.rows; r += run, cursor.skip(run)) {
      run = std::min(b.rows - r, cursor.run());
      cursor.place(kX, run, b.x + r);
      cursor.place(kResidual, run, b.residual + r);
      cursor.place(kOut, run, b.out + r);
      cursor.place(kResidualOut, run, b.residual_out + r);
    }
    for (int r = 0; wide && r < b.rows; ++r) b.wide[r] = wide + r * padded(norm.n);
    if (b.shared) {
      std::fill_n(b.weight, b.rows, affine.weight.data);
      std::fill_n(b.bias, b.rows, affine.bias.data);
    } else {
      for (int r = 0; r < b.rows; ++r, affine_cursor.next()) {
        b.weight[r] = affine.weight.row(affine_cursor.group());
        b.bias[r] = affine.bias.row(affine_cursor.group());
      }
    }
    if (!memory) return;
    for (int r = 0; r < b.rows; ++r) b.normalised[r] = normalised + r * padded(norm.n);
    if (z_cursor) {
      float* const factors = memory + job.plan.block_rows * padded(norm.n);
      for (int r = 0; r < b.rows; ++r, z_cursor->next()) {
        b.z[r] = z_cursor->at(0);
        b.factor[r] = factors + r * padded(norm.n);
      }
      return;
    }
    if (rotation_cursor) return rotation_cursor->fill(b);
    modulation_cursor->fill(b);
    if (job.stages.has_scale) take_modulation(b);
  };
  Room<StridedColumns> columns;
  if (job.columns)
    columns.emplace(norm, job.plan.block_rows,
                    reinterpret_cast<char*>(job.columns + part * job.columns_floats));
  Block blocks_in_flight[2];
  Block* block = &blocks_in_flight[0];
  Block* next = &blocks_in_flight[1];
  fill(*block, begin);
  for (int64_t row = begin; row < end; row += job.plan.block_rows) {
    const bool more = row + block->rows < end;
    if (more) fill(*next, row + block->rows);
    block->sums_next = job.stages.apply_and_sum && more && next->rows == block->rows;
    const bool looks_ahead = more && (job.plan.fetch || block->sums_next);
    const int ahead = looks_ahead ? std::min(block->rows, next->rows) : 0;
    std::copy_n(next->x, ahead, block->next);
    std::fill_n(block->next + ahead, block->rows - ahead, nullptr);
    if (job.first) {
      normalise_first(*block, *job.first, affine_first, job.kernels, normalised_first, row);
      take_affine(*block, affine);
    }
    if (columns) columns->take(*block);
    run(*block, job.stages, norm, job.kernels, row, rotator ? &*rotator : nullptr);
    if (columns) columns->give(*block);
    if (cache_cursor) cache_cursor->store(*block);
    if (block->sums_next) {
      std::copy_n(block->next_sum, next->rows, next->sum);
      next->has_sum = true;
    }
    std::swap(block, next);
  }
  if (job.plan.stream) end_of_stream();
}

int64_t row_bytes(const RowNorm& norm) {
  int64_t bytes = 0;
  for (const RowsOf* t : {&norm.x, &norm.residual, &norm.out, &norm.residual_out, &norm.gating.z})
    if (t->data) bytes += norm.n * item_size(t->dtype);
  return bytes;
}

}  // namespace

Plan plan(const RowNorm& norm) {
  const int64_t traffic = row_bytes(norm) * norm.rows;
  const bool in_place = norm.out.data == norm.x.data || norm.out.data == norm.residual.data;
  Plan p;
  p.stream = norm.out.data && fills_last_cache(traffic) && !in_place && !norm.rotation &&
             on_cache_lines(norm.out, norm.outer_dims, norm.n);
  p.fetch = traffic >= kFetchBytes && !norm.residual.data && !norm.x.has_strided_columns();
  p.block_rows =
      std::clamp<int64_t>(kBlockBytes / (norm.n * item_size(norm.x.dtype)), 1, kMaxBlockRows);
  if (has_strided_columns(norm)) p.block_rows = rows_of_strided_block(norm, traffic);
  const int64_t blocks = (norm.rows + p.block_rows - 1) / p.block_rows;
  p.threads = is_overwritten(norm) ? 1 : threads_for(traffic, blocks);
  return p;
}

std::string describe(const RowNorm& norm) {
  const Plan p = plan(norm);
  std::string text = std::string(instruction_set()) + ", " + std::to_string(p.threads) +
                     (p.threads == 1 ? " thread, " : " threads, ") + std::to_string(p.block_rows) +
                     (p.block_rows == 1 ? " row" : " rows") + " at a time";
  if (p.stream) {
    text += ", stores around the caches";
    if (stages_of(norm, p, kernels_in_use()).keeps_sum) text += ", of the sum too";
  }
  if (has_strided_columns(norm)) text += ", strided columns transposed on the way";
  return text;
}

void row_norm(const RowNorm& norm) {
  if (norm.rows == 0) return;
  const Kernels& kernels = kernels_in_use();
  const Plan p = plan(norm);
  const Stages stages = stages_of(norm, p, kernels);
  Job job{norm, p, stages, kernels, nullptr, 0, nullptr, nullptr, 0};
  if (!job.stages.affine_as_stored && (!job.stages.has_scale || job.stages.scale_has_weight)) {
    job.affine_floats = affine_floats(norm);
    job.affine = affine_scratch.reserve(job.plan.threads * job.affine_floats);
  }
  if (norm.modulation || norm.gating || norm.rotation) {
    const int64_t rows = job.plan.block_rows * padded(norm.n);
    job.modulation_floats =
        rows + (norm.gating     ? rows
                : norm.rotation ? Rotator::floats(norm)
                                : ModulationCursor::floats(norm, job.plan.block_rows));
    job.modulation = modulation_scratch.reserve(job.plan.threads * job.modulation_floats);
  }
  if (has_strided_columns(norm)) {
    job.columns_floats = StridedColumns::bytes(norm, job.plan.block_rows) / sizeof(float);
    job.columns = columns_scratch.reserve(job.plan.threads * job.columns_floats);
  }
  Room<First> first;
  if (norm.before) {
    first.emplace(First{norm_before_sum(norm), {}, nullptr, 0});
    first->stages = stages_of(first->norm, p, kernels);
    first->floats = affine_floats(first->norm) + job.plan.block_rows * padded(norm.n);
    first->memory = before_scratch.reserve(job.plan.threads * first->floats);
    job.first = &*first;
  }
  if (job.stages.wide || job.stages.keeps_sum || job.stages.clamp_x || job.stages.gate ||
      (first && first->stages.wide))
    job.wide = wide_scratch.reserve(job.plan.threads * job.plan.block_rows * padded(norm.n));
  run_on_threads(job.plan.threads, run_part, &job);
  if (job.affine) affine_scratch.trim();
  if (job.wide) wide_scratch.trim();
  if (job.modulation) modulation_scratch.trim();
  if (job.first) before_scratch.trim();
  if (job.columns) columns_scratch.trim();
}

}  // namespace normkit::cpu
