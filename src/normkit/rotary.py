"""Norms of heads with the rotary embedding behind them, in one pass over memory.

Arguments of a norm mean what they mean in `normkit.functional`; those of the rotation are described
once, in `norm_rope`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from normkit._serving.backends import quick
from normkit._serving.serve import FUNCTIONS, serve
from normkit._spec import BEFORE_ROTATION, BEHIND_ROTATION, OPS, Call, Kind, rotated

__all__ = ["norm_rope", "norm_rope_"]

_norm = cast("Callable[..., Tensor | None]", quick)
_serve = cast("Callable[[Call], Tensor]", serve)


def norm_rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    kind: Kind = "rms",
    positions: Tensor | None = None,
    interleaved: bool = False,
    round_norm: bool = False,
    round_each: bool = False,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Normalise each head of x, and rotate pairs of its columns by the token's position (RoPE).

        n = head_norm(x);  y = (a * cos - b * sin, b * cos + a * sin) for each pair (a, b) of n

    With r columns in cos, column i and column r + i are a pair for i < r; columns from 2 r on are
    normalised alone (partial rotary embedding).

    Args:
        x: (..., heads, head_dim): the dimensions ahead of the heads are tokens.  A slice of a
            packed projection is read where it is.
        cos: x's tokens, of which the first may be left out or 1, and up to head_dim / 2 columns,
            in any of the three dtypes; with positions a table (positions, columns).
        sin: likewise, of cos's shape and dtype.
        weight: (heads, head_dim) or (head_dim,) in any of the three dtypes; None for no weight.
        bias: likewise.
        kind: "rms" or "layer".
        positions: int32 or int64, x's tokens as in cos: the row of cos and sin of each token.  The
            rotated columns of a token whose position is outside of the table are NaN.
        interleaved: columns 2 i and 2 i + 1 are a pair (GPT-J, Flux), and not i and r + i (Llama,
            NeoX).
        round_norm: round n to x's dtype before it is rotated.  False: nothing is rounded between
            norm and rotation.
        round_each: round n to x's dtype, and each product to the dtype that torch gives it: the
            bits of `n * cos + rotate_half(n) * sin` in torch.

    The other arguments, errors and rounding are those of `head_norm`; out shares no memory with cos
    or sin.  Gradients go to x, cos, sin, weight and bias.

    Returns:
        y, of x's shape, rounded to out_dtype.

    Semantics: q_norm, k_norm and `apply_rotary_pos_emb` of Qwen3, Gemma 3 and GLM-4.5 in Hugging
    Face transformers (Su et al. 2021, arXiv:2104.09864), whose cos and sin repeat their columns:
    the first half of them is what is asked for here.

    Example:
        >>> import normkit, torch
        >>> q, weight = torch.randn(2, 5, 4, 8), torch.rand(8)
        >>> angles = torch.arange(5.0).outer(torch.tensor([1.0, 0.1, 0.01, 0.001]))
        >>> y = normkit.norm_rope(q, angles.cos(), angles.sin(), weight)
        >>> torch.equal(y[:, 0], normkit.head_norm(q, weight)[:, 0])  # position 0
        True
    """
    call = (
        rotated(kind, interleaved), x, None, weight, bias, eps, weight_offset,
        round_before_weight, True, clamp_inf, round_rstd, round_weight, out_dtype, out, None, False,
    )  # fmt: skip
    of_rotation = (
        None, None, None, round_each, *BEFORE_ROTATION, round_norm, cos, sin, positions,
        *BEHIND_ROTATION,
    )  # fmt: skip
    made = None if is_dynamo_compiling() else _norm(*call, *of_rotation)
    return _serve(Call(*call, False, *of_rotation)) if made is None else made


def norm_rope_(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    kind: Kind = "rms",
    positions: Tensor | None = None,
    interleaved: bool = False,
    round_norm: bool = False,
    round_each: bool = False,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
) -> Tensor:
    """`norm_rope` in place: x, whose last stride has to be 1, is overwritten and returned."""
    call = (
        rotated(kind, interleaved), x, None, weight, bias, eps, weight_offset,
        round_before_weight, True, clamp_inf, round_rstd, round_weight, None, x, None, False,
    )  # fmt: skip
    of_rotation = (
        None, None, None, round_each, *BEFORE_ROTATION, round_norm, cos, sin, positions,
        *BEHIND_ROTATION,
    )  # fmt: skip
    made = None if is_dynamo_compiling() else _norm(*call, *of_rotation)
    return _serve(Call(*call, True, *of_rotation)) if made is None else made


FUNCTIONS.update(
    (op.name + form, globals()[op.name + form])
    for op in OPS.values()
    if op.rotated
    for form in ("", "_")
)
