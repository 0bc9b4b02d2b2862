"""The norms of `normkit.functional` in place: the result replaces x, and the sum the residual."""

from __future__ import annotations

from typing import Literal, cast

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from normkit import _dispatch, _ops
from normkit._checks import Call

_native = _dispatch.quick

Kind = Literal["rms", "layer"]


def is_layer(kind: Kind) -> bool:
    """Whether a kind of norm subtracts the mean.

    Raises:
        ValueError: kind is neither "rms" nor "layer".
    """
    if kind not in ("rms", "layer"):
        raise ValueError(f'kind: expected "rms" or "layer", got {kind!r}')
    return kind == "layer"


def rms_norm_(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
) -> Tensor:
    """Normalise the last dimension of x in place by its root mean square.

        y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset) + bias
        x <- y

    Args:
        x: (..., n) in float32, float16 or bfloat16, of any outer strides and a last stride of 1;
            overwritten.
        weight: (n,) in any of the three dtypes, whatever x is; None for no weight.
        bias: (n,) in any of the three dtypes; None for no bias.
        eps: added to the mean of squares; None for the machine epsilon of the computing dtype, as
            torch has it.
        weight_offset: added to the weight in float32 (Gemma: 1.0); without a weight it is not used.
        round_before_weight: round xhat to x's dtype before the weight
            multiplies it, as Llama and Qwen of Hugging Face transformers do.
        clamp_inf: count +-inf in a float16 x as +-65504, as ExLlamaV2 does; NaN stays.

    Returns:
        x.

    Raises:
        TypeError: an argument is no tensor, or of the wrong dtype.
        ValueError: a shape, stride, device, option or memory overlap is wrong, or a backend asked
            for by name cannot serve the call.
        RuntimeError: a gradient is needed: use `rms_norm`.

    y is rounded to x's dtype, and xhat where round_before_weight says so.  Semantics: Zhang and
    Sennrich 2019, arXiv:1910.07467; rounding as `torch.nn.functional.rms_norm`.

    Example:
        >>> import normkit, torch
        >>> x = torch.randn(2, 4)
        >>> normkit.rms_norm_(x) is x
        True
    """
    if not is_dynamo_compiling():
        result = _native(
            0, x, None, weight, bias, eps, weight_offset, round_before_weight, True, clamp_inf,
            None, x, None, 0,
        )  # fmt: skip
        if result is not None:
            return result  # type: ignore[no-any-return]
    call = Call(
        "rms_norm_", False, False, x, weight, bias, eps, weight_offset, round_before_weight,
        clamp_inf, None, x,
    )  # fmt: skip
    return cast(Tensor, _ops.serve(call))


