"""Which backend runs a call that the quick path did not take, and why.

`serve.py` has checked such a call, or `save` does; it runs on the backend that was asked for by
name, or on the first that can.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple, TypeGuard, TypeVar, cast

import torch
from torch import Tensor

from normkit import reference
from normkit._serving import triton
from normkit._serving.backends import Native, backends, falls_back, natives, wanted_backend
from normkit._serving.checks import check
from normkit._serving.formula import OF_STATISTICS, Formula
from normkit._serving.refusal import Refusal
from normkit._spec import (
    FUSED,
    GATING,
    MODULATION,
    MODULATORS,
    NATIVE,
    ROTATION,
    Call,
    Gradients,
    Result,
    Saved,
)
from normkit.reference import rotation

Made = TypeVar("Made")


@dataclass(frozen=True)
class Explanation:
    """How a call would run: the backend, what it does, and why this one."""

    backend: str
    plan: str
    reason: str


def run(call: Call) -> Result:
    """Run a call that has been checked and needs no gradient."""
    made: Result | Refusal = _ask(call, native_for(call.x, wanted_backend()).norm)
    if isinstance(made, Refusal):
        return run_by_reference(call)
    return made


def save(call: Call) -> Saved:
    """Check and run a call without outputs of its own, and keep what its gradients need.

    The extension checks quickly; what it refuses is checked in full, and asked again.
    """
    made: Saved | Refusal | None = save_quickly(call.native())
    if made is None:
        call = check(call)
        made = _ask(call, native_for(call.x, wanted_backend()).norm_saving)
    return save_by_reference(call) if isinstance(made, Refusal) else made


def save_quickly(native: tuple[Any, ...]) -> Saved | None:
    """Run a call of which the extension's arguments are these, or nothing that it refuses."""
    x = native[1]
    if _hides_signs(x) or _hides_signs(_cos_of(native)):
        return None
    made = native_for(x, wanted_backend()).norm_saving(*native)
    return None if isinstance(made, Refusal) else made


def save_by_reference(call: Call) -> Saved:
    """Run a call that has been checked in plain torch, and keep what its gradients need."""
    results = run_by_reference(call)
    y, residual_out = results if isinstance(results, tuple) else (results, None)
    if call.post:  # whose gradients take the statistics again
        return cast(Saved, (y, residual_out, None, None))
    rstd, mean = reference.statistics(
        call.x,
        call.residual,
        call.eps,
        kind=call.statistic,
        eps_outside=call.eps_outside,
        gate=call.gate,
        round_each=call.round_each,
        **call.named(GATING),
        **call.named(OF_STATISTICS),
    )
    return y, residual_out, rstd, mean


class Wanted(NamedTuple):
    """The dtypes of the gradients of x and residual, None for none, and which others there are."""

    x: torch.dtype | None
    residual: torch.dtype | None
    weight: bool
    bias: bool


def backward_refusal(backend: str, clamp_inf: bool) -> str:
    """Why no kernel makes these gradients; an empty str when one does."""
    if backend == "triton":
        return str(triton.norm_backward())
    return "clamp_inf=True" if clamp_inf else ""


def backward(
    formula: Formula,
    wanted: Wanted,
    backend: str,
    grad_y: Tensor,
    grad_residual_out: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor,
    mean: Tensor | None,
) -> Gradients:
    """Make the gradients of a norm; backend is what `use_backend` named for the forward pass."""
    weight_offset, round_before_weight, clamp_inf, round_weight = formula.of_backward()
    if round_weight and weight is not None:
        # Of the weight itself kernels need nothing; what multiplied is a weight without an offset.
        weight = reference.offset_weight(weight, weight_offset, rstd.dtype, True).to(weight.dtype)
        weight_offset = 0.0
        formula = formula.without_offset()
    if not backward_refusal(backend, clamp_inf):
        native = natives[backend].norm_backward
        rest = (
            rstd,
            mean,
            weight_offset,
            round_before_weight,
            wanted.x,
            wanted.residual,
            wanted.weight + 2 * wanted.bias,
        )
        tensors = (grad_y, grad_residual_out, x, residual, weight, bias)
        given = _with_copies(native, formula.of_gradients, tensors, rest)
        made = answer(given, backend, "make these gradients")
        if not isinstance(made, Refusal):
            return _of_lengths_kept(formula, made, grad_y, rstd) if formula.eps_outside else made
    return backward_by_reference(
        formula, wanted, grad_y, grad_residual_out, x, residual, weight, bias, rstd
    )


