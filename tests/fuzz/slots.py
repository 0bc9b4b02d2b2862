"""Tensors of a call: first what they are to be, then they themselves."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fuzz.memory import (
    FLOATS,
    LAYOUTS,
    STYLES,
    WRITABLE,
    Arena,
    Place,
    packed,
    span,
    strides_for,
)
from normkit._spec import MODULATORS

WRONG_DTYPES = (
    torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip
# What may stand where a tensor belongs; the second half are tensors, of a kind.
STRANGERS = ("list", "none", "number", "array", "text", "nested", "sparse", "meta", "freed", "conj")

_COLUMNS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 63, 64, 65, 100, 129)


@dataclass
class Slot:
    """What a tensor is to be."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    layout: str = "packed"
    style: str = "normal"
    stranger: str | None = None
    negated: bool = False
    inference: bool = False
    needs_gradient: bool = False
    over: str | None = None  # the tensor whose memory it shares
    below: int | None = None  # of indices: most of them are at least 0, and below this


class Maker:
    """Makes tensors in the arena, some over the memory of others."""

    def __init__(self, rng: Random, arena: Arena) -> None:
        self._rng = rng
        self._arena = arena
        self._made: dict[str, tuple[Slot, tuple[int, ...], Place, Any]] = {}

    def make(self, name: str, slot: Slot, *, roomy: bool = False) -> Any:
        if slot.stranger:
            return _stranger(slot)
        if slot.over in self._made:
            return self._over(name, slot)
        strides = strides_for(self._rng, slot.shape, slot.layout)
        if slot.negated:  # torch makes such views of complex tensors, whose parts lie 2 apart
            strides = tuple(2 * stride for stride in strides)
        items = span(slot.shape, strides)
        around = items + 8 if roomy else 0
        place = self._arena.reserve(self._rng, slot.dtype, items, slot.style, around)
        t = self._finished(slot, slot.dtype, place.offset, slot.shape, strides)
        if slot.below is not None and slot.dtype in _INDICES:
            indices = torch.tensor(_indices(self._rng, t.numel(), slot.below)).view(slot.shape)
            with torch.inference_mode(slot.inference):
                t.copy_(indices)
        self._made[name] = slot, strides, place, t
        return t

    def _finished(self, slot: Slot, dtype: torch.dtype, *where: Any) -> Tensor:
        with torch.inference_mode(slot.inference):
            t = self._arena.tensor(dtype, *where)
        if slot.negated and dtype in FLOATS:
            t = torch._neg_view(t)
        return t.requires_grad_() if slot.needs_gradient and dtype.is_floating_point else t

    def _over(self, name: str, slot: Slot) -> Any:
        """A tensor over another's memory: the same, shifted, of another layout or dtype."""
        rng = self._rng
        assert slot.over is not None
        base, strides, place, t = self._made[slot.over]
        slot.negated = False
        written = name in ("out", "residual_out")
        dtype = slot.dtype if written and rng.random() < 0.3 else base.dtype
        if slot.shape != base.shape:
            strides = packed(slot.shape)
        elif dtype == base.dtype and rng.random() < 0.35:
            if rng.random() < 0.5 and not base.needs_gradient and not slot.needs_gradient:
                return t
            return self._finished(slot, dtype, place.offset, slot.shape, strides)
        elif rng.random() < 0.2:
            strides = packed(slot.shape)
        item, of_base = dtype.itemsize, base.dtype.itemsize
        n = slot.shape[-1] if slot.shape else 1
        items = span(slot.shape, strides)
        shift = rng.choice((0, 1, -1, n, -n, n // 2, items, -items, rng.randint(-items, items)))
        first = max(place.begin * of_base, (place.offset + shift) * of_base)
        offset = -(-first // item)
        if (offset + items) * item > place.end * of_base:  # no room: at the end of it
            offset = place.end * of_base // item - items
        if offset * item < place.begin * of_base:
            return self.make(name, replace(slot, over=None))
        return self._finished(slot, dtype, offset, slot.shape, strides)


def _stranger(slot: Slot) -> Any:
    shape = slot.shape
    small = tuple(min(size, 8) for size in shape)
    plain = slot.dtype if slot.dtype.is_floating_point else torch.float32
    if slot.stranger == "nested":
        n = shape[-1] if shape else 3
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of their being a prototype
            return torch.nested.nested_tensor([torch.ones(2, n), torch.ones(3, n)])
    if slot.stranger == "freed":
        t = torch.zeros(shape, dtype=plain)
        t.untyped_storage().resize_(0)
        return t
    if slot.stranger == "meta":
        return torch.empty(shape, dtype=plain, device="meta")
    made = {
        "list": lambda: [1.0] * 4,
        "none": lambda: None,
        "number": lambda: 1.0,
        "array": lambda: np.ones(small, np.float32),
        "text": lambda: "x",
        "sparse": lambda: torch.ones(small).to_sparse() if shape else torch.ones(2).to_sparse(),
        "conj": lambda: torch.ones(shape, dtype=torch.complex64).conj(),
    }
    assert slot.stranger is not None
    return made[slot.stranger]()


_INDICES = (torch.int32, torch.int64)


def _indices(rng: Random, count: int, below: int) -> list[int]:
    """Rows of a table; a few are outside of it."""
    outside = (-1, below, -below - 1, 2**31 - 1, -(2**31))
    return [
        rng.choice(outside) if below == 0 or rng.random() < 0.05 else rng.randrange(below)
        for _ in range(count)
    ]


def fused_slots(
    rng: Random, takes: Any, shape: tuple[int, ...], dtype: Callable[[], torch.dtype]
) -> dict[str, Slot]:
    """The tensors of x's rows and tokens: those that modulate, and those that rotate."""
    slots = {}
    style = "normal" if rng.random() < 0.85 else rng.choice(STYLES)
    same = rng.random() < 0.6  # one tensor is cut into these, mostly
    first, rows = dtype(), _rows(rng, shape)
    for name in filter(takes.__contains__, MODULATORS):
        if rng.random() < 0.75:
            of_rows = rows if same or rng.random() < 0.5 else _rows(rng, shape)
            layout = "packed" if rng.random() < 0.5 else rng.choice(LAYOUTS)
            slots[name] = Slot(first if same else dtype(), of_rows, layout, style)
    if "cos" not in takes:
        return slots
    columns = rng.choice((shape[-1] // 2, shape[-1] // 2, rng.randint(0, shape[-1] // 2)))
    tokens = _tokens(rng, shape[:-2])
    if rng.random() < 0.4:
        table = (rng.choice((1, 2, 7, 40, 0)), columns)
        slots["positions"] = Slot(rng.choice(_INDICES), tokens, below=table[0])
    else:
        table = (*tokens, columns)
    layout = "packed" if rng.random() < 0.6 else rng.choice(LAYOUTS)
    return {"cos": Slot(first, table, layout), "sin": Slot(first, table, layout), **slots}


def _rows(rng: Random, shape: tuple[int, ...]) -> tuple[int, ...]:
    """x's first dimensions, or ones in their place, and its last."""
    first = shape[: rng.randrange(len(shape))]
    return (*(size if rng.random() < 0.7 else 1 for size in first), shape[-1])


def _tokens(rng: Random, tokens: tuple[int, ...]) -> tuple[int, ...]:
    """x's last dimensions ahead of the heads, or ones in their place."""
    last = tokens[rng.choice((0, 0, rng.randrange(len(tokens) + 1))) :]
    return tuple(size if rng.random() < 0.85 else 1 for size in last)


def random_shape(rng: Random, per_head: bool) -> tuple[int, ...]:
    """A shape that a norm takes, mostly of few elements."""
    n = rng.randint(300, 5000) if rng.random() < 0.06 else rng.choice(_COLUMNS)
    least = 1 if per_head else 0
    count = rng.choice((least, 1, 1, 1, 2, 2, 2, 3, 4))
    most = 24_000 if rng.random() < 0.02 else max(300, 2 * n)
    outer: list[int] = []
    for _ in range(max(count, least)):
        size = rng.choice((1, 1, 2, 2, 3, 4, 5, 7, 8, 20, 100))
        if rng.random() < 0.02:
            size = 0
        room = most // (n * math.prod(outer) or 1)
        outer.append(min(size, max(room, 1)))
    return (*outer, n)


def wrong_shape(rng: Random, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Another shape than that."""
    if not shape:
        return (2,)
    kind = rng.randrange(7)
    if kind == 0:
        return ()
    if kind == 1:
        return (*shape[:-1], shape[-1] + 1)
    if kind == 2:
        return (*shape[:-1], 0)
    if kind == 3:
        return (1, *shape)
    if kind == 4:
        return shape[1:]
    if kind == 5:
        return tuple(reversed(shape))
    return (*shape[:-1], max(shape[-1] - 1, 1))


def writable(rng: Random, shape: tuple[int, ...]) -> str:
    """A layout that a tensor which is written may have, almost always."""
    return rng.choice(WRITABLE) if len(shape) < 3 or rng.random() < 0.9 else "any"
