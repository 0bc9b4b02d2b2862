"""Makes a random call from a seed and a number."""

from __future__ import annotations

import inspect
from fractions import Fraction
from functools import cache
from random import Random
from typing import Any

import numpy as np
import torch

import normkit
from fuzz.memory import LAYOUTS, STYLES, Arena
from fuzz.model import FLAGS, INDICES, NUMBERS, OUTPUTS, TENSORS, Call, Norm
from fuzz.slots import (
    STRANGERS,
    WRONG_DTYPES,
    Maker,
    Slot,
    fused_slots,
    random_shape,
    writable,
    wrong_shape,
)
from normkit import parallel
from normkit._spec import FIELDS, OPS

STORED = (torch.float32, torch.float16, torch.bfloat16)
FUNCTIONS = tuple(OPS)
OF_DEVICES = tuple(name for name in OPS if hasattr(parallel, f"{name}_tp"))

EPS = (1e-6, 1e-5, 0.3, 0.0, None, 1, 1e-12, 1e-300, -0.0, np.float32(1e-3), Fraction(1, 1000))
WRONG_EPS = (
    float("nan"), float("inf"), -1e-6, -1, "1e-6", b"1", True, 10**400, 1e39, [1e-6], 1j, object(),
    torch.tensor(1e-6),
)  # fmt: skip
OFFSETS = (0.0, 1.0, 1, -0.5, 1e-3, np.float64(0.25))
WRONG_OFFSETS = (None, "1", float("nan"), -float("inf"), 1e39, torch.tensor(1.0), False, (1.0,))
WRONG_FLAGS = (1, 0, None, "True", torch.tensor(True), 1.0)
WRONG_DTYPE_OPTIONS = (torch.int32, torch.float64, torch.bool, torch.complex64, "float32", float, 1)
FACTORS = (1.0, 1, -1.0, 0.5, 0.0, 2.0**0.5, np.float32(1.5))
# Of the arguments that are words: what is right, and what is not.
WORDS = {"kind": ("rms", "layer"), "activation": ("silu", "sigmoid")}
WRONG_WORDS = ("l2", "RMS", None, 0, torch.float32, b"rms")
WRONG_SIZES = (0, -1, True, 2.0, "4", torch.tensor(2))


RIGHT_NUMBERS: dict[str, tuple[Any, ...]] = {
    "eps": EPS, "next_eps": EPS, "weight_offset": OFFSETS, "alpha": FACTORS, "beta": FACTORS,
}  # fmt: skip


def make(seed: int, number: int, arena: Arena) -> Call:
    arena.clear()
    rng = Random(f"{seed}:{number}")
    form = rng.choices(("function", "module", "parallel", "operator"), (78, 11, 5, 6))[0]
    if form == "module":
        from fuzz.making_modules import make_module

        return make_module(rng, arena)
    if form == "parallel":
        return _parallel(rng, arena)
    return _function(rng, arena) if form == "function" else _operator(rng, arena)


def settings(rng: Random) -> dict[str, Any]:
    """What is around a call."""
    return {
        "backend": rng.choices((None, "auto", "cpu", "reference"), (70, 5, 13, 12))[0],
        "mode": rng.choices(("grad", "no_grad", "inference"), (70, 22, 8))[0],
    }


