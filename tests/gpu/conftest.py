"""Tests that need a CUDA device; without one they are skipped, and say so.

Where the cuda backend was asked for by name (NORMKIT_TEST_BACKENDS, as `make gpu` does), a device
whose kernels cannot be used is a failure: it must not pass for a machine without one.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import normkit

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True, scope="session")
def _device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch finds none")
    cuda = normkit.backends()["cuda"]
    if not cuda.usable:
        asked = "cuda" in os.environ.get("NORMKIT_TEST_BACKENDS", "").split(",")
        (pytest.fail if asked else pytest.skip)(f"the CUDA kernels cannot be used: {cuda.reason}")


@pytest.fixture
def needs_memory():
    """Skip where the device has not so many bytes free."""

    def check(wanted: int) -> None:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if wanted > 0.9 * free:
            pytest.skip(
                f"needs {wanted / 1e9:.0f} GB of device memory, {free / 1e9:.0f} GB are free"
            )

    yield check
    torch.cuda.empty_cache()
