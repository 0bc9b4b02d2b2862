"""The scripts of benchmarks/, as modules, and what runs one of them in this process."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from normkit import _bench

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not part of this tree", allow_module_level=True)

sys.path.insert(0, str(BENCHMARKS))
try:
    names = sorted(path.stem for path in BENCHMARKS.glob("*.py"))
    scripts = SimpleNamespace(**{name: importlib.import_module(name) for name in names})
finally:
    sys.path.remove(str(BENCHMARKS))
    sys.modules.pop("gpu", None)  # tests/gpu is another one


class Runner:
    """Runs a script with arguments; returns what it prints, and the JSON that it keeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: Any) -> None:
        self.monkeypatch, self.folder, self.capsys = monkeypatch, folder, capsys
        monkeypatch.setattr(_bench, "pin_heap", lambda threads: None)

    def __call__(self, name: str, *arguments: str, status: int = 0) -> tuple[str, Any]:
        self.monkeypatch.setattr(sys, "argv", [name, *arguments, "--out", str(self.folder)])
        assert (getattr(scripts, name).main() or 0) == status
        kept = [json.loads(path.read_text()) for path in self.folder.glob(f"{name}-*.json")]
        return self.capsys.readouterr().out, kept[0] if kept else None


@contextmanager
def same_threads() -> Iterator[None]:
    """Scripts set how many threads torch takes."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
