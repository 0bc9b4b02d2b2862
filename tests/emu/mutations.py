"""What `mutants.py` breaks: patches, each of which stands for a bug that somebody has had."""

from __future__ import annotations

from dataclasses import dataclass, replace

PLAIN, ADDRESS, THREAD = "plain", "address,undefined", "thread"


@dataclass(frozen=True)
class Mutant:
    name: str
    stands_for: str
    build: str
    file: str
    patches: tuple[tuple[str, str], ...]
    only: str = "forward"  # the part of the sweep that is to see it


def mutant(name: str, stands_for: str, build: str, file: str, old: str, new: str) -> Mutant:
    return Mutant(name, stands_for, build, file, ((old, new),))


PACK = "cuda/pack.cuh"
REDUCE = "cuda/reduce.cuh"
ROWS = "cuda/rows.cuh"
ACCESS = "cuda/access.cuh"
ARGS = "cuda/args.cuh"
ROW = "cuda/row.cuh"
EPILOGUE = "cuda/epilogue.cuh"
ROW_NORM = "cuda/row_norm.cuh"
STREAMED = "cuda/streamed_row_norm.cuh"
LAUNCH = "cuda/launch.cu"
LAUNCHES = "cuda/launches.h"
BACKWARD = "cuda/row_norm_backward.cuh"
PARTIAL = "cuda/partial_sums.cuh"
SPLIT = "cuda/split.cuh"
LAUNCH_BACKWARD = "cuda/launch_backward.cu"

WARP_TREE = """\
    float* const mine = const_cast<float*>(of_group) + lane * kWarps;
    *mine = fold_warps<kWarps>(mine);
    for (int half = kWarp / 2; half > 0; half /= 2)
      if (lane < half) *mine += mine[half * kWarps];
    __syncwarp(0xffffffffu);
    return *of_group;
"""

