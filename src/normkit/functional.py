"""The norms as functions.

Every op is one row norm: a statistic of the last dimension, and an affine map.  With s the sum x +
residual where there is a residual, and x otherwise:

    rms:    xhat = s / sqrt(mean(s^2) + eps)
    layer:  xhat = (s - mean(s)) / sqrt(mean((s - mean(s))^2) + eps)
    y = xhat * (weight + weight_offset) + bias

Statistics and products are float32; y is rounded once, to the nearest even, when it is stored.  A
row's bits depend on nothing but the row, the weights and the options.  docs/numerics.md states
these promises, with their bounds.

Arguments mean the same everywhere: `rms_norm` describes them, `add_rms_norm` those of a residual.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from normkit._serving.backends import quick
from normkit._serving.serve import FUNCTIONS, explain, serve
from normkit._spec import ADD, LAYER, OPS, Call, Kind, heads

__all__ = [
    "Kind", "add_head_norm", "add_head_norm_", "add_layer_norm", "add_layer_norm_", "add_rms_norm",
    "add_rms_norm_", "explain", "head_norm", "head_norm_", "layer_norm", "layer_norm_", "rms_norm",
    "rms_norm_",
]  # fmt: skip

# One entry and one function, under the types of what they return for these kinds.
_norm = cast("Callable[..., Tensor | None]", quick)
_add_norm = cast("Callable[..., tuple[Tensor, Tensor] | None]", quick)
_serve = cast("Callable[[Call], Tensor]", serve)
_serve_both = cast("Callable[[Call], tuple[Tensor, Tensor]]", serve)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    memory_efficient: bool = False,
) -> Tensor:
    """Normalise the last dimension of x by its root mean square.

        y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset) + bias

    Args:
        x: (..., n) in float32, float16 or bfloat16 (float64 takes the reference path).  Outer
            strides are free, and so is the last one where it is positive: a permuted image
            (batch, channels, ...) is normalised over its channels without a copy.
        weight: (n,) in any of the three dtypes, whatever x is; None for no weight.
        bias: (n,) in any of the three dtypes; None for no bias.
        eps: added to the mean of squares; None for the machine epsilon of the computing dtype, as
            torch has it.
        weight_offset: added to the weight in float32 (Gemma: 1.0); without a weight it is not used.
        round_before_weight: round xhat to the dtype of what is normalised (x, or the rounded sum)
            before the weight multiplies it, as Llama and Qwen of Hugging Face transformers do.
        clamp_inf: count +-inf in a float16 x, or in a sum rounded to float16, as +-65504, as
            ExLlamaV2 does; NaN stays.
        round_rstd: round rstd = 1 / sqrt(...) to the dtype of what is normalised before it
            multiplies, as the norms without a weight of DeepSeek-V4 and GLM-5 do.  In float16 an
            rstd beyond 65504 is infinite.
        round_weight: round weight + weight_offset to weight's dtype before it multiplies, as models
            do that add 1 to a weight of 16 bits (Nemotron, VideoPrism).
        out_dtype: dtype of the result; None for out's, or x's without an out.
        out: written and returned, if given: x's shape, any strides of elements apart; may be x
            itself but not overlap it in part.  None: a new tensor, packed whatever x's strides are.
        memory_efficient: where a gradient is needed, keep y for it instead of what was normalised,
            and undo the affine map: for a y that is kept anyway.  The gradients carry y's rounding,
            and a weight of 0 (with its offset) gets none.  Not with round_before_weight or
            clamp_inf, which lose what would be undone: x, or the sum, is kept.

    Returns:
        y, of x's shape, rounded to out_dtype; xhat and rstd are rounded where options say so.

    Raises:
        TypeError: an argument is no tensor, or of the wrong dtype.
        ValueError: a shape, stride, device, option or memory overlap is wrong, or a backend asked
            for by name cannot run the call.
        RuntimeError: what would be written (an output that is given, or x in place) is needed for
            a gradient, or is an inference tensor outside of inference mode.

    Semantics: Zhang and Sennrich 2019, arXiv:1910.07467; rounding as torch's own `rms_norm`.

    Example:
        >>> import normkit, torch
        >>> normkit.rms_norm(torch.randn(2, 4), torch.ones(4)).shape
        torch.Size([2, 4])
    """
    call = (
        0, x, None, weight, bias, eps, weight_offset, round_before_weight, True, clamp_inf,
        round_rstd, round_weight, out_dtype, out, None,
        memory_efficient,
    )  # fmt: skip
    made = None if is_dynamo_compiling() else _norm(*call)
    return _serve(Call(*call)) if made is None else made


def rms_norm_(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
) -> Tensor:
    """`rms_norm` in place: x, whose elements must not share memory, is overwritten and returned.

    Example:
        >>> import normkit, torch
        >>> x = torch.randn(2, 3, 4)
        >>> normkit.rms_norm_(x) is x
        True
    """
    call = (
        0, x, None, weight, bias, eps, weight_offset, round_before_weight, True, clamp_inf,
        round_rstd, round_weight, None, x, None, False,
    )  # fmt: skip
    made = None if is_dynamo_compiling() else _norm(*call)
    return _serve(Call(*call, in_place=True)) if made is None else made


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-5,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    memory_efficient: bool = False,
) -> Tensor:
    """Normalise the last dimension of x to mean 0 and variance 1 (LayerNorm).

        y = (x - mean(x)) / sqrt(var(x) + eps) * (weight + weight_offset) + bias

    Arguments, result, errors and rounding are those of `rms_norm`; eps is added to the variance.
    Semantics: Ba et al. 2016, arXiv:1607.06450.

    Example:
        >>> import normkit, torch
        >>> normkit.layer_norm(torch.tensor([1.0, 3.0]), eps=0.0)
        tensor([-1.,  1.])
    """
    call = (
        LAYER, x, None, weight, bias, eps, weight_offset, round_before_weight, True, clamp_inf,
        round_rstd, round_weight, out_dtype, out, None,
        memory_efficient,
    )  # fmt: skip
    made = None if is_dynamo_compiling() else _norm(*call)
    return _serve(Call(*call)) if made is None else made


def layer_norm_(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-5,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
) -> Tensor:
    """`layer_norm` in place: x is overwritten and returned, as `rms_norm_` does it."""
    call = (
        LAYER, x, None, weight, bias, eps, weight_offset, round_before_weight, True, clamp_inf,
        round_rstd, round_weight, None, x, None, False,
    )  # fmt: skip
    made = None if is_dynamo_compiling() else _norm(*call)
    return _serve(Call(*call, in_place=True)) if made is None else made


def head_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    kind: Kind = "rms",
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    memory_efficient: bool = False,
) -> Tensor:
    """Normalise each head of x, with a weight per head or one for all.

        y = xhat * (weight + weight_offset) + bias,  xhat by `kind` as in `rms_norm` or `layer_norm`

    Args:
        x: (..., heads, head_dim); q and k may be slices of a packed qkv.
        weight: (heads, head_dim), or (head_dim,) for all heads; None for no weight.
        bias: likewise.
        kind: "rms" or "layer".

    The other arguments, result, errors and rounding are those of `rms_norm`.  Semantics: q and k
    norms of Qwen3 and Gemma 3 (rms), and Cohere (layer, a weight per head).

    Example:
        >>> import normkit, torch
        >>> normkit.head_norm(torch.randn(2, 3, 4), torch.ones(3, 4)).shape
        torch.Size([2, 3, 4])
    """
    call = (
        heads(kind), x, None, weight, bias, eps, weight_offset, round_before_weight, True,
        clamp_inf, round_rstd, round_weight, out_dtype, out, None,
        memory_efficient,
    )  # fmt: skip
    made = None if is_dynamo_compiling() else _norm(*call)
    return _serve(Call(*call)) if made is None else made


def head_norm_(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    kind: Kind = "rms",
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
) -> Tensor:
    """`head_norm` in place: x is overwritten and returned, as `rms_norm_` does it."""
    call = (
        heads(kind), x, None, weight, bias, eps, weight_offset, round_before_weight, True,
        clamp_inf, round_rstd, round_weight, None, x, None, False,
    )  # fmt: skip
    made = None if is_dynamo_compiling() else _norm(*call)
    return _serve(Call(*call, in_place=True)) if made is None else made


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    round_sum: bool = True,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
    memory_efficient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Add x to the residual and normalise the sum by its RMS, in one pass over memory.

        s = residual_out = x + residual
        y = s / sqrt(mean(s^2) + eps) * (weight + weight_offset) + bias

    Args:
        residual: of x's shape, in any of the three dtypes.
        round_sum: take the statistic and y from the sum as rounded to residual's dtype, so that
            fused equals unfused, bit for bit; False: from the float32 sum, as FlashInfer and QuACK
            do.
        residual_out: written and returned, if given: x's shape, residual's dtype; may be residual,
            or x, but share no memory with weight or bias.  Here it and out need last stride 1, and
            inputs with another are copied.

    The other arguments, errors and rounding are those of `rms_norm`, of the sum.

    Returns:
        (y, residual_out), both of x's shape: rounded to out_dtype, and to residual's dtype.

    Example:
        >>> import normkit, torch
        >>> y, total = normkit.add_rms_norm(torch.ones(2, 4), torch.ones(2, 4), torch.ones(4))
        >>> total[0]
        tensor([2., 2., 2., 2.])
    """
    call = (
        ADD, x, residual, weight, bias, eps, weight_offset, round_before_weight, round_sum,
        clamp_inf, round_rstd, round_weight, out_dtype, out, residual_out,
        memory_efficient,
    )  # fmt: skip
    made = None if is_dynamo_compiling() else _add_norm(*call)
    return _serve_both(Call(*call)) if made is None else made


