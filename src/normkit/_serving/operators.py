"""The norms as operators of torch, and their gradients.

Eager calls of plain tensors come here only for a gradient.  What is compiled, exported, a subclass
or on another device takes the operator of the function's name in `torch.ops.normkit`, which returns
rstd and mean as well.  The gradients of all of them are one operator, `norm_backward`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from normkit._serving import dispatch, gating, modulation, post_norm, rotation
from normkit._serving.backends import differentiate_quickly, natives, quick, wanted_backend
from normkit._serving.checks import check
from normkit._serving.definition import KERNEL, Definition, refusal
from normkit._serving.dispatch import Wanted
from normkit._serving.formula import Formula, keeps_output, normalises_sum, values_of
from normkit._serving.native import backward_kernel, kernel_of
from normkit._serving.refusal import Refusal
from normkit._spec import (
    EPS_OUTSIDE,
    FIELDS,
    FROM_OUTPUT,
    FUSED,
    NATIVE,
    OPS,
    OPTIONS,
    Call,
    Field,
    Fields,
    Gradients,
    Op,
    Result,
    Saved,
)


def is_sharded(t: object) -> bool:
    """Whether it is a DTensor, which only torch's own operators may write in place."""
    return type(t).__name__ == "DTensor"


def _namer(arguments: Fields) -> Callable[[Sequence[object]], dict[str, object]]:
    """Return what names an operator's values, of which torch leaves out the last defaults."""
    names = tuple(arguments)
    defaults = tuple(argument.default for argument in arguments.values())
    return lambda values: dict(zip(names, (*values, *defaults[len(values) :]), strict=True))


def _reader(
    op: Op, arguments: Fields, *, in_place: bool = False
) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """Return what makes an operator's values the extension's, quicker than `Call.native`."""
    native = NATIVE[1:] + FUSED * op.fused
    names = (*arguments, *(name for name in native if name not in arguments))
    defaults = tuple(
        arguments[name].default if name in arguments else getattr(Call, name) for name in names
    )
    written = op.written if in_place else {}
    pick = itemgetter(*(names.index(written.get(name, name)) for name in native))
    flags = {name: names.index(name) for name in op.flags}

    def read(values: Sequence[Any]) -> tuple[Any, ...]:
        given = (*values, *defaults[len(values) :])
        kind = op.kind_of({name: given[place] for name, place in flags.items()})
        return kind, *pick(given)

    return read


# ---------------------------------------------------------------- gradients


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
    made: Result = _Norm.apply(values_of(call), saved, *_inputs(call))  # type: ignore[no-untyped-call]
    return made


def _inputs(call: Call) -> Inputs:
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


# ---------------------------------------------------------------- operators


def _empty_like(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Make an output for an input: packed, whatever the input's strides are."""
    return torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)


def _new_y(call: Call) -> Tensor:
    if call.post and not call.adds:  # it is the sum
        return _new_sum(call)
    return _empty_like(call.x, call.out_dtype)


def _new_sum(call: Call) -> Tensor:
    assert call.residual is not None
    return _empty_like(call.residual)


def _row_values(x: Tensor) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[:-1], dtype=dtype)


def _register(op: Op) -> None:
    _register_functional(op)
    aliases = dict(zip(op.written, "ab", strict=False))
    in_place = op.fields | {op.written[output]: _written(a) for output, a in aliases.items()}
    outputs = {output: _written(a) for output, a in aliases.items()}
    _register_writing(op, "_", in_place)
    _register_writing(op, "_out", {**outputs, **op.fields})


def _written(alias: str) -> Field:
    return Field(f"Tensor({alias}!)", ..., "overwritten")


def _of_values(op: Op) -> Fields:
    """Of what the function of an op takes besides, what is no tensor."""
    return {name: field for name, field in op.results.items() if field.type[:6] != "Tensor"}


def _outputs(op: Op) -> tuple[str, ...]:
    """The outputs of the functional form; mean is empty where a kind of "rms" has none."""
    residual_out = ("residual_out",) if op.adds else ()
    if op.post:  # whose gradients take the statistics again
        return ("y", *residual_out)
    mean = () if op.layer is False else ("mean",)
    return ("y", *residual_out, "rstd", *mean)


def _fusion_of(op: Op) -> object | None:
    """The module that keeps what gradients of a fused norm need, and makes them."""
    fusions = (
        (op.modulated, modulation),
        (op.gated, gating),
        (op.post, post_norm),
        (op.rotated, rotation),
    )
    return next((module for is_it, module in fusions if is_it), None)


