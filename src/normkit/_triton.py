"""The Triton kernels as a backend, for devices without kernels of their own (ROCm and XPU).

`norm` takes the arguments of `_C.norm`, in its modes 1 to 3, and gives what that gives.  Importing
this module does not import Triton; the first call does.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

EXPLAIN, SAVING = 2, 3

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
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
        """The name of the kernel in `normkit._triton_kernels`."""
        return "norm_streamed_row" if self.streamed else "norm_rows"


@cache
def plan(n: int) -> Plan:
    """The plan for rows of n elements."""
    if n > LONGEST_BLOCK:
        return Plan(True, 1, STREAMED_BLOCK, MOST_WARPS)
    block = 1 << (n - 1).bit_length()
    tile = max(block, TILE)
    return Plan(False, tile // block, block, min(tile // TILE, MOST_WARPS))


def serves(device: torch.device) -> str:
    """Why calls on a device are not for Triton; an empty str when they are."""
    if device.type != "xpu" and not (device.type == "cuda" and torch.version.hip):
        return f"the Triton kernels are for ROCm and XPU devices, and x is on {device}"
    return unusable()


def unusable() -> str:
    """Why Triton's kernels work on no device here; an empty str when they do."""
    kernels = _kernels()
    return kernels if isinstance(kernels, str) else ""


@cache
def _kernels() -> Any:
    """The module of the kernels; a str that says why there is none."""
    try:
        return importlib.import_module("normkit._triton_kernels")
    except Exception as error:  # a broken installation of Triton raises whatever it likes
        return f"Triton could not be loaded: {error}"


def norm(
    kind: int,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    weight_offset: float,
    round_before_weight: bool,
    round_sum: bool,
    clamp_inf: bool,
    out_dtype: torch.dtype | None,
    out: Tensor | None,
    residual_out: Tensor | None,
    mode: int,
) -> Any:
    """Run a row norm, or say in a str why it is not served; `_C.norm` tells the rest.

    What is written must overlap no input unless it is that input.
    """
    tensors = (x, residual, weight, bias, out, residual_out)
    refusal = _refuse(kind, tensors, out_dtype)
    kernels = _kernels()
    if refusal or isinstance(kernels, str):
        return refusal or kernels
    on_host = x.device.type == "cpu"
    if on_host and not kernels.INTERPRETED:
        return f"x is on {x.device}"
    n = x.shape[-1]
    rows = x.numel() // n
    way = plan(n)
    programs = -(-rows // way.rows)
    if programs > MOST_PROGRAMS or n > MOST_COLUMNS:
        return f"x has too many {'columns' if n > MOST_COLUMNS else 'rows'}"

    packed = torch.contiguous_format
    y = torch.empty_like(x, dtype=out_dtype, memory_format=packed) if out is None else out
    total = residual_out
    if residual is not None and residual_out is None:
        total = torch.empty_like(residual, memory_format=packed)
    for name, t in (("out", y), ("residual_out", total)):
        if t is not None and n > 1 and t.stride(-1) != 1:
            return f"{name} has a last stride other than 1"
    if mode == EXPLAIN:
        return "triton", str(way)
    rstd = mean = None
    if mode == SAVING:
        rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
        mean = torch.empty_like(rstd) if kind & 1 else None
    if rows > 0:
        sizes, strides = _lay_out_rows(x, residual, y, total)
        normalised = residual if residual is not None and round_sum else x
        clamps_sum = clamp_inf and residual is not None and round_sum
        inputs = {t.data_ptr() for t in (x, residual, weight, bias) if t is not None}
        written = {t.data_ptr() for t in (out, residual_out) if t is not None}
        launch = getattr(kernels, way.kernel)
        with _current(x.device):
            launch[(programs,)](
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
                x.shape[-2] if kind & 2 else 1,
                n,
                float(n),
                FLOAT32_EPSILON if eps is None else float(eps),
                float(weight_offset),
                LAYER=bool(kind & 1),
                PER_HEAD=any(t is not None and t.ndim == 2 for t in (weight, bias)),
                HAS_OFFSET=weight is not None and weight_offset != 0,
                XHAT_DTYPE=kernels.DTYPES[
                    normalised.dtype if round_before_weight else torch.float32
                ],
                ROUND_SUM=round_sum,
                CLAMP_X=clamp_inf and x.dtype == torch.float16,
                CLAMP_SUM=clamps_sum and normalised.dtype == torch.float16,
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
    if mode == SAVING:
        return y, total, rstd, mean
    return y if residual is None else (y, total)


def norm_backward(*_: Any) -> str:
    """Say why no kernel here makes gradients, with the arguments of `_C.norm_backward`."""
    return "the Triton backend has no backward pass"


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, and its current stream."""
    if device.type == "cpu":
        return nullcontext()
    made: AbstractContextManager[Any] = torch.get_device_module(device).device(device)
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


# ---------------------------------------------------------------- what is not served

NAMES = ("x", "residual", "weight", "bias", "out", "residual_out")


def _refuse(kind: int, tensors: Sequence[Tensor | None], out_dtype: torch.dtype | None) -> str:
    """Why a call is not served: the reasons of `_C.norm`, in its words; or an empty str."""
    if forward_ad._current_level >= 0:
        return "forward-mode AD is on"
    x = tensors[0]
    if x is None:
        return "x is None"
    if (tensors[1] is not None) != bool(kind & 4):
        return "residual is None"
    for name, t in zip(NAMES, tensors, strict=True):
        if t is not None and (why := _refuse_tensor(t) or _refuse_place(name, t, x, kind)):
            return f"{name} {why}"
    if out_dtype is not None and out_dtype not in FLOATS:
        return "out_dtype is not float32, float16 or bfloat16"
    if torch.is_grad_enabled():
        for name, t in zip(NAMES, tensors, strict=True):
            if t is not None and t.requires_grad:
                return f"{name} requires a gradient"
    return ""


def _refuse_tensor(t: Tensor) -> str:
    if type(t) not in (Tensor, torch.nn.Parameter):
        return "is not a plain torch.Tensor"
    if t.dtype not in FLOATS:
        return "is float64" if t.dtype == torch.float64 else "is not float32, float16 or bfloat16"
    if t.layout != torch.strided:
        return "is not dense"
    try:
        missing = t.data_ptr() == 0 and t.numel() > 0
    except RuntimeError:  # a wrapper of torch.func has no memory of its own
        missing = True
    return "has no memory" if missing else ""


def _refuse_place(name: str, t: Tensor, x: Tensor, kind: int) -> str:
    if t.ndim < 1 or (t is x and x.ndim < 1 + bool(kind & 2)):
        return "has too few dimensions"
    if name in ("weight", "bias"):
        row_per_head = kind & 2 and t.shape == x.shape[-2:]
        if not row_per_head and t.shape != x.shape[-1:]:
            return "does not fit x's shape"
    elif t.shape != x.shape:
        return "does not have x's shape"
    if t.shape[-1] < 1:
        return "has rows of no elements"
    if t.shape[-1] > 1 and t.stride(-1) != 1:
        return "has a last stride other than 1"
    return "" if t.device == x.device else "is on another device than x"