def _of_lengths_kept(formula: Formula, made: Gradients, grad_y: Tensor, rstd: Tensor) -> Gradients:
    """The gradients with those of rows that eps divided, whose rstd is a constant."""
    of_x = made[0]
    if of_x is None:
        return made
    divided = reference.is_divided_by_eps(rstd, formula.eps).unsqueeze(-1)
    of_x = torch.where(divided, (grad_y * rstd.unsqueeze(-1)).to(of_x.dtype), of_x)
    return of_x, *made[1:]


def backward_by_reference(
    formula: Formula,
    wanted: Wanted,
    grad_y: Tensor,
    grad_residual_out: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor,
    *,
    differentiable: bool = False,
) -> Gradients:
    """Make the gradients of a norm in plain torch; differentiable ones take rstd from x again."""
    # What was kept of a float64 x may be narrower: a rounded sum, or the output.
    compute = torch.float64 if rstd.dtype == torch.float64 else None
    of_sum, of_weight, of_bias = reference.norm_backward(
        grad_y,
        x,
        residual,
        weight,
        bias,
        formula.eps,
        kind=formula.statistic,
        rstd=None if differentiable else rstd,
        from_output=formula.from_output,
        eps_outside=formula.eps_outside,
        compute_dtype=compute,
        **formula.options,
    )
    if grad_residual_out is not None:
        of_sum = of_sum + grad_residual_out
    of_x = of_sum
    if formula.options["clamp_inf"] and x.dtype == torch.float16:  # what was clamped is a constant
        of_x = torch.where(x.isinf(), 0.0, of_sum)
    return (
        None if wanted.x is None else packed(of_x.to(wanted.x)),
        None if wanted.residual is None else packed(of_sum.to(wanted.residual)),
        _as_wanted(of_weight, weight, wanted.weight),
        _as_wanted(of_bias, bias, wanted.bias),
    )


def _as_wanted(gradient: Tensor | None, like: Tensor | None, wanted: bool) -> Tensor | None:
    if gradient is None or like is None or not wanted:
        return None
    return packed(gradient.to(like.dtype))


def explain_call(call: Call) -> Explanation:
    """Tell how a call that has been checked would run."""
    gradient = call.needs_gradient()
    with torch.no_grad():
        made = _ask(call, native_for(call.x, wanted_backend()).plan)
    if isinstance(made, Refusal):
        return Explanation("reference", "plain torch", str(made))
    backend, plan = made
    reason = "served natively"
    if gradient:
        why_not = backward_refusal(backend, call.clamp_inf)
        too = ", gradients too" + ", each norm by itself, which is taken again" * call.post
        reason += f"; the gradients by plain torch: {why_not}" if why_not else too
    copied = _copied(call)
    if copied:
        reason += f"; copied first, for strides that kernels take: {', '.join(copied)}"
    return Explanation(backend, plan, reason)


def _copied(call: Call) -> list[str]:
    """The inputs of which kernels get copies."""
    with torch.no_grad():
        made = _first_answer(call, native_for(call.x, wanted_backend()).plan)
    if not _asks_for_copies(made):
        return []
    copies = as_kernels_read(call, made.argument)
    return [name for name, t in call.inputs() if getattr(copies, name) is not t]


