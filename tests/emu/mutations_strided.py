"""What `mutants.py` breaks in norms of strided columns, which the sweep of those has to see."""

from __future__ import annotations

from dataclasses import replace

from mutations import LAUNCH, PLAIN, mutant

STRIDED_NORM = "cuda/strided_row_norm.cuh"

_BROKEN = (
    mutant(
        "strided-half-of-the-lanes",
        "the last two lanes of a row are not added",
        PLAIN,
        STRIDED_NORM,
        "half >= rows; half /= 2",
        "half > rows; half /= 2",
    ),
    mutant(
        "strided-y-at-the-columns-of-x",
        "y is written at the column stride of x",
        PLAIN,
        LAUNCH,
        "norm.x.column_stride, norm.out.column_stride, 0}",
        "norm.x.column_stride, norm.x.column_stride, 0}",
    ),
)

STRIDED = tuple(replace(broken, only="strided") for broken in _BROKEN)
