"""The norms as operators of torch, and their gradients.

Eager calls of plain tensors come here only for a gradient.  What is compiled, exported, a subclass
or on another device takes the operator of the function's name in `torch.ops.normkit`, which returns
rstd and mean as well.  The gradients of all of them are one operator, `norm_backward`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from normkit import _dispatch, _nested, _sharding
from normkit._checks import Call, check
from normkit._dispatch import ALWAYS_DISPATCH, Formula, Gradients, Result, Saved, Wanted

# Devices on which torch's autocast has its layer norm (True) or rms norm (False) return float32.
# Torch itself is asked: that of 2.10 has no such rule for rms_norm.
AUTOCAST_TO_FLOAT32 = tuple(
    (device, layer)
    for device in ("cuda", "xpu")
    for layer, norm in ((False, "aten::rms_norm"), (True, "aten::layer_norm"))
    if torch._C._dispatch_has_kernel_for_dispatch_key(norm, f"Autocast{device.upper()}")
)

PLAIN = (Tensor, torch.nn.Parameter)


class Argument(NamedTuple):
    """One argument of an operator: its type in a schema, and its default; Ellipsis for none."""

    type: str
    default: Any = ...

    def declared(self, name: str) -> str:
        """Write it as schemas do."""
        if self.default is ...:
            return f"{self.type} {name}"
        default = f'"{self.default}"' if isinstance(self.default, str) else self.default
        return f"{self.type} {name}={default}"


Arguments = dict[str, Argument]


def _namer(arguments: Arguments) -> Callable[[Sequence[Any]], dict[str, Any]]:
    """Return what names an operator's values, of which torch leaves out the last defaults."""
    names = tuple(arguments)
    defaults = tuple(argument.default for argument in arguments.values())
    return lambda values: dict(zip(names, (*values, *defaults[len(values) :]), strict=True))


def _define(name: str, arguments: Arguments, returned: str) -> None:
    declared = ", ".join(argument.declared(name) for name, argument in arguments.items())
    schema = f"{name}({declared}) -> {returned}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]


class Op(NamedTuple):
    """A norm, as operators see it."""

    name: str
    layer: bool | None  # None: an argument `kind` says it
    per_head: bool
    adds: bool
    arguments: Arguments  # of every form: fields of a Call
    names: tuple[str, ...]  # theirs, as tracers can walk them

    def call(self, form: str, named: dict[str, Any]) -> Call:
        """Make the call that these arguments mean."""
        layer = named.pop("kind") == "layer" if self.layer is None else self.layer
        return Call(self.name + form, layer, self.per_head, **named)

    def values(self, call: Call) -> list[Any]:
        """Return the values of the arguments that every form takes."""
        return [getattr(call, name) for name in self.names]


def _make(name: str, layer: bool | None, eps: float, *, per_head: bool = False) -> Op:
    adds = name.startswith("add_")
    arguments = {
        "x": Argument("Tensor"),
        "residual": Argument("Tensor"),
        "weight": Argument("Tensor?", None),
        "bias": Argument("Tensor?", None),
        "eps": Argument("float?", eps),
        "kind": Argument("str", "rms"),
        "round_sum": Argument("bool", True),
        "weight_offset": Argument("float", 0.0),
        "round_before_weight": Argument("bool", False),
        "clamp_inf": Argument("bool", False),
    }
    if not adds:
        del arguments["residual"], arguments["round_sum"]
    if layer is not None:
        del arguments["kind"]
    return Op(name, layer, per_head, adds, arguments, tuple(arguments))


OPS = {
    op.name: op
    for op in (
        _make("rms_norm", False, 1e-6),
        _make("layer_norm", True, 1e-5),
        _make("head_norm", None, 1e-6, per_head=True),
        _make("add_rms_norm", False, 1e-6),
        _make("add_layer_norm", True, 1e-5),
        _make("add_head_norm", None, 1e-6, per_head=True),
    )
}


# The public functions by name: what other types than tensors are told of, as torch tells its own.
FUNCTIONS: dict[str, Callable[..., Any]] = {}


