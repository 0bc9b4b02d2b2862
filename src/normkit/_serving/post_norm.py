"""Gradients of norms in front of a sum: of the unfused formula, by those of the norms alone.

Of a call only its inputs and the sum are kept; the statistics of each norm are taken again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from normkit import reference
from normkit._serving import dispatch
from normkit._serving.backends import wanted_backend
from normkit._serving.dispatch import Wanted
from normkit._serving.formula import Formula
from normkit._spec import Call, Gradients

# In the order of their gradients.
INPUTS = ("x", "residual", "weight", "bias", "next_weight", "next_bias")

if TYPE_CHECKING:
    from normkit._serving.formula import Context


class Options(NamedTuple):
    """What is kept beside the tensors."""

    formula: Formula
    next_eps: float | None
    alpha: float
    beta: float
    residual_dtype: torch.dtype


class _Norm(NamedTuple):
    """One of the two norms: what it normalised, and its weights."""

    source: Tensor
    weight: Tensor | None
    bias: Tensor | None
    formula: Formula


def keep(ctx: Context, call: Call, made: dict[str, Tensor]) -> None:
    """Keep what `gradients` needs."""
    assert call.residual is not None
    ctx.save_for_backward(
        call.x, call.weight, call.bias, made.get("residual_out"), call.next_weight, call.next_bias
    )
    ctx.backend = wanted_backend()
    options = call.alpha, call.beta, call.residual.dtype
    ctx.options = Options(Formula.of(call), call.second_eps, *options)


def gradients(
    ctx: Context,
    needed: dict[str, bool],
    grad_y: Tensor | None,
    grad_residual_out: Tensor | None,
    norm_backward: Callable[..., Gradients],
) -> dict[str, Tensor | None]:
    """Gradients of INPUTS, by name; roundings count as the identity.

    With h = alpha * residual + beta * norm(x) and grad_h, that of the second norm for grad_y plus
    grad_residual_out: residual gets alpha * grad_h, and x, weight and bias what the first norm has
    for beta * grad_h.  Without a second norm grad_y is grad_h.
    """
    x, weight, bias, total, next_weight, next_bias = ctx.saved_tensors
    formula, next_eps, alpha, beta, residual_dtype = ctx.options
    first = _Norm(x, weight, bias, formula)
    compute = reference.compute_dtype_of(x, None)
    made: dict[str, Tensor | None] = dict.fromkeys(INPUTS)
    of_first = any(needed[name] for name in ("x", "weight", "bias"))

    def back(norm: _Norm, grad: Tensor, *wanted: Any) -> Gradients:
        return _back(norm, grad, Wanted(wanted[0], None, *wanted[1:]), ctx.backend, norm_backward)

    of_h = None if total is not None or grad_y is None else grad_y.to(compute)
    if total is not None and grad_y is not None:
        second = _Norm(total, next_weight, next_bias, _with_eps(formula, next_eps))
        of_sum = compute if needed["residual"] or of_first else None
        wanted = of_sum, needed["next_weight"], needed["next_bias"]
        of_h, _, made["next_weight"], made["next_bias"] = back(second, grad_y, *wanted)
    if grad_residual_out is not None:
        wide = grad_residual_out.to(compute)
        of_h = wide if of_h is None else of_h + wide
    if of_h is None:
        return made
    if needed["residual"]:
        of_residual = of_h if alpha == 1.0 else of_h * alpha
        made["residual"] = dispatch.packed(of_residual.to(residual_dtype))
    if of_first:
        of_norm = of_h if beta == 1.0 else of_h * beta
        wanted = x.dtype if needed["x"] else None, needed["weight"], needed["bias"]
        made["x"], _, made["weight"], made["bias"] = back(first, of_norm, *wanted)
    return made


def _with_eps(formula: Formula, eps: float | None) -> Formula:
    return replace(formula, eps=eps, from_output=False)


def _back(
    norm: _Norm,
    grad: Tensor,
    wanted: Wanted,
    backend: str,
    norm_backward: Callable[..., Gradients],
) -> Gradients:
    source, weight, bias, formula = norm
    tensors = grad, None, source, None, weight, bias
    if torch.is_grad_enabled():  # to be differentiated again: the statistics are part of that
        of_rows = source.new_empty(0, dtype=reference.compute_dtype_of(source, None))
        return dispatch.backward_by_reference(
            formula, wanted, *tensors, of_rows, differentiable=True
        )
    operator = torch.ops.normkit.layer_norm if formula.layer else torch.ops.normkit.rms_norm
    options = {name: value for name, value in formula.options.items() if name != "round_sum"}
    _, rstd, *mean = operator(source, eps=formula.eps, **options)
    return norm_backward(formula, wanted, backend, *tensors, rstd, mean[0] if mean else None)