FORWARD = (
    mutant(
        "tail-load",
        "a whole pack is loaded where the row ends inside it",
        ADDRESS,
        PACK,
        "    const Item* from = reinterpret_cast<const Item*>(row.data) + column;\n"
        "    if (row.wide && column + kRun <= end) {",
        "    const Item* from = reinterpret_cast<const Item*>(row.data) + column;\n"
        "    if (row.wide && column < end) {",
    ),
    mutant(
        "alignment-not-checked",
        "16 bytes at once from rows of any alignment",
        ADDRESS,
        LAUNCHES,
        "return offset % std::min<int64_t>(16, pack * item_size(dtype)) == 0;",
        "return (void)offset, (void)dtype, (void)pack, true;",
    ),
    mutant(
        "storage-used-twice",
        "both reductions through one storage, without a barrier between them",
        THREAD,
        ROW_NORM,
        "mean, squares_storage,",
        "mean, kStatistic == Statistic::kLayer ? sum_storage : squares_storage,",
    ),
    mutant(
        "warp-tree-unsynced",
        "a tree over shared memory that trusts a warp to run in step",
        THREAD,
        REDUCE,
        "    return fold_lanes(fold_warps<kWarps>(of_group + lane * kWarps), kWarp);\n",
        WARP_TREE,
    ),
    mutant(
        "barrier-missing",
        "other warps' sums are read before they are written",
        THREAD,
        REDUCE,
        "  __syncthreads();\n  // Not by",
        "  // Not by",
    ),
    mutant(
        "barrier-divergent",
        "a barrier that only threads with columns of the row reach",
        PLAIN,
        REDUCE,
        "  __syncthreads();\n  // Not by",
        "  if (v.quad[0] != 0.f) __syncthreads();\n  // Not by",
    ),
    mutant(
        "shared-uninitialised",
        "sums of warps that the group does not have",
        PLAIN,
        REDUCE,
        "  if (warps < 4) return fold_group<kQuads, 2>(of_group);\n",
        "",
    ),
    mutant(
        "offset-32-bits",
        "row * stride in 32 bits, for tensors of more than 2 GiB",
        PLAIN,
        ROWS,
        "int64_t offset = at[2] * rows.stride[2];",
        "int64_t offset = static_cast<int>(at[2] * static_cast<uint32_t>(rows.stride[2]));",
    ),
    mutant(
        "order-follows-lanes",
        "a batch of another size gives other bits",
        PLAIN,
        REDUCE,
        "for (int half = kMost / 2; half > 0; half /= 2)",
        "for (int half = 1; half < kMost; half *= 2)",
    ),
    mutant(
        "mean-lost",
        "LayerNorm without its mean",
        PLAIN,
        ROW,
        "v.v[i] = (v.v[i] - mean) * rstd;",
        "v.v[i] = v.v[i] * rstd;",
    ),
    mutant(
        "offset-in-weight-dtype",
        "1 + weight rounded to bfloat16 (Gemma's norm)",
        PLAIN,
        EPILOGUE,
        "Variant::kPlain ? w.v[i] : w.v[i] + a.options.weight_offset;",
        "Variant::kPlain ? w.v[i] : Access::rounded(w.v[i] + a.options.weight_offset, "
        "a.weight.dtype);",
    ),
    mutant(
        "wrong-head",
        "tokens and heads exchanged in the choice of the weight",
        PLAIN,
        ROWS,
        "at_head - a.heads.divide(at_head) * a.heads.value;",
        "a.heads.divide(at_head) % a.heads.value;",
    ),
    mutant(
        "sum-written-early",
        "residual_out takes the residual's memory before its last read",
        PLAIN,
        STREAMED,
        "      return values_of(column, sum);\n",
        "      const Values v = values_of(column, sum);\n"
        "      if constexpr (kAdds)\n"
        "        Access::store(place.of(a.residual_out, a.dims), column, end, sum);\n"
        "      return v;\n",
    ),
    mutant(
        "tail-dropped",
        "columns behind the last whole pack are left out",
        PLAIN,
        STREAMED,
        "column < end; column +=",
        "column + kSize <= end; column +=",
    ),
    Mutant(
        "rounded-after-weight",
        "Llama's rounding before the weight comes after it",
        PLAIN,
        EPILOGUE,
        (
            ("[&] { v = Access::rounded(v, a.normalised); }", "[] {}"),
            (
                "v.v[i] = Variant::kBias ? fmaf(v.v[i], factor, b.v[i]) : v.v[i] * factor;",
                "v.v[i] *= factor;\n"
                "        if (a.options.round_before_weight)\n"
                "          v.v[i] = Access::rounded(v.v[i], a.normalised);\n"
                "        if (Variant::kBias) v.v[i] += b.v[i];",
            ),
        ),
    ),
    mutant(
        "sum-not-rounded",
        "the norm of another sum than the one in residual_out",
        PLAIN,
        ROW,
        "x[r][p] = a.options.round_sum ? rounded : v;",
        "x[r][p] = v;",
    ),
    mutant(
        "peer-before-barrier",
        "a peer's shared memory is read with only the own block waited for",
        PLAIN,
        REDUCE,
        "  cluster_arrive();\n  cluster_wait();\n",
        "  __syncthreads();\n",
    ),
    Mutant(
        "peer-gone",
        "a block ends while its peers read its shared memory",
        PLAIN,
        ROW_NORM,
        (
            ("if (row.has_peers()) cluster_arrive();", ""),
            ("if (row.has_peers()) cluster_wait();", ""),
        ),
    ),
    mutant(
        "masked-in-variance",
        "columns behind the end count as the mean squared (Triton's where left out)",
        PLAIN,
        ARGS,
        "else if (i < count)",
        "else if (count > -1)",
    ),
    mutant(
        "saved-at-first-row",
        "rstd of every launch in the place of the first rows",
        PLAIN,
        LAUNCHES,
        "  if (part.rstd) part.rstd += begin * inside;\n",
        "",
    ),
    mutant(
        "divisor-off-by-one",
        "a division by multiplication with the factor rounded down",
        PLAIN,
        LAUNCHES,
        "(power + d.value - 1) / d.value",
        "power / d.value",
    ),
    mutant(
        "variance-of-a-sample",
        "n - 1 in the place of n",
        PLAIN,
        ARGS,
        "inverse_square_root(mean_of(a, squares) + a.options.eps)",
        "inverse_square_root(squares / (a.columns > 1 ? a.columns - 1 : 1) + a.options.eps)",
    ),
    mutant(
        "eps-outside",
        "eps added to the root, not under it",
        PLAIN,
        ARGS,
        "return inverse_square_root(mean_of(a, squares) + a.options.eps);",
        "return 1.f / (sqrtf(mean_of(a, squares)) + a.options.eps);",
    ),
    mutant(
        "weight-of-first-row",
        "the rows of one thread all take the first one's weight",
        PLAIN,
        EPILOGUE,
        "Access::load(at[m] + row.offset",
        "Access::load(at[0] + row.offset",
    ),
    mutant(
        "rows-behind-the-last",
        "groups without a row work on the first one, in place, again",
        PLAIN,
        ROW,
        "live[r] = number[r] < a.rows;",
        "live[r] = true;",
    ),
    mutant(
        "idle-lane-counted",
        "lanes without columns in the last pack add what their registers hold",
        PLAIN,
        ROW,
        "if (!has_last) of_pack[kPacks - 1].quad[q] = 0.f;",
        "if (false) of_pack[kPacks - 1].quad[q] = 0.f;",
    ),
    mutant(
        "first-pack-missing",
        "every pack of a lane is taken to be full",
        ADDRESS,
        ROW,
        "return p < kPacks - 1 || has_last;",
        "return p < kPacks;",
    ),
    mutant(
        "sum-of-another-row",
        "of four rows in one thread, two neighbours exchange their sums",
        PLAIN,
        REDUCE,
        "first + r * apart, kWarp);",
        "first + (r ^ 1) * apart, kWarp);",
    ),
    mutant(
        "streamed-in-other-order",
        "rows that cannot be reached in whole packs are added up as they come",
        PLAIN,
        REDUCE,
        "  int bit = turns / 2;\n"
        "  for (; turn & bit; bit /= 2) turn ^= bit;\n"
        "  return turn | bit;\n",
        "  return (turn + 1) % turns;\n",
    ),
    mutant(
        "absent-weight-is-undefined",
        "what a null weight has in its registers",
        PLAIN,
        EPILOGUE,
        "branch_if(!a.weight.data, [&] { fill(weight, 1.f); });",
        "",
    ),
    mutant(
        "float32-half-loaded",
        "of a float32 weight beside 16 bits only the first half is loaded",
        PLAIN,
        ACCESS,
        "operand.rest = load_if(from + 16, wanted && is_float32(dtype));",
        "operand.rest = load_if(from, wanted && is_float32(dtype));",
    ),
    mutant(
        "clamp-swallows-nan",
        "fminf and fmaxf make a number of NaN",
        PLAIN,
        PACK,
        "return v > 65504.f ? 65504.f : v < -65504.f ? -65504.f : v;",
        "return fminf(fmaxf(v, -65504.f), 65504.f);",
    ),
    mutant(
        "errors-not-kept",
        "a plain sum over a long row, whose error grows with it",
        PLAIN,
        REDUCE,
        "lost = t - t == 0.f ? (t - sum) - y : 0.f;",
        "lost = 0.f;",
    ),
)

