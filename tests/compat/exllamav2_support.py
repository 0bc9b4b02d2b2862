"""What the tests of ExLlamaV2's interfaces share: calls on a backend, models, and devices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import normkit
from devices import call_on
from normkit.compat.exllamav2 import ExLlamaV2HeadNorm, ExLlamaV2LayerNorm, ExLlamaV2RMSNorm
from normkit.testing import assert_accurate

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = 3e-3  # so large that another one shows


def run(backend: Any, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` served by a backend, which raises if it cannot."""
    with normkit.use_backend(backend.name):
        if backend.name == "cuda":
            return call_on("cuda", function, *args)
        return function(*args)


# ---------------------------------------------------------------------------------------- models


def values(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.7 + 0.4).to(dtype)


def make_model(folder: Path, tensors: dict[str, Tensor], **lm: Any) -> Any:
    """What the modules of ExLlamaV2 read of a model; each tensor is in a file of its own."""
    files = {}
    for i, (name, t) in enumerate(tensors.items()):
        files[name] = str(folder / f"part-{i}.safetensors")
        save_file({name: t}, files[name])
    width = max((t.numel() for t in tensors.values()), default=1)
    arch = SimpleNamespace(
        lm=SimpleNamespace(**({"norm_constant_bias": 0, "headnorm": "layernorm"} | lm)),
        keymap=None,
        orig_weights_transposed=False,
    )
    config = SimpleNamespace(
        norm_eps=EPS, hidden_size=width, head_dim=8, arch=arch, tensor_file_map=files
    )
    return SimpleNamespace(config=config)


HEADS = (3, 8)
ROW_NORMS = [ExLlamaV2RMSNorm, ExLlamaV2LayerNorm]
row_norms = pytest.mark.parametrize("cls", ROW_NORMS)
all_norms = pytest.mark.parametrize("cls", [*ROW_NORMS, ExLlamaV2HeadNorm])


def shape_of(cls: Any) -> tuple[int, ...]:
    return HEADS if cls is ExLlamaV2HeadNorm else (24,)


def make(
    cls: Any, folder: Path, weight: Tensor | None = None, bias: Tensor | None = None, **lm: Any
) -> Any:
    """A module of a model that stores this weight and bias, not loaded yet."""
    tensors = {"model.norm.weight": values(*shape_of(cls), seed=1) if weight is None else weight}
    if bias is not None:
        tensors["model.norm.bias"] = bias
    heads = HEADS if cls is ExLlamaV2HeadNorm else ()
    return cls(make_model(folder, tensors, **lm), "model.norm", *heads)


def loaded(cls: Any, folder: Path, *stored: Tensor | None, **lm: Any) -> Any:
    norm = make(cls, folder, *stored, **lm)
    norm.load()
    return norm


def rows_for(norm: Any, dtype: torch.dtype = torch.float16) -> Tensor:
    """hidden_states of 2 batches of 5 tokens."""
    return values(2, 5, *shape_of(type(norm)), dtype=dtype, seed=7)


def kind_of(norm: Any) -> str:
    if isinstance(norm, ExLlamaV2HeadNorm) and norm.archparams.headnorm == "rmsnorm":
        return "rms"
    return "rms" if isinstance(norm, ExLlamaV2RMSNorm) else "layer"


def constant_of(norm: Any) -> float:
    """What is added to the stored weight; ExLlamaV2 adds nothing in a LayerNorm."""
    return 0.0 if isinstance(norm, ExLlamaV2LayerNorm) else norm.archparams.norm_constant_bias


def check(norm: Any, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    assert_accurate(
        y, x, weight, bias, EPS, kind=kind_of(norm), clamp_inf=True, weight_offset=constant_of(norm)
    )


# --------------------------------------------------------------------------------------- devices


class Split:
    """A context of ExLlamaV2 as far as its norms look: the CPU, several times over."""

    def __init__(self, *parts: tuple[int, int, int]) -> None:
        self.parts = list(parts)
        self.num_devices = 3

    def get_split(self, broadcast_type: int) -> list[tuple[int, int, int]]:
        return self.parts if broadcast_type == 3 else [(-1, 0, 64)]
