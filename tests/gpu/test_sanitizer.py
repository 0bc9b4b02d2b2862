"""compute-sanitizer finds nothing in the kernels, and does find what was planted for it to find.

All of its tools start at once and each test waits for its own: most of their time is spent on the
host.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

NAME = "compute-sanitizer"
NVCC = Path(__file__).parents[2] / "benchmarks" / "nvcc.py"
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND = 99
SECONDS = 300
HERE = Path(__file__).parent
# What compute-sanitizer says where it cannot work at all.
UNSUPPORTED = re.compile(r"not supported|unable to|failed to (initialize|inject|attach)", re.I)


class Finished(NamedTuple):
    code: int
    output: str


@pytest.fixture(scope="session")
def sanitizer() -> str:
    homes = [os.environ[k] for k in ("CUDA_HOME", "CUDA_PATH") if k in os.environ]
    places = [f"{home}/{at}" for home in (*homes, "/usr/local/cuda") for at in ("bin", NAME)]
    found = shutil.which(NAME) or shutil.which(NAME, path=os.pathsep.join(places))
    if found is None:
        pytest.skip("compute-sanitizer is not installed")
    return found


def _start(sanitizer: str, tool: str, *command: str) -> subprocess.Popen[str]:
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "all"]
    options += ["--report-api-errors", "no"]  # torch asks the driver for what it can do without
    return subprocess.Popen(
        [sanitizer, *options, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ
        | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def _finish(process: subprocess.Popen[str]) -> Finished:
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        return Finished(-1, f"took more than {SECONDS} s\n{output}")
    return Finished(process.returncode, output)


def _started(commands: dict[str, subprocess.Popen[str]]) -> Iterator[dict]:
    yield commands
    for process in commands.values():
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture(scope="session")
def controls(sanitizer: str) -> Iterator[dict]:
    if not NVCC.exists():
        pytest.skip("the benchmarks, which know how to compile, are not part of this tree")
    nvcc = runpy.run_path(str(NVCC))
    try:
        broken = str(
            nvcc["compiled"](
                nvcc["BROKEN"], nvcc["ARCH"].format(*torch.cuda.get_device_capability())
            )
        )
    except FileNotFoundError as error:
        pytest.skip(f"the positive controls cannot be compiled: {error}")
    yield from _started({tool: _start(sanitizer, tool, broken, tool) for tool in TOOLS})


@pytest.fixture(scope="session")
def kernels_under(sanitizer: str) -> Iterator[dict]:
    script = str(HERE / "sanitized_calls.py")
    yield from _started({t: _start(sanitizer, t, sys.executable, script) for t in TOOLS})


@pytest.fixture(scope="session")
def checked_controls(controls: dict) -> dict[str, Finished]:
    return {tool: _finish(process) for tool, process in controls.items()}


def _needs_working(tool: str, checked_controls: dict[str, Finished]) -> None:
    control = checked_controls[tool]
    if control.code == FOUND:
        return
    reason = UNSUPPORTED.search(control.output)
    if reason:
        pytest.skip(f"compute-sanitizer does not work on this machine: {control.output[:300]}")
    pytest.fail(f"{tool} did not report the planted error: {control}")


@pytest.mark.parametrize("tool", TOOLS)
def test_it_reports_a_planted_error(tool: str, checked_controls: dict[str, Finished]) -> None:
    _needs_working(tool, checked_controls)


@pytest.mark.parametrize("tool", TOOLS)
def test_it_finds_nothing_in_the_kernels(
    tool: str, kernels_under: dict, checked_controls: dict[str, Finished]
) -> None:
    _needs_working(tool, checked_controls)
    code, output = _finish(kernels_under[tool])
    assert code == 0, f"{tool} ended with {code}:\n{output[-4000:]}"
    assert re.search(r"^\d+ calls$", output, re.M), f"the calls did not run:\n{output[-4000:]}"
