"""Runs a call on another device, with the same memory layout, and brings back what it wrote.

So the conformance suite, whose tensors are on the CPU, serves CUDA as it is: strides, offsets,
alignment and aliases are those of the test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Copies:
    """Copies of whole storages, so that views of one memory stay views of one memory."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._storages: dict[int, tuple[Tensor, Tensor]] = {}
        self._originals: dict[int, Tensor] = {}

    def of(self, value: Any) -> Any:
        plain = type(value) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)
        if not plain or value.device.type != "cpu" or value.layout != torch.strided:
            return value
        if value.requires_grad:
            return value.to(self.device)  # autograd has to see the way there and back
        storage = value.untyped_storage()
        if storage.data_ptr() == 0 or value.is_neg():
            return value.to(self.device)
        if storage.data_ptr() not in self._storages:
            memory = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._storages[storage.data_ptr()] = memory, memory.to(self.device, copy=True)
        memory = self._storages[storage.data_ptr()][1]
        copy = torch.empty(0, dtype=value.dtype, device=self.device).set_(
            memory.untyped_storage(), value.storage_offset(), value.size(), value.stride()
        )
        if type(value) is torch.nn.Parameter:
            copy = torch.nn.Parameter(copy, requires_grad=False)
        self._originals[id(copy)] = value
        return copy

    def bring_back(self) -> None:
        for original, copy in self._storages.values():
            original.copy_(copy)

    def original_of(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self.original_of(v) for v in value)
        if not isinstance(value, Tensor):
            return value
        return self._originals[id(value)] if id(value) in self._originals else value.cpu()


def call_on(device: str, function: Callable[..., Any], *tensors: Any, **options: Any) -> Any:
    """`function(*tensors, **options)` with every tensor on `device`; the results are on the CPU."""
    copies = _Copies(device)
    moved = [copies.of(t) for t in tensors]
    moved_options = {name: copies.of(value) for name, value in options.items()}
    try:
        result = function(*moved, **moved_options)
    finally:
        copies.bring_back()
    return copies.original_of(result)
