"""Memory of the tensors of a call: one buffer, with a guard band around each of them."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GUARD = 128
_SENTINEL = 0xFF  # a NaN in every dtype: what is read from a guard band shows in the result
_POOL = 1 << 15
_MOST = 1 << 17  # elements that a tensor may be spread over

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
STYLES = (
    "normal", "offset", "tiny", "small", "huge", "wide", "constant", "zeros", "special",
)  # fmt: skip


class Place(NamedTuple):
    """Where a tensor lies: an offset in elements of its dtype, and what is reserved around it."""

    dtype: torch.dtype
    offset: int
    begin: int
    end: int


class Arena:
    """A buffer that is filled anew for every call."""

    def __init__(self, size: int = 1 << 24) -> None:
        self._buffer = np.full(size, _SENTINEL, np.uint8)
        self._storage = torch.from_numpy(self._buffer).untyped_storage()
        self._address = self._storage.data_ptr()
        self._used = 0
        self._pools = {style: _pool(style) for style in STYLES}

    def clear(self) -> None:
        self._buffer[: self._used + 2 * _GUARD] = _SENTINEL
        self._used = 0

    def reserve(
        self, rng: Random, dtype: torch.dtype, items: int, style: str, around: int = 0
    ) -> Place:
        """Fill room for `items` elements, and for `around` more on both sides of them."""
        item = dtype.itemsize
        # One more than a multiple of 64 bytes, in whole elements, breaks every wider alignment.
        start = -(-(self._used + _GUARD) // 64) * 64 + item * rng.choice((0, 0, 1, 2, 3, 5))
        begin = start // item
        end = begin + items + 2 * around
        if end * item + 2 * _GUARD > len(self._buffer):
            raise MemoryError(f"a call of {end * item} bytes")
        self._fill(rng, dtype, begin, end, style)
        self._used = end * item + _GUARD
        return Place(dtype, begin + around, begin, end)

    def _fill(self, rng: Random, dtype: torch.dtype, begin: int, end: int, style: str) -> None:
        item = dtype.itemsize
        room = self._buffer[begin * item : end * item]
        if dtype not in FLOATS:
            room[:] = 1
            return
        pool = self._pools[style][dtype]
        first = rng.randrange(_POOL // 2) * item
        for at in range(0, len(room), _POOL // 2 * item):
            part = room[at : at + _POOL // 2 * item]
            part[:] = pool[first : first + len(part)]

    def tensor(
        self, dtype: torch.dtype, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> Tensor:
        """A tensor over the buffer; it counts its versions by itself, as one of its own would."""
        return torch.empty(0, dtype=dtype).set_(self._storage, offset, shape, strides)

    def holds(self, t: Tensor) -> bool:
        """Whether a tensor's memory is the arena's."""
        return 0 <= t.data_ptr() - self._address < len(self._buffer)

    def snapshot(self) -> NDArray[np.uint8]:
        return self._buffer[: self._used + _GUARD].copy()

    def changed(self, before: NDArray[np.uint8]) -> NDArray[np.intp]:
        """The bytes that are not as they were."""
        now = self._buffer[: len(before)]
        if np.array_equal(now, before):
            return np.empty(0, np.intp)
        return np.flatnonzero(now != before)

    def outside(self, changed: NDArray[np.intp], written: list[Tensor]) -> NDArray[np.intp]:
        """Those bytes that belong to no element of the tensors."""
        may = np.zeros(self._used + _GUARD, bool)
        for t in written:
            if t.numel():
                item = t.element_size()
                first = t.data_ptr() - self._address
                strides = (*(stride * item for stride in t.stride()), 1)
                np.lib.stride_tricks.as_strided(may[first:], (*t.shape, item), strides)[...] = True
        return changed[~may[changed]]

    def whose(self, byte: int, tensors: dict[str, Tensor]) -> str:
        """Words for the place of a byte."""
        for name, t in tensors.items():
            if t.numel() and self.holds(t):
                first = t.data_ptr() - self._address
                last = first + span(tuple(t.shape), t.stride()) * t.element_size()
                if first - 16 <= byte < last + 16:
                    inside = first <= byte < last
                    return f"{'inside' if inside else 'next to'} {name}, byte {byte - first}"
        return f"byte {byte} of the arena"


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from a tensor's first to its last."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def packed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides that torch.empty gives a shape, by hand."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def element_bytes(t: Tensor) -> NDArray[np.int64]:
    """The addresses of a tensor's elements, in no order."""
    at = np.array([t.data_ptr()], np.int64)
    for size, stride in zip(t.shape, t.stride(), strict=True):
        at = (at[:, None] + np.arange(size) * (stride * t.element_size())).ravel()
    return at


