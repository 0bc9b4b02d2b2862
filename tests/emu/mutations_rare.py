"""What `mutants.py` breaks in what few calls ask for: L2 norms, and weights that are rounded."""

from __future__ import annotations

from dataclasses import replace

from mutations import LAUNCH, LAUNCH_BACKWARD, PLAIN, STREAMED, mutant

RARE = (
    mutant(
        "l2-of-the-mean",
        "squares are divided by how many there are",
        PLAIN,
        LAUNCH,
        "if (norm.options.of_sum) columns = 1;",
        "",
    ),
    mutant(
        "l2-eps-added",
        "eps that bounds the length is added to its square",
        PLAIN,
        STREAMED,
        "if (kFused && a.options.eps_outside) rstd = reciprocal_length(a, squares);",
        "",
    ),
    mutant(
        "l2-nan-hidden",
        "the bound takes the place of NaN, so that a row with one is finite elsewhere",
        PLAIN,
        STREAMED,
        "return rstd > largest ? largest : rstd;",
        "return rstd < largest ? rstd : largest;",
    ),
    mutant(
        "l2-any-kernel",
        "a call with eps_outside takes a kernel that adds eps",
        PLAIN,
        LAUNCH,
        "|| o.eps_outside ||",
        "||",
    ),
    mutant(
        "round-weight-lost",
        "weight + weight_offset is not rounded",
        PLAIN,
        STREAMED,
        "if (kRoundsWeight && a.options.round_weight) round_all(a.weight.dtype, weight);",
        "",
    ),
    mutant(
        "round-weight-to-x",
        "weight + weight_offset is rounded to the dtype of x",
        PLAIN,
        STREAMED,
        "round_all(a.weight.dtype, weight);",
        "round_all(a.x.dtype, weight);",
    ),
    mutant(
        "round-weight-any-kernel",
        "a call with round_weight takes a kernel that does not round",
        PLAIN,
        LAUNCH,
        "o.eps_outside || rounds);",
        "o.eps_outside);",
    ),
    replace(
        mutant(
            "l2-backward-of-the-mean",
            "the gradient has the mean of g * xhat where it has their sum",
            PLAIN,
            LAUNCH_BACKWARD,
            "norm.options.of_sum ? 1.f : static_cast<float>(norm.n)",
            "static_cast<float>(norm.n)",
        ),
        only="backward",
    ),
)