class Draft:
    """A call of a function that is about to be made: its tensors to be, and its options."""

    def __init__(self, rng: Random, name: str, *, writes: bool = True) -> None:
        self.rng = rng
        self.name = name
        self.in_place = name.endswith("_")
        self.op = OPS[name.rstrip("_")]
        results = {} if self.in_place else self.op.results
        self.takes = {**self.op.fields, **results}
        self.options: dict[str, Any] = {}
        self.wrong: list[tuple[str, tuple[type[Exception], ...]]] = []
        self.shape = random_shape(rng, self.op.per_head and not self.op.gated)
        self.slots = self._slots(writes)
        self._choose_options()

    @property
    def layer(self) -> bool:
        """Whether the mean is subtracted."""
        if self.op.layer is not None:
            return self.op.layer
        return bool(self.options.get("kind", self.takes["kind"].default) == "layer")

    # ---------------------------------------------------------------- what is right

    def _slots(self, writes: bool) -> dict[str, Slot]:
        rng, shape = self.rng, self.shape
        dtype = torch.float64 if rng.random() < 0.06 else rng.choice(STORED)
        style = "normal" if rng.random() < 0.7 else rng.choice(STYLES)
        slots = {"x": Slot(dtype, shape, self._layout("x"), style)}
        for name in ("residual", "z"):
            if name in self.takes:
                slots[name] = Slot(self._dtype(dtype), shape, self._layout(name), style)
        shares = {"weight": 0.75, "next_weight": 0.75, "bias": 0.4, "next_bias": 0.4}
        for name, share in shares.items():
            if name in self.takes and rng.random() < share:
                heads = self.op.per_head and rng.random() < 0.5
                affine = shape[-2:] if heads else shape[-1:]
                layout = "packed" if rng.random() < 0.7 else rng.choice(LAYOUTS)
                slots[name] = Slot(self._dtype(dtype), affine, layout, self._affine_style())
        slots |= fused_slots(rng, self.takes, shape, lambda: self._dtype(dtype))
        if writes and not self.in_place:
            self._add_outputs(slots, dtype)
        for name, slot in slots.items():
            slot.negated = name not in INDICES and rng.random() < 0.01
        return slots

    def _dtype(self, of_x: torch.dtype) -> torch.dtype:
        return self.rng.choice((of_x, of_x, *STORED))

    def _affine_style(self) -> str:
        return "normal" if self.rng.random() < 0.85 else self.rng.choice(STYLES)

    def _layout(self, name: str) -> str:
        rng = self.rng
        if self.in_place and name in self.op.written.values() and rng.random() < 0.88:
            return writable(rng, self.shape)
        return "packed" if rng.random() < 0.4 else rng.choice(LAYOUTS)

    def _add_outputs(self, slots: dict[str, Slot], dtype: torch.dtype) -> None:
        rng = self.rng
        if rng.random() < 0.3:
            of_y = dtype if "out_dtype" in self.takes else slots["residual"].dtype
            of_out = of_y if rng.random() < 0.6 else rng.choice(STORED)
            slots["out"] = Slot(of_out, self.shape, writable(rng, self.shape))
        if "residual_out" in self.takes and rng.random() < 0.3:
            slots["residual_out"] = Slot(
                slots["residual"].dtype, self.shape, writable(rng, self.shape)
            )

    def _choose_options(self) -> None:
        rng, options = self.rng, self.options
        for name in filter(self.takes.__contains__, WORDS):
            if rng.random() < 0.6:
                options[name] = rng.choice(WORDS[name])
        for name in filter(self.takes.__contains__, NUMBERS):
            if rng.random() < 0.4:
                options[name] = rng.choice(RIGHT_NUMBERS[name])
        for name in self.flags():
            if rng.random() < 0.25:
                options[name] = rng.random() < 0.8
        if "out_dtype" in self.takes and rng.random() < 0.25:
            dtypes = (*STORED, torch.float64) if self.slots["x"].dtype == torch.float64 else STORED
            options["out_dtype"] = rng.choice(dtypes)
            if "out" in self.slots and rng.random() < 0.8:
                self.slots["out"].dtype = options["out_dtype"]

    def choose_group_size(self) -> None:
        """Have a gated norm be one of groups of columns, which only its function knows."""
        n = self.shape[-1]
        if self.op.gated and self.rng.random() < 0.3:
            sizes = [size for size in (1, 2, 3, 4, 8, n) if n % size == 0]
            self.options["group_size"] = self.rng.choice(sizes)
            for name in ("weight", "bias"):
                if name in self.slots and self.rng.random() < 0.95:
                    self.slots[name].shape = (n,)

    def flags(self) -> tuple[str, ...]:
        return tuple(name for name in FLAGS if name in self.takes)

    # ---------------------------------------------------------------- what may be wrong

    def share_memory(self) -> None:
        """Have some tensor lie over another's memory."""
        rng, slots = self.rng, self.slots
        names = [name for name in TENSORS if name in slots]
        names = [name for name in names if name not in INDICES]
        later = [name for name in names[1:] if name in (*OUTPUTS, "residual")]
        if not later or (rng.random() < 0.2 and len(names) > 1):
            later = names[1:]
        if later:
            name = rng.choice(later)
            earlier = names[: names.index(name)]
            slots[name].over = rng.choice(("x", *earlier))

    def spoil(self, *, strangers: bool = True) -> None:
        """Make one thing wrong, or what may be."""
        rng = self.rng
        name = rng.choice(list(self.slots))
        slot = self.slots[name]
        kind = rng.choice(("stranger", "dtype", "shape", "option", "option", "layout", "negated"))
        if kind == "stranger" and strangers:
            slot.stranger = rng.choice(STRANGERS)
            if slot.stranger == "none" and name not in ("x", "residual", "z", "cos", "sin"):
                slot.stranger = "list"
        elif kind == "dtype":
            slot.dtype = rng.choice((*WRONG_DTYPES, torch.float64))
        elif kind == "shape" and slot.below is None:
            slot.shape = wrong_shape(rng, slot.shape)
        elif kind == "option":
            self._spoil_option()
        elif kind == "layout" and slot.below is None:
            slot.layout = rng.choice(LAYOUTS)
        elif name not in INDICES:
            slot.negated = True

    def _spoil_option(self) -> None:
        rng = self.rng
        wrong: dict[str, tuple[Any, ...]] = {
            name: WRONG_EPS if name.endswith("eps") else WRONG_OFFSETS
            for name in NUMBERS
            if name in self.takes
        }
        wrong |= dict.fromkeys(self.flags(), WRONG_FLAGS)
        wrong |= {name: WRONG_WORDS for name in WORDS if name in self.takes}
        if "out_dtype" in self.takes:
            wrong["out_dtype"] = WRONG_DTYPE_OPTIONS
        if "group_size" in self.options:
            wrong["group_size"] = (*WRONG_SIZES, self.shape[-1] + 1)
        name = rng.choice(list(wrong))
        self.options[name] = rng.choice(wrong[name])
        if name in WORDS or name == "group_size":
            self.wrong.append((name, (TypeError, ValueError)))

    def need_gradients(self) -> None:
        for name in self.slots:
            if name not in OUTPUTS or self.rng.random() < 0.05:
                self.slots[name].needs_gradient = self.rng.random() < 0.5

    # ---------------------------------------------------------------- the call

    def made(self, arena: Arena) -> dict[str, Any]:
        maker = Maker(self.rng, arena)
        bases = {slot.over for slot in self.slots.values()}
        return {
            name: maker.make(name, self.slots[name], roomy=name in bases)
            for name in TENSORS
            if name in self.slots
        }

    def norm(self, tensors: dict[str, Any], **more: Any) -> Norm:
        options = {name: value for name, value in self.options.items() if name != "kind"}
        defaults = {
            name: field.default
            for name, field in self.takes.items()
            if name not in TENSORS and name not in ("kind", "out_dtype")
        }
        return Norm(
            self.op, self.layer, self.in_place, **tensors, **{**defaults, **options}, **more
        )


