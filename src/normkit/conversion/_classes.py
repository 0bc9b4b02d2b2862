"""The class of a converted module or fused layer: a subclass of its own, by the same name."""

from __future__ import annotations

import copy
import copyreg
import threading
from collections.abc import Callable
from inspect import signature
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from normkit.conversion._plan import NotConvertible, Plan

_LOCK = threading.Lock()
_autocast_is_on = torch._C._is_any_autocast_enabled
_is_tracing = torch._C._is_tracing

# What a class may do its own way, and converted classes do for it, or must not do again.
_OWN_WAYS = (
    "__copy__", "__deepcopy__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__",
    "__getnewargs__", "__getnewargs_ex__",
)  # fmt: skip
_ORIGINAL = "_normkit_original"
PLAN = "_normkit_plan"  # the attribute of a converted module's class


def is_ours(module: nn.Module) -> bool:
    """Whether a module's class is of here, also where others derived theirs from it."""
    return hasattr(type(module), _ORIGINAL)


def is_converted(module: nn.Module) -> bool:
    """Whether it is a norm's, likewise."""
    return hasattr(type(module), PLAN)


def original_of(module: nn.Module) -> type[nn.Module] | None:
    """The class that a module had before; None where its class is not one of these."""
    original: type[nn.Module] | None = vars(type(module)).get(_ORIGINAL)
    return original


def set_class(module: nn.Module, new: type[nn.Module]) -> None:
    """Give a module another class, of those that differ by a plan only."""
    old = type(module).forward
    module.__class__ = new
    # what others keep of it on the instance, as kernelize and accelerate do
    for name, value in module.__dict__.items():
        if type(value) is MethodType and value.__func__ is old and value.__self__ is module:
            module.__dict__[name] = MethodType(new.forward, module)


def converted_class(own: type[nn.Module], plan: Plan) -> type[nn.Module]:
    """The class for modules of a class with this plan, one for all of them.

    Raises:
        NotConvertible: the class has its own way of being copied.
    """
    return derived_class(own, PLAN, plan, lambda: {"forward": _forward(own, plan)})


def derived_class(
    own: type[nn.Module], name: str, value: object, members: Callable[[], dict[str, Any]]
) -> type[nn.Module]:
    """The class that differs from a class by what a value says, one for each value.

    Raises:
        NotConvertible: the class has its own way of being copied.
    """
    ways = {way for base in own.__mro__ if base not in (nn.Module, object) for way in vars(base)}
    if not ways.isdisjoint(_OWN_WAYS) or type(own) is not type:
        raise NotConvertible("its class has its own way of being copied")
    with _LOCK:
        for known in own.__subclasses__():  # Python keeps this list, and lets go of the unused
            if _ORIGINAL in vars(known) and name in vars(known) and vars(known)[name] == value:
                return known
        all_members = {
            "__module__": own.__module__,
            "__qualname__": own.__qualname__,
            "__doc__": own.__doc__,
            "__copy__": _copied,
            "__deepcopy__": _deep_copied,
            "__reduce_ex__": _reduced,
            _ORIGINAL: own,
            name: value,
            **members(),
        }
        # The base comes later, so that it is not told (__init_subclass__), as of a class of users.
        # No second one: Python gives an instance only a class whose first base is its own.
        made = type(own.__name__, (nn.Module,), all_members)
        try:
            made.__bases__ = (own,)
        except TypeError as error:
            raise NotConvertible(
                "its class has __slots__, or a base that is none of torch"
            ) from error
        return made


def _copied(self: nn.Module) -> nn.Module:
    """A copy is converted as well."""
    other = type(self).__new__(type(self))
    other.__dict__ = self.__dict__.copy()
    return other


def _deep_copied(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    other = type(self).__new__(type(self))
    memo[id(self)] = other
    other.__dict__ = copy.deepcopy(self.__dict__, memo)
    return other


def _reduced(self: Any, protocol: Any) -> Any:
    """A file has the module as it was before, and is loaded where normkit is not installed.

    Pickle takes `copyreg.__newobj__` for an object's own class only.
    """
    made = nn.Module.__reduce_ex__(self, protocol)
    original = original_of(self)
    if original is None:  # a class that others derived from this one
        return made
    make = copyreg._reconstructor  # type: ignore[attr-defined]
    return make, (original, object, None), *made[2:]


def _forward(own: type[nn.Module], plan: Plan) -> Callable[..., Tensor]:
    """Its forward, whose arguments have the names of the original's."""

    def of_x(self: nn.Module, x: Any) -> Any:
        if is_dynamo_compiling():
            return when_compiled(own, self, x)
        # in a trace, sizes are no numbers
        made = None if _autocast_is_on() or _is_tracing() else plan.run(self, x)
        return own.forward(self, x) if made is None else made

    def of_x_and_gate(self: nn.Module, x: Any, z: Any) -> Any:
        if is_dynamo_compiling():
            return when_compiled(own, self, x, z)
        is_apart = _autocast_is_on() or _is_tracing()
        made = None if is_apart else plan.run(self, x, None, (), z)
        return own.forward(self, x, z) if made is None else made

    arguments = list(signature(own.forward).parameters.values())[1:]
    names = [argument.name for argument in arguments]
    defaults = [a.default for a in arguments if a.name == plan.gate and a.default is not a.empty]
    served = {names[0], plan.gate}

    def of_more(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return when_compiled(own, self, *args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        is_known = len(given) == len(args) + len(kwargs) and given.keys() <= served
        made = None
        if is_known and names[0] in given and not (_autocast_is_on() or _is_tracing()):
            z = given.get(plan.gate or "", defaults[0] if defaults else None)
            made = plan.run(self, given[names[0]], None, (), z)
        return own.forward(self, *args, **kwargs) if made is None else made

    if len(names) == 1:
        return _called_as(own.forward, of_x, names)
    if names[1:] == [plan.gate] and all(a.kind is a.POSITIONAL_OR_KEYWORD for a in arguments):
        return _called_as(own.forward, of_x_and_gate, names, *defaults)
    return of_more


def _called_as(
    own: Callable[..., Any], forward: Callable[..., Any], names: list[str], *defaults: object
) -> Callable[..., Tensor]:
    """The function with the names of the original, its own and those of its arguments.

    torch.fx, keyword calls and errors go by them, and cannot know of x.
    """
    assert isinstance(forward, FunctionType)
    code = forward.__code__
    variables = ("self", *names, *code.co_varnames[1 + len(names) :])
    named = code.replace(co_varnames=variables)
    made = FunctionType(named, globals(), "forward", defaults, forward.__closure__)
    made.__qualname__ = getattr(own, "__qualname__", "forward")
    return made


def when_compiled(own: type[nn.Module], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Its own forward, the only thing that torch.compile sees of a converted module.

    Inductor fuses it with what is around it; docs/torch.md has what an operator costs there.
    """
    return own.forward(module, *args, **kwargs)
