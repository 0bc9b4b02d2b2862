"""Norms that are wrong on purpose: each must be found, or this test shows nothing."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import normkit
from fuzz.making import FUNCTIONS
from fuzz.memory import span
from fuzz.model import has_memory

Norm = Callable[..., Any]


def _after(change: Callable[[Tensor, Any], Any]) -> Callable[[Norm], Norm]:
    """A norm that changes what it made: a function of x and of its result."""

    def spoil(norm: Norm) -> Norm:
        def spoiled(*args: Any, **options: Any) -> Any:
            made = norm(*args, **options)
            x = args[0] if args else options["x"]
            with torch.no_grad():
                return change(x, made)

        return spoiled

    return spoil


def _instead(error_of: Callable[[Exception, Any], Any]) -> Callable[[Norm], Norm]:
    """A norm that does something else than to raise its error."""

    def spoil(norm: Norm) -> Norm:
        def spoiled(*args: Any, **options: Any) -> Any:
            try:
                return norm(*args, **options)
            except (TypeError, ValueError, RuntimeError) as error:
                return error_of(error, args[0] if args else options["x"])

        return spoiled

    return spoil


def _to_y(change: Callable[[Tensor], Any]) -> Callable[[Norm], Norm]:
    """A norm whose y is another."""

    def changed(_: Tensor, made: Any) -> Any:
        y, *rest = made if type(made) is tuple else (made,)
        y = change(y)
        return (y, *rest) if rest else y

    return _after(changed)


def _spill(x: Tensor, made: Any) -> Any:
    if has_memory(x) and x.numel():
        end = x.data_ptr() + span(tuple(x.shape), x.stride()) * x.element_size()
        ctypes.memset(end, 0, 1)
    return made


def _two_steps(y: Tensor) -> Tensor:
    if y.element_size() == 2 and y.numel() and y.is_contiguous() and has_memory(y):
        y.detach().view(torch.int16).view(-1)[0] += 2
    return y


def _next_sum(_: Tensor, made: Any) -> Any:
    if type(made) is tuple and made[1].dtype == torch.float32 and made[1].is_contiguous():
        made[1].detach().view(torch.int32).view(-1)[:1] += 1
    return made


def _strided(y: Tensor) -> Tensor:
    return y.mT.contiguous().mT if y.ndim > 1 else y


def _write(x: Any) -> None:
    if isinstance(x, Tensor) and has_memory(x) and x.numel():
        ctypes.memset(x.data_ptr(), 0, 1)


def _writes(x: Tensor, made: Any) -> Any:
    _write(x)
    return made


def _with_wrong_gradient(y: Tensor) -> Tensor:
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient * 1.01)
    return y


def _raise(error: Exception) -> Any:
    raise error


def _write_and_raise(error: Exception, x: Any) -> Any:
    _write(x)
    raise error


def _refusing(norm: Norm) -> Norm:
    def refusing(*args: Any, **options: Any) -> Any:
        if options.get("clamp_inf") is True:
            raise ValueError("clamp_inf: expected False, got True")
        return norm(*args, **options)

    return refusing


def _crashing(norm: Norm) -> Norm:
    def crashing(*args: Any, **options: Any) -> Any:
        if options.get("round_sum") is False:
            os.kill(os.getpid(), signal.SIGSEGV)
        return norm(*args, **options)

    return crashing


def _text(error: Exception) -> str:
    return str(error).partition(":")[2]


# What is wrong: the kind of failure that must come of it, and how a norm is made so.
SPOILED: dict[str, tuple[str, Callable[[Norm], Norm]]] = {
    "a byte behind x is written": ("memory", _after(_spill)),
    "x is written": ("memory", _after(_writes)),
    "an element is two steps off": ("values", _to_y(_two_steps)),
    "a NaN is hidden": ("values", _to_y(lambda y: y.nan_to_num_(0.0))),
    "the sum is one step off": ("sum", _after(_next_sum)),
    "strides are kept": ("not packed", _to_y(_strided)),
    "another dtype": ("dtype", _to_y(lambda y: y.double())),
    "another shape": ("shape", _to_y(lambda y: y.unsqueeze(0))),
    "a copy instead of out": ("result", _to_y(lambda y: y.clone())),
    "x itself is returned": ("alias", _after(lambda x, made: x)),
    "a gradient is off by a hundredth": ("gradient of x", _to_y(_with_wrong_gradient)),
    "a detached result": ("requires_grad", _to_y(lambda y: y.detach())),
    "an error without a name": (
        "unnamed ValueError",
        _instead(lambda error, _: _raise(type(error)(_text(error)))),
    ),
    "an error that names another argument": (
        "an error about something else",
        _instead(lambda error, _: _raise(type(error)("bias:" + _text(error)))),
    ),
    "an error that names an argument that is not there": (
        "an argument that the function does not have",
        _instead(lambda error, _: _raise(type(error)("input:" + _text(error)))),
    ),
    "an error of another type": (
        "RuntimeError for another type",
        _instead(lambda error, _: _raise(RuntimeError(str(error)))),
    ),
    "an error that says too little": (
        "an error that says not what was expected",
        _instead(lambda error, _: _raise(type(error)(str(error).partition(":")[0] + ": wrong"))),
    ),
    "nothing is refused": ("accepted", _instead(lambda error, x: x)),
    "x is written and then refused": ("written by a refused call", _instead(_write_and_raise)),
    "what is right is refused": ("refused", _refusing),
    "a crash": ("crash", _crashing),
}


@contextmanager
def spoiled(how: str) -> Any:
    """Have all of normkit's functions be wrong in one way."""
    _, spoil = SPOILED[how]
    with ExitStack() as stack:
        for name in (*FUNCTIONS, *(f"{name}_" for name in FUNCTIONS)):
            # With its signature, which says what arguments it has.
            norm = getattr(normkit, name)
            wrong = spoil(norm)
            wrong.__wrapped__ = norm  # type: ignore[attr-defined]
            stack.enter_context(patch.object(normkit, name, wrong))
        yield
