"""What decides what a module computes, beside its class and the values of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from weakref import ref

import torch
from torch import nn

OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)
_SAME_FOR_ALL = (nn.Module, object)


class _Unseen(Exception):
    """Something of which it cannot be told whether it stays as it is."""


def identity(module: nn.Module) -> Hashable | None:
    """What is equal for two modules of one class that compute the same; None where none can tell.

    It holds the numbers of the instance and of its class, the functions of the class, and the
    numbers and functions that those read from around them: each can be replaced while a program
    runs.  Functions and classes are held weakly.
    """
    own = {k: v for k, v in module.__dict__.items() if k not in OF_EVERY_MODULE}
    tensors = {**module._parameters, **module._buffers}
    described = {k: t if t is None else (tuple(t.shape), t.dtype) for k, t in tensors.items()}
    try:
        attributes = tuple((name, _described(own[name])) for name in sorted(own))
        return (module.training, repr(described), attributes, tuple(_of_class(type(module))))
    except (_Unseen, RecursionError):  # as of a decorated function that holds itself
        return None


def _of_class(cls: type) -> Iterator[Hashable]:
    for base in cls.__mro__:
        if base in _SAME_FOR_ALL:
            continue
        for name, value in vars(base).items():
            is_special = name.startswith("__") and name.endswith("__")
            # of the special ones only functions compute: the others are documentation
            if not is_special or isinstance(value, FunctionType):
                yield name, _described(value)


def _described(value: object) -> Hashable:
    if type(value) in _PLAIN:
        return repr(value)
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *map(_described, value))
    if isinstance(value, dict):  # as the one in which transformers has its activations
        return (ref(type(value)), *((_described(k), _described(v)) for k, v in value.items()))
    if isinstance(value, (staticmethod, classmethod)):
        return _described(value.__func__)
    if isinstance(value, property):
        return tuple(map(_described, (value.fget, value.fset, value.fdel)))
    if isinstance(value, FunctionType):
        return (ref(value), *_read_by(value))
    return _unchanging(value)


def _unchanging(value: object) -> Hashable:
    """A description of what is not looked into."""
    if isinstance(value, (type, FunctionType)):
        return ref(value)
    if isinstance(value, (ModuleType, BuiltinFunctionType)):
        return None
    raise _Unseen


def _read_by(function: FunctionType) -> Iterator[Hashable]:
    """What a function reads from around it."""
    for value in (function.__defaults__, function.__kwdefaults__):
        yield _plain_or(repr, value)
    for cell in function.__closure__ or ():
        try:
            inside = cell.cell_contents
        except ValueError:  # nothing yet
            continue
        yield _described(inside)
    for name in _names(function.__code__):
        if name in function.__globals__:
            yield name, _plain_or(_unchanging, function.__globals__[name])


def _plain_or(otherwise: Callable[[object], Hashable], value: object) -> Hashable:
    is_plain = isinstance(value, (*_PLAIN, tuple, list, dict))
    return _described(value) if is_plain else otherwise(value)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