def check_backend(call: Call) -> None:
    """Raise if a backend that was asked for by name cannot run a call, before anything runs."""
    backend = wanted_backend()
    if not falls_back(backend):
        with torch.no_grad():
            _ask(call, native_for(call.x, backend).plan)


def native_for(x: Tensor, backend: str) -> Native:
    """The entries that calls of x are for, by the backend that `use_backend` named."""
    if backend == "auto":
        return natives["auto" if x.is_cpu or triton.why_not(x.device) else "triton"]
    if backend in ("cpu", "cuda") and x.device.type != backend:
        unusable = "" if (here := backends()[backend]).usable else f"; {here.reason}"
        return Native.refusing("x", f"is on {x.device}{unusable}")
    return natives[backend]


def answer(made: Made | Refusal, backend: str, what: str) -> Made | Refusal:
    """Return what a backend's entry gave.

    Raises:
        ValueError: a refusal, of a backend that was asked for by name.
    """
    if isinstance(made, Refusal) and not falls_back(backend):
        raise ValueError(f'use_backend("{backend}") cannot {what}: {made}')
    return made


def _ask(call: Call, native: Callable[..., Made | Refusal]) -> Made | Refusal:
    """What a backend's entry gives; an error if a backend was asked for by name and refuses."""
    made = _first_answer(call, native)
    if _asks_for_copies(made):
        made = native(*as_kernels_read(call, made.argument).native())
    return answer(made, wanted_backend(), f"serve this {call.op}")


def _first_answer(call: Call, native: Callable[..., Made | Refusal]) -> Made | Refusal:
    """What a backend's entry gives for the tensors themselves."""
    if hides_signs(call):
        return Refusal("x", "may be negated lazily", "strides")
    return native(*call.native())


def _asks_for_copies(made: object) -> TypeGuard[Refusal]:
    return isinstance(made, Refusal) and made.kind == "strides"


def as_kernels_read(call: Call, refused: str) -> Call:
    """The call of inputs with a last stride of 1, and with their signs in memory.

    Where x may have other strides it stays as it is, unless it is what was refused.
    """
    copies: dict[str, Any] = {name: as_kernels_read_it(t) for name, t in call.inputs()}
    if call.takes_strides and refused != "x":
        copies["x"] = call.x
    modulators = [(name, copies[name]) for name in MODULATORS if name in copies]
    alike = len({dims for _, t in modulators if (dims := _dims_of_rows(t))}) <= 1
    for name, t in modulators:
        copies[name] = _one_stride_apart(t, call.x, alike)
    return replace(call, **copies)


def _dims_of_rows(t: Tensor) -> tuple[int, ...]:
    """The dimensions along which a gate, scale or shift has several rows."""
    return tuple(d for d in range(t.ndim - 1) if t.shape[d] > 1)


def _one_stride_apart(t: Tensor, x: Tensor, alike: bool) -> Tensor:
    """Rows of a gate, scale or shift that follow each other at one stride.

    As many as x has, where the three have other ones, or dimensions of x stand between those of t.
    """
    dims = _dims_of_rows(t)
    if not dims:
        return t
    if not alike or any(x.shape[d] > 1 for d in range(dims[0], dims[-1]) if d not in dims):
        whole = reference.per_row(t, x).expand(x.shape)
        return whole.clone(memory_format=torch.contiguous_format)
    follow = all(
        t.stride(outer) == t.stride(inner) * t.shape[inner] for outer, inner in pairwise(dims)
    )
    return t if follow else t.clone(memory_format=torch.contiguous_format)


def _with_copies(
    native: Callable[..., Made | Refusal],
    kind: int,
    tensors: tuple[Tensor | None, ...],
    rest: tuple[object, ...],
) -> Made | Refusal:
    """Ask for these tensors, or where strides are the reason why not for copies of them."""
    if not _hides_signs(tensors[0]):
        made = native(kind, *tensors, *rest)
        if not (isinstance(made, Refusal) and made.kind == "strides"):
            return made
    copies = tuple(t if t is None else as_kernels_read_it(t) for t in tensors)
    return native(kind, *copies, *rest)


