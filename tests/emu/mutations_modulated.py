"""What `mutants.py` breaks in modulated norms, which the sweep of those has to see."""

from __future__ import annotations

from dataclasses import replace

from mutations import LAUNCH, PLAIN, ROWS, STREAMED, mutant

_BROKEN = (
    mutant(
        "modulated-row-for-row",
        "a row of x takes a row of scale by % alone, which one sample does not show",
        PLAIN,
        ROWS,
        "a.inner.divide(a.first + row)",
        "(a.first + row)",
    ),
    mutant(
        "modulated-launches-begin-anew",
        "the rows of a second launch take the scale of the first rows",
        PLAIN,
        ROWS,
        "a.inner.divide(a.first + row)",
        "a.inner.divide(row)",
    ),
    mutant(
        "modulated-product-not-rounded",
        "round_each rounds all but the product",
        PLAIN,
        STREAMED,
        "if (m.round_each) round_all(m.product, v);",
        "",
    ),
    mutant(
        "modulated-scale-without-one",
        "the scale multiplies, and not 1 + scale",
        PLAIN,
        STREAMED,
        "factor.v[i] += 1.f;",
        "factor.v[i] += 0.f;",
    ),
    mutant(
        "modulated-plain-without-one",
        "likewise where a norm with that weight stands for it",
        PLAIN,
        LAUNCH,
        "plain.weight.data ? 1.f : 0.f",
        "0.f",
    ),
    mutant(
        "modulated-gate-not-rounded",
        "round_each rounds all but the product with the gate",
        PLAIN,
        STREAMED,
        "if (m.round_each) round_all(m.gated, v);",
        "",
    ),
)

MODULATED = tuple(replace(broken, only="modulated") for broken in _BROKEN)
