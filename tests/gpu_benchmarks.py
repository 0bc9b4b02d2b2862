"""The modules of the GPU benchmarks, for the tests of their arithmetic, tables and plots."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not part of this tree", allow_module_level=True)

sys.path.insert(0, str(BENCHMARKS))
try:
    gpu = importlib.import_module("gpu")
    cases = importlib.import_module("gpu_cases")
    method = importlib.import_module("gpu_method")
    reporting = importlib.import_module("gpu_report")
    tune = importlib.import_module("tune")
finally:
    sys.path.remove(str(BENCHMARKS))
    sys.modules.pop("gpu", None)  # tests/gpu is another one


def on_the_host(make: Any) -> Any:
    """gpu_cases.make_buffers, but with the buffers on the host."""
    return lambda case, sets, device="cpu": make(case, sets, "cpu")


def stamped(result: dict[str, Any]) -> dict[str, Any]:
    return {**result, "torch": "2.11.0", "commit": "abc"}