@cache
def _positional(name: str) -> tuple[str, ...]:
    """The arguments that a function takes without their names."""
    parameters = inspect.signature(getattr(normkit, name)).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)


def _function(rng: Random, arena: Arena) -> Call:
    name = rng.choice(FUNCTIONS) + ("_" if rng.random() < 0.25 else "")
    draft = Draft(rng, name)
    draft.choose_group_size()
    around = settings(rng)
    _complicate(rng, draft)
    tensors = draft.made(arena)
    order = _positional(name)
    arguments = _ordered(rng, order, {**tensors, **draft.options})
    positional = 0
    for argument in order[: rng.randrange(len(order) + 1)]:
        if argument not in arguments:
            break
        positional += 1
    call = Call("function", name, [draft.norm(tensors)], arguments, positional, **around)
    call.wrong = draft.wrong
    call.explains = rng.random() < 0.07
    if call.explains and rng.random() < 0.02:
        call.name = "no_norm"
        call.wrong = [("op", (TypeError, ValueError))]
    add_gradients(rng, call, arena)
    return call


def _complicate(rng: Random, draft: Draft) -> None:
    if rng.random() < 0.2:
        draft.share_memory()
    if rng.random() < 0.3:
        draft.spoil()
        if rng.random() < 0.15:
            draft.spoil()
    if rng.random() < (0.1 if draft.in_place else 0.3):
        draft.need_gradients()
    elif rng.random() < 0.06:
        for slot in draft.slots.values():
            slot.inference = rng.random() < 0.5
            slot.needs_gradient = False


def _ordered(rng: Random, order: tuple[str, ...], given: dict[str, Any]) -> dict[str, Any]:
    """Arguments in the order of positions, weights of None said or left out."""
    arguments: dict[str, Any] = {}
    for name in order:
        if name in given:
            arguments[name] = given.pop(name)
        elif name in FIELDS and FIELDS[name].type == "Tensor?" and rng.random() < 0.3:
            arguments[name] = None
    return arguments | given


def add_gradients(rng: Random, call: Call, arena: Arena) -> None:
    """What comes back to a call that makes something differentiable."""
    (norm,) = call.norms
    tensors = norm.tensors
    differentiable = call.mode == "grad" and not call.explains and not norm.written
    needing = [name for name, t in tensors.items() if t.requires_grad]
    if not differentiable or not needing or not isinstance(norm.x, torch.Tensor):
        return
    if norm.x.is_nested or norm.x.layout != torch.strided or not norm.x.dtype.is_floating_point:
        return
    if "residual" in norm.needed and not isinstance(norm.residual, torch.Tensor):
        return
    out_dtype = norm.y_dtype if isinstance(norm.y_dtype, torch.dtype) else norm.x.dtype
    shape = tuple(norm.x.shape)
    slots = {"y": Slot(out_dtype, shape, rng.choice(LAYOUTS))}
    summands = {"x", "residual"} & set(needing)
    if norm.returns_both and summands and rng.random() < 0.8:
        slots["residual_out"] = Slot(norm.residual.dtype, shape, rng.choice(LAYOUTS))
        if rng.random() < 0.2:
            del slots["y"]
    maker = Maker(rng, arena)
    call.grads = {f"grad of {name}": maker.make(name, slot) for name, slot in slots.items()}


