"""Calls of tensors that have no memory to read or write: for a process that may crash."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import emulation
import normkit
import triton_backend


def fake(t: Tensor) -> Tensor:
    with FakeTensorMode() as mode:
        return mode.from_tensor(t)


def freed(t: Tensor) -> Tensor:
    t.untyped_storage().resize_(0)
    return t


CHANGES = {
    "fake": fake,
    "freed": freed,
    "zero": lambda t: torch._efficientzerotensor(t.shape),
    "nested": lambda t: torch.nested.nested_tensor([torch.ones(8)] * 4),
    "uninitialized": lambda t: torch.nn.UninitializedParameter(requires_grad=False),
    "deleted": lambda t: t.set_(),
}
NAMES = ("x", "residual", "weight", "bias", "out", "residual_out")


def call_with(kinds: list[str], backend: str, said: Path) -> None:
    """For each kind and argument write a line of what became of the call."""
    warnings.simplefilter("ignore")  # of nested tensors, which are new
    if backend == "emu":
        emulation.extension()
    if backend == "triton":
        triton_backend.register()
    with said.open("w", buffering=1) as file, normkit.use_backend(backend):
        for kind in kinds:
            for name in NAMES:
                values = {t: torch.ones(4, 8) for t in ("x", "residual", "out", "residual_out")}
                values |= {t: torch.ones(8) for t in ("weight", "bias")}
                values[name] = CHANGES[kind](values[name])
                print(f"calling with {kind} {name}", file=file)
                try:
                    normkit.add_rms_norm(**values)
                except Exception as error:
                    print(kind, name, "raised", type(error).__name__, error, file=file)
                else:
                    print(kind, name, "served", file=file)
