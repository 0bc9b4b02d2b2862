"""The Triton kernels as a backend, for devices without kernels of their own (ROCm and XPU).

`norm`, `norm_saving` and `plan_of` take the arguments of `_C`'s entries, and give what those give.
Importing this module does not import Triton; the first call does.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normkit._serving.refusal import Refusal
from normkit._spec import FLAGS, FLOATS, NATIVE, Call, Result, Saved

FLOAT32_EPSILON = 2.0**-23

LONGEST_BLOCK = 16384  # what a program keeps in registers
STREAMED_BLOCK = 8192
TILE = 1024  # elements of a program at least: no thread is without, so none holds another's
MOST_WARPS = 8  # what they have to tell each other costs barriers
MOST_PROGRAMS = 2**31 - 1
MOST_COLUMNS = 2**30  # behind the last block there are columns that int32 has to hold


class Plan(NamedTuple):
    """How a row of n elements is normalised: by n alone, and so are its bits."""

    streamed: bool  # the row is read again for each statistic
    rows: int  # of a program
    block: int  # columns at a time, a power of 2
    warps: int

    def __str__(self) -> str:
        rows = f"{self.rows} row{'s' if self.rows > 1 else ''} a program"
        kept = "read again for each statistic" if self.streamed else "kept in registers"
        where = f"{self.block} columns at a time, {kept}"
        return f"{self.kernel}: {rows}, {where}, warps: {self.warps}"

    @property
    def kernel(self) -> str:
        """The name of the kernel in `normkit._serving.triton_kernels`."""
        return "norm_streamed_row" if self.streamed else "norm_rows"


@cache
def plan(n: int) -> Plan:
    """The plan for rows of n elements."""
    if n > LONGEST_BLOCK:
        return Plan(True, 1, STREAMED_BLOCK, MOST_WARPS)
    block = 1 << (n - 1).bit_length()
    tile = max(block, TILE)
    return Plan(False, tile // block, block, min(tile // TILE, MOST_WARPS))


def why_not(device: torch.device) -> str:
    """Why calls on a device are not for Triton; an empty str when they are."""
    if device.type != "xpu" and not (device.type == "cuda" and torch.version.hip):
        return f"the Triton kernels are for ROCm and XPU devices, and x is on {device}"
    return unusable()


def unusable() -> str:
    """Why Triton's kernels work on no device here; an empty str when they do."""
    kernels = _kernels()
    return kernels if isinstance(kernels, str) else ""


@cache
def _kernels() -> ModuleType | str:
    """The module of the kernels; a str that says why there is none."""
    try:
        return importlib.import_module("normkit._serving.triton_kernels")
    except Exception as error:  # a broken installation of Triton raises whatever it likes
        return f"Triton could not be loaded: {error}"


def norm(*values: Any) -> Result | Refusal:
    """Run a call: y, or (y, residual_out).

    What is written must overlap no input unless it is that input.
    """
    call = _call_of(values)
    way = _way_of(call)
    if isinstance(way, Refusal):
        return way
    y, residual_out = _run(call, way)
    return y if residual_out is None else (y, residual_out)


def norm_saving(*values: Any) -> Saved | Refusal:
    """Run a call and keep what its gradients need: (y, residual_out, rstd, mean)."""
    call = _call_of(values)
    way = _way_of(call)
    if isinstance(way, Refusal):
        return way
    rstd = call.x.new_empty(call.x.shape[:-1], dtype=torch.float32)
    mean = torch.empty_like(rstd) if call.layer else None
    return *_run(call, way, rstd, mean), rstd, mean


def plan_of(*values: Any) -> tuple[str, str] | Refusal:
    """How a call would run: the backend's name and the plan in words."""
    way = _way_of(_call_of(values))
    return way if isinstance(way, Refusal) else ("triton", str(way))


def norm_backward(*_: object) -> Refusal:
    """Say why no kernel here makes gradients, with the arguments of `_C.norm_backward`."""
    return Refusal("the Triton backend", "has no backward pass", "backend")


def _call_of(values: tuple[Any, ...]) -> Call:
    return Call(*values[: len(NATIVE)])


def _way_of(call: Call) -> Plan | Refusal:
    if refusal := _refuse(call):
        return refusal
    kernels = _kernels()
    if isinstance(kernels, str):
        return Refusal(kernels, "", "backend")
    if call.x.device.type == "cpu" and not kernels.INTERPRETED:
        return Refusal("x", f"is on {call.x.device}", "device")
    n = call.x.shape[-1]
    way = plan(n)
    if n > MOST_COLUMNS or _programs(call.x, way) > MOST_PROGRAMS:
        return Refusal("x", f"has too many {'columns' if n > MOST_COLUMNS else 'rows'}", "shape")
    return way


