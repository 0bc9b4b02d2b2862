"""The jobs of the workflow `gpu`: every registered runner with a GPU, each with several torches.

    export GPU_RUNNERS='[{"name": "h100-580", "labels": ["self-hosted", "h100"]}]'
    python .ci/gpu_runners.py

prints the line `jobs=[...]` for $GITHUB_OUTPUT; docs/developing.md says what GPU_RUNNERS holds.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REQUIRED, OPTIONAL = {"name", "labels"}, {"torch", "index"}


def torches() -> list[str]:
    """The oldest that is supported, the one that the tests are written with, and the newest."""
    oldest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest
    return [f"torch=={oldest[1]}.*", (ROOT / "constraints.txt").read_text().strip(), "torch"]


def runners(text: str) -> list[dict[str, Any]]:
    """What GPU_RUNNERS says; ValueError where that cannot be."""
    found = json.loads(text or "[]")
    if not isinstance(found, list):
        raise ValueError(f"GPU_RUNNERS: expected a list, got {found!r}")
    for runner in found:
        keys = set(runner) if isinstance(runner, dict) else None
        if keys is None or not REQUIRED <= keys <= REQUIRED | OPTIONAL:
            raise ValueError(
                f"GPU_RUNNERS: expected name, labels, and torch and index at most, got {runner!r}"
            )
        for key in ("name", "index"):
            if not isinstance(runner.get(key, ""), str):
                raise ValueError(f"GPU_RUNNERS: {key}: expected a string, got {runner[key]!r}")
        for key in ("labels", "torch"):
            words = runner.get(key, ["one"])
            if not isinstance(words, list) or not words or not all(type(w) is str for w in words):
                raise ValueError(f"GPU_RUNNERS: {key}: expected strings in a list, got {words!r}")
    names = [runner["name"] for runner in found]
    if len(set(names)) < len(names) or not all(re.fullmatch(r"[\w.-]+", name) for name in names):
        raise ValueError(f"GPU_RUNNERS: expected names that differ, of [A-Za-z0-9_.-], got {names}")
    return found


def jobs(text: str) -> list[dict[str, Any]]:
    """A job for every runner and torch."""
    return [
        {
            "name": runner["name"],
            "labels": runner["labels"],
            "index": runner.get("index", ""),
            "torch": torch,
            "results": f"gpu-{runner['name']}-{plain(torch)}",
        }
        for runner in runners(text)
        for torch in runner.get("torch", torches())
    ]


def plain(requirement: str) -> str:
    """For the name of an artifact, which takes no asterisks."""
    return re.sub(r"[^\w.]+", "-", requirement).strip("-.")


if __name__ == "__main__":
    try:
        print(f"jobs={json.dumps(jobs(os.environ.get('GPU_RUNNERS', '')))}")
    except ValueError as error:  # malformed JSON too
        sys.exit(str(error))
