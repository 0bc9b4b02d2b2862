"""What the tests of inference engines' layers share."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import normkit


def recorded(monkeypatch: pytest.MonkeyPatch, layers: ModuleType) -> list[str]:
    """The names of normkit's functions, in the order in which that module will call them."""
    names: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            names.append(name)
            return function(*args, **options)

        return call

    for name in ("rms_norm", "add_rms_norm", "add_rms_norm_", "layer_norm"):
        monkeypatch.setattr(layers, name, counted(name, getattr(normkit, name)))
    return names


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (values * 3 + 0.5).to(dtype)
