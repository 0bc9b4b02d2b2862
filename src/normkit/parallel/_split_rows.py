"""A norm of rows whose columns are split over the ranks of a process group.

Each rank takes the statistics of its part, all are gathered, and each rank applies the norm to its
part; the backward pass is the same once more.  Eager calls come here straight; what is compiled
takes the operators `sharded_norm` and `sharded_norm_backward` in `torch.ops.normkit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normkit import reference
from normkit._serving import dispatch
from normkit._serving.backends import ALWAYS_DISPATCH, natives, wanted_backend
from normkit._serving.refusal import Refusal
from normkit._spec import FIELDS, LAYER, OPTIONS, PLAIN_OPTIONS, Call
from normkit.parallel._gather import Ranks, gather

Made = tuple[Tensor, Tensor, Tensor | None]  # y, rstd, and mean but for rms
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def run(call: Call, ranks: Ranks) -> Tensor:
    """Run a call that has been checked, of the part of this rank."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise RuntimeError(
            f"{ranks.op}: torch.func and forward-mode AD cannot cross ranks; expected a call"
            " outside of both"
        )
    if torch.compiler.is_compiling() or ALWAYS_DISPATCH or torch._C._len_torch_dispatch_stack() > 0:
        return _call_operator(call, ranks)
    if call.requires_grad():
        return _PartNorm.apply(call, ranks, call.x, call.weight, call.bias)  # type: ignore[no-any-return, no-untyped-call]
    return _forward(call, ranks)[0]


def _forward(call: Call, ranks: Ranks) -> Made:
    backend = wanted_backend()
    x, weight, bias, clamp_inf = call.x, call.weight, call.bias, call.clamp_inf
    planes = _ask(ranks.op, backend, "part_statistics", call.layer, x, clamp_inf)
    if planes is None:
        planes = reference.part_statistics(x, kind=call.statistic, clamp_inf=clamp_inf)
    # What None means: the computing dtype's.
    eps = torch.finfo(planes.dtype).eps if call.eps is None else call.eps
    gathered = gather(planes, x.shape[-1], ranks, backward=False, eps=eps)
    made = _ask(
        ranks.op, backend, "part_apply", call.layer, x, weight, bias, call.eps,
        *call.named(OPTIONS).values(), call.out_dtype, gathered,
    )  # fmt: skip
    if made is not None:
        return made  # type: ignore[no-any-return]
    y, rstd, mean = reference.part_norm(
        x,
        gathered,
        weight,
        bias,
        call.eps,
        kind=call.statistic,
        out_dtype=call.out_dtype,
        **call.options(),
    )
    return dispatch.packed(y), rstd, mean


def _backward(
    layer: bool,
    options: dict[str, Any],
    wanted: tuple[bool, bool, bool],
    ranks: Ranks,
    backend: str,
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor,
    mean: Tensor | None,
) -> Gradients:
    """Return the gradients of x, weight and bias; as elsewhere the kernels know no clamp_inf."""
    offset, clamp_inf = options["weight_offset"], options["clamp_inf"]
    rounded = options["round_before_weight"]
    plain: dict[str, Any] = {"weight_offset": offset, "clamp_inf": clamp_inf}
    backend = "reference" if clamp_inf else backend
    planes = _ask(
        ranks.op, backend, "part_backward_statistics", layer, grad_y, x, weight, rstd, mean, offset
    )
    if planes is None:
        planes = reference.part_backward_statistics(grad_y, x, rstd, mean, weight, **plain)
    # Also where no gradient of x is wanted here: another rank may want its own.
    gathered = gather(planes, x.shape[-1], ranks, backward=True)
    made = _ask(
        ranks.op, backend, "part_backward_apply", layer, grad_y, x, weight, bias, rstd, mean,
        offset, rounded, x.dtype if wanted[0] else None, wanted[1] + 2 * wanted[2], gathered,
    )  # fmt: skip
    if made is not None:
        return made  # type: ignore[no-any-return]
    gradients = reference.part_norm_backward(
        grad_y, x, rstd, mean, gathered, weight, bias, round_before_weight=rounded, **plain
    )
    of_x, of_weight, of_bias = (
        dispatch.packed(gradient.to(like.dtype))
        if gradient is not None and like is not None and is_wanted
        else None
        for gradient, like, is_wanted in zip(gradients, (x, weight, bias), wanted, strict=True)
    )
    return of_x, of_weight, of_bias


def _ask(op: str, backend: str, step: str, layer: bool, *args: Any) -> Any:
    """Ask the kernels of a backend; None where plain torch has to make it."""
    device = next(t.device for t in args if isinstance(t, Tensor))
    parts = natives[backend].parts
    if backend in ("cpu", "cuda") and device.type != backend:
        made = Refusal("x", f"is on {device}", "device")
    elif parts is None:
        made = Refusal("it", "has no kernels for rows that are split over ranks", "backend")
    else:
        given = [_as_read(arg) if isinstance(arg, Tensor) else arg for arg in args]
        made = getattr(parts, step)(int(layer), *given)
    if not isinstance(made, Refusal):
        return made
    if backend not in ("auto", "reference"):
        raise ValueError(f'use_backend("{backend}") cannot serve this {op}: {made}')
    return None


def is_on_its_way(t: Tensor) -> bool:
    """Whether it is what a collective of torch returned that may not have ended."""
    return type(t).__name__ == "AsyncCollectiveTensor"


def _as_read(t: Tensor) -> Tensor:
    if is_on_its_way(t):
        t = t.wait()  # type: ignore[attr-defined]
    return dispatch.as_kernels_read_it(t) if t.ndim else t