BACKWARD_PASS = (
    mutant(
        "sums-barrier-missing",
        "other warps' sums are read before they are written",
        THREAD,
        REDUCE,
        "  __syncthreads();\n#pragma unroll\n  for (int s",
        "#pragma unroll\n  for (int s",
    ),
    mutant(
        "sums-storage-at-once",
        "the sums of the next row take the place of those that are still read",
        THREAD,
        BACKWARD,
        "sums_storage[walked % 2]",
        "sums_storage[0]",
    ),
    mutant(
        "groups-barrier-missing",
        "the groups of a block are folded with only the first step waited for",
        THREAD,
        PARTIAL,
        "[threadIdx.x + half * lanes];\n    __syncthreads();\n",
        "[threadIdx.x + half * lanes];\n",
    ),
    mutant(
        "groups-not-folded",
        "the sums of all groups but the first are lost",
        PLAIN,
        BACKWARD,
        "if (a.groups > 1) fold_groups(v, lanes, a.groups, group_storage);",
        "",
    ),
    mutant(
        "partial-sums-collide",
        "heads share the memory of their partial sums",
        PLAIN,
        BACKWARD,
        "slice * a.sums_stride + head * a.padded + column(p)",
        "slice * a.padded + head * a.padded + column(p)",
    ),
    mutant(
        "partial-sum-left-out",
        "the last partial sum of a column is not folded",
        PLAIN,
        LAUNCH_BACKWARD,
        "i < gradient.count;",
        "i + 1 < gradient.count;",
    ),
    mutant(
        "earlier-launch-lost",
        "the sums of the last launch are taken for those of all",
        PLAIN,
        PARTIAL,
        "if (adds) sum",
        "if (false) sum",
    ),
    mutant(
        "compensation-left-out",
        "sums go to the partial sums one after the other, with what is lost left out",
        PLAIN,
        PARTIAL,
        "      add_to(sum.v[i], lost.v[i], half == 0 ? v.v[i] : v.v[kSize - 4 + i]);",
        "      sum.v[i] += half == 0 ? v.v[i] : v.v[kSize - 4 + i];",
    ),
    mutant(
        "sums-counted-twice",
        "sums that went to memory are not cleared",
        PLAIN,
        BACKWARD,
        "    v = {};\n",
        "",
    ),
    mutant(
        "part-of-the-heads",
        "launches of some of the heads all take the first heads' partial sums",
        PLAIN,
        LAUNCH_BACKWARD,
        "space.of(memory, false, first_row % heads)",
        "space.of(memory, false, 0)",
    ),
    mutant(
        "shared-by-heads",
        "the gradient of a weight that all heads share is that of the first",
        PLAIN,
        LAUNCH_BACKWARD,
        "per_head ? partials : partials * heads",
        "partials",
    ),
    mutant(
        "gradient-of-wrong-head",
        "a block takes its weight from the first head",
        PLAIN,
        BACKWARD,
        "from.data) + head * from.row_stride",
        "from.data) + 0 * from.row_stride",
    ),
    mutant(
        "mean-of-g-dropped",
        "LayerNorm's gradient without its mean",
        PLAIN,
        BACKWARD,
        "g -= means[1];",
        "",
    ),
    mutant(
        "weight-gradient-unrounded",
        "xhat rounded by the forward pass, and not for the gradient of its weight",
        PLAIN,
        BACKWARD,
        "if (a.options.round_before_weight) xhat = Access::rounded(a.normalised, xhat);",
        "",
    ),
    mutant(
        "rows-behind-the-last-again",
        "groups without a row count the first one again",
        PLAIN,
        BACKWARD,
        "const int live = exists ? end : 0;\n#pragma",
        "const int live = end;\n#pragma",
    ),
    mutant(
        "columns-behind-the-end",
        "partial sums of rows whose last pack is not whole lie in one another",
        ADDRESS,
        LAUNCH_BACKWARD,
        "padded(divide_up(norm.n, 8) * 8)",
        "padded(norm.n)",
    ),
    mutant(
        "divided-by-zero",
        "an output whose weight is 0 undone",
        PLAIN,
        BACKWARD,
        "w == 0.f ? 0.f : (x.v[i] - bias.v[i]) / w;",
        "(x.v[i] - bias.v[i]) / w;",
    ),
    mutant(
        "statistics-of-first-launch",
        "rstd and mean of a later launch are taken from the first rows",
        PLAIN,
        LAUNCHES,
        "  if (part.rstd) part.rstd += begin * inside;\n",
        "",
    ),
)

MUTANTS = (*FORWARD, *(replace(m, only="backward") for m in BACKWARD_PASS))
