"""What autograd keeps of a norm, and the gradients that it gets for it.

The operators and compiled calls as plain torch keep the same; eager calls that need gradients leave
the node of this module, which the extension makes for most of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from normkit._serving import dispatch
from normkit._serving.backends import differentiate_quickly, natives, wanted_backend
from normkit._serving.dispatch import Wanted
from normkit._serving.formula import Formula, keeps_output, normalises_sum, values_of
from normkit._serving.refusal import Refusal
from normkit._spec import EPS_OUTSIDE, FROM_OUTPUT, Call, Gradients, Result, Saved

# What was normalised, residual, weight, bias, rstd and mean.
Kept = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor | None]


class Context(Protocol):
    """What autograd keeps of a call."""

    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def mark_non_differentiable(self, *tensors: Tensor) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


class NormContext(Context, Protocol):
    """And what is kept with it here."""

    saved_tensors: Kept
    # `values_of` the call, what `use_backend` named, and the dtypes of x and residual: one
    # attribute, since each costs every call.
    norm: tuple[tuple[Any, ...], str, torch.dtype, torch.dtype | None]


# What autograd hands to the forward pass of a norm, and of which it takes gradients.
Inputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def remember(ctx: NormContext, values: tuple[Any, ...], inputs: Inputs, saved: Saved) -> None:
    """Keep what the backward pass needs: rstd, mean and no second copy of anything."""
    x, residual, weight, bias = inputs
    y, residual_out, rstd, mean = saved
    ctx.norm = values, wanted_backend(), x.dtype, None if residual is None else residual.dtype
    source = x
    if keeps_output(values):
        source, residual, mean = y, None, None
    elif residual_out is not None and normalises_sum(values):
        source, residual = residual_out, None
    ctx.save_for_backward(source, residual, weight, bias, rstd, mean)


def result_of(ctx: NormContext, values: tuple[Any, ...], inputs: Inputs, saved: Saved) -> Result:
    """Give what the forward pass of an autograd function returns, and remember the rest."""
    remember(ctx, values, inputs, saved)
    y, residual_out = saved[:2]
    if residual_out is None:
        return y
    if not any(ctx.needs_input_grad[-4:-2]):
        ctx.mark_non_differentiable(residual_out)
    return y, residual_out


def gradients(
    ctx: NormContext,
    needed: Sequence[bool],
    grad_y: Tensor | None,
    grad_residual_out: Tensor | None,
    kept: Kept,
    backward: Callable[..., Gradients],
) -> Gradients:
    """Gradients of x, residual, weight and bias as far as they are needed."""
    if grad_y is None:
        if grad_residual_out is None:
            return None, None, None, None
        grad_y = torch.zeros_like(grad_residual_out)
    values, backend, x_dtype, residual_dtype = ctx.norm
    formula = Formula.of_call(values)
    wanted = Wanted(
        x_dtype if needed[0] else None, residual_dtype if needed[1] else None, *needed[2:]
    )
    if not torch.is_grad_enabled():
        return backward(formula, wanted, backend, grad_y, grad_residual_out, *kept)
    if formula.from_output:
        raise RuntimeError(
            "memory_efficient: expected False where gradients are differentiated again, got True"
        )
    return dispatch.backward_by_reference(
        formula, wanted, grad_y, grad_residual_out, *kept[:-1], differentiable=True
    )


def run_with_gradient(call: Call) -> Result:
    """Run an eager call that needs a gradient; `dispatch.save` checks it."""
    with torch.no_grad():
        saved = dispatch.save(call)
    made: Result = _Norm.apply(values_of(call), saved, *inputs_of(call))  # type: ignore[no-untyped-call]
    return made


def inputs_of(call: Call) -> Inputs:
    """Those of a call."""
    return call.x, call.residual, call.weight, call.bias


class _Norm(torch.autograd.Function):
    """What eager calls that need a gradient leave with autograd."""

    @staticmethod
    def forward(
        ctx: NormContext, values: tuple[Any, ...], saved: Saved, *inputs: Tensor | None
    ) -> Result:
        ctx.set_materialize_grads(False)
        return result_of(ctx, values, cast(Inputs, inputs), saved)

    @staticmethod
    def backward(
        ctx: NormContext, grad_y: Tensor | None, grad_residual_out: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        needed, kept = ctx.needs_input_grad[2:], ctx.saved_tensors
        if grad_y is not None and not torch.is_grad_enabled():
            made = _gradients_quickly(ctx, needed, grad_y, grad_residual_out, kept)
            if made is not None:
                return None, None, *made
        made = gradients(ctx, needed, grad_y, grad_residual_out, kept, dispatch.backward)
        return None, None, *made


def _gradients_quickly(
    ctx: NormContext,
    needed: Sequence[bool],
    grad_y: Tensor,
    grad_residual_out: Tensor | None,
    kept: Kept,
) -> Gradients | None:
    """The kernels' gradients, past what `dispatch.backward` looks at; None for any other."""
    values, backend, x_dtype, residual_dtype = ctx.norm
    kind, _, offset, before_weight, _, clamps, _, rounds_weight, _ = values
    if clamps or rounds_weight or kind & EPS_OUTSIDE or backend != "auto":
        return None
    if grad_y.shape[-1] == 1:  # may be negated lazily, of which neither strides nor DLPack tell
        return None
    if keeps_output(values):
        kind |= FROM_OUTPUT
    of_x, of_residual, of_weight, of_bias = needed
    made = natives["auto"].norm_backward(
        kind,
        grad_y,
        grad_residual_out,
        *kept,
        offset,
        before_weight,
        x_dtype if of_x else None,
        residual_dtype if of_residual else None,
        of_weight + 2 * of_bias,
    )
    return None if isinstance(made, Refusal) else made


# Not by torch's own apply(), which asks at every call for transforms of torch.func, and looks for
# tensors that one has left behind: such calls do not come here.  It takes half of an empty node.
differentiate_quickly(super(torch.autograd.Function, _Norm).apply)