class _PartNorm(torch.autograd.Function):
    """Autograd function for eager calls that need a gradient."""

    @staticmethod
    def forward(ctx: Any, call: Call, ranks: Ranks, *tensors: Tensor | None) -> Tensor:
        y, rstd, mean = _forward(call, ranks)
        ctx.save_for_backward(*tensors, rstd, mean)
        ctx.made_with = call.layer, call.options(), ranks, wanted_backend()
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
        layer, options, ranks, backend = ctx.made_with
        if torch.is_grad_enabled():  # torch would take the gradient for a constant where it is not
            raise RuntimeError(
                f"{ranks.op}: its gradient cannot be differentiated again; expected"
                " create_graph=False, got True"
            )
        wanted = ctx.needs_input_grad[2:]
        made = _backward(layer, options, wanted, ranks, backend, grad_y, *ctx.saved_tensors)
        return None, None, *made


# ---------------------------------------------------------------- operators

_library = torch.library.Library("normkit", "FRAGMENT")  # type: ignore[no-untyped-call]
_FORMULA = ", ".join(["bool layer", *(f"{FIELDS[name].type} {name}" for name in PLAIN_OPTIONS)])
_RANKS = "str op, str group, float? timeout"
_TENSORS = "Tensor x, Tensor? weight, Tensor? bias"
_TAKEN = 1 + len(PLAIN_OPTIONS)


def _call_operator(call: Call, ranks: Ranks) -> Tensor:
    y, _, _ = torch.ops.normkit.sharded_norm.default(
        call.layer, *call.options().values(), ranks.op, ranks.group.group_name, ranks.timeout,
        call.x, call.weight, call.bias, call.eps, call.out_dtype,
    )  # fmt: skip
    return y  # type: ignore[no-any-return]


def _ranks(op: str, group: str, timeout: float | None) -> Ranks:
    from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

    return Ranks(op, _resolve_process_group(group), timeout)  # type: ignore[arg-type]


def _options(values: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(PLAIN_OPTIONS, values[1:_TAKEN], strict=True))


def _sharded_norm(*values: Any) -> tuple[Tensor, Tensor, Tensor]:
    kind, ranks = values[0] * LAYER, _ranks(*values[_TAKEN : _TAKEN + 3])
    x, weight, bias, eps, out_dtype = values[_TAKEN + 3 :]
    call = Call(kind, x, None, weight, bias, eps, **_options(values), out_dtype=out_dtype)
    y, rstd, mean = _forward(call, ranks)
    return y, rstd, rstd.new_empty(0) if mean is None else mean


def _fake_norm(*values: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, _, _, _, out_dtype = values[_TAKEN + 3 :]
    y = x.new_empty(x.shape, dtype=out_dtype or x.dtype)
    planes = reference.part_statistics(x, kind="layer" if values[0] else "rms")
    rstd = planes.new_empty(x.shape[:-1])
    return y, rstd, torch.empty_like(rstd) if values[0] else rstd.new_empty(0)


def _sharded_norm_backward(*values: Any) -> tuple[Tensor, Tensor, Tensor]:
    layer, ranks = values[0], _ranks(*values[_TAKEN : _TAKEN + 3])
    wanted, tensors = values[_TAKEN + 3 : _TAKEN + 6], list(values[_TAKEN + 6 :])
    if not layer:
        tensors[-1] = None
    made = _backward(layer, _options(values), wanted, ranks, wanted_backend(), *tensors)
    of_x, of_weight, of_bias = (
        tensors[0].new_empty(0) if gradient is None else gradient for gradient in made
    )
    return of_x, of_weight, of_bias


def _fake_backward(*values: Any) -> tuple[Tensor, Tensor, Tensor]:
    wanted, tensors = values[_TAKEN + 3 : _TAKEN + 6], values[_TAKEN + 7 : _TAKEN + 10]
    of_x, of_weight, of_bias = (
        t.new_empty(t.shape) if is_wanted else tensors[0].new_empty(0)
        for t, is_wanted in zip(tensors, wanted, strict=True)
    )
    return of_x, of_weight, of_bias


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, rstd, mean = output
    ctx.mark_non_differentiable(rstd, mean)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[_TAKEN + 3 : _TAKEN + 6], rstd, mean)
    ctx.made_with = inputs[: _TAKEN + 3]


def _differentiate(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Any, ...]:
    none = (None,) * (_TAKEN + 3)
    if grad_y is None:
        return *none, None, None, None, None, None
    wanted = tuple(ctx.needs_input_grad[_TAKEN + 3 : _TAKEN + 6])
    operator = torch.ops.normkit.sharded_norm_backward.default
    made = operator(*ctx.made_with, *wanted, grad_y, *ctx.saved_tensors)
    gradients = [t if is_wanted else None for t, is_wanted in zip(made, wanted, strict=True)]
    return *none, *gradients, None, None


def _refuse(ctx: Any, *_: Any) -> Any:
    raise RuntimeError("sharded_norm_backward: its result cannot be differentiated again")


def _register(name: str, arguments: str, function: Any, fake: Any, backward: Any) -> None:
    schema = f"{name}({arguments}) -> (Tensor, Tensor, Tensor)"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _library.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"normkit::{name}", fake, lib=_library)
    setup = _remember if backward is _differentiate else None
    torch.library.register_autograd(f"normkit::{name}", backward, setup_context=setup, lib=_library)


_register(
    "sharded_norm",
    f"{_FORMULA}, {_RANKS}, {_TENSORS}, float? eps, ScalarType? out_dtype",
    _sharded_norm,
    _fake_norm,
    _differentiate,
)
_register(
    "sharded_norm_backward",
    f"{_FORMULA}, {_RANKS}, bool x_wanted, bool weight_wanted, bool bias_wanted,"
    f" Tensor grad_y, {_TENSORS}, Tensor rstd, Tensor mean",
    _sharded_norm_backward,
    _fake_backward,
    _refuse,
)