def serve(call: Call) -> Any:
    """Check and serve a call that the quick path did not take."""
    if type(call.x) not in PLAIN:
        if _nested.is_jagged(call.x):
            return _serve_jagged(call)
        if not isinstance(call.x, Tensor | type) and has_torch_function((call.x,)):
            return _hand_over(call)
    if autocasts(call):
        call.out_dtype = torch.float32
    # Under these only torch's own operators know what to do, and in a trace of torch.jit too.
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    if torch.compiler.is_compiling():
        check(call)
        return _dispatch.serve_by_reference(call) if transformed else _call_operator(call)
    transformed = transformed or torch._C._is_tracing()
    if _dispatch.is_explaining():
        check(call)
        dim = None if transformed else _sharding.split_columns(call)
        return _dispatch.explain_call(call if dim is None else _sharding.part_of_rank(call, dim)[0])
    if ALWAYS_DISPATCH or torch._C._len_torch_dispatch_stack() > 0 or not _is_plain(call):
        check(call)
        _sharding.register_once(SHARDED)
        # A backend asked for by name has to say that it cannot serve these.
        dim = None if transformed else _sharding.split_columns(call)
        if dim is not None:
            return _sharding.norm_split_columns(call, dim)
        by_name = transformed or _dispatch.wanted_backend() not in ("auto", "reference")
        return _dispatch.serve(call) if by_name else _call_operator(call)
    writes = call.out is not None or call.residual_out is not None
    if transformed or writes or not call.wants_gradient():
        check(call)
        return _dispatch.serve(call)
    # The extension checks, and what it refuses _dispatch.save; but neither sees these.
    if type(call.memory_efficient) is not bool or (
        call.residual is None and call.op.startswith("add_")
    ):
        check(call)
    return _Norm.apply(call, call.x, call.residual, call.weight, call.bias)  # type: ignore[no-untyped-call]


def _serve_jagged(call: Call) -> Any:
    made = serve(_nested.norm_of_values(call))
    if _dispatch.is_explaining():
        return made
    made = made if isinstance(made, tuple) else (made,)
    given = (call.out, call.residual_out)
    returned = tuple(
        _nested.ragged_as(call.x, values) if out is None else out
        for values, out in zip(made, given, strict=False)
    )
    return returned if len(returned) > 1 else returned[0]


def _hand_over(call: Call) -> Any:
    """Let an x that is no tensor, as torch.fx traces with, say what a call of it means."""
    function = FUNCTIONS[call.op]
    given: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        value, default = getattr(call, name), parameter.default
        is_default = value is default or (type(value) is type(default) and value == default)
        if not is_default or default is parameter.empty:
            given[name] = value
    return handle_torch_function(function, (call.x,), given.pop("x"), **given)


def autocasts(call: Call) -> bool:
    """Whether torch's rules for autocast have this call return float32."""
    if not isinstance(call.x, Tensor) or call.x.is_cpu:
        return False
    if call.out_dtype is not None or call.out is not None:
        return False
    device = call.x.device.type
    return (
        (device, call.layer) in AUTOCAST_TO_FLOAT32
        and call.x.dtype != torch.float64
        and torch.is_autocast_enabled(device)
    )


def _is_plain(call: Call) -> bool:
    """Whether kernels may read the tensors, and autograd needs no help of the dispatcher."""
    for t in (call.residual, call.weight, call.bias, call.out, call.residual_out):
        if t is not None and not _is_plain_tensor(t):
            return False
    return _is_plain_tensor(call.x) and (call.x.is_cpu or call.x.is_cuda or call.x.is_xpu)


def _is_plain_tensor(t: Any) -> bool:
    # A nested tensor of the older kind is a plain Tensor without a shape.
    return type(t) in PLAIN and not t.is_nested


# ---------------------------------------------------------------- gradients


def _remember(ctx: Any, call: Call, saved: Saved) -> None:
    """Keep what the backward pass needs: rstd, mean and no second copy of anything."""
    y, residual_out, rstd, mean = saved
    from_output = call.memory_efficient and not call.round_before_weight and not call.clamp_inf
    residual = None
    if from_output:
        source = y
    elif call.residual is None:
        source = call.x
    elif residual_out is not None and call.round_sum and not call.clamp_inf:
        source = residual_out
    else:
        source, residual = call.x, call.residual
    kept_mean = None if from_output else mean
    ctx.save_for_backward(source, residual, call.weight, call.bias, rstd, kept_mean)
    ctx.set_materialize_grads(False)
    ctx.backend = _dispatch.wanted_backend()
    ctx.dtypes = call.x.dtype, None if call.residual is None else call.residual.dtype
    ctx.formula = Formula(
        call.layer,
        call.per_head,
        from_output,
        call.eps,
        call.weight_offset,
        call.round_before_weight,
        call.clamp_inf,
        call.round_sum,
    )


def _gradients(
    ctx: Any,
    needed: Sequence[bool],
    grad_y: Tensor | None,
    grad_residual_out: Tensor | None,
    backward: Callable[..., Gradients],
) -> Gradients:
    """Gradients of x, residual, weight and bias as far as they are needed."""
    if grad_y is None:
        if grad_residual_out is None:
            return None, None, None, None
        grad_y = torch.zeros_like(grad_residual_out)
    x_dtype, residual_dtype = ctx.dtypes
    source, residual, weight, bias, rstd, mean = ctx.saved_tensors
    wanted = Wanted(
        x_dtype if needed[0] else None, residual_dtype if needed[1] else None, *needed[2:]
    )
    if not torch.is_grad_enabled():
        return backward(
            ctx.formula,
            wanted,
            ctx.backend,
            grad_y,
            grad_residual_out,
            source,
            residual,
            weight,
            bias,
            rstd,
            mean,
        )
    if ctx.formula.from_output:
        raise RuntimeError(
            "memory_efficient: expected False where gradients are differentiated again, got True"
        )
    return _dispatch.backward_by_reference(
        ctx.formula, wanted, grad_y, grad_residual_out, source, residual, weight, bias, rstd,
        differentiable=True,
    )  # fmt: skip


