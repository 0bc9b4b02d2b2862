"""Random calls of qk_norm_rope: slices of a packed projection, rotated, and kept in caches."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

import normkit
from fuzz.making import OFFSETS, STORED
from fuzz.memory import Arena
from fuzz.model import Norm
from fuzz.numbers import widened
from fuzz.oracle import Values
from fuzz.oracle_fused import FusedValues
from fuzz.running import Failure
from fuzz.slots import Maker, Slot
from normkit._spec import OPS

FLAGS = ("round_before_weight", "round_rstd", "round_weight", "clamp_inf")
OF_ROTATION = ("interleaved", "round_norm", "round_each")


class Several:
    """A call that is right: its tensors in the arena, and what they are to give."""

    def __init__(self, seed: int, number: int, arena: Arena) -> None:
        arena.clear()
        self.rng = rng = Random(f"several:{seed}:{number}")
        self.arena, self.maker = arena, Maker(rng, arena)
        self.dtype = rng.choice(STORED)
        self.tokens = tuple(rng.choice((1, 2, 3, 5, 0)) for _ in range(rng.choice((1, 1, 2, 3))))
        self.n = rng.choice((1, 2, 7, 16, 24, 64, 65, 128))
        self.kind = rng.choice(("rms", "layer"))
        self.options: dict[str, Any] = {"eps": rng.choice((1e-6, 0.3))}
        self.options |= {name: True for name in FLAGS if rng.random() < 0.2}
        if rng.random() < 0.3:
            self.options["weight_offset"] = rng.choice(OFFSETS)
        self.x = self._split()
        self.affine = {name: self._affine(name) for name in ("q", "k", "v")}
        self.rotation = self._rotation()
        self.has_v, self.norms_v = (rng.random() < share for share in (0.7, 0.3))
        self.norms_v &= self.has_v
        self.caches = self._caches()
        self.in_place = rng.random() < 0.4

    def _make(self, name: str, dtype: torch.dtype, *shape: int, layout: str = "packed") -> Tensor:
        made: Tensor = self.maker.make(name, Slot(dtype, shape, layout))
        return made

    def _split(self) -> dict[str, Tensor]:
        heads = [self.rng.choice((1, 2, 4)) for _ in range(3)]
        layout = self.rng.choice(("packed", "padded", "far"))
        whole = self._make("qkv", self.dtype, *self.tokens, sum(heads), self.n, layout=layout)
        return dict(zip(("q", "k", "v"), whole.split(heads, -2), strict=True))

    def _affine(self, name: str) -> dict[str, Tensor]:
        shape = self.x[name].shape[-2:] if self.rng.random() < 0.4 else self.x[name].shape[-1:]
        of = ("weight",) if name == "v" else ("weight", "bias")
        dtype = self.rng.choice((self.dtype, *STORED))
        return {
            which: self._make(f"{name}_{which}", dtype, *shape)
            for which in of
            if self.rng.random() < 0.6
        }

    def _rotation(self) -> dict[str, Any]:
        rng, columns = self.rng, self.rng.randint(1, max(self.n // 2, 1))
        if self.n < 2 or rng.random() < 0.2:
            return {}
        made: dict[str, Any] = {name: True for name in OF_ROTATION if rng.random() < 0.3}
        rows = self.tokens
        if rng.random() < 0.5:
            rows = (9,)
            slot = Slot(rng.choice((torch.int32, torch.int64)), self.tokens, below=9)
            made["positions"] = self.maker.make("positions", slot)
        dtype = rng.choice((self.dtype, torch.float32))
        return made | {name: self._make(name, dtype, *rows, columns) for name in ("cos", "sin")}

    def _caches(self) -> dict[str, Tensor]:
        rng, pages, size = self.rng, 4, 9
        names = [n for n in ("k", "v") if rng.random() < 0.6 and (n == "k" or self.has_v)]
        if not names:
            return {}
        count = int(np.prod(self.tokens))
        outside = [-1, pages * size, -(2**31), 2**31 - 1] * count
        places = rng.sample(range(pages * size), min(count, pages * size)) + outside
        dtype = rng.choice((torch.int32, torch.int64))
        chosen = rng.sample(places[: 2 * count], count)
        made = {"slots": torch.tensor(chosen, dtype=dtype).view(self.tokens)}
        for name in names:
            heads = self.x[name].shape[-2]
            swapped = rng.random() < 0.5  # pages of heads, and not of slots
            shape = (pages, heads, size, self.n) if swapped else (pages, size, heads, self.n)
            cache = self._make(f"{name}_cache", self.dtype, *shape)
            made[f"{name}_cache"] = cache.transpose(1, 2) if swapped else cache
        return made

    # ---------------------------------------------------------------- the call, and what is wrong

    def failures(self) -> Iterator[Failure]:
        normed = ("q", "k", "v") if self.norms_v else ("q", "k")
        values = {name: self._values(name) for name in normed}
        caches = {name: t for name, t in self.caches.items() if name != "slots"}
        kept = {name: t.clone() for name, t in caches.items()}
        before, old_v = self.arena.snapshot(), self.x["v"].clone()
        affine = {f"{n}_{which}": t for n, of in self.affine.items() for which, t in of.items()}
        if not self.has_v:
            affine.pop("v_weight", None)
        outs = [self.x[name] for name in normed] if self.in_place else None
        given = {"v": self.x["v"], "norm_v": self.norms_v} if self.has_v else {}
        made = normkit.qk_norm_rope(
            self.x["q"], self.x["k"], kind=self.kind, outs=outs,
            **affine, **self.rotation, **self.caches, **given, **self.options,
        )  # fmt: skip
        results = dict(zip(("q", "k", "v"), made, strict=False))
        for name in normed:
            if self.in_place and results[name] is not self.x[name]:
                yield Failure("result", f"{name} is not the tensor that was given")
            values[name].normalise(None)
            if wrong := values[name].wrong(widened(results[name]), self.dtype):
                yield Failure(f"values of {name}", wrong)
        if self.has_v and not self.norms_v and not _same(results["v"], old_v):
            yield Failure("v", "is not as it was")
        for name, cache in caches.items():
            if not _same(cache, self._expected(kept[name], results[name[0]])):
                yield Failure(name, "does not hold the tokens that have a slot, and only these")
        written = [*(outs or []), *caches.values()]
        outside = self.arena.outside(self.arena.changed(before), written)
        if outside.size:
            yield Failure("memory", f"{outside.size} bytes that are no output's")

    def _values(self, name: str) -> Values:
        rotates = bool(self.rotation) and name != "v"
        op = OPS["norm_rope" if rotates else "head_norm"]
        rotation = self.rotation if rotates else {}
        tensors = {"x": self.x[name], **self.affine[name], **rotation}
        norm = Norm(op, self.kind == "layer", False, **tensors, **self.options)
        return FusedValues(norm) if rotates else Values(norm)

    def _expected(self, cache: Tensor, tokens: Tensor) -> Tensor:
        pages, size, *_ = cache.shape
        rows = tokens.reshape(-1, *tokens.shape[-2:])
        for slot, row in zip(self.caches["slots"].flatten().tolist(), rows, strict=True):
            if 0 <= slot < pages * size:
                cache[slot // size, slot % size] = row
        return cache


def _same(one: Tensor, two: Tensor) -> bool:
    bits = {2: torch.int16, 4: torch.int32}[one.element_size()]
    return torch.equal(one.view(bits), two.view(bits))
