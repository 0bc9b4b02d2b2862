"""Norms together with what models compute around them, in one pass over memory.

Arguments of a norm mean what they mean in `normkit.functional`; those of the fusion are described
once, in `modulated_norm`, `add_modulated_norm` and `gated_norm`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from normkit._serving.backends import quick
from normkit._serving.checks import in_groups
from normkit._serving.serve import FUNCTIONS, serve
from normkit._spec import (
    ADD,
    BEHIND_GATING,
    BEHIND_MODULATION,
    LAYER,
    MODULATED,
    OPS,
    Activation,
    Call,
    Kind,
    gated,
    is_layer,
)

__all__ = [
    "add_modulated_norm",
    "add_modulated_norm_",
    "gated_norm",
    "gated_norm_",
    "modulated_norm",
    "modulated_norm_",
]

_norm = cast("Callable[..., Tensor | None]", quick)
_add_norm = cast("Callable[..., tuple[Tensor, Tensor] | None]", quick)
_serve = cast("Callable[[Call], Tensor]", serve)
_serve_both = cast("Callable[[Call], tuple[Tensor, Tensor]]", serve)


def modulated_norm(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    kind: Kind = "layer",
    round_each: bool = False,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Normalise x, and scale and shift it by what a condition says (AdaLN).

        n = xhat * (weight + weight_offset) + bias,  xhat by `kind` as in `rms_norm` or `layer_norm`
        y = n * (1 + scale) + shift

    Args:
        x: (..., n), as in `rms_norm`.
        scale: x's first dimensions, or ones in their place, and its last: (n,) for all rows, (B, n)
            or (B, 1, n) for each sample of an x of (B, S, n), (B, S, n) for each token; in any of
            the three dtypes; None for zeros.  A chunk of a tensor that holds several of them is
            read where it is.
        shift: likewise.
        weight: (n,) in any of the three dtypes; None for no weight.
        bias: likewise.
        kind: "layer" or "rms".
        round_each: round n to x's dtype, 1 + scale to scale's, and the product and the sum to the
            dtype in which torch computes them of two tensors, as models do that modulate in 16 bits
            (Flux, SD3, Qwen-Image): the bits of `norm(x) * (1 + scale) + shift`.  False: all in
            float32, rounded once, at the store (Wan, SkyReels, Cosmos).

    The other arguments, errors and rounding are those of `rms_norm`; out shares no memory with
    scale or shift.  Gradients go to x, scale, shift, weight and bias.

    Returns:
        y, of x's shape, rounded to out_dtype.

    Semantics: `AdaLayerNormZero` and its relatives in Hugging Face diffusers (Peebles and Xie 2022,
    arXiv:2212.09748).

    Example:
        >>> import normkit, torch
        >>> x, scale, shift = torch.randn(2, 5, 8), torch.randn(2, 8), torch.randn(2, 8)
        >>> normkit.modulated_norm(x, scale, shift).shape
        torch.Size([2, 5, 8])
    """
    call = (
        MODULATED | is_layer(kind) * LAYER, x, None, weight, bias, eps, weight_offset,
        round_before_weight, True, clamp_inf, round_rstd, round_weight, out_dtype, out, None, False,
    )  # fmt: skip
    modulation = (None, scale, shift, round_each)
    made = None if is_dynamo_compiling() else _norm(*call, *modulation, *BEHIND_MODULATION)
    return _serve(Call(*call, False, *modulation)) if made is None else made


def modulated_norm_(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    kind: Kind = "layer",
    round_each: bool = False,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
) -> Tensor:
    """`modulated_norm` in place: x, whose last stride has to be 1, is overwritten and returned."""
    call = (
        MODULATED | is_layer(kind) * LAYER, x, None, weight, bias, eps, weight_offset,
        round_before_weight, True, clamp_inf, round_rstd, round_weight, None, x, None, False,
    )  # fmt: skip
    modulation = (None, scale, shift, round_each)
    made = None if is_dynamo_compiling() else _norm(*call, *modulation, *BEHIND_MODULATION)
    return _serve(Call(*call, True, *modulation)) if made is None else made