def add_rms_norm_(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    round_sum: bool = True,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in place: x becomes y and the residual the sum; returns both."""
    call = (
        ADD, x, residual, weight, bias, eps, weight_offset, round_before_weight, round_sum,
        clamp_inf, round_rstd, round_weight, None, x, residual, False,
    )  # fmt: skip
    made = None if is_dynamo_compiling() else _add_norm(*call)
    return _serve_both(Call(*call, in_place=True)) if made is None else made


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-5,
    *,
    round_sum: bool = True,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
    memory_efficient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Add x to the residual and normalise the sum by LayerNorm, in one pass over memory.

        s = residual_out = x + residual
        y = (s - mean(s)) / sqrt(var(s) + eps) * (weight + weight_offset) + bias

    Arguments, results, errors and rounding are those of `add_rms_norm`; eps is added to the
    variance.

    Example:
        >>> import normkit, torch
        >>> x = torch.tensor([1.0, 3.0])
        >>> normkit.add_layer_norm(x, torch.tensor([2.0, 1.0]), eps=0.0)
        (tensor([-1.,  1.]), tensor([3., 4.]))
    """
    call = (
        ADD | LAYER, x, residual, weight, bias, eps, weight_offset, round_before_weight, round_sum,
        clamp_inf, round_rstd, round_weight, out_dtype, out, residual_out,
        memory_efficient,
    )  # fmt: skip
    made = None if is_dynamo_compiling() else _add_norm(*call)
    return _serve_both(Call(*call)) if made is None else made


def add_layer_norm_(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-5,
    *,
    round_sum: bool = True,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` in place: x becomes y and the residual the sum; returns both."""
    call = (
        ADD | LAYER, x, residual, weight, bias, eps, weight_offset, round_before_weight, round_sum,
        clamp_inf, round_rstd, round_weight, None, x, residual, False,
    )  # fmt: skip
    made = None if is_dynamo_compiling() else _add_norm(*call)
    return _serve_both(Call(*call, in_place=True)) if made is None else made


def add_head_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    kind: Kind = "rms",
    round_sum: bool = True,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
    memory_efficient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Add x to the residual and normalise each head of the sum, in one pass over memory.

        s = residual_out = x + residual
        y = xhat * (weight + weight_offset) + bias,  xhat of s by `kind`

    x, weight, bias and kind are those of `head_norm`, the other arguments, the results, errors and
    rounding those of `add_rms_norm`.

    Example:
        >>> import normkit, torch
        >>> x = torch.ones(2, 3, 4)
        >>> y, total = normkit.add_head_norm(x, x, torch.ones(3, 4))
        >>> total[0, 0]
        tensor([2., 2., 2., 2.])
    """
    call = (
        ADD | heads(kind), x, residual, weight, bias, eps, weight_offset, round_before_weight,
        round_sum, clamp_inf, round_rstd, round_weight, out_dtype, out, residual_out,
        memory_efficient,
    )  # fmt: skip
    made = None if is_dynamo_compiling() else _add_norm(*call)
    return _serve_both(Call(*call)) if made is None else made


def add_head_norm_(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    kind: Kind = "rms",
    round_sum: bool = True,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    """`add_head_norm` in place: x becomes y and the residual the sum; returns both."""
    call = (
        ADD | heads(kind), x, residual, weight, bias, eps, weight_offset, round_before_weight,
        round_sum, clamp_inf, round_rstd, round_weight, None, x, residual, False,
    )  # fmt: skip
    made = None if is_dynamo_compiling() else _add_norm(*call)
    return _serve_both(Call(*call, in_place=True)) if made is None else made


FUNCTIONS.update(
    (op.name + form, globals()[op.name + form])
    for op in OPS.values()
    if op.is_plain
    for form in ("", "_")
)
