"""The CUDA kernels on the CPU: loads the build of tests/emu as the backend "emu"."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from functools import cache
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import Any

import torch

from normkit._serving import backends
from normkit._serving.refusal import Refusal

ROOT = Path(__file__).parents[1]
BUILD = Path(os.environ.get("NORMKIT_EMU", ROOT / "build" / "emu"))


@cache
def extension() -> Any:
    """`_C` with the CUDA kernels in the place of the CPU kernels; None when it is not built."""
    path = next(iter(BUILD.glob("_C*.so")), None)
    if path is None:
        return None
    loader = ExtensionFileLoader("_C", str(path))
    spec = importlib.util.spec_from_file_location("_C", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    module.bind_torch(torch, Refusal)
    backends.natives["emu"] = backends.Native.of(module)
    return module


def emulate_device(processors: int = 4, *, clusters: bool = True) -> None:
    """Say what device is emulated; few processors make few rows many."""
    ctypes.CDLL(extension().__file__).normkit_emulate_device(processors, int(clusters))


def launches() -> int:
    """How many kernels have run."""
    count = ctypes.CDLL(extension().__file__).normkit_emulated_launches
    count.restype = ctypes.c_uint64
    return int(count())