def _programs(x: Tensor, way: Plan) -> int:
    return -(-(x.numel() // x.shape[-1]) // way.rows)


def _run(
    call: Call, way: Plan, rstd: Tensor | None = None, mean: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Run a call: y and residual_out; rstd and mean are written where they are given."""
    kernels = _kernels()
    assert isinstance(kernels, ModuleType)  # or _way_of would have refused
    x, residual, weight, bias = call.x, call.residual, call.weight, call.bias
    out, residual_out = call.out, call.residual_out
    n = x.shape[-1]
    rows = x.numel() // n
    packed = torch.contiguous_format
    y = torch.empty_like(x, dtype=call.out_dtype, memory_format=packed) if out is None else out
    total = residual_out
    if residual is not None and residual_out is None:
        total = torch.empty_like(residual, memory_format=packed)
    if rows > 0:
        sizes, strides = _lay_out_rows(x, residual, y, total)
        normalised = residual if residual is not None and call.round_sum else x
        inputs = {t.data_ptr() for t in (x, residual, weight, bias) if t is not None}
        written = {t.data_ptr() for t in (out, residual_out) if t is not None}
        launch = getattr(kernels, way.kernel)
        with _current(x.device):
            launch[(_programs(x, way),)](
                x,
                residual,
                weight,
                bias,
                y,
                total,
                rstd,
                mean,
                sizes,
                *strides,
                _head_stride(weight),
                _head_stride(bias),
                rows,
                x.shape[-2] if call.per_head else 1,
                n,
                float(n),
                FLOAT32_EPSILON if call.eps is None else float(call.eps),
                float(call.weight_offset),
                LAYER=call.layer,
                PER_HEAD=any(t is not None and t.ndim == 2 for t in (weight, bias)),
                HAS_OFFSET=weight is not None and call.weight_offset != 0,
                NORMALISED=kernels.DTYPES[normalised.dtype],
                **{name.upper(): getattr(call, name) for name in FLAGS},
                IN_PLACE=not inputs.isdisjoint(written),
                DIMS=len(sizes),
                ROWS=way.rows,
                LOG2_BLOCK=way.block.bit_length() - 1,
                num_warps=way.warps,
                enable_fp_fusion=False,
            )
    given = [t for t in (out, residual_out) if t is not None]
    if given:  # autograd learns of a write by the version counter
        torch.autograd.graph.increment_version(given)
    return y, total


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, and its current stream."""
    if device.type == "cpu":
        return nullcontext()
    made: AbstractContextManager[object] = torch.get_device_module(device).device(device)
    return made


def _head_stride(t: Tensor | None) -> int:
    return t.stride(0) if t is not None and t.ndim == 2 else 0


def _lay_out_rows(
    x: Tensor, *others: Tensor | None
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The outer dimensions of all tensors at once, and in elements the strides of each in them.

    Dimensions of size 1 are dropped, and neighbours merged where every tensor allows it.
    """
    tensors = [x if t is None else t for t in (x, *others)]
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in tensors]
    for d, size in enumerate(x.shape[:-1]):
        if size == 1:
            continue
        here = [t.stride(d) for t in tensors]
        if sizes and all(s[-1] == size * inner for s, inner in zip(strides, here, strict=True)):
            sizes[-1] *= size
            for s, inner in zip(strides, here, strict=True):
                s[-1] = inner
        else:
            sizes.append(size)
            for s, inner in zip(strides, here, strict=True):
                s.append(inner)
    return tuple(sizes) or (1,), [tuple(s) or (0,) for s in strides]


# ---------------------------------------------------------------- what no kernel here takes


def _refuse(call: Call) -> Refusal | None:
    """Why no kernel here takes a call: the reasons of `_C`, in its words."""
    if forward_ad._current_level >= 0:
        return Refusal("forward-mode AD", "is on", "recorder")
    if call.x is None:
        return Refusal("x", "is None", "dtype")
    if (call.residual is not None) != call.takes_residual:
        return Refusal("residual", "is None", "dtype")
    if call.fused or call.of_sum:
        return Refusal("the Triton backend", f"has no {call.op.rstrip('_')}", "backend")
    tensors = [*call.inputs(), *call.written()]
    for name, t in tensors:
        if why := _refuse_tensor(t) or _refuse_place(name, t, call):
            return Refusal(name, *why)
    if call.out_dtype is not None and call.out_dtype not in FLOATS:
        return Refusal("out_dtype", "is not float32, float16 or bfloat16", "option")
    if torch.is_grad_enabled():
        for name, t in tensors:
            if t.requires_grad:
                return Refusal(name, "requires a gradient", "recorder")
    return None


def _refuse_tensor(t: Tensor) -> tuple[str, str] | None:
    if type(t) not in (Tensor, torch.nn.Parameter):
        return "is not a plain torch.Tensor", "dtype"
    if t.dtype == torch.float64:
        return "is float64", "dtype"
    if t.dtype not in FLOATS:
        return "is not float32, float16 or bfloat16", "dtype"
    if t.layout != torch.strided:
        return "is not dense", "memory"
    try:
        missing = t.data_ptr() == 0 and t.numel() > 0
    except RuntimeError:  # a wrapper of torch.func has no memory of its own
        missing = True
    return ("has no memory", "memory") if missing else None


def _refuse_place(name: str, t: Tensor, call: Call) -> tuple[str, str] | None:
    x = call.x
    if t.ndim < 1 or (t is x and x.ndim < 1 + call.per_head):
        return "has too few dimensions", "shape"
    if name in ("weight", "bias"):
        row_per_head = call.per_head and t.shape == x.shape[-2:]
        if not row_per_head and t.shape != x.shape[-1:]:
            return "does not fit x's shape", "shape"
    elif t.shape != x.shape:
        return "does not have x's shape", "shape"
    if t.shape[-1] < 1:
        return "has rows of no elements", "shape"
    if t.shape[-1] > 1 and t.stride(-1) != 1:
        return "has a last stride other than 1", "strides"
    return None if t.device == x.device else ("is on another device than x", "device")