def hides_signs(call: Call) -> bool:
    """Whether the extension cannot tell from strides that inputs are lazily negated."""
    return _hides_signs(call.x) or _hides_signs(call.cos)


def _hides_signs(t: Tensor | None) -> bool:
    return t is not None and t.shape[-1:] == (1,)


_COS = len(NATIVE) + FUSED.index("cos")


def _cos_of(native: tuple[Any, ...]) -> Tensor | None:
    return native[_COS] if len(native) > _COS else None


def as_kernels_read_it(t: Tensor) -> Tensor:
    """The tensor itself, or a copy with a last stride of 1 and its signs in its memory."""
    if _has_steps(t):
        # contiguous() would return an empty tensor as it is.
        t = t.clone(memory_format=torch.contiguous_format)
    return t.resolve_neg()


def _has_steps(t: Tensor) -> bool:
    return t.ndim > 0 and t.shape[-1] > 1 and t.stride(-1) != 1


def run_by_reference(call: Call) -> Result:
    """Run a call that has been checked in plain torch; what it makes is packed."""
    out_dtype = call.out_dtype if call.out is None else call.out.dtype
    if call.post:
        return _post_norm_by_reference(call, out_dtype)
    if call.rotated:
        y = rotation.norm_rope(
            call.x,
            *call.table(),
            call.weight,
            call.bias,
            call.eps,
            kind=call.statistic,
            out_dtype=out_dtype,
            **call.named(ROTATION[2:]),
            **call.plain_options(),
        )
        return packed(y) if call.out is None else call.out.copy_(y)
    if call.residual is None:
        y = reference.norm(
            call.x,
            call.weight,
            call.bias,
            call.eps,
            kind=call.statistic,
            eps_outside=call.eps_outside,
            out_dtype=out_dtype,
            scale=call.scale,
            shift=call.shift,
            round_each=call.round_each,
            **call.named(GATING),
            **call.plain_options(),
        )
        return packed(y) if call.out is None else call.out.copy_(y)
    y, residual_out = reference.add_norm(
        call.x,
        call.residual,
        call.weight,
        call.bias,
        call.eps,
        kind=call.statistic,
        out_dtype=out_dtype,
        **call.named(MODULATION),
        **call.options(),
    )
    if call.residual_out is not None:
        residual_out = call.residual_out.copy_(residual_out)
    else:
        residual_out = packed(residual_out)
    return (packed(y) if call.out is None else call.out.copy_(y)), residual_out


def _post_norm_by_reference(call: Call, out_dtype: torch.dtype | None) -> Result:
    assert call.residual is not None
    options = call.plain_options()
    total = reference.norm_add(
        call.x,
        call.residual,
        call.weight,
        call.bias,
        call.eps,
        kind=call.statistic,
        alpha=call.alpha,
        beta=call.beta,
        round_norm=call.round_norm,
        **options,
    )
    if not call.adds:
        return packed(total) if call.out is None else call.out.copy_(total)
    y = reference.norm(
        total,
        call.next_weight,
        call.next_bias,
        call.second_eps,
        kind=call.statistic,
        out_dtype=out_dtype or call.x.dtype,
        compute_dtype=reference.compute_dtype_of(call.x, None),
        **options,
    )
    total = packed(total) if call.residual_out is None else call.residual_out.copy_(total)
    return (packed(y) if call.out is None else call.out.copy_(y)), total


def packed(t: Tensor) -> Tensor:
    """The tensor itself, or a copy with the strides of a new one, also of dimensions of size 1."""
    if reference.is_compiled():  # where strides may be symbols, which a comparison would fix
        return t.contiguous()
    expected = 1
    for size, stride in zip(reversed(t.shape), reversed(t.stride()), strict=True):
        if stride != expected:
            return t.clone(memory_format=torch.contiguous_format)
        expected *= max(size, 1)
    return t
