"""What `mutants.py` breaks in norms in front of a sum, which the sweep of those has to see."""

from __future__ import annotations

from dataclasses import replace

from mutations import LAUNCH, PLAIN, mutant

KERNEL = "cuda/post_norm.cuh"

_BROKEN = (
    mutant(
        "post-norm-not-rounded",
        "the norm is added as float32",
        PLAIN,
        KERNEL,
        "if (a.round_norm) round_all(a.x.dtype, v);\n    Values residual",
        "Values residual",
    ),
    mutant(
        "post-norm-product-not-rounded",
        "alpha * residual is added as float32",
        PLAIN,
        KERNEL,
        "if (a.round_norm) round_all(a.residual.dtype, residual);",
        "",
    ),
    mutant(
        "post-norm-adds-up-behind-the-end",
        "what the first norm makes of no column counts in the statistics of the second",
        PLAIN,
        KERNEL,
        "column + i < end ? v.v[i] : 0.f",
        "v.v[i]",
    ),
    mutant(
        "post-norm-sum-not-clamped",
        "an infinite sum is normalised as it is",
        PLAIN,
        KERNEL,
        "Values v = sum_at(column);\n    clamp_infinities(a, a.residual.dtype, v);",
        "Values v = sum_at(column);",
    ),
    mutant(
        "post-norm-second-rounds-as-the-first",
        "rstd of the second norm is rounded to x's dtype",
        PLAIN,
        KERNEL,
        "a.options.eps, a.residual.dtype);",
        "a.options.eps, a.x.dtype);",
    ),
    mutant(
        "post-norm-offset-of-the-next",
        "the first weight takes the offset of the one behind the sum, which may be absent",
        PLAIN,
        LAUNCH,
        "launch_offset(first.weight_offset)",
        "launch_offset(norm.options.weight_offset)",
    ),
)

POST_NORM = tuple(replace(broken, only="post_norm") for broken in _BROKEN)