# ---------------------------------------------------------------- strides

LAYOUTS = (
    "packed", "padded", "permuted", "expanded", "windows", "stepped", "any", "one", "far",
)  # fmt: skip
WRITABLE = ("packed", "packed", "padded", "permuted", "far")


def strides_for(rng: Random, shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """Strides of a kind, for a shape; those of dimensions of size 1 are anything."""
    if not shape:
        return ()
    n = max(shape[-1], 1)
    strides = list(packed(shape))
    if layout == "padded":  # slices of something wider
        strides = list(packed((*shape[:-1], n + rng.choice((1, 3, 8, n, 2 * n)))))
    elif layout == "permuted":
        last = [len(shape) - 1] if rng.random() < 0.6 else []
        order = list(range(len(shape) - len(last)))
        rng.shuffle(order)
        order += last
        step = 1
        for i in reversed(order):
            strides[i] = step
            step *= max(shape[i], 1)
    elif layout == "expanded":
        for i in range(len(shape) - (rng.random() < 0.8)):
            if rng.random() < 0.6:
                strides[i] = 0
    elif layout == "windows":  # Tensor.unfold, and what comes of it
        for i in range(len(shape) - 1):
            strides[i] = rng.choice((0, 1, 1, 1, 2, 8, n - 1, max(n // 2, 1)))
        strides[-1] = 1
    elif layout == "stepped":
        step = rng.choice((2, 2, 3, 7))
        strides = [stride * step for stride in strides]
    elif layout == "any":
        strides = [rng.randrange(2 * n + 2) for _ in shape]
        if rng.random() < 0.6:
            strides[-1] = 1
    elif layout == "one":
        strides[-1] = 0 if rng.random() < 0.5 else rng.choice((1, 2, 5))
    elif layout == "far" and len(shape) > 1:
        strides[0] += rng.choice((1, n, 64))
    if rng.random() < 0.3:
        for i, size in enumerate(shape):
            if size == 1:
                strides[i] = rng.choice((0, 1, 2, 3, n, 5 * n))
    return tuple(strides) if span(shape, tuple(strides)) < _MOST else packed(shape)


# ---------------------------------------------------------------- values


def _pool(style: str) -> dict[torch.dtype, NDArray[np.uint8]]:
    """Bytes of many values of a style, in each dtype."""
    random = np.random.default_rng(STYLES.index(style))
    normal = random.normal(0.5, 1.5, _POOL)
    made = {}
    for dtype in FLOATS:
        half = dtype == torch.float16
        values = {
            "normal": lambda: normal,
            "offset": lambda: 1000 + normal,
            "tiny": lambda half=half: normal * (2.0**-20 if half else 2.0**-128),
            "small": lambda half=half: normal * (2.0**-12 if half else 2.0**-61),
            "huge": lambda half=half: normal * (2.0**13 if half else 2.0**63),
            "wide": lambda half=half: _wide(random, normal, 12 if half else 60),
            "constant": lambda: np.full(_POOL, 0.7),
            "zeros": lambda: np.where(random.random(_POOL) < 0.5, 0.0, -0.0),
            "special": lambda: _with_special(random, normal),
        }[style]()  # fmt: skip
        stored = torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
        made[dtype] = stored.view(torch.uint8).numpy()
    return made


def _wide(
    random: np.random.Generator, normal: NDArray[np.float64], most: int
) -> NDArray[np.float64]:
    return np.ldexp(normal, random.integers(-most, most, _POOL))


def _with_special(random: np.random.Generator, normal: NDArray[np.float64]) -> NDArray[np.float64]:
    values = normal.copy()
    kinds = (np.inf, -np.inf, np.nan, 65504.0, -0.0, 6e-8, 1e-40, 3e38)
    at = random.integers(0, _POOL, _POOL // 40)
    values[at] = random.choice(kinds, len(at))
    return values
