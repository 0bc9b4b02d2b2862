"""Norms in front of a sum: post-norm and sandwich layers, in one pass over memory.

Arguments of a norm mean what they mean in `normkit.functional`; those of the sum are described
once, in `norm_add` and `norm_add_norm`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from normkit._serving.backends import quick
from normkit._serving.serve import FUNCTIONS, serve
from normkit._spec import (
    ADD,
    BEFORE_POST_NORM,
    BEHIND_POST_NORM,
    LAYER,
    OPS,
    POST,
    Call,
    Kind,
    is_layer,
)

__all__ = ["norm_add", "norm_add_", "norm_add_norm", "norm_add_norm_"]

_norm_add = cast("Callable[..., Tensor | None]", quick)
_norm_add_norm = cast("Callable[..., tuple[Tensor, Tensor] | None]", quick)
_serve = cast("Callable[[Call], Tensor]", serve)
_serve_both = cast("Callable[[Call], tuple[Tensor, Tensor]]", serve)


def norm_add(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    kind: Kind = "rms",
    alpha: float = 1.0,
    beta: float = 1.0,
    round_norm: bool = True,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Normalise x, and add it to the residual.

        h = alpha * residual + beta * norm(x),  the norm by `kind` as in `rms_norm` or `layer_norm`

    Args:
        x: what a layer returned, (..., n).
        residual: of x's shape, in any of the three dtypes.
        weight: (n,) in any of the three dtypes; None for no weight.
        bias: likewise.
        kind: "rms" or "layer".
        alpha: multiplies the residual.
        beta: multiplies the norm.
        round_norm: round the norm to x's dtype, a product with alpha to residual's and one with
            beta to x's: the bits of `alpha * residual + beta * norm(x)` in torch.  False: all in
            float32, rounded once, at the store.
        out: where h goes: of x's shape and residual's dtype, with a last stride of 1; it may be x
            or the residual, and shares no memory with weight or bias.

    The other arguments, errors and rounding are those of `rms_norm`.  Gradients go to x, residual,
    weight and bias: of the formula above, by the norm's own, for which it is taken again.

    Returns:
        h, of x's shape and residual's dtype.

    Semantics: the end of a layer of Gemma 2 and 3, OLMo 2 and 3, GLM-4 and EXAONE 4 in Hugging Face
    transformers: `residual + post_norm(hidden_states)`.

    Example:
        >>> import normkit, torch
        >>> x, residual, weight = torch.randn(2, 8), torch.randn(2, 8), torch.rand(8)
        >>> h = normkit.norm_add(x, residual, weight)
        >>> torch.equal(h, residual + normkit.rms_norm(x, weight))
        True
    """
    call = (
        POST | is_layer(kind) * LAYER, x, residual, weight, bias, eps, weight_offset,
        round_before_weight, True, clamp_inf, round_rstd, round_weight, None, out, None, False,
    )  # fmt: skip
    of_sum = (*BEFORE_POST_NORM, None, None, None, alpha, beta, round_norm, *BEHIND_POST_NORM)
    made = None if is_dynamo_compiling() else _norm_add(*call, *of_sum)
    return _serve(Call(*call, False, *of_sum)) if made is None else made


def norm_add_(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    kind: Kind = "rms",
    alpha: float = 1.0,
    beta: float = 1.0,
    round_norm: bool = True,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
) -> Tensor:
    """`norm_add` in place: the residual becomes h and is returned; x stays as it is."""
    call = (
        POST | is_layer(kind) * LAYER, x, residual, weight, bias, eps, weight_offset,
        round_before_weight, True, clamp_inf, round_rstd, round_weight, None, residual, None, False,
    )  # fmt: skip
    of_sum = (*BEFORE_POST_NORM, None, None, None, alpha, beta, round_norm, *BEHIND_POST_NORM)
    made = None if is_dynamo_compiling() else _norm_add(*call, *of_sum)
    return _serve(Call(*call, True, *of_sum)) if made is None else made


def norm_add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    next_weight: Tensor | None = None,
    bias: Tensor | None = None,
    next_bias: Tensor | None = None,
    eps: float | None = 1e-6,
    next_eps: float | None = None,
    *,
    kind: Kind = "rms",
    alpha: float = 1.0,
    beta: float = 1.0,
    round_norm: bool = True,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise x, add it to the residual, and normalise the sum: `norm_add`, and the next norm.

        h = residual_out = alpha * residual + beta * norm(x, weight, bias, eps)
        y = norm(h, next_weight, next_bias, next_eps)

    Args:
        x: what a layer returned, (..., n).
        residual: of x's shape, in any of the three dtypes.
        weight: (n,) in any of the three dtypes; None for no weight.
        next_weight: likewise, of the norm behind the sum.
        bias: likewise.
        next_bias: likewise, of the norm behind the sum.
        next_eps: of the norm behind the sum; None for eps.
        out_dtype: the dtype of y; None: that of out, or x's.
        residual_out: where h goes, of residual's dtype.

    Both norms have the kind and the options.  h is normalised as it is rounded to residual's dtype,
    to which round_before_weight and round_rstd round there.  The other arguments are those of
    `norm_add`, and gradients go to next_weight and next_bias too.

    Returns:
        (y, residual_out), both of x's shape.

    Semantics: two neighbours in a sandwich layer of Gemma 2 and 3 and GLM-4, of which the second is
    the first norm of the feed-forward or of the next layer.

    Example:
        >>> import normkit, torch
        >>> x, residual, first, second = torch.randn(4, 2, 8).unbind()
        >>> y, h = normkit.norm_add_norm(x, residual, first[0], second[0])
        >>> torch.equal(y, normkit.rms_norm(h, second[0]))
        True
    """
    call = (
        POST | ADD | is_layer(kind) * LAYER, x, residual, weight, bias, eps, weight_offset,
        round_before_weight, True, clamp_inf, round_rstd, round_weight, out_dtype, out,
        residual_out, False,
    )  # fmt: skip
    of_sum = (
        *BEFORE_POST_NORM,
        next_weight,
        next_bias,
        next_eps,
        alpha,
        beta,
        round_norm,
        *BEHIND_POST_NORM,
    )
    made = None if is_dynamo_compiling() else _norm_add_norm(*call, *of_sum)
    return _serve_both(Call(*call, False, *of_sum)) if made is None else made


def norm_add_norm_(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    next_weight: Tensor | None = None,
    bias: Tensor | None = None,
    next_bias: Tensor | None = None,
    eps: float | None = 1e-6,
    next_eps: float | None = None,
    *,
    kind: Kind = "rms",
    alpha: float = 1.0,
    beta: float = 1.0,
    round_norm: bool = True,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    """`norm_add_norm` in place: x becomes y and the residual h; returns both."""
    call = (
        POST | ADD | is_layer(kind) * LAYER, x, residual, weight, bias, eps, weight_offset,
        round_before_weight, True, clamp_inf, round_rstd, round_weight, None, x, residual, False,
    )  # fmt: skip
    of_sum = (
        *BEFORE_POST_NORM,
        next_weight,
        next_bias,
        next_eps,
        alpha,
        beta,
        round_norm,
        *BEHIND_POST_NORM,
    )
    made = None if is_dynamo_compiling() else _norm_add_norm(*call, *of_sum)
    return _serve_both(Call(*call, True, *of_sum)) if made is None else made


FUNCTIONS.update(
    (op.name + form, globals()[op.name + form])
    for op in OPS.values()
    if op.post
    for form in ("", "_")
)