class _Norm(torch.autograd.Function):
    """The way of eager calls that want a gradient."""

    @staticmethod
    def forward(ctx: Any, call: Call, *_: Tensor | None) -> Result:
        saved = _dispatch.save(call)
        _remember(ctx, call, saved)
        y, residual_out = saved[:2]
        if residual_out is not None and not any(ctx.needs_input_grad[1:3]):
            ctx.mark_non_differentiable(residual_out)
        return y if residual_out is None else (y, residual_out)

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_residual_out: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        made = _gradients(ctx, needed, grad_y, grad_residual_out, _dispatch.backward)
        return None, *made


# ---------------------------------------------------------------- operators

_library = torch.library.Library("normkit", "DEF")  # type: ignore[no-untyped-call]


def _empty_like(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Make an output for an input: packed, whatever the input's strides are."""
    return torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)


def _row_values(x: Tensor) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[:-1], dtype=dtype)


def _register(op: Op) -> None:
    _register_functional(op)
    in_place = {**op.arguments, "x": Argument("Tensor(a!)")}
    outputs = {"out": Argument("Tensor(a!)")}
    if op.adds:
        in_place["residual"] = Argument("Tensor(b!)")
        outputs["residual_out"] = Argument("Tensor(b!)")
    _register_writing(op, "_", in_place)
    _register_writing(op, "_out", {**outputs, **op.arguments})


def _outputs(op: Op) -> tuple[str, ...]:
    """The outputs of the functional form; mean is empty where a kind of "rms" has none."""
    residual_out = ("residual_out",) if op.adds else ()
    mean = () if op.layer is False else ("mean",)
    return ("y", *residual_out, "rstd", *mean)


