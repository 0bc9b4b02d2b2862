"""What of comfy-kitchen normkit relies on, for tests where it is not installed.

test_comfy_kitchen.py compares it with the package itself, where that is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class MinDims:
    ndim: int


@dataclass(frozen=True)
class ParamConstraint:
    dtypes: frozenset[torch.dtype] | None = None
    devices: frozenset[str] | None = None
    shape_rules: tuple[MinDims, ...] = ()


@dataclass(frozen=True)
class FunctionConstraints:
    params: dict[str, ParamConstraint] = field(default_factory=dict)
    default_devices: frozenset[str] = field(default_factory=lambda: frozenset({"cuda", "cpu"}))
    min_compute_capability: tuple[int, int] | None = None
    call_rules: tuple[Callable[[Mapping[str, object]], Any], ...] = ()


class BackendRegistry:
    def __init__(self) -> None:
        self._backends: dict[str, tuple[Any, dict[str, FunctionConstraints]]] = {}
        self._priority = ["ascend", "cuda", "triton", "eager"]
        self._disabled: set[str] = set()

    def register(
        self, name: str, module: Any, capabilities: dict[str, FunctionConstraints]
    ) -> None:
        self._backends[name] = module, capabilities

    def disable(self, backend_name: str) -> None:
        self._disabled.add(backend_name)

    def enable(self, backend_name: str) -> None:
        self._disabled.discard(backend_name)

    def set_priority(self, priority_list: list[str]) -> None:
        self._priority = list(priority_list)

    def is_available(self, backend_name: str) -> bool:
        return backend_name in self._backends and backend_name not in self._disabled
