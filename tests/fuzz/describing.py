"""One call again, with its arguments in words."""

from __future__ import annotations

import faulthandler
from typing import Any

import torch
from torch import Tensor

from fuzz import rules
from fuzz.making import make
from fuzz.memory import Arena
from fuzz.model import Call, has_memory
from fuzz.running import check


def describe(seed: int, number: int) -> int:
    """Print a call and what is wrong with it; 1 if anything is."""
    faulthandler.enable()
    arena = Arena()
    call = make(seed, number, arena)
    print("\n".join(_lines(call)), flush=True)  # before it may crash
    failures = check(call, arena)
    for failure in failures:
        print(f"FAILED: {failure.kind}: {failure.detail}")
    if not failures:
        print("as it should be")
    return bool(failures)


def _lines(call: Call) -> list[str]:
    around = [call.form, f"use_backend({call.backend!r})" if call.backend else "", call.mode]
    around += ["explain"] if call.explains else []
    lines = [f"{call.name}: {', '.join(filter(None, around))}"]
    if call.module:
        lines.append(f"  constructed with {call.module['arguments']}")
    for i, (name, value) in enumerate(call.arguments.items()):
        marked = "" if i < call.positional else f"{name}="
        values = value if isinstance(value, list) and call.form == "parallel" else [value]
        lines += [f"  {marked or f'({name}) '}{_words(value)}" for value in values]
    for name, parameter in call.module.get("parameters", {}).items():
        lines.append(f"  parameter {name} {_words(parameter)}")
    for name, t in (call.grads or {}).items():
        lines.append(f"  {name} {_words(t)}")
    verdict = rules.judge(call)
    for may_be, faults in (("must be", verdict.must), ("may be", verdict.may)):
        lines += [f"  {may_be} refused: {f.why} ({', '.join(sorted(f.names))})" for f in faults]
    return lines


def _words(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    if not has_memory(value):
        return f"{value.dtype} {value.layout} on {value.device}"
    words = [
        str(value.dtype).removeprefix("torch."),
        str(tuple(value.shape)),
        f"strides {value.stride()}",
        f"offset {value.storage_offset()}",
    ]
    flags = {
        "requires_grad": value.requires_grad,
        "negated": value.is_neg(),
        "inference": value.is_inference(),
    }
    words += [name for name, holds in flags.items() if holds]
    if 0 < value.numel() <= 8 and value.dtype != torch.bool:
        words.append(str(value.detach().resolve_neg().flatten().tolist()))
    return " ".join(words)
