"""The norms as operators of torch, and their gradients.

Eager calls of plain tensors do not come here.  What is compiled, exported, a subclass or on another
device takes the operator of the function's name in `torch.ops.normkit`, which returns
rstd and mean as well.  The gradients of all of them are one operator, `norm_backward`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, cast

import torch
from torch import Tensor

from normkit._serving import dispatch, gating, modulation, post_norm, rotation
from normkit._serving.autograd import NormContext, gradients, inputs_of, remember
from normkit._serving.backends import quick, wanted_backend
from normkit._serving.checks import check
from normkit._serving.definition import KERNEL, Definition, refusal
from normkit._serving.dispatch import Wanted
from normkit._serving.formula import Formula, values_of
from normkit._serving.native import backward_kernel, kernel_of
from normkit._spec import (
    FIELDS,
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
        remember(ctx, values_of(call), inputs_of(call), saved)

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
