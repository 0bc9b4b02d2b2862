"""The norms as functions.

Every op is one row norm: a statistic of the last dimension, and an affine map.  With s the sum x +
residual where there is a residual, and x otherwise:

    rms:    xhat = s / sqrt(mean(s^2) + eps)
    layer:  xhat = (s - mean(s)) / sqrt(mean((s - mean(s))^2) + eps)
    y = xhat * (weight + weight_offset) + bias

Statistics and products are float32; y is rounded once, to the nearest even, when it is stored.  A
row's bits depend on nothing but the row, the weights and the options.  docs/numerics.md states
these promises, with their bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from normkit import _dispatch, _ops
from normkit._checks import Call
from normkit._dispatch import Explanation
from normkit.inplace import (
    Kind,
    add_layer_norm_,
    add_rms_norm_,
    head_norm_,
    is_layer,
    layer_norm_,
    rms_norm_,
)

__all__ = [
    "Kind",
    "add_layer_norm",
    "add_layer_norm_",
    "add_rms_norm",
    "add_rms_norm_",
    "explain",
    "head_norm",
    "head_norm_",
    "layer_norm",
    "layer_norm_",
    "rms_norm",
    "rms_norm_",
]

_native = _dispatch.quick


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    memory_efficient: bool = False,
) -> Tensor:
    """Normalise the last dimension of x by its root mean square.

        y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset) + bias

    Args:
        x: (..., n) in float32, float16 or bfloat16 (float64 takes the reference path).  Outer
            strides are free; an x whose last stride is not 1 is copied once.
        weight: (n,) in any of the three dtypes, whatever x is; None for no weight.
        bias: (n,) in any of the three dtypes; None for no bias.
        eps: added to the mean of squares; None for the machine epsilon of the computing dtype, as
            torch has it.
        weight_offset: added to the weight in float32 (Gemma: 1.0); without a weight it is not used.
        round_before_weight: round xhat to x's dtype before the weight
            multiplies it, as Llama and Qwen of Hugging Face transformers do.
        clamp_inf: count +-inf in a float16 x as +-65504, as ExLlamaV2 does; NaN stays.
        out_dtype: dtype of the result; None for out's, or x's without an out.
        out: written and returned, if given: x's shape, last stride 1; may be x itself but not
            overlap it in part.
        memory_efficient: where a gradient is wanted, keep y for it instead of x, and
            undo the affine map: for a y that is kept anyway.  The gradients carry y's rounding, and
            a weight of 0 (with its offset) gets none.  Not with round_before_weight or clamp_inf,
            which lose what would be undone: x is kept.

    Returns:
        y, of x's shape, in out_dtype.

    Raises:
        TypeError: an argument is no tensor, or of the wrong dtype.
        ValueError: a shape, stride, device, option or memory overlap is wrong, or a backend asked
            for by name cannot serve the call.
        RuntimeError: out is given where a gradient is needed.

    y is rounded to out_dtype, and xhat where round_before_weight says so.  Semantics: Zhang and
    Sennrich 2019, arXiv:1910.07467; rounding as `torch.nn.functional.rms_norm`.

    Example:
        >>> import normkit, torch
        >>> normkit.rms_norm(torch.randn(2, 4), torch.ones(4)).shape
        torch.Size([2, 4])
    """
    if not is_dynamo_compiling():
        result = _native(
            0, x, None, weight, bias, eps, weight_offset, round_before_weight, True, clamp_inf,
            out_dtype, out, None, 0,
        )  # fmt: skip
        if result is not None:
            return result  # type: ignore[no-any-return]
    call = Call(
        "rms_norm", False, False, x, weight, bias, eps, weight_offset, round_before_weight,
        clamp_inf, out_dtype, out, memory_efficient=memory_efficient,
    )  # fmt: skip
    return cast(Tensor, _ops.serve(call))


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-5,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    memory_efficient: bool = False,
) -> Tensor:
    """Normalise the last dimension of x to mean 0 and variance 1 (LayerNorm).

        y = (x - mean(x)) / sqrt(var(x) + eps) * (weight + weight_offset) + bias

    Args:
        x: (..., n) in float32, float16 or bfloat16 (float64 takes the reference path).  Outer
            strides are free; an x whose last stride is not 1 is copied once.
        weight: (n,) in any of the three dtypes, whatever x is; None for no weight.
        bias: (n,) in any of the three dtypes; None for no bias.
        eps: added to the variance; None for the machine epsilon of the computing dtype, as torch
            has it.
        weight_offset: added to the weight in float32 (Gemma: 1.0); without a weight it is not used.
        round_before_weight: round xhat to x's dtype before the weight
            multiplies it, as Llama and Qwen of Hugging Face transformers do.
        clamp_inf: count +-inf in a float16 x as +-65504, as ExLlamaV2 does; NaN stays.
        out_dtype: dtype of the result; None for out's, or x's without an out.
        out: written and returned, if given: x's shape, last stride 1; may be x itself but not
            overlap it in part.
        memory_efficient: where a gradient is wanted, keep y for it instead of x, and
            undo the affine map: for a y that is kept anyway.  The gradients carry y's rounding, and
            a weight of 0 (with its offset) gets none.  Not with round_before_weight or clamp_inf,
            which lose what would be undone: x is kept.

    Returns:
        y, of x's shape, in out_dtype.

    Raises:
        TypeError: an argument is no tensor, or of the wrong dtype.
        ValueError: a shape, stride, device, option or memory overlap is wrong, or a backend asked
            for by name cannot serve the call.
        RuntimeError: out is given where a gradient is needed.

    y is rounded to out_dtype, and xhat where round_before_weight says so.  Semantics: Ba et al.
    2016, arXiv:1607.06450.

    Example:
        >>> import normkit, torch
        >>> normkit.layer_norm(torch.randn(2, 4), torch.ones(4)).shape
        torch.Size([2, 4])
    """
    if not is_dynamo_compiling():
        result = _native(
            1, x, None, weight, bias, eps, weight_offset, round_before_weight, True, clamp_inf,
            out_dtype, out, None, 0,
        )  # fmt: skip
        if result is not None:
            return result  # type: ignore[no-any-return]
    call = Call(
        "layer_norm", True, False, x, weight, bias, eps, weight_offset, round_before_weight,
        clamp_inf, out_dtype, out, memory_efficient=memory_efficient,
    )  # fmt: skip
    return cast(Tensor, _ops.serve(call))


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
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    memory_efficient: bool = False,
) -> Tensor:
    """Normalise each head of x, with a weight per head or one for all.

        y = xhat * (weight + weight_offset) + bias,  xhat by `kind` as in `rms_norm` or `layer_norm`

    Args:
        x: (..., heads, head_dim) in float32, float16 or bfloat16 (float64 takes the reference
            path).  Outer strides are free, so q and k may be slices of a packed qkv; an x whose
            last stride is not 1 is copied once.
        weight: (heads, head_dim), or (head_dim,) for all heads, in any of the three dtypes; None
            for no weight.
        bias: likewise; None for no bias.
        eps: added to the variance or mean of squares; None for the machine epsilon of the computing
            dtype, as torch has it.
        kind: "rms" or "layer".
        weight_offset: added to the weight in float32 (Gemma: 1.0); without a weight it is not used.
        round_before_weight: round xhat to x's dtype before the weight
            multiplies it, as Llama and Qwen of Hugging Face transformers do.
        clamp_inf: count +-inf in a float16 x as +-65504, as ExLlamaV2 does; NaN stays.
        out_dtype: dtype of the result; None for out's, or x's without an out.
        out: written and returned, if given: x's shape, last stride 1; may be x itself but not
            overlap it in part.
        memory_efficient: where a gradient is wanted, keep y for it instead of x, and
            undo the affine map: for a y that is kept anyway.  The gradients carry y's rounding, and
            a weight of 0 (with its offset) gets none.  Not with round_before_weight or clamp_inf,
            which lose what would be undone: x is kept.

    Returns:
        y, of x's shape, in out_dtype.

    Raises:
        TypeError: an argument is no tensor, or of the wrong dtype.
        ValueError: a shape, stride, device, option or memory overlap is wrong, or a backend asked
            for by name cannot serve the call.
        RuntimeError: out is given where a gradient is needed.

    y is rounded to out_dtype, and xhat where round_before_weight says so.  Semantics: per-head q
    and k norms of Qwen3, Gemma 3 (rms) and Cohere (layer, weight (heads, head_dim)).

    Example:
        >>> import normkit, torch
        >>> normkit.head_norm(torch.randn(2, 3, 4), torch.ones(3, 4)).shape
        torch.Size([2, 3, 4])
    """
    layer = is_layer(kind)
    if not is_dynamo_compiling():
        result = _native(
            layer + 2, x, None, weight, bias, eps, weight_offset, round_before_weight, True,
            clamp_inf, out_dtype, out, None, 0,
        )  # fmt: skip
        if result is not None:
            return result  # type: ignore[no-any-return]
    call = Call(
        "head_norm", layer, True, x, weight, bias, eps, weight_offset, round_before_weight,
        clamp_inf, out_dtype, out, memory_efficient=memory_efficient,
    )  # fmt: skip
    return cast(Tensor, _ops.serve(call))


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
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
    memory_efficient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Add x to the residual and normalise the sum by its RMS, in one pass over memory.

        s = residual_out = x + residual
        y = s / sqrt(mean(s^2) + eps) * (weight + weight_offset) + bias

    Args:
        x: (..., n) in float32, float16 or bfloat16 (float64 takes the reference path).  Outer
            strides are free; an x whose last stride is not 1 is copied once.
        residual: of x's shape, in any of the three dtypes.
        weight: (n,) in any of the three dtypes, whatever x is; None for no weight.
        bias: (n,) in any of the three dtypes; None for no bias.
        eps: added to the mean of squares; None for the machine epsilon of the computing dtype, as
            torch has it.
        round_sum: take the statistic and y from the sum as rounded to residual's dtype, so that
            fused equals unfused, bit for bit; False: from the float32 sum, as FlashInfer and QuACK
            do.
        weight_offset: added to the weight in float32 (Gemma: 1.0); without a weight it is not used.
        round_before_weight: round xhat to the dtype of what is normalised (x, or the rounded sum)
            before the weight multiplies it, as Llama and Qwen of Hugging Face transformers do.
        clamp_inf: count +-inf in a float16 x, or in a sum rounded to float16, as +-65504, as
            ExLlamaV2 does; NaN stays.
        out_dtype: dtype of the result; None for out's, or x's without an out.
        out: written and returned, if given: x's shape, last stride 1; may be x itself but not
            overlap it in part.
        residual_out: written and returned, if given: x's shape, residual's dtype, last stride 1;
            may be residual.
        memory_efficient: where a gradient is wanted, keep y for it instead of residual_out, and
            undo the affine map: for a y that is kept anyway.  The gradients carry y's rounding, and
            a weight of 0 (with its offset) gets none.  Not with round_before_weight or clamp_inf,
            which lose what would be undone: residual_out is kept.

    Returns:
        y of x's shape in out_dtype, and residual_out of x's shape in residual's dtype.

    Raises:
        TypeError: an argument is no tensor, or of the wrong dtype.
        ValueError: a shape, stride, device, option or memory overlap is wrong, or a backend asked
            for by name cannot serve the call.
        RuntimeError: out or residual_out is given where a gradient is needed.

    The sum is rounded to residual's dtype, y to out_dtype, and xhat where round_before_weight says
    so.  Semantics: Zhang and Sennrich 2019, arXiv:1910.07467; rounding as
    `torch.nn.functional.rms_norm`.

    Example:
        >>> import normkit, torch
        >>> y, residual = normkit.add_rms_norm(torch.ones(2, 4), torch.ones(2, 4), torch.ones(4))
        >>> residual[0, 0].item()
        2.0
    """
    if not is_dynamo_compiling():
        result = _native(
            4, x, residual, weight, bias, eps, weight_offset, round_before_weight, round_sum,
            clamp_inf, out_dtype, out, residual_out, 0,
        )  # fmt: skip
        if result is not None:
            return result  # type: ignore[no-any-return]
    call = Call(
        "add_rms_norm", False, False, x, weight, bias, eps, weight_offset, round_before_weight,
        clamp_inf, out_dtype, out, residual, residual_out, round_sum, memory_efficient,
    )  # fmt: skip
    return cast("tuple[Tensor, Tensor]", _ops.serve(call))


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
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
    memory_efficient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Add x to the residual and normalise the sum by LayerNorm, in one pass over memory.

        s = residual_out = x + residual
        y = (s - mean(s)) / sqrt(var(s) + eps) * (weight + weight_offset) + bias

    Args:
        x: (..., n) in float32, float16 or bfloat16 (float64 takes the reference path).  Outer
            strides are free; an x whose last stride is not 1 is copied once.
        residual: of x's shape, in any of the three dtypes.
        weight: (n,) in any of the three dtypes, whatever x is; None for no weight.
        bias: (n,) in any of the three dtypes; None for no bias.
        eps: added to the variance; None for the machine epsilon of the computing dtype, as torch
            has it.
        round_sum: take the statistic and y from the sum as rounded to residual's dtype, so that
            fused equals unfused, bit for bit; False: from the float32 sum, as FlashInfer and QuACK
            do.
        weight_offset: added to the weight in float32 (Gemma: 1.0); without a weight it is not used.
        round_before_weight: round xhat to the dtype of what is normalised (x, or the rounded sum)
            before the weight multiplies it, as Llama and Qwen of Hugging Face transformers do.
        clamp_inf: count +-inf in a float16 x, or in a sum rounded to float16, as +-65504, as
            ExLlamaV2 does; NaN stays.
        out_dtype: dtype of the result; None for out's, or x's without an out.
        out: written and returned, if given: x's shape, last stride 1; may be x itself but not
            overlap it in part.
        residual_out: written and returned, if given: x's shape, residual's dtype, last stride 1;
            may be residual.
        memory_efficient: where a gradient is wanted, keep y for it instead of residual_out, and
            undo the affine map: for a y that is kept anyway.  The gradients carry y's rounding, and
            a weight of 0 (with its offset) gets none.  Not with round_before_weight or clamp_inf,
            which lose what would be undone: residual_out is kept.

    Returns:
        y of x's shape in out_dtype, and residual_out of x's shape in residual's dtype.

    Raises:
        TypeError: an argument is no tensor, or of the wrong dtype.
        ValueError: a shape, stride, device, option or memory overlap is wrong, or a backend asked
            for by name cannot serve the call.
        RuntimeError: out or residual_out is given where a gradient is needed.

    The sum is rounded to residual's dtype, y to out_dtype, and xhat where round_before_weight says
    so.  Semantics: Ba et al. 2016, arXiv:1607.06450.

    Example:
        >>> import normkit, torch
        >>> y, residual = normkit.add_layer_norm(torch.ones(2, 4), torch.ones(2, 4), torch.ones(4))
        >>> residual[0, 0].item()
        2.0
    """
    if not is_dynamo_compiling():
        result = _native(
            5, x, residual, weight, bias, eps, weight_offset, round_before_weight, round_sum,
            clamp_inf, out_dtype, out, residual_out, 0,
        )  # fmt: skip
        if result is not None:
            return result  # type: ignore[no-any-return]
    call = Call(
        "add_layer_norm", True, False, x, weight, bias, eps, weight_offset, round_before_weight,
        clamp_inf, out_dtype, out, residual, residual_out, round_sum, memory_efficient,
    )  # fmt: skip
    return cast("tuple[Tensor, Tensor]", _ops.serve(call))


_ops.FUNCTIONS.update(
    (op.__name__, op)
    for op in (
        rms_norm,
        layer_norm,
        head_norm,
        add_rms_norm,
        add_layer_norm,
        rms_norm_,
        layer_norm_,
        head_norm_,
        add_rms_norm_,
        add_layer_norm_,
    )
)


def explain(op: str | Callable[..., Any], *tensors: Tensor | None, **options: Any) -> Explanation:
    """Tell who would serve exactly this call, how, and why; nothing is computed or written.

    Args:
        op: one of normkit's functions, or its name.
        tensors: its positional arguments.
        options: its keyword arguments.

    Returns:
        An `Explanation` with `backend` ("cpu", "cuda", "triton" or "reference"), `plan` and
        `reason`.

    Raises:
        ValueError: op is not one of normkit's functions.
        Whatever the call itself would raise.

    Example:
        >>> import normkit, torch
        >>> normkit.explain("rms_norm", torch.ones(2, 4, dtype=torch.float64)).reason
        'x is float64'
    """
    functions = _ops.FUNCTIONS
    function = functions.get(op) if isinstance(op, str) else op
    if function is None or function not in functions.values():
        raise ValueError(f"op: expected one of {', '.join(functions)} of normkit, got {op!r}")
    return _dispatch.explain(function, *tensors, **options)
