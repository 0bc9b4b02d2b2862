"""What `mutants.py` breaks in gated norms, which the sweep of those has to see."""

from __future__ import annotations

from dataclasses import replace

from mutations import LAUNCH, LAUNCHES, PLAIN, STREAMED, mutant

_BROKEN = (
    mutant(
        "gated-row-of-x",
        "z is read at the strides of x",
        PLAIN,
        LAUNCH,
        "launch_rows(norm, norm.gating.z, pack)",
        "launch_rows(norm, RowsOf{norm.gating.z.data, norm.gating.z.dtype, {norm.x.stride[0],"
        " norm.x.stride[1]}}, pack)",
    ),
    mutant(
        "gated-on-both-sides",
        "what the gate has multiplied before the norm is multiplied behind it, too",
        PLAIN,
        STREAMED,
        "if (g.z.data && g.norm_first) {",
        "if (g.z.data) {",
    ),
    mutant(
        "gated-norm-not-rounded",
        "round_norm rounds nothing",
        PLAIN,
        STREAMED,
        "if (g.round_norm) round_all(a.normalised, v);",
        "",
    ),
    mutant(
        "gated-by-the-slope",
        "silu without its factor z",
        PLAIN,
        STREAMED,
        "(silu ? z.v[i] : 1.f)",
        "(silu ? 1.f : 1.f)",
    ),
    mutant(
        "gated-launches-begin-anew",
        "the rows of a second launch take z of the first rows",
        PLAIN,
        LAUNCHES,
        "&norm.residual_out, &norm.gating.z})",
        "&norm.residual_out})",
    ),
)

GATED = tuple(replace(broken, only="gated") for broken in _BROKEN)