def add_modulated_norm(
    x: Tensor,
    residual: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    kind: Kind = "layer",
    round_sum: bool = True,
    round_each: bool = False,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add x, times a gate, to the residual, and normalise and modulate the sum.

        h = residual_out = residual + gate * x
        n = xhat * (weight + weight_offset) + bias,  xhat of h by `kind`
        y = n * (1 + scale) + shift

    Args:
        x: what a layer returned, (..., n).
        residual: of x's shape, in any of the three dtypes.
        gate: as scale of `modulated_norm`; None for no gate.
        round_sum: normalise h as rounded to residual's dtype; False: the float32 sum.
        round_each: as in `modulated_norm`, of h's dtype; and round gate * x to the dtype in which
            torch computes it.
        residual_out: as in `add_rms_norm`.

    The other arguments are those of `modulated_norm`, errors and rounding those of `rms_norm`.
    Gradients go to x, residual and gate too.

    Returns:
        (y, residual_out), both of x's shape: rounded to out_dtype, and to residual's dtype.

    Example:
        >>> import normkit, torch
        >>> x, residual, of_sample = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.randn(2, 24)
        >>> gate, scale, shift = of_sample.chunk(3, dim=-1)
        >>> y, residual = normkit.add_modulated_norm(x, residual, gate, scale, shift)
    """
    call = (
        MODULATED | ADD | is_layer(kind) * LAYER, x, residual, weight, bias, eps, weight_offset,
        round_before_weight, round_sum, clamp_inf, round_rstd, round_weight, out_dtype, out,
        residual_out, False,
    )  # fmt: skip
    modulation = (gate, scale, shift, round_each)
    made = None if is_dynamo_compiling() else _add_norm(*call, *modulation, *BEHIND_MODULATION)
    return _serve_both(Call(*call, False, *modulation)) if made is None else made


def add_modulated_norm_(
    x: Tensor,
    residual: Tensor,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    kind: Kind = "layer",
    round_sum: bool = True,
    round_each: bool = False,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
) -> tuple[Tensor, Tensor]:
    """`add_modulated_norm` in place: x becomes y and the residual the sum; returns both."""
    call = (
        MODULATED | ADD | is_layer(kind) * LAYER, x, residual, weight, bias, eps, weight_offset,
        round_before_weight, round_sum, clamp_inf, round_rstd, round_weight, None, x, residual,
        False,
    )  # fmt: skip
    modulation = (gate, scale, shift, round_each)
    made = None if is_dynamo_compiling() else _add_norm(*call, *modulation, *BEHIND_MODULATION)
    return _serve_both(Call(*call, True, *modulation)) if made is None else made


def gated_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    kind: Kind = "rms",
    activation: Activation = "silu",
    norm_before_gate: bool = True,
    group_size: int | None = None,
    round_each: bool = False,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Normalise x, and multiply it by an activation of z, or the other way round.

        norm_before_gate:  y = n * act(z),  n = xhat * (weight + weight_offset) + bias
        otherwise:         y = h_hat * (weight + weight_offset) + bias,  h = x * act(z)

    with xhat and h_hat by `kind` as in `rms_norm` or `layer_norm`, act(z) = z * sigmoid(z) for
    "silu" and sigmoid(z) for "sigmoid".

    Args:
        x: (..., n), as in `rms_norm`.
        z: of x's shape, with any outer strides, in any of the three dtypes.
        weight: (n,), or (heads, n) for an x of (..., heads, n); None for no weight.
        bias: likewise.
        kind: "rms" or "layer".
        activation: "silu" or "sigmoid".
        norm_before_gate: True: Qwen3-Next, Kimi-Linear, OLMo-Hybrid; False: Mamba-2, Bamba,
            Zamba-2, Falcon-H1.
        group_size: normalise each group of so many columns by itself; it divides n, and weight
            and bias are (n,) then.  None: all of them together.
        round_each: round n to x's dtype before act(z) multiplies it, as Qwen3-Next does, together
            with round_before_weight.  No effect where the gate comes first: Mamba-2 and its
            relatives compute in float32 up to round_before_weight.

    All in float32, act(z) too, and rounded once, at the store, but for what these say; an act(z)
    below 2^-126 counts as 0.  The other arguments, errors and rounding are those of `rms_norm`.
    Gradients go to x, z, weight and bias.

    Returns:
        y, of x's shape, rounded to out_dtype.

    Semantics: `RMSNormGated` of mamba-ssm (Dao and Gu 2024, arXiv:2405.21060) and of Hugging Face
    transformers.

    Example:
        >>> import normkit, torch
        >>> x, z, weight = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.ones(8)
        >>> normkit.gated_norm(x, z, weight, norm_before_gate=False, group_size=4).shape
        torch.Size([2, 5, 8])
    """
    if group_size is not None:
        split = in_groups(group_size, x=x, z=z, weight=weight, bias=bias, out=out)
        y = gated_norm(
            **split, eps=eps, kind=kind, activation=activation, norm_before_gate=norm_before_gate,
            round_each=round_each, weight_offset=weight_offset,
            round_before_weight=round_before_weight, clamp_inf=clamp_inf, round_rstd=round_rstd,
            round_weight=round_weight,
            out_dtype=out_dtype,
        )  # fmt: skip
        return y.flatten(-2) if out is None else out
    call = (
        gated(kind, activation, norm_before_gate), x, None, weight, bias, eps, weight_offset,
        round_before_weight, True, clamp_inf, round_rstd, round_weight, out_dtype, out, None, False,
    )  # fmt: skip
    gating = (None, None, None, round_each, z)
    made = None if is_dynamo_compiling() else _norm(*call, *gating, *BEHIND_GATING)
    return _serve(Call(*call, False, *gating)) if made is None else made


def gated_norm_(
    x: Tensor,
    z: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    kind: Kind = "rms",
    activation: Activation = "silu",
    norm_before_gate: bool = True,
    group_size: int | None = None,
    round_each: bool = False,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
) -> Tensor:
    """`gated_norm` in place: x, whose last stride has to be 1, is overwritten and returned."""
    if group_size is not None:
        split = in_groups(group_size, x=x, z=z, weight=weight, bias=bias)
        gated_norm_(
            **split, eps=eps, kind=kind, activation=activation, norm_before_gate=norm_before_gate,
            round_each=round_each, weight_offset=weight_offset,
            round_before_weight=round_before_weight, clamp_inf=clamp_inf, round_rstd=round_rstd,
            round_weight=round_weight,
        )  # fmt: skip
        return x
    call = (
        gated(kind, activation, norm_before_gate), x, None, weight, bias, eps, weight_offset,
        round_before_weight, True, clamp_inf, round_rstd, round_weight, None, x, None, False,
    )  # fmt: skip
    gating = (None, None, None, round_each, z)
    made = None if is_dynamo_compiling() else _norm(*call, *gating, *BEHIND_GATING)
    return _serve(Call(*call, True, *gating)) if made is None else made


FUNCTIONS.update(
    (op.name + form, globals()[op.name + form])
    for op in OPS.values()
    if op.modulated or op.gated
    for form in ("", "_")
)
