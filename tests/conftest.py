"""Which backends the tests run on, and how much hypothesis tries."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

import normkit
import triton_backend
from devices import call_on
from emulation import BUILD, extension

# "auto" is what callers get: the quick path, which a backend asked for by name does not take.
# "emu" is the CUDA kernels on the CPU; "cuda" runs where NORMKIT_TEST_BACKENDS names it.
BACKENDS = {"reference": "reference", "cpu": "cpu", "auto": "cpu", "emu": "emu", "cuda": "cuda"}
BACKENDS["triton"] = "triton"  # under its interpreter, which takes minutes: not by default
DEFAULT = "reference,cpu,auto,emu"

if "PYTEST_XDIST_WORKER" in os.environ:  # each core has a worker: more threads would only wait
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of child processes

hypothesis.settings.register_profile("ci", derandomize=True, max_examples=200, deadline=None)
hypothesis.settings.register_profile("fuzz", max_examples=5000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("NORMKIT_TEST_PROFILE", "ci"))


class Backend:
    """Calls ops, and fails when another backend than the named one serves them."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name

    def __call__(self, op: str, *tensors: Any, **options: Any) -> Any:
        with normkit.use_backend(self.name):
            served_by = self._call("explain", op, *tensors, **options).backend
            assert served_by == BACKENDS[self.name]
            return self._call(op, *tensors, **options)

    def unexplained(self, op: str, *tensors: Any, **options: Any) -> Any:
        """For calls that must raise: explain() would raise first."""
        with normkit.use_backend(self.name):
            return self._call(op, *tensors, **options)

    def _call(self, name: str, *args: Any, **options: Any) -> Any:
        function = getattr(normkit, name)
        if self.name == "cuda":
            return call_on("cuda", function, *args, **options)
        return function(*args, **options)


def _chosen() -> list[str]:
    names = os.environ.get("NORMKIT_TEST_BACKENDS", DEFAULT).split(",")
    unknown = set(names) - set(BACKENDS)
    if unknown:
        raise pytest.UsageError(f"NORMKIT_TEST_BACKENDS: unknown backends {sorted(unknown)}")
    return names


def _get(name: str) -> Backend:
    if name == "emu":
        if extension() is None:
            pytest.fail(f"{BUILD} has no emulated kernels; `make emu` builds them")
        return Backend(name)
    if name == "triton":
        _register_triton()
        return Backend(name)
    entry = normkit.backends()[BACKENDS[name]]
    if not entry.usable:
        pytest.fail(f"backend {name} is not usable: {entry.reason}")
    return Backend(name)


def _register_triton() -> None:
    if not triton_backend.register():
        pytest.fail(
            "Triton is not installed; the extra test-triton brings it, NORMKIT_TEST_TRITON=0 leaves"
            " out what is for it alone"
        )


@pytest.fixture(scope="session", autouse=True)
def _compiled_calls_are_operators() -> Iterator[None]:
    """What is promised of compiled calls bit for bit; test_compile_mode.py has the other form."""
    with normkit.compile_mode("op"):
        yield


# Of the session: hypothesis refuses fixtures that it cannot make anew for each example.
@pytest.fixture(scope="session", params=_chosen())
def backend(request: pytest.FixtureRequest) -> Backend:
    return _get(request.param)


@pytest.fixture(scope="session", params=[name for name in _chosen() if name != "reference"])
def kernels(request: pytest.FixtureRequest) -> Backend:
    """A backend with kernels: what plain torch does not promise is asked of these."""
    return _get(request.param)


@pytest.fixture(scope="session")
def triton_is_there() -> None:
    """For what tests Triton's kernels alone: without Triton it fails, and is not passed over."""
    if os.environ.get("NORMKIT_TEST_TRITON") == "0":
        pytest.skip("NORMKIT_TEST_TRITON=0 says so")
    if sys.platform != "linux":
        pytest.skip("Triton is for Linux")
    _register_triton()


@pytest.fixture(scope="session")
def emu() -> Backend:
    return _get("emu")
