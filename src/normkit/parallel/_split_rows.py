"""A norm of rows whose columns are split over the ranks of a process group.

Each rank takes the statistics of its part, all are gathered, and each rank applies the norm to its
part; the backward pass is the same once more.  Eager calls come here straight; what is compiled
takes the operators `sharded_norm` and `sharded_norm_backward` in `torch.ops.normkit`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normkit import reference
from normkit._serving import dispatch
from normkit._serving.autograd import Context
from normkit._serving.backends import ALWAYS_DISPATCH, wanted_backend
from normkit._serving.definition import define, differentiate, refuse_to_differentiate
from normkit._serving.refusal import Refusal
from normkit._spec import FIELDS, LAYER, PLAIN_OPTIONS, Call, PartGradients, PartSaved, PlainOptions
from normkit.parallel import _reference
from normkit.parallel._gather import Ranks, gather

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import GroupName

Wanted = tuple[bool, bool, bool]  # the gradients of x, weight and bias
Made = TypeVar("Made")


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
        tensors = (call.x, call.weight, call.bias)
        y: Tensor = _PartNorm.apply(call, ranks, *tensors)  # type: ignore[no-untyped-call]
        return y
    return _forward(call, ranks)[0]


def _forward(call: Call, ranks: Ranks) -> PartSaved:
    backend = wanted_backend()
    native = dispatch.native_for(call.x, backend)
    x, weight, bias, clamp_inf = call.x, call.weight, call.bias, call.clamp_inf
    planes = _ask(native.part_statistics, backend, ranks.op, call.layer, x, clamp_inf)
    if planes is None:
        planes = _reference.part_statistics(x, kind=call.statistic, clamp_inf=clamp_inf)
    # What None means: the computing dtype's.
    eps = torch.finfo(planes.dtype).eps if call.eps is None else call.eps
    gathered = gather(planes, x.shape[-1], ranks, backward=False, eps=eps)
    made = _ask(
        native.part_apply, backend, ranks.op, call.layer, x, weight, bias, call.eps,
        *call.options().values(), call.out_dtype, gathered,
    )  # fmt: skip
    if made is not None:
        return made
    y, rstd, mean = _reference.part_norm(
        x,
        gathered,
        weight,
        bias,
        call.eps,
        kind=call.statistic,
        out_dtype=call.out_dtype,
        **call.plain_options(),
    )
    return dispatch.packed(y), rstd, mean


def _weight_of(weight: Tensor | None, options: PlainOptions) -> tuple[Tensor | None, PlainOptions]:
    """The weight and the options of kernels of gradients, which do not round a weight."""
    if weight is None or not options["round_weight"]:
        return weight, options
    compute = reference.compute_dtype_of(weight, None)
    whole = reference.offset_weight(weight, options["weight_offset"], compute, True)
    return whole.to(weight.dtype), {**options, "weight_offset": 0.0, "round_weight": False}


def _backward(
    layer: bool,
    options: PlainOptions,
    wanted: Wanted,
    ranks: Ranks,
    backend: str,
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor,
    mean: Tensor | None,
) -> PartGradients:
    """Return the gradients of x, weight and bias; as elsewhere the kernels know no clamp_inf."""
    weight, options = _weight_of(weight, options)
    offset, rounded = options["weight_offset"], options["round_before_weight"]
    clamp_inf = options["clamp_inf"]
    backend = "reference" if clamp_inf else backend
    native = dispatch.native_for(x, backend)
    planes = _ask(
        native.part_backward_statistics, backend, ranks.op, layer,
        grad_y, x, weight, rstd, mean, offset,
    )  # fmt: skip
    if planes is None:
        planes = _reference.part_backward_statistics(
            grad_y, x, rstd, mean, weight, weight_offset=offset, clamp_inf=clamp_inf
        )
    # Also where no gradient of x is wanted here: another rank may want its own.
    gathered = gather(planes, x.shape[-1], ranks, backward=True)
    made = _ask(
        native.part_backward_apply, backend, ranks.op, layer,
        grad_y, x, weight, bias, rstd, mean, offset, rounded,
        x.dtype if wanted[0] else None, wanted[1] + 2 * wanted[2], gathered,
    )  # fmt: skip
    if made is not None:
        return made
    gradients = _reference.part_norm_backward(
        grad_y, x, rstd, mean, gathered, weight, bias,
        weight_offset=offset, round_before_weight=rounded, clamp_inf=clamp_inf,
    )  # fmt: skip
    of_x, of_weight, of_bias = (
        dispatch.packed(gradient.to(like.dtype))
        if gradient is not None and like is not None and is_wanted
        else None
        for gradient, like, is_wanted in zip(gradients, (x, weight, bias), wanted, strict=True)
    )
    return of_x, of_weight, of_bias


def _ask(
    native: Callable[..., Made | Refusal], backend: str, op: str, layer: bool, *args: object
) -> Made | None:
    """Ask an entry of a backend; None where plain torch has to make it."""
    given = [_as_read(arg) if isinstance(arg, Tensor) else arg for arg in args]
    made = dispatch.answer(native(int(layer), *given), backend, f"serve this {op}")
    return None if isinstance(made, Refusal) else made


class AsyncCollectiveTensor(Protocol):
    """What a collective of torch returned; its own type is not worth an import of all of them."""

    def wait(self) -> Tensor: ...


def is_on_its_way(t: Tensor) -> bool:
    """Whether it is what a collective of torch returned that may not have ended."""
    return type(t).__name__ == "AsyncCollectiveTensor"


def _as_read(t: Tensor) -> Tensor:
    if is_on_its_way(t):
        t = cast(AsyncCollectiveTensor, t).wait()
    return dispatch.as_kernels_read_it(t) if t.ndim else t


class _Context(Context, Protocol):
    """And what is kept with it here."""

    saved_tensors: tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]
    made_with: tuple[bool, PlainOptions, Ranks, str]  # of eager calls
    described: tuple[object, ...]  # of the operator's: what is no tensor


class _PartNorm(torch.autograd.Function):
    """Autograd function for eager calls that need a gradient."""

    @staticmethod
    def forward(ctx: _Context, call: Call, ranks: Ranks, *tensors: Tensor | None) -> Tensor:
        y, rstd, mean = _forward(call, ranks)
        ctx.save_for_backward(*tensors, rstd, mean)
        ctx.made_with = call.layer, call.plain_options(), ranks, wanted_backend()
        return y

    @staticmethod
    def backward(ctx: _Context, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        layer, options, ranks, backend = ctx.made_with
        if torch.is_grad_enabled():  # torch would take the gradient for a constant where it is not
            raise RuntimeError(
                f"{ranks.op}: its gradient cannot be differentiated again; expected"
                " create_graph=False, got True"
            )
        _, _, *needed = ctx.needs_input_grad
        wanted = cast(Wanted, needed)
        made = _backward(layer, options, wanted, ranks, backend, grad_y, *ctx.saved_tensors)
        return None, None, *made


# ---------------------------------------------------------------- operators

# The tensors come first, and the options last: as many as there are.
_TENSORS = "Tensor x, Tensor? weight, Tensor? bias"
_DESCRIBED = ", ".join(
    [
        "bool layer, str op, str group, float? timeout",
        *(f"{FIELDS[name].type} {name}" for name in PLAIN_OPTIONS),
    ]
)
_RETURNED = "(Tensor, Tensor, Tensor)"


def _call_operator(call: Call, ranks: Ranks) -> Tensor:
    y: Tensor
    y, _, _ = torch.ops.normkit.sharded_norm.default(
        call.x, call.weight, call.bias, call.eps, call.out_dtype,
        call.layer, ranks.op, ranks.group.group_name, ranks.timeout,
        *call.plain_options().values(),
    )  # fmt: skip
    return y


def _ranks(op: str, group: str, timeout: float | None) -> Ranks:
    from torch._C._distributed_c10d import _resolve_process_group

    return Ranks(op, _resolve_process_group(cast("GroupName", group)), timeout)


def _named(options: tuple[float, ...]) -> PlainOptions:
    return cast(PlainOptions, dict(zip(PLAIN_OPTIONS, options, strict=True)))


def _sharded_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    out_dtype: torch.dtype | None,
    layer: bool,
    op: str,
    group: str,
    timeout: float | None,
    *options: float,
) -> tuple[Tensor, Tensor, Tensor]:
    call = Call(layer * LAYER, x, None, weight, bias, eps, out_dtype=out_dtype, **_named(options))
    y, rstd, mean = _forward(call, _ranks(op, group, timeout))
    return y, rstd, rstd.new_empty(0) if mean is None else mean


def _fake_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    out_dtype: torch.dtype | None,
    layer: bool,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=out_dtype or x.dtype)
    planes = _reference.part_statistics(x, kind="layer" if layer else "rms")
    rstd = planes.new_empty(x.shape[:-1])
    return y, rstd, torch.empty_like(rstd) if layer else rstd.new_empty(0)


def _sharded_norm_backward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor,
    mean: Tensor,
    grad_y: Tensor,
    x_wanted: bool,
    weight_wanted: bool,
    bias_wanted: bool,
    layer: bool,
    op: str,
    group: str,
    timeout: float | None,
    *options: float,
) -> tuple[Tensor, Tensor, Tensor]:
    made = _backward(
        layer,
        _named(options),
        (x_wanted, weight_wanted, bias_wanted),
        _ranks(op, group, timeout),
        wanted_backend(),
        grad_y,
        x,
        weight,
        bias,
        rstd,
        mean if layer else None,
    )
    of_x, of_weight, of_bias = (x.new_empty(0) if t is None else t for t in made)
    return of_x, of_weight, of_bias


def _fake_backward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor,
    mean: Tensor,
    grad_y: Tensor,
    x_wanted: bool,
    weight_wanted: bool,
    bias_wanted: bool,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    of_x, of_weight, of_bias = (
        t.new_empty(t.shape) if is_wanted and t is not None else x.new_empty(0)
        for t, is_wanted in ((x, x_wanted), (weight, weight_wanted), (bias, bias_wanted))
    )
    return of_x, of_weight, of_bias


def _remember(ctx: _Context, inputs: tuple[object, ...], output: tuple[Tensor, ...]) -> None:
    _, rstd, mean = output
    x, weight, bias = cast("tuple[Tensor, Tensor | None, Tensor | None]", inputs[:3])
    ctx.mark_non_differentiable(rstd, mean)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, rstd, mean)
    ctx.described = inputs[5:]  # behind eps and out_dtype


def _differentiate(
    ctx: _Context, grad_y: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    none = (None,) * (len(ctx.needs_input_grad) - 3)
    if grad_y is None:
        return None, None, None, *none
    wanted = ctx.needs_input_grad[:3]
    operator = torch.ops.normkit.sharded_norm_backward.default
    made = operator(*ctx.saved_tensors, grad_y, *wanted, *ctx.described)
    gradients = [t if is_wanted else None for t, is_wanted in zip(made, wanted, strict=True)]
    return *gradients, *none


define(
    "sharded_norm",
    f"{_TENSORS}, float? eps, ScalarType? out_dtype, {_DESCRIBED}",
    _RETURNED,
    _sharded_norm,
    _fake_norm,
)
differentiate("sharded_norm", _differentiate, _remember)
define(
    "sharded_norm_backward",
    f"{_TENSORS}, Tensor rstd, Tensor mean, Tensor grad_y,"
    f" bool x_wanted, bool weight_wanted, bool bias_wanted, {_DESCRIBED}",
    _RETURNED,
    _sharded_norm_backward,
    _fake_backward,
)
refuse_to_differentiate("sharded_norm_backward")