def layer_norm_(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-5,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
) -> Tensor:
    """Normalise the last dimension of x in place to mean 0 and variance 1 (LayerNorm).

        y = (x - mean(x)) / sqrt(var(x) + eps) * (weight + weight_offset) + bias
        x <- y

    Args:
        x: (..., n) in float32, float16 or bfloat16, of any outer strides and a last stride of 1;
            overwritten.
        weight: (n,) in any of the three dtypes, whatever x is; None for no weight.
        bias: (n,) in any of the three dtypes; None for no bias.
        eps: added to the variance; None for the machine epsilon of the computing dtype, as torch
            has it.
        weight_offset: added to the weight in float32 (Gemma: 1.0); without a weight it is not used.
        round_before_weight: round xhat to x's dtype before the weight
            multiplies it, as Llama and Qwen of Hugging Face transformers do.
        clamp_inf: count +-inf in a float16 x as +-65504, as ExLlamaV2 does; NaN stays.

    Returns:
        x.

    Raises:
        TypeError: an argument is no tensor, or of the wrong dtype.
        ValueError: a shape, stride, device, option or memory overlap is wrong, or a backend asked
            for by name cannot serve the call.
        RuntimeError: a gradient is needed: use `layer_norm`.

    y is rounded to x's dtype, and xhat where round_before_weight says so.  Semantics: Ba et al.
    2016, arXiv:1607.06450.

    Example:
        >>> import normkit, torch
        >>> x = torch.randn(2, 4)
        >>> normkit.layer_norm_(x) is x
        True
    """
    if not is_dynamo_compiling():
        result = _native(
            1, x, None, weight, bias, eps, weight_offset, round_before_weight, True, clamp_inf,
            None, x, None, 0,
        )  # fmt: skip
        if result is not None:
            return result  # type: ignore[no-any-return]
    call = Call(
        "layer_norm_", True, False, x, weight, bias, eps, weight_offset, round_before_weight,
        clamp_inf, None, x,
    )  # fmt: skip
    return cast(Tensor, _ops.serve(call))


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
) -> Tensor:
    """Normalise each head of x in place, with a weight per head or one for all.

        y = xhat * (weight + weight_offset) + bias,  xhat by `kind` as in `rms_norm` or `layer_norm`
        x <- y

    Args:
        x: (..., heads, head_dim) in float32, float16 or bfloat16, of any outer strides and a last
            stride of 1; overwritten.
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

    Returns:
        x.

    Raises:
        TypeError: an argument is no tensor, or of the wrong dtype.
        ValueError: a shape, stride, device, option or memory overlap is wrong, or a backend asked
            for by name cannot serve the call.
        RuntimeError: a gradient is needed: use `head_norm`.

    y is rounded to x's dtype, and xhat where round_before_weight says so.  Semantics: per-head q
    and k norms of Qwen3, Gemma 3 (rms) and Cohere (layer, weight (heads, head_dim)).

    Example:
        >>> import normkit, torch
        >>> x = torch.randn(2, 3, 4)
        >>> normkit.head_norm_(x, torch.ones(3, 4)) is x
        True
    """
    layer = is_layer(kind)
    if not is_dynamo_compiling():
        result = _native(
            layer + 2, x, None, weight, bias, eps, weight_offset, round_before_weight, True,
            clamp_inf, None, x, None, 0,
        )  # fmt: skip
        if result is not None:
            return result  # type: ignore[no-any-return]
    call = Call(
        "head_norm_", layer, True, x, weight, bias, eps, weight_offset, round_before_weight,
        clamp_inf, None, x,
    )  # fmt: skip
    return cast(Tensor, _ops.serve(call))


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
) -> tuple[Tensor, Tensor]:
    """Add x to the residual and normalise the sum by its RMS, both in place.

        s = residual_out = x + residual
        y = s / sqrt(mean(s^2) + eps) * (weight + weight_offset) + bias
        residual <- s,  x <- y

    Args:
        x: (..., n) in float32, float16 or bfloat16, of any outer strides and a last stride of 1;
            overwritten.
        residual: of x's shape, in any of the three dtypes; overwritten by x + residual, rounded to
            its dtype.
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

    Returns:
        x and residual.

    Raises:
        TypeError: an argument is no tensor, or of the wrong dtype.
        ValueError: a shape, stride, device, option or memory overlap is wrong, or a backend asked
            for by name cannot serve the call.
        RuntimeError: a gradient is needed: use `add_rms_norm`.

    The sum is rounded to residual's dtype, y to x's dtype, and xhat where round_before_weight says
    so.  Semantics: Zhang and Sennrich 2019, arXiv:1910.07467; rounding as
    `torch.nn.functional.rms_norm`.

    Example:
        >>> import normkit, torch
        >>> x, residual = torch.ones(2, 4), torch.ones(2, 4)
        >>> _ = normkit.add_rms_norm_(x, residual, torch.ones(4))
        >>> residual[0, 0].item()
        2.0
    """
    if not is_dynamo_compiling():
        result = _native(
            4, x, residual, weight, bias, eps, weight_offset, round_before_weight, round_sum,
            clamp_inf, None, x, residual, 0,
        )  # fmt: skip
        if result is not None:
            return result  # type: ignore[no-any-return]
    call = Call(
        "add_rms_norm_", False, False, x, weight, bias, eps, weight_offset, round_before_weight,
        clamp_inf, None, x, residual, residual, round_sum,
    )  # fmt: skip
    return cast("tuple[Tensor, Tensor]", _ops.serve(call))


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
) -> tuple[Tensor, Tensor]:
    """Add x to the residual and normalise the sum by LayerNorm, both in place.

        s = residual_out = x + residual
        y = (s - mean(s)) / sqrt(var(s) + eps) * (weight + weight_offset) + bias
        residual <- s,  x <- y

    Args:
        x: (..., n) in float32, float16 or bfloat16, of any outer strides and a last stride of 1;
            overwritten.
        residual: of x's shape, in any of the three dtypes; overwritten by x + residual, rounded to
            its dtype.
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

    Returns:
        x and residual.

    Raises:
        TypeError: an argument is no tensor, or of the wrong dtype.
        ValueError: a shape, stride, device, option or memory overlap is wrong, or a backend asked
            for by name cannot serve the call.
        RuntimeError: a gradient is needed: use `add_layer_norm`.

    The sum is rounded to residual's dtype, y to x's dtype, and xhat where round_before_weight says
    so.  Semantics: Ba et al. 2016, arXiv:1607.06450.

    Example:
        >>> import normkit, torch
        >>> x, residual = torch.ones(2, 4), torch.ones(2, 4)
        >>> _ = normkit.add_layer_norm_(x, residual, torch.ones(4))
        >>> residual[0, 0].item()
        2.0
    """
    if not is_dynamo_compiling():
        result = _native(
            5, x, residual, weight, bias, eps, weight_offset, round_before_weight, round_sum,
            clamp_inf, None, x, residual, 0,
        )  # fmt: skip
        if result is not None:
            return result  # type: ignore[no-any-return]
    call = Call(
        "add_layer_norm_", True, False, x, weight, bias, eps, weight_offset, round_before_weight,
        clamp_inf, None, x, residual, residual, round_sum,
    )  # fmt: skip
    return cast("tuple[Tensor, Tensor]", _ops.serve(call))