def _operator(rng: Random, arena: Arena) -> Call:
    """torch.ops.normkit: the types of arguments are for torch to check."""
    base = rng.choice(FUNCTIONS)
    form = rng.choice(("", "_", "_out"))
    draft = Draft(rng, base + ("_" if form == "_" else ""), writes=False)
    if form == "_out":
        is_sum = "out_dtype" not in draft.takes
        writes = {"out": draft.slots["residual" if is_sum else "x"].dtype}
        if "residual_out" in draft.takes:
            writes["residual_out"] = draft.slots["residual"].dtype
        for name, dtype in writes.items():
            draft.slots[name] = Slot(dtype, draft.shape, writable(rng, draft.shape))
    if form:
        for slot in draft.slots.values():  # torch resolves these before the operator sees them
            slot.negated = False
        for name in ("out_dtype", "memory_efficient"):
            draft.options.pop(name, None)
    for name in NUMBERS:
        if draft.options.get(name) is not None:
            draft.options[name] = float(draft.options[name])
    if rng.random() < 0.15:
        draft.share_memory()
    if rng.random() < 0.2:
        name = rng.choice(list(draft.slots))
        slot = draft.slots[name]
        if rng.random() < 0.5 and slot.below is None:
            slot.shape = wrong_shape(rng, slot.shape)
        else:
            slot.dtype = rng.choice(WRONG_DTYPES)
    around = settings(rng)
    if around["mode"] == "inference":
        around["mode"] = "no_grad"
    tensors = draft.made(arena)
    # A schema keeps the order of arguments, defaults or not.
    return Call(
        "operator",
        base + form,
        [draft.norm(tensors)],
        {**tensors, **draft.options},
        **around,
    )


def _parallel(rng: Random, arena: Arena) -> Call:
    """A norm on each of several devices, all of them the CPU."""
    base = rng.choice(OF_DEVICES)
    count = rng.choice((1, 2, 2, 3))
    first = Draft(rng, base)
    drafts = [first]
    for _ in range(count - 1):
        draft = Draft(rng, base)
        draft.options = first.options
        drafts.append(draft)
    first.options.pop("memory_efficient", None)
    outs = rng.random() < 0.4
    gradients = rng.random() < 0.15
    around = settings(rng)
    for draft in drafts:
        draft.slots.pop("out", None)
        if outs:
            of_out = first.options.get("out_dtype") or draft.slots["x"].dtype
            draft.slots["out"] = Slot(of_out, draft.shape, writable(rng, draft.shape))
        if rng.random() < 0.2:
            draft.share_memory()
        if gradients and not outs:
            draft.need_gradients()
    if rng.random() < 0.25:
        spoiled = rng.choice(drafts)
        spoiled.spoil(strangers=False)
        for draft in drafts:
            draft.options = spoiled.options
        first.wrong = spoiled.wrong
        first.options.pop("memory_efficient", None)
    made = [draft.made(arena) for draft in drafts]
    if count > 1 and rng.random() < 0.1:
        name, other = rng.choice(("x", "out")), rng.choice(("x", "out"))
        if name in made[0] and other in made[1]:
            made[1][other] = made[0][name]
    norms = []
    for i, (draft, tensors) in enumerate(zip(drafts, made, strict=True)):
        names = {name: f"{plural}[{i}]" for name, plural in PLURALS.items()}
        norms.append(draft.norm(tensors, names=names))
    arguments: dict[str, Any] = {}
    for name, plural in PLURALS.items():
        if any(name in tensors for tensors in made):
            arguments[plural] = [tensors.get(name) for tensors in made]
    call = Call("parallel", f"{base}_tp", norms, arguments | first.options, 1, **around)
    call.wrong = first.wrong
    _spoil_lists(rng, call)
    return call


PLURALS = {"x": "xs", "weight": "weights", "bias": "biases", "out": "outs"}


def _spoil_lists(rng: Random, call: Call) -> None:
    if rng.random() > 0.08:
        return
    name = rng.choice([name for name in call.arguments if name in PLURALS.values()])
    of = call.arguments[name]
    kind = rng.choice(("tensor", "short", "context", "number"))
    if kind == "context":
        call.arguments["context"] = rng.choice((None, 1, ["cpu"]))
        call.wrong.append(("context", (TypeError,)))
    elif kind == "short" and name != "xs":
        call.arguments[name] = of[:-1]
        call.wrong.append((name, (ValueError,)))
    else:
        call.arguments[name] = of[0] if kind == "tensor" and of[0] is not None else 3
        call.wrong.append((name, (TypeError,)))
