"""Which modules may be norms at all, without running them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from normkit._spec import FLOATS, FLOATS_TEXT
from normkit.recognition._identity import OF_EVERY_MODULE

# More elements than the parameters of any norm: what is beyond is a matrix or a table.
_MOST_ELEMENTS, _MOST_OF_HEADS = 1 << 17, 1 << 15
_NOT_OF_A_NORM = "parameters are not those of a norm"
# Without a weight, the widths to measure at where the module names none: no multiples of another.
_ANY_WIDTHS = (96, 40)
_WIDTH_NAMES = ("normalized_shape", "dim", "hidden_size", "size")


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that a module has, by name."""
    return {name: p for name, p in module._parameters.items() if p is not None}


def row_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape without sizes of 1: the (n, 1, 1) of channels-first norms is n."""
    return tuple(size for size in parameter.shape if size != 1) or (parameter.numel(),)


def gate_of(module: nn.Module) -> str | None:
    """The name of the argument that is a gate."""
    names = list(inspect.signature(type(module).forward).parameters)[2:]
    return next((name for name in names if "gate" in name.split("_") or name == "z"), None)


def widths(module: nn.Module) -> tuple[int, ...]:
    """The n to measure at."""
    parameters = list(parameters_of(module).values())
    if parameters:
        return row_shape(parameters[0])[-1:]
    for name in _WIDTH_NAMES:
        value = module.__dict__.get(name)
        if isinstance(value, (tuple, list)) and len(value) == 1:
            value = value[0]
        if isinstance(value, int) and not isinstance(value, bool) and value > 1:
            return (value,)
    return _ANY_WIDTHS


def refusal(module: nn.Module) -> str | None:
    """Why a module cannot be a norm of rows, or None."""
    checks = (_of_structure, _of_attributes, _of_parameters, _of_buffers, _of_signature)
    return next((why for check in checks if (why := check(module)) is not None), None)


def _of_structure(module: nn.Module) -> str | None:
    if "parametrizations" in module._modules:
        return "a parameter is parametrised"
    if module._modules:
        return "has children"
    if isinstance(module, torch.jit.ScriptModule):
        return "is scripted"
    forward = type(module).forward
    if forward is nn.Module.forward:
        return "has no forward"
    own = module.__dict__.get("forward")
    # transformers' kernelize binds the same function again where it has no kernel
    if own is not None and getattr(own, "__func__", None) is not forward:
        return "forward is replaced on the instance"
    called = ((cls.__call__, cls._call_impl) for cls in (type(module), nn.Module))
    if next(called) != next(called) or not {"__call__", "_call_impl"}.isdisjoint(module.__dict__):
        return "a call of it does more than forward"
    return None


def _of_attributes(module: nn.Module) -> str | None:
    """What torch does not know of, and what would keep its values in a copy."""
    for name, value in module.__dict__.items():
        for inside in () if name in OF_EVERY_MODULE else _inside(value):
            if isinstance(inside, nn.Module):
                return f"has a module that is no child, {name}"
            if isinstance(inside, Tensor):
                return f"has a tensor that is no parameter, {name}"
    return None


def _inside(value: object) -> Iterator[object]:
    """A value, and what is in it if it is a container."""
    yield value
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple, set)):
        for inside in value:
            yield from _inside(inside)


def _of_parameters(module: nn.Module) -> str | None:
    parameters = list(parameters_of(module).values())
    if any(type(p) not in (nn.Parameter, Tensor) for p in parameters):
        return "parameters are of a tensor subclass"
    if any(hasattr(p, "_fsdp_flattened") for p in parameters):  # of it, a rank has any part or none
        return "parameters are split by FSDP"
    if isinstance(module, (nn.Linear, nn.Embedding, nn.Bilinear)) or len(parameters) > 2:
        return _NOT_OF_A_NORM
    shapes = {row_shape(p) for p in parameters}
    if len(shapes) > 1:
        return "weight and bias are of different shapes"
    if any(len(s) > 2 or p.numel() > _most(s) for s in shapes for p in parameters):
        return _NOT_OF_A_NORM
    if any(p.dtype not in FLOATS for p in parameters):
        return f"parameters are of {parameters[0].dtype}, not {FLOATS_TEXT}"
    if shapes and min(min(s) for s in shapes) < 1:
        return "a parameter has no elements"
    named = "norm" in type(module).__name__.lower() or hasattr(module, "eps")
    return None if parameters or named else "has neither a parameter nor the name of a norm"


def _most(shape: Sequence[int]) -> int:
    return _MOST_ELEMENTS if len(shape) == 1 else _MOST_OF_HEADS


def _of_buffers(module: nn.Module) -> str | None:
    for name, buffer in module._buffers.items():
        if buffer is None:
            continue
        # One that is not saved may lie unused; it is randomised, and what depends on it is no norm.
        if name not in module._non_persistent_buffers_set or not buffer.is_floating_point():
            return f"has a buffer, {name}"
    return None


def _of_signature(module: nn.Module) -> str | None:
    try:
        arguments = list(inspect.signature(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return "forward has no signature"
    if not arguments or arguments[0].kind not in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    ):
        return "forward takes no x"
    gate = gate_of(module)
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [a for a in arguments[1:] if a.default is a.empty and a.kind not in variable]
    extra = [a.name for a in needed if a.name != gate]
    return f"forward takes more than x: {extra[0]}" if extra else None
