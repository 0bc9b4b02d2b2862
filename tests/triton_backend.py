"""The Triton kernels as the backend "triton": on the CPU under Triton's interpreter.

The interpreter has flaws, which are mended here and not in the kernels.  It cuts bfloat16 off
instead of rounding, misreads subnormal bfloat16, cannot be in two threads at once, and that of
Triton 3.6 counts loops in a way that NumPy 2.4 refuses.  It adds elements one by one, and takes
milliseconds for each program of a launch: here numpy adds, and a program has more rows than on a
device.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor

from normkit._serving import backends
from normkit._serving import triton as _triton

KERNELS = Path(_triton.__file__).with_name("triton_kernels.py")

ENTRIES = ("norm", "norm_saving", "plan_of")

_lock = threading.Lock()
_planned = _triton.plan


@cache
def interpreted() -> Any:
    """A second copy of the kernels, decorated for the interpreter; None without Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    _import_compiler()
    spec = importlib.util.spec_from_file_location("normkit_interpreted_kernels", KERNELS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
        spec.loader.exec_module(module)
    assert module.INTERPRETED
    return module


def _import_compiler() -> None:
    """Have Triton's own functions decorated for the compiler, also those it imports later."""
    with suppress(ImportError):
        importlib.import_module("triton.experimental.gluon")


def register() -> bool:
    """Make "triton" a name of use_backend(); False without Triton."""
    if interpreted() is None:
        return False
    entries = (partial(_interpreted, getattr(_triton, name)) for name in ENTRIES)
    backends.natives["triton"] = backends.Native(*entries, _triton.norm_backward)
    return True


def _interpreted(entry: Callable[..., Any], *args: Any) -> Any:
    """An entry of the backend, interpreted where x is on the CPU."""
    x = args[1]
    if x is not None and x.device.type != "cpu":
        return entry(*args)
    with interpreting(), mock.patch.object(_triton, "plan", partial(_few_programs, x)):
        return entry(*args)


def _few_programs(x: Tensor, n: int) -> _triton.Plan:
    usual = _planned(n)
    wanted = 1 << max(x.numel() // n - 1, 0).bit_length()
    return usual if usual.streamed else usual._replace(rows=min(wanted, 2**17 // usual.block))


@contextmanager
def interpreting() -> Iterator[None]:
    """Have the entries run tensors on the CPU, as it is planned for devices."""
    with _lock, _mended(), mock.patch.object(_triton, "_kernels", interpreted):
        yield


@contextmanager
def _mended() -> Iterator[None]:
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, ReduceOps

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def add(self: Any, pairs: Any) -> Any:
        first, second = np.moveaxis(pairs[0].handle.data, self.axis, 0)
        return [self.to_tensor(first + second, pairs[0].dtype)]

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)  # what a kernel calls, it has made ready already

    casts = _with_bfloat16(InterpreterBuilder.cast_impl)
    with (
        mock.patch.object(interpreter, "_patch_lang_tensor", patch),
        mock.patch.object(InterpreterBuilder, "cast_impl", casts),
        mock.patch.object(ReduceOps, "generic_reduce", add),
        mock.patch.object(InterpretedFunction, "__call__", call),
        np.errstate(all="ignore"),  # numpy warns of the infinities that are asked for
    ):
        yield


def _with_bfloat16(cast: Callable[..., Any]) -> Callable[..., Any]:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        pair = src.dtype.scalar, dst_type.scalar
        if pair == (tl.bfloat16, tl.float32):
            wide = (src.data.astype(np.uint32) << 16).view(np.float32)
            return TensorHandle(wide, tl.float32)
        if pair == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(src.data).view(np.uint32)
            rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
            narrow = np.where(np.isnan(src.data), 0x7FC0, rounded).astype(np.uint16)
            return TensorHandle(narrow, tl.bfloat16)
        return cast(self, src, dst_type)

    return cast_impl
