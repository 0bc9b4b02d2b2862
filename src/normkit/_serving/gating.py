"""Gradients of gated norms: those of the norm in them, and of the gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from normkit import reference
from normkit._serving import dispatch
from normkit._serving.backends import wanted_backend
from normkit._serving.dispatch import Wanted
from normkit._serving.formula import Formula
from normkit._serving.modulation import differentiable, of_row_alone
from normkit._spec import Activation, Call, Gradients

if TYPE_CHECKING:
    from normkit._serving.formula import Context


class Options(NamedTuple):
    """What is kept beside the tensors."""

    formula: Formula
    activation: Activation
    norm_before_gate: bool
    round_each: bool


class Kept(NamedTuple):
    """The inputs of a call, and what it took of each row."""

    x: Tensor
    z: Tensor
    weight: Tensor | None
    bias: Tensor | None
    rstd: Tensor
    mean: Tensor | None


# In the order of their gradients.
INPUTS = Kept._fields[: Kept._fields.index("rstd")]


def keep(ctx: Context, call: Call, made: dict[str, Tensor]) -> None:
    """Keep what `gradients` needs."""
    inputs = [getattr(call, name) for name in INPUTS]
    ctx.save_for_backward(*inputs, made["rstd"], made.get("mean") if call.layer else None)
    ctx.backend = wanted_backend()
    ctx.options = Options(Formula.of(call), call.activation, call.norm_before_gate, call.round_each)


def gradients(
    ctx: Context,
    needed: dict[str, bool],
    grad_y: Tensor | None,
    _grad_residual_out: None,
    norm_backward: Callable[..., Gradients],
) -> dict[str, Tensor | None]:
    """Gradients of INPUTS, by name; roundings count as the identity.

    With a = act(z): of y = norm(x) * a the norm gets grad_y * a, and a gets grad_y * norm(x); of
    y = norm(h) with h = x * a the norm gets grad_y, and with its gradient of h, x gets grad_h * a
    and a gets grad_h * x.  That of z is that of a times act'(z).
    """
    kept, options = Kept(*ctx.saved_tensors), ctx.options
    if grad_y is None:
        grad_y = torch.zeros_like(kept.x)
    if torch.is_grad_enabled():  # to be differentiated again
        norm_backward = differentiable
    compute = kept.rstd.dtype
    s = _sigmoid(kept.z, compute)
    a = s if options.activation == "sigmoid" else kept.z.to(compute) * s
    made: dict[str, Tensor | None] = dict.fromkeys(INPUTS)
    g = grad_y.to(compute)
    if options.norm_before_gate:
        of_norm = kept.x.dtype if needed["x"] else None
        made["x"], made["weight"], made["bias"] = _of_norm(
            ctx, kept, g * a, kept.x, of_norm, needed, norm_backward
        )
        of_a = g * _norm_again(kept, options) if needed["z"] else None
    else:
        x = reference.widened(kept.x, compute, options.formula.options["clamp_inf"])
        either = compute if needed["x"] or needed["z"] else None
        of_h, made["weight"], made["bias"] = _of_norm(
            ctx, kept, g, x * a, either, needed, norm_backward
        )
        of_a = None if of_h is None else of_h * x
        if needed["x"] and of_h is not None:
            of_x = of_h * a
            if options.formula.options["clamp_inf"] and kept.x.dtype == torch.float16:
                of_x = torch.where(kept.x.isinf(), 0.0, of_x)  # what was clamped is a constant
            made["x"] = dispatch.packed(of_x.to(kept.x.dtype))
    if needed["z"] and of_a is not None:
        slope = s * (1 - s)
        if options.activation == "silu":
            slope = s + kept.z.to(compute) * slope
        of_z = of_a * slope
        made["z"] = dispatch.packed(of_z.to(kept.z.dtype))
    return made


def _of_norm(
    ctx: Context,
    kept: Kept,
    g: Tensor,
    source: Tensor,
    of_source: torch.dtype | None,
    needed: dict[str, bool],
    norm_backward: Callable[..., Gradients],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of what is normalised, of weight and of bias."""
    formula = of_row_alone(ctx.options.formula, clamped=source is not kept.x)
    wanted = Wanted(of_source, None, needed["weight"], needed["bias"])
    tensors = (g, None, source, None, kept.weight, kept.bias, kept.rstd, kept.mean)
    of_row, _, of_weight, of_bias = norm_backward(formula, wanted, ctx.backend, *tensors)
    return of_row, of_weight, of_bias


def _norm_again(kept: Kept, options: Options) -> Tensor:
    """What act(z) multiplied."""
    formula, x = options.formula, kept.x
    given = formula.statistics(x) if torch.is_grad_enabled() else (kept.rstd, kept.mean)
    affine = kept.weight, kept.bias
    return formula.norm_again(x, *given, *affine, normalised=x.dtype, rounds=options.round_each)


def _sigmoid(z: Tensor, compute: torch.dtype) -> Tensor:
    """The activation as kernels compute it: the gate of a row of ones, whose norm is 1.

    Torch's own has other bits at the end of a tensor, and of what a thread has of it, than before.
    """
    if torch.is_grad_enabled():  # to be differentiated again
        return torch.sigmoid(z.to(compute))
    ones = z.new_ones(z.shape[-1:], dtype=compute).expand(z.shape)
    gated: Tensor = torch.ops.normkit.gated_norm(ones, z, eps=0.0, activation="sigmoid")[0]
    return gated
