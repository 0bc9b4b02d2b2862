"""The targets of make for a GPU, the baselines, and the stand-in that plays one."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import stand_in_gpu
from benchmark_scripts import ROOT, scripts

machine = scripts.machine

# --------------------------------------------------------------------------------------------- make


def made(target: str, tmp_path: Path, torch_source: str) -> subprocess.CompletedProcess[str]:
    """What make makes of a target with this torch."""
    (tmp_path / "torch.py").write_text(torch_source)
    command = ["make", "--no-print-directory", target, f"GPU_PYTHON={sys.executable}"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("target", ["gpu", "gpu-check", "gpu-bench"])
def test_make_tells_a_broken_torch_from_a_missing_gpu(target: str, tmp_path: Path) -> None:
    done = made(target, tmp_path, 'raise ImportError("libcudart.so.13 is not there")\n')
    assert done.returncode != 0
    assert "ImportError: libcudart.so.13 is not there" in done.stderr
    if list(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("there is a GPU")
    none = "class version: cuda = None\nclass cuda: is_available = staticmethod(lambda: False)\n"
    done = made(target, tmp_path, f"__version__ = '2.99'\n{none}")
    assert done.returncode == 0, done.stderr
    assert "skipped: torch 2.99 (CUDA None) finds no CUDA device" in done.stdout


# ------------------------------------------------------------------------------ the stand-in itself


def test_the_stand_in_has_nothing_that_torch_has_not() -> None:
    assert stand_in_gpu.strangers() == []


def test_nvml_has_the_names_that_are_asked_for() -> None:
    pynvml = pytest.importorskip("pynvml")
    for name in vars(stand_in_gpu.nvml()):
        assert name.startswith("__") or hasattr(pynvml, name)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_baselines_compile_and_answer_without_a_device(
    monkeypatch: Any, tmp_path: Path
) -> None:
    """Their functions take the arguments that are given, and say what CUDA says."""
    monkeypatch.setattr(scripts.nvcc, "KEPT", tmp_path)
    library = ctypes.CDLL(str(scripts.nvcc.compiled(scripts.nvcc.BASELINES, "sm_90")))
    library.nk_launch.restype = library.nk_copy.restype = ctypes.c_char_p
    none = ctypes.c_void_p(None)
    error = library.nk_copy(1, 4, 512, 0, 1, none, none, none, none, ctypes.c_int64(8), none)
    assert error == b"fewer bytes than one access"
    if not torch.cuda.is_available():
        assert b"CUDA driver" in library.nk_launch(1, 32, 1, 1, 1, none)
