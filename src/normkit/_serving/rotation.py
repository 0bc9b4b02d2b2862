"""Gradients of rotated norms: those of the norm, for what has been turned back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from normkit._serving import dispatch
from normkit._serving.backends import wanted_backend
from normkit._serving.dispatch import Wanted
from normkit._serving.formula import Formula
from normkit._serving.modulation import differentiable
from normkit._spec import Call, Gradients
from normkit.reference import rotation

if TYPE_CHECKING:
    from normkit._serving.formula import Context


class Options(NamedTuple):
    """What is kept beside the tensors."""

    formula: Formula
    interleaved: bool
    rounds_norm: bool


class Kept(NamedTuple):
    """The inputs of a call, and what it took of each row."""

    x: Tensor
    cos: Tensor
    sin: Tensor
    weight: Tensor | None
    bias: Tensor | None
    positions: Tensor | None
    rstd: Tensor
    mean: Tensor | None


# In the order of their gradients.
INPUTS = Kept._fields[: Kept._fields.index("positions")]


def keep(ctx: Context, call: Call, made: dict[str, Tensor]) -> None:
    """Keep what `gradients` needs."""
    inputs = [getattr(call, name) for name in (*INPUTS, "positions")]
    ctx.save_for_backward(*inputs, made["rstd"], made.get("mean") if call.layer else None)
    ctx.backend = wanted_backend()
    rounds_norm = call.round_norm or call.round_each
    ctx.options = Options(Formula.of(call), call.interleaved, rounds_norm)


def gradients(
    ctx: Context,
    needed: dict[str, bool],
    grad_y: Tensor | None,
    _grad_residual_out: None,
    norm_backward: Callable[..., Gradients],
) -> dict[str, Tensor | None]:
    """Gradients of INPUTS, by name; roundings count as the identity.

    The norm gets grad_y rotated by the opposite angle; with pairs (a, b) of the norm and (g, h) of
    grad_y, that of cos is the sum of a * g + b * h over heads, that of sin that of a * h - b * g.
    """
    kept, options = Kept(*ctx.saved_tensors), ctx.options
    if grad_y is None:
        grad_y = torch.zeros_like(kept.x)
    if torch.is_grad_enabled():  # to be differentiated again
        norm_backward = differentiable
    compute, interleaved = kept.rstd.dtype, options.interleaved
    made: dict[str, Tensor | None] = dict.fromkeys(INPUTS)
    g = grad_y.to(compute)
    table = kept.cos.to(compute), -kept.sin.to(compute), kept.positions
    of_norm = rotation.rotated(g, *table, interleaved=interleaved)
    wanted = Wanted(kept.x.dtype if needed["x"] else None, None, needed["weight"], needed["bias"])
    tensors = (of_norm, None, kept.x, None, kept.weight, kept.bias, kept.rstd, kept.mean)
    made["x"], _, made["weight"], made["bias"] = norm_backward(
        options.formula, wanted, ctx.backend, *tensors
    )
    if needed["cos"] or needed["sin"]:
        width = 2 * kept.cos.shape[-1]
        n = _norm_again(kept, options)[..., :width]
        of_a, of_b = rotation.pairs(g[..., :width], interleaved)
        a, b = rotation.pairs(n, interleaved)
        made["cos"] = _of_table(a * of_a + b * of_b, kept.cos, kept.positions)
        made["sin"] = _of_table(a * of_b - b * of_a, kept.sin, kept.positions)
    return made


def _of_table(of_rows: Tensor, table: Tensor, positions: Tensor | None) -> Tensor:
    """The sum over heads, and over the rows that took a row of cos or sin."""
    of_tokens = of_rows.sum(-2)
    if positions is None:
        return dispatch.packed(of_tokens.sum_to_size(table.shape).to(table.dtype))
    at = positions.expand(of_tokens.shape[:-1]).reshape(-1)
    of_tokens = of_tokens.reshape(at.shape[0], of_tokens.shape[-1])
    inside = (at >= 0) & (at < table.shape[0])
    made = of_tokens.new_zeros(table.shape)
    return made.index_add(0, at[inside].long(), of_tokens[inside]).to(table.dtype)


def _norm_again(kept: Kept, options: Options) -> Tensor:
    """What was rotated."""
    formula, x = options.formula, kept.x
    given = formula.statistics(x) if torch.is_grad_enabled() else (kept.rstd, kept.mean)
    affine = kept.weight, kept.bias
    return formula.norm_again(x, *given, *affine, normalised=x.dtype, rounds=options.rounds_norm)