def _register_functional(op: Op) -> None:
    """Register what returns y, residual_out if there is one, rstd, and mean unless it is rms."""
    arguments = {
        **op.arguments,
        "out_dtype": Argument("ScalarType?", None),
        "memory_efficient": Argument("bool", False),
    }
    outputs = _outputs(op)
    has_mean = "mean" in outputs
    _define(op.name, arguments, f"({', '.join(f'Tensor {name}' for name in outputs)})")
    name = f"normkit::{op.name}"

    named = _namer(arguments)

    def call_of(values: Sequence[Any]) -> Call:
        return op.call("", named(values))

    def forward(*values: Any) -> tuple[Tensor, ...]:
        call = call_of(values)
        y, residual_out, rstd, mean = _dispatch.save(call)
        made = [y] if residual_out is None else [y, residual_out]
        made.append(rstd)
        if has_mean:
            made.append(rstd.new_empty(0) if mean is None else mean)
        return tuple(made)

    def fake(*values: Any) -> tuple[Tensor, ...]:
        call = call_of(values)
        made = [_empty_like(call.x, call.out_dtype)]
        if call.residual is not None:
            made.append(_empty_like(call.residual))
        made.append(_row_values(call.x))
        if has_mean:
            made.append(
                _row_values(call.x) if call.layer else call.x.new_empty(0, dtype=made[-1].dtype)
            )
        return tuple(made)

    def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call = call_of(inputs)
        made = dict(zip(outputs, output, strict=True))
        mean = made.get("mean") if call.layer else None
        # A sum of what wants no gradient wants none either.
        summands = ctx.needs_input_grad[:2] if op.adds else (True,)
        ctx.mark_non_differentiable(*output[1 + (op.adds and any(summands)) :])
        _remember(ctx, call, (made["y"], made.get("residual_out"), made["rstd"], mean))

    places = [
        op.names.index(name) if name in op.names else None
        for name in ("x", "residual", "weight", "bias")
    ]

    def backward(ctx: Any, grad_y: Tensor | None, *grads: Tensor | None) -> tuple[Any, ...]:
        grad_residual_out = grads[0] if op.adds else None
        needs = ctx.needs_input_grad  # as many as arguments were given
        needed = [place is not None and place < len(needs) and needs[place] for place in places]
        made = _gradients(ctx, needed, grad_y, grad_residual_out, _call_backward_operator)
        of_inputs: list[Tensor | None] = [None] * len(needs)
        for place, gradient, wanted in zip(places, made, needed, strict=True):
            if place is not None and wanted:
                of_inputs[place] = gradient
        return tuple(of_inputs)

    _library.impl(op.name, forward, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(name, fake, lib=_library)
    torch.library.register_autograd(name, backward, setup_context=remember, lib=_library)


def _register_writing(op: Op, form: str, arguments: Arguments) -> None:
    """Register what writes its outputs, or x and the residual, and returns nothing."""
    _define(op.name + form, arguments, "()")

    name_values = _namer(arguments)

    def write(*values: Any) -> None:
        named = name_values(values)
        if "out" not in named:
            named["out"] = named["x"]
            if op.adds:
                named["residual_out"] = named["residual"]
        call = op.call(form, named)
        check(call)
        _dispatch.serve(call)

    def fake(*_: Any) -> None:
        return None

    _library.impl(op.name + form, write, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"normkit::{op.name}{form}", fake, lib=_library)


_FORMULA = {
    "layer": Argument("bool"),
    "per_head": Argument("bool"),
    "from_output": Argument("bool"),
    "eps": Argument("float?"),
    "weight_offset": Argument("float"),
    "round_before_weight": Argument("bool"),
    "clamp_inf": Argument("bool"),
    "round_sum": Argument("bool"),
}
_WANTED = {
    "x_dtype": Argument("ScalarType?"),
    "residual_dtype": Argument("ScalarType?"),
    "weight_wanted": Argument("bool"),
    "bias_wanted": Argument("bool"),
}
_TENSORS = {
    "grad_y": Argument("Tensor"),
    "grad_residual_out": Argument("Tensor?"),
    "x": Argument("Tensor"),
    "residual": Argument("Tensor?"),
    "weight": Argument("Tensor?"),
    "bias": Argument("Tensor?"),
    "rstd": Argument("Tensor"),
    "mean": Argument("Tensor?"),
}


# The tensors come first: DTensor of torch 2.10 looks for the mesh in the first argument alone.
_BACKWARD = {**_TENSORS, **_FORMULA, **_WANTED}


def _register_backward() -> None:
    _define("norm_backward", _BACKWARD, f"({', '.join(['Tensor'] * 4)})")
    first, last = len(_TENSORS), len(_TENSORS) + len(_FORMULA)

    def parts(values: Sequence[Any]) -> tuple[Formula, Wanted, Sequence[Any]]:
        return Formula(*values[first:last]), Wanted(*values[last:]), values[:first]

    def backward(*values: Any) -> tuple[Tensor, ...]:
        formula, wanted, tensors = parts(values)
        grad_y, x = tensors[0], tensors[2]
        of_x, of_residual, *of_affine = _dispatch.backward(
            formula, wanted, _dispatch.wanted_backend(), *tensors
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

    def refuse(ctx: Any, *_: Any) -> Any:
        raise RuntimeError("norm_backward: its result cannot be differentiated again")

    _library.impl("norm_backward", backward, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake("normkit::norm_backward", fake, lib=_library)
    torch.library.register_autograd("normkit::norm_backward", refuse, lib=_library)


def _call_backward_operator(
    formula: Formula, wanted: Wanted, _backend: str, *tensors: Tensor | None
) -> Gradients:
    operator = torch.ops.normkit.norm_backward.default
    x, residual, weight, bias = operator(*tensors, *formula, *wanted)
    return (
        x if wanted.x is not None else None,
        x if wanted.residual == wanted.x else residual,
        weight if wanted.weight else None,
        bias if wanted.bias else None,
    )


for _op in OPS.values():
    _register(_op)
_register_backward()

_GRADIENTS = ("grad_x", "grad_residual", "grad_weight", "grad_bias")
SHARDED = (
    *((op.name, (*op.names, "out_dtype", "memory_efficient"), _outputs(op)) for op in OPS.values()),
    ("norm_backward", tuple(_BACKWARD), _GRADIENTS),
)
_sharding.register_once(SHARDED)

_FORMS = {
    op.name + form: getattr(torch.ops.normkit, op.name + form).default
    for op in OPS.values()
    for form in ("", "_", "_out")
}


def _call_operator(call: Call) -> Result:
    if call.written() and _sharding.is_sharded(call.x):
        return _dispatch.serve_by_reference(call)
    op = OPS[call.op.rstrip("_")]
    values = op.values(call)
    if call.op.endswith("_"):
        _FORMS[call.op](*values)
        return (call.x, call.residual) if call.residual is not None else call.x
    if not call.written():
        made = _FORMS[call.op](*values, call.out_dtype, call.memory_efficient)
        return made[:2] if op.adds else made[0]  # type: ignore[no-any-return]
    out = _empty_like(call.x, call.out_dtype) if call.out is None else call.out
    if call.residual is None:
        _FORMS[call.op + "_out"](out, *values)
        return out
    total = _empty_like(call.residual) if call.residual_out is None else call.residual_out
    _FORMS[call.op + "_out"](out, total, *values)
    return out, total
