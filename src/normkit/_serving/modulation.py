"""Gradients of modulated norms: those of the norm in them, and of what stands around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from normkit import reference
from normkit._serving import dispatch
from normkit._serving.backends import wanted_backend
from normkit._serving.dispatch import Wanted
from normkit._serving.formula import OF_STATISTICS, Formula
from normkit._spec import OPTIONS, Call, Gradients

if TYPE_CHECKING:
    from normkit._serving.formula import Context


class Options(NamedTuple):
    """What is kept beside the tensors."""

    formula: Formula
    round_each: bool


class Kept(NamedTuple):
    """The inputs of a call, and what it took of each row; residual_out where it was normalised."""

    x: Tensor
    residual: Tensor | None
    gate: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    residual_out: Tensor | None
    rstd: Tensor
    mean: Tensor | None


# In the order of their gradients.
INPUTS = Kept._fields[: Kept._fields.index("residual_out")]


def keep(ctx: Context, call: Call, made: dict[str, Tensor]) -> None:
    """Keep what `gradients` needs; the sum again only where it is not what was normalised."""
    is_source = call.round_sum and not call.clamp_inf
    sum_of = made.get("residual_out") if is_source else None
    mean = made.get("mean") if call.layer else None
    inputs = [getattr(call, name) for name in INPUTS]
    ctx.save_for_backward(*inputs, sum_of, made["rstd"], mean)
    ctx.backend = wanted_backend()
    ctx.options = Options(Formula.of(call), call.round_each)


def gradients(
    ctx: Context,
    needed: dict[str, bool],
    grad_y: Tensor | None,
    grad_residual_out: Tensor | None,
    norm_backward: Callable[..., Gradients],
) -> dict[str, Tensor | None]:
    """Gradients of INPUTS, by name; roundings count as the identity.

    With n = norm(h), h = residual + gate * x and g = grad_y * (1 + scale), that of shift is the sum
    of grad_y, that of scale the sum of grad_y * n, and h, weight and bias get those of the norm for
    g; with grad_h, that of gate is the sum of grad_h * x, and that of x is grad_h * gate.
    """
    kept, (formula, round_each) = Kept(*ctx.saved_tensors), ctx.options
    if torch.is_grad_enabled():  # to be differentiated again
        kept, norm_backward = _as_functions(kept, formula, round_each), differentiable
    if grad_y is None:
        grad_y = torch.zeros_like(kept.x)
    compute = kept.rstd.dtype
    made: dict[str, Tensor | None] = dict.fromkeys(INPUTS)
    g = grad_y.to(compute)
    if needed["shift"]:
        made["shift"] = _summed(g, kept.shift)
    source = _source(kept, formula, round_each)
    if kept.scale is not None:
        if needed["scale"]:
            made["scale"] = _summed(g * _norm_again(kept, source, formula, round_each), kept.scale)
        g = g * (1 + reference.per_row(kept.scale, g).to(compute))
    adds = kept.residual is not None
    of_h_wanted = adds and (needed["residual"] or needed["gate"] or needed["x"])
    of_x = kept.x.dtype if needed["x"] else None
    wanted = Wanted(compute if of_h_wanted else None if adds else of_x, None, needed["weight"],
                    needed["bias"])  # fmt: skip
    tensors = (g, None, source, None, kept.weight, kept.bias, kept.rstd, kept.mean)
    of_h, _, made["weight"], made["bias"] = norm_backward(
        of_row_alone(formula, clamped=adds), wanted, ctx.backend, *tensors
    )
    if not adds:
        made["x"] = of_h
    elif of_h is not None:
        made |= _around_sum(kept, formula, needed, of_h, grad_residual_out)
    return made


def _as_functions(kept: Kept, formula: Formula, round_each: bool) -> Kept:
    """With the statistics, and the sum, as functions of the inputs."""
    rstd, mean = reference.statistics(
        kept.x,
        kept.residual,
        formula.eps,
        kind=formula.statistic,
        gate=kept.gate,
        round_each=round_each,
        **{name: formula.options[name] for name in OF_STATISTICS},  # type: ignore[literal-required]
    )
    return kept._replace(rstd=rstd, mean=mean, residual_out=None)


def differentiable(formula: Formula, wanted: Wanted, _backend: str, *tensors: Any) -> Gradients:
    """The norm's gradients by operations that torch can differentiate again."""
    return dispatch.backward_by_reference(formula, wanted, *tensors[:-1], differentiable=True)


def _around_sum(
    kept: Kept, formula: Formula, needed: dict[str, bool], of_h: Tensor, of_sum: Tensor | None
) -> dict[str, Tensor | None]:
    """Gradients of residual, gate and x, from that of what was normalised and of residual_out."""
    assert kept.residual is not None
    clamps = formula.options["clamp_inf"]
    if clamps and formula.options["round_sum"] and kept.residual.dtype == torch.float16:
        total = reference.added(kept.x, kept.residual, kept.gate, clamp_inf=True)
        of_h = torch.where(total.to(torch.float16).isinf(), 0.0, of_h)  # clamped: a constant
    if of_sum is not None:
        of_h = of_h + of_sum.to(of_h.dtype)
    made: dict[str, Tensor | None] = {}
    if needed["residual"]:
        made["residual"] = dispatch.packed(of_h.to(kept.residual.dtype))
    x, clamped = kept.x.to(of_h.dtype), None
    if clamps and kept.x.dtype == torch.float16:
        clamped = x.isinf()
        x = x.clamp(-reference.FLOAT16_MAX, reference.FLOAT16_MAX)
    if needed["gate"]:
        made["gate"] = _summed(of_h * x, kept.gate)
    if needed["x"]:
        of_x = of_h if kept.gate is None else of_h * reference.per_row(kept.gate, x).to(of_h.dtype)
        of_x = of_x if clamped is None else torch.where(clamped, 0.0, of_x)
        made["x"] = dispatch.packed(of_x.to(kept.x.dtype))
    return made


def _source(kept: Kept, formula: Formula, round_each: bool) -> Tensor:
    """What was normalised: a tensor of the call, or the sum again."""
    if kept.residual is None:
        return kept.x
    if kept.residual_out is not None:
        return kept.residual_out
    options = formula.options
    total = reference.normalised_row(
        kept.x,
        kept.residual,
        kept.rstd.dtype,
        options["round_sum"],
        options["clamp_inf"],
        kept.gate,
        round_each,
    )
    # As it was rounded, since options round to its dtype.
    return total.to(kept.residual.dtype) if options["round_sum"] else total


def of_row_alone(formula: Formula, *, clamped: bool) -> Formula:
    """That of the norm of what has been made of x; clamped: where it had to be."""
    options: dict[str, Any] = {**formula.options}
    if clamped:
        options["clamp_inf"] = False
    given = tuple(options[name] for name in OPTIONS)
    return Formula(formula.kind, formula.eps, given)


def _norm_again(kept: Kept, source: Tensor, formula: Formula, round_each: bool) -> Tensor:
    """What 1 + scale multiplied."""
    dtype = kept.x.dtype
    if kept.residual is not None and formula.options["round_sum"]:
        dtype = kept.residual.dtype
    tensors = source, kept.rstd, kept.mean, kept.weight, kept.bias
    return formula.norm_again(*tensors, normalised=dtype, rounds=round_each)


def _summed(t: Tensor, like: Tensor | None) -> Tensor:
    assert like is not None
    shape = reference.per_row(like, t).shape
    return dispatch.packed(t.sum_to_size(shape).reshape(like.shape).to(like.dtype))
