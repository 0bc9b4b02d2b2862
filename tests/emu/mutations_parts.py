"""What `mutants.py` breaks in the norms of split rows, which the sweep of parts has to see."""

from __future__ import annotations

from dataclasses import replace

from mutations import (
    ADDRESS,
    LAUNCH,
    LAUNCHES,
    PLAIN,
    REDUCE,
    SPLIT,
    STREAMED,
    THREAD,
    mutant,
)

_BROKEN = (
    mutant(
        "parts-barrier-missing",
        "other warps' squares are read before they are written",
        THREAD,
        REDUCE,
        "  __syncthreads();\n  // Not by",
        "  // Not by",
    ),
    mutant(
        "parts-sums-unsynced",
        "other warps' sums of gradients are read before they are written",
        THREAD,
        REDUCE,
        "  __syncthreads();\n#pragma unroll\n  for (int s",
        "#pragma unroll\n  for (int s",
    ),
    mutant(
        "parts-saved-by-all",
        "every thread writes a row's statistics",
        THREAD,
        STREAMED,
        "if (lane == 0) save_statistics",
        "save_statistics",
    ),
    mutant(
        "part-too-many",
        "statistics are read behind those of the last part",
        ADDRESS,
        SPLIT,
        "part < split.parts; ++part) {",
        "part <= split.parts; ++part) {",
    ),
    mutant(
        "part-left-out",
        "the squares of the last part are left out",
        PLAIN,
        SPLIT,
        "part < split.parts; ++part) {",
        "part + 1 < split.parts; ++part) {",
    ),
    mutant(
        "part-of-its-own",
        "a part takes the first one's statistics for those of all",
        PLAIN,
        SPLIT,
        "(part * split.planes + plane)",
        "(0 * part + plane)",
    ),
    mutant(
        "planes-before-parts",
        "what is gathered is read in another order than it is written",
        PLAIN,
        SPLIT,
        "(part * split.planes + plane)",
        "(plane * split.parts + part)",
    ),
    mutant(
        "planes-exchanged",
        "means are written where squares are read",
        PLAIN,
        STREAMED,
        "{squares, mean};",
        "{mean, squares};",
    ),
    mutant(
        "plane-of-one-launch",
        "planes are taken to be as long as a launch has rows",
        PLAIN,
        LAUNCHES,
        "  part.rows = inside * count;\n",
        "  part.rows = inside * count;\n  part.split.plane = part.rows;\n",
    ),
    mutant(
        "saved-of-one-launch",
        "statistics of every launch in the place of the first rows",
        PLAIN,
        LAUNCHES,
        "  if (part.split.statistics) part.split.statistics += begin * inside;\n",
        "",
    ),
    mutant(
        "gathered-of-one-launch",
        "a later launch takes the statistics of the first rows",
        PLAIN,
        LAUNCHES,
        "  if (part.split.gathered) part.split.gathered += begin * inside;\n",
        "",
    ),
    mutant(
        "means-not-compared",
        "the squares of parts added, each about a mean of its own",
        PLAIN,
        SPLIT,
        "    add_to(sum, lost, static_cast<float>(n) * apart * apart);\n",
        "",
    ),
    mutant(
        "columns-of-one-part",
        "the squares of whole rows divided by a part's number of columns",
        PLAIN,
        LAUNCH,
        "norm.n * norm.split.parts : norm.n;",
        "norm.n : norm.n;",
    ),
    mutant(
        "sum-for-mean",
        "means of parts are added, and not divided by their number",
        PLAIN,
        SPLIT,
        "return sum / static_cast<float>(split.parts);",
        "return sum;",
    ),
    mutant(
        "parts-not-clamped",
        "infinities of a float16 are not looked for",
        PLAIN,
        STREAMED,
        "clamp_infinities(a, a.x.dtype, v);",
        "",
    ),
)

PARTS = tuple(replace(m, only="parts") for m in _BROKEN)
