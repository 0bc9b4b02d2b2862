"""Random calls of the modules."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import torch

from fuzz.making import EPS, OFFSETS, STORED, WRONG_DTYPE_OPTIONS, add_gradients, settings
from fuzz.memory import LAYOUTS, STYLES, Arena
from fuzz.model import Call, Norm
from fuzz.slots import STRANGERS, WRONG_DTYPES, Maker, Slot, random_shape, wrong_shape
from normkit._spec import OPS

NAMES = {"RMSNorm": "rms_norm", "LayerNorm": "layer_norm", "HeadNorm": "head_norm"}


def make_module(rng: Random, arena: Arena) -> Call:
    name = rng.choice(list(NAMES))
    per_head = name == "HeadNorm"
    shape = random_shape(rng, per_head)
    module = _constructed(rng, name, shape)
    ending = module["ending"]
    slots = _slots(rng, module, shape)
    around = settings(rng)
    options: dict[str, Any] = {}
    if rng.random() < 0.25:
        of_x = slots["x"].dtype
        options["out_dtype"] = rng.choice(STORED if rng.random() < 0.9 else WRONG_DTYPE_OPTIONS)
        if of_x == torch.float64 and rng.random() < 0.3:
            options["out_dtype"] = torch.float64
    if rng.random() < 0.25:
        _spoil(rng, slots)
    maker = Maker(rng, arena)
    tensors = {name: maker.make(name, slot) for name, slot in slots.items()}
    module["parameters"] = {
        name: torch.nn.Parameter(t.detach(), t.requires_grad) if t is not None else None
        for name in ("weight", "bias")
        for t in (tensors.pop(name, None),)
    }
    norm = Norm(
        OPS[f"{'add_' if 'residual' in tensors else ''}{module['op']}"],
        module["layer"],
        False,
        **tensors,
        **module["parameters"],
        **module["options"],
        out_dtype=options.get("out_dtype"),
        ending=ending,
    )
    call = Call("module", name, [norm], tensors | options, rng.randint(0, len(tensors)), **around)
    call.module = module
    add_gradients(rng, call, arena)
    return call


def _constructed(rng: Random, name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """The arguments of a constructor, and what they mean."""
    options: dict[str, Any] = {"eps": rng.choice(EPS)}
    if rng.random() < 0.3:
        options["weight_offset"] = rng.choice(OFFSETS)
    for flag in ("round_before_weight", "round_rstd", "round_weight", "memory_efficient"):
        if rng.random() < 0.25:
            options[flag] = True
    affine, bias = rng.random() < 0.8, rng.random() < 0.5
    arguments: dict[str, Any] = {**options, "elementwise_affine": affine, "bias": bias}
    layer, op = name == "LayerNorm", NAMES[name]
    if name == "HeadNorm":
        heads = shape[-2] if rng.random() < 0.6 else None
        kind = rng.choice(("rms", "layer"))
        layer = kind == "layer"
        arguments |= {"num_heads": heads, "head_dim": shape[-1], "kind": kind}
        ending = shape[-1:] if heads is None else shape[-2:]
    else:
        last = rng.choice((1, 1, 1, 2, 3)) if rng.random() > 0.01 else 0
        ending = shape[max(len(shape) - last, 0) :] if last else ()
        whole = len(ending) == 1 and rng.random() < 0.5
        arguments["normalized_shape"] = ending[0] if whole else ending
    return {
        "arguments": arguments,
        "options": options,
        "op": op,
        "layer": layer,
        "ending": ending,
        "affine": ["weight", "bias"][: affine + (affine and bias)],
    }


def _slots(rng: Random, module: dict[str, Any], shape: tuple[int, ...]) -> dict[str, Slot]:
    dtype = torch.float64 if rng.random() < 0.06 else rng.choice(STORED)
    style = "normal" if rng.random() < 0.8 else rng.choice(STYLES)

    def layout() -> str:
        return "packed" if rng.random() < 0.4 else rng.choice(LAYOUTS)

    slots = {"x": Slot(dtype, shape, layout(), style)}
    if rng.random() < 0.35:
        slots["residual"] = Slot(rng.choice((dtype, *STORED)), shape, layout(), style)
    trained = rng.random() < 0.5
    for name in module["affine"]:
        of = rng.choice((dtype, *STORED))
        slots[name] = Slot(of, module["ending"], needs_gradient=trained)
    for name in ("x", "residual"):
        if name in slots:
            slots[name].needs_gradient = rng.random() < 0.2
            slots[name].negated = rng.random() < 0.02
    if math.prod(module["ending"]) == 0:
        for slot in slots.values():
            slot.needs_gradient = False
    return slots


def _spoil(rng: Random, slots: dict[str, Slot]) -> None:
    name = rng.choice([name for name in slots if name in ("x", "residual")])
    slot = slots[name]
    kind = rng.choice(("stranger", "dtype", "shape", "shape"))
    if kind == "shape":
        slot.shape = wrong_shape(rng, slot.shape)
    elif kind == "dtype":
        slot.dtype = rng.choice((*WRONG_DTYPES, torch.float64))
    elif name == "x":
        slot.stranger = rng.choice(STRANGERS)
    else:
        slot.stranger = rng.choice([kind for kind in STRANGERS if kind != "none"])
