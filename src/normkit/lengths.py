"""Norms of length: rows are divided by how long they are, and not by their spread.

Arguments mean what they mean in `normkit.functional`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from normkit._serving.backends import quick
from normkit._serving.serve import FUNCTIONS, serve
from normkit._spec import Call, length

__all__ = ["l2_norm", "l2_norm_"]

_norm = cast("Callable[..., Tensor | None]", quick)
_serve = cast("Callable[[Call], Tensor]", serve)


def l2_norm(
    x: Tensor,
    eps: float | None = 1e-6,
    *,
    eps_outside: bool = False,
    clamp_inf: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Divide the last dimension of x by its Euclidean length.

        y = x / sqrt(sum(x^2) + eps)
        y = x / max(sqrt(sum(x^2)), eps)    with eps_outside

    The first is what linear attention does to each head of q and k (Qwen3-Next, Kimi-Linear), the
    second `torch.nn.functional.normalize(x, dim=-1, eps=eps)`, in float32 until it is stored.

    Args:
        x: (..., n), as in `rms_norm`: heads of a packed tensor are read where they are.
        eps: added to the sum of squares, or with eps_outside the least that x is divided by; None
            for the machine epsilon of the computing dtype.
        eps_outside: whether eps bounds the length, and is added to nothing.

    The other arguments, errors and rounding are those of `rms_norm`.  x gets a gradient; that of a
    row which eps has divided is that of a division by a constant.

    Returns:
        y, of x's shape, rounded once, to out_dtype.

    Example:
        >>> import normkit, torch
        >>> normkit.l2_norm(torch.tensor([3.0, 4.0]), eps=0.0)
        tensor([0.6000, 0.8000])
    """
    call = (
        length(eps_outside), x, None, None, None, eps, 0.0, False, True, clamp_inf, False,
        False, out_dtype, out, None, False,
    )  # fmt: skip
    made = None if is_dynamo_compiling() else _norm(*call)
    return _serve(Call(*call)) if made is None else made


def l2_norm_(
    x: Tensor,
    eps: float | None = 1e-6,
    *,
    eps_outside: bool = False,
    clamp_inf: bool = False,
) -> Tensor:
    """`l2_norm` in place: x is overwritten and returned, as `rms_norm_` does it."""
    call = (
        length(eps_outside), x, None, None, None, eps, 0.0, False, True, clamp_inf, False,
        False, None, x, None, False,
    )  # fmt: skip
    made = None if is_dynamo_compiling() else _norm(*call)
    return _serve(Call(*call, in_place=True)) if made is None else made


FUNCTIONS.update(l2_norm=l2_norm, l2_norm_=l2_norm_)