def _register_functional(op: Op) -> None:
    """Register what returns the outputs, of which y and residual_out have gradients."""
    arguments = {**op.fields, **_of_values(op)}
    outputs = _outputs(op)
    has_mean = "mean" in outputs
    named, read = _namer(arguments), _reader(op, arguments)
    names = list(op.fields)
    summands = ("x", "residual", "gate") + ("weight", "bias") * op.post
    of_sum = [names.index(name) for name in summands if name in names]
    fusion: Any = _fusion_of(op)

    def call_of(values: Sequence[object]) -> Call:
        return op.call(named(values))

    def forward(*values: object) -> Tensor | tuple[Tensor, ...]:
        # A `Call` takes four times as long to make as all else that Python does here.
        saved = dispatch.save_quickly(read(values)) or dispatch.save(call_of(values))
        y, residual_out, rstd, mean = saved
        made = [y] if residual_out is None else [y, residual_out]
        if op.post:
            return made[0] if len(made) == 1 else tuple(made)
        made.append(rstd)
        if has_mean:
            made.append(rstd.new_empty(0) if mean is None else mean)
        return tuple(made)

    def fake(*values: object) -> Tensor | tuple[Tensor, ...]:
        call = check(call_of(values))
        made = [_new_y(call)]
        if call.adds:
            made.append(_new_sum(call))
        if op.post:
            return made[0] if len(made) == 1 else tuple(made)
        made.append(_row_values(call.x))
        if has_mean:
            made.append(
                _row_values(call.x) if call.layer else call.x.new_empty(0, dtype=made[-1].dtype)
            )
        return tuple(made)

    def keep(
        ctx: NormContext, inputs: tuple[object, ...], output: Tensor | tuple[Tensor, ...]
    ) -> None:
        call = call_of(inputs)
        output = (output,) if isinstance(output, Tensor) else output
        made = dict(zip(outputs, output, strict=True))
        mean = made.get("mean") if call.layer else None
        # residual_out requires grad only where x, residual or gate does, or what normalised x.
        needs = ctx.needs_input_grad[1:]  # as many as arguments were given
        sum_needs_it = any(place < len(needs) and needs[place] for place in of_sum)
        ctx.mark_non_differentiable(*output[1 + (op.adds and sum_needs_it) :])
        ctx.set_materialize_grads(False)
        if fusion is not None:
            fusion.keep(cast(Any, ctx), call, made)
            return
        saved = made["y"], made.get("residual_out"), made["rstd"], mean
        remember(ctx, values_of(call), _inputs(call), saved)

    with_gradients = ("x", "residual", "weight", "bias") if fusion is None else fusion.INPUTS
    places = [names.index(name) if name in names else None for name in with_gradients]

    def backward(
        ctx: NormContext, grad_y: Tensor | None, *grads: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grad_residual_out = grads[0] if op.adds else None
        needs = ctx.needs_input_grad[1:]  # as many as arguments were given
        needed = [place is not None and place < len(needs) and needs[place] for place in places]
        made: Sequence[Tensor | None]
        if fusion is not None:
            by_name = dict(zip(with_gradients, needed, strict=True))
            grads_out = grad_y, grad_residual_out
            of_all = fusion.gradients(cast(Any, ctx), by_name, *grads_out, _call_backward_operator)
            made = tuple(of_all.values())
        else:
            grads_out = grad_y, grad_residual_out
            made = gradients(ctx, needed, *grads_out, ctx.saved_tensors, _call_backward_operator)
        of_inputs: list[Tensor | None] = [None] * len(needs)
        for place, gradient, wanted in zip(places, made, needed, strict=True):
            if place is not None and wanted:
                of_inputs[place] = gradient
        return tuple(of_inputs)

    returned = f"({', '.join(f'Tensor {name}' for name in outputs)})"
    kernel = kernel_of(op, arguments, outputs)
    made = Definition(arguments, returned, forward, fake, kernel)
    made.define_with_gradients(op.name, backward, keep)


def _register_writing(op: Op, form: str, arguments: Fields) -> None:
    """Register what writes its outputs, or x and the residual, and returns nothing."""
    in_place = form == "_"
    named, read = _namer(arguments), _reader(op, arguments, in_place=in_place)

    def write(*values: object) -> None:
        if quick(*read(values)) is None:
            dispatch.run(check(op.call(named(values), in_place=in_place)))

    def fake(*values: object) -> None:
        check(op.call(named(values), in_place=in_place))

    made = Definition(arguments, "()", write, fake, kernel_of(op, arguments))
    made.define(op.name + form)


_FORMULA = {
    "layer": Field("bool", ..., "whether the mean is subtracted"),
    "per_head": Field("bool", ..., "whether weight and bias may have a row per head"),
    "from_output": Field("bool", ..., "whether x is the output, to be undone"),
    **{name: FIELDS[name]._replace(default=...) for name in ("eps", *OPTIONS)},
    "of_sum": Field("bool", ..., "whether the statistic is the sum of squares, not their mean"),
    "eps_outside": FIELDS["eps_outside"]._replace(default=...),
}
_WANTED = {
    "x_dtype": Field("ScalarType?", ..., "dtype of x's gradient; None: it is not wanted"),
    "residual_dtype": Field("ScalarType?", ..., "likewise of residual's"),
    "weight_wanted": Field("bool", ..., "whether weight's gradient is"),
    "bias_wanted": Field("bool", ..., "whether bias's gradient is"),
}
_TENSORS = {
    "grad_y": Field("Tensor", ..., "gradient of y"),
    "grad_residual_out": Field("Tensor?", ..., "gradient of residual_out"),
    "x": Field("Tensor", ..., "what was normalised"),
    "residual": Field("Tensor?", ..., "what was added to x in float32"),
    "weight": Field("Tensor?", ..., "as in the forward pass"),
    "bias": Field("Tensor?", ..., "as in the forward pass"),
    "rstd": Field("Tensor", ..., "of each row"),
    "mean": Field("Tensor?", ..., "of each row"),
}


# The tensors come first: DTensor of torch 2.10 looks for the mesh in the first argument alone.
_BACKWARD = {**_TENSORS, **_FORMULA, **_WANTED}


def _register_backward() -> None:
    first, last = len(_TENSORS), len(_TENSORS) + len(_FORMULA)

    def parts(values: Sequence[Any]) -> tuple[Formula, Wanted, Sequence[Any]]:
        return Formula.of_values(values[first:last]), Wanted(*values[last:]), values[:first]

    def backward(*values: Any) -> tuple[Tensor, ...]:
        formula, wanted, tensors = parts(values)
        grad_y, x = tensors[0], tensors[2]
        of_x, of_residual, *of_affine = dispatch.backward(
            formula, wanted, wanted_backend(), *tensors
        )
        made = of_x, None if of_residual is of_x else of_residual, *of_affine
        listed = [x.new_empty(0) if t is None else t for t in made]
        return tuple(t.clone() if t is grad_y else t for t in listed)

    def fake(*values: Any) -> tuple[Tensor, ...]:
        _, wanted, tensors = parts(values)
        x, weight, bias = tensors[2], tensors[4], tensors[5]
        nothing = x.new_empty(0)
        both = wanted.residual == wanted.x
        return (
            nothing if wanted.x is None else _empty_like(x, wanted.x),
            nothing.clone() if wanted.residual is None or both else _empty_like(x, wanted.residual),
            _empty_like(weight) if wanted.weight and weight is not None else nothing.clone(),
            _empty_like(bias) if wanted.bias and bias is not None else nothing.clone(),
        )

    returned = f"({', '.join(['Tensor'] * 4)})"
    made = Definition(_BACKWARD, returned, backward, fake, backward_kernel(_BACKWARD))
    made.define_with_gradients("norm_backward", refusal("norm_backward"))


def _call_backward_operator(
    formula: Formula, wanted: Wanted, _backend: str, *tensors: Tensor | None
) -> Gradients:
    operator = torch.ops.normkit.norm_backward.default
    x, residual, weight, bias = operator(*tensors, *formula.values(), *wanted)
    return (
        x if wanted.x is not None else None,
        x if wanted.residual == wanted.x else residual,
        weight if wanted.weight else None,
        bias if wanted.bias else None,
    )


for _op in OPS.values():
    _register(_op)
_register_backward()

# The arguments that every form takes: one text, of which Dynamo makes one guard.
_TAKEN = {op.name: " ".join(op.fields) for op in OPS.values()}
_MORE = {op.name: " ".join(_of_values(op)) for op in OPS.values()}
_GRADIENTS = ("grad_x", "grad_residual", "grad_weight", "grad_bias")

# (name, arguments, outputs) of the operators that take DTensors.
SHARDED = tuple(
    (name + form, arguments, outputs)
    for name, arguments, outputs in (
        *(
            (op.name, (*op.fields, *_of_values(op)), _outputs(op))
            for op in OPS.values()
            if op.is_plain
        ),
        ("norm_backward", tuple(_BACKWARD), _GRADIENTS),
    )
    for form in ("", KERNEL)
)

_FORMS = {
    op.name + form: getattr(torch.ops.normkit, op.name + form).default
    for op in OPS.values()
    for form in ("", "_", "_out")
}


def call_operator(call: Call) -> Result:
    """Run a checked call as an operator of torch."""
    if is_sharded(call.x) and (call.written() or call.fused or call.of_sum):
        return dispatch.run_by_reference(call)
    name = call.op
    values = [
        call.statistic if taken == "kind" else getattr(call, taken)
        for taken in _TAKEN[name.rstrip("_")].split()
    ]
    if call.in_place:
        _FORMS[name](*values)
        return (call.x, cast(Tensor, call.residual)) if call.adds else cast(Tensor, call.out)
    if not call.written():
        more = [getattr(call, taken) for taken in _MORE[name].split()]
        made: Tensor | tuple[Tensor, ...] = _FORMS[name](*values, *more)
        if isinstance(made, Tensor):  # an operator of one output
            return made
        return (made[0], made[1]) if call.adds else made[0]
    out = _new_y(call) if call.out is None else call.out
    if not call.adds:
        _FORMS[name + "_out"](out, *values)
        return out
    total = _new_sum(call) if call.residual_out is None else call.residual_out
    _FORMS[name + "_out"](out, total, *values)
    return out, total
