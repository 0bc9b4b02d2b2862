"""A million calls leave nothing behind, and a process ends while others of its threads compute."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import normkit

STATM = Path("/proc/self/statm")
# More than the ups and downs of an allocator; one object of 16 bytes in a million calls is 16 MB.
MOST_BYTES = 1 << 20


def resident() -> int:
    return int(STATM.read_text().split()[1]) * 4096


def _gradient() -> Callable[[], object]:
    x = torch.randn(4, 64, requires_grad=True)
    weight = torch.ones(64, requires_grad=True)
    return lambda: torch.autograd.grad(normkit.rms_norm(x, weight).sum(), (x, weight))


def _refused() -> Callable[[], object]:
    x, weight = torch.randn(4, 64), torch.ones(63)

    def call() -> None:
        with suppress(ValueError):
            normkit.rms_norm(x, weight)

    return call


def _plain(out: bool) -> Callable[[], object]:
    x, weight = torch.randn(4, 64), torch.ones(64)
    y = torch.empty_like(x) if out else None
    return lambda: normkit.rms_norm(x, weight, out=y)


def _added() -> Callable[[], object]:
    x, residual, weight = torch.randn(4, 64), torch.randn(4, 64), torch.ones(64)
    return lambda: normkit.add_rms_norm(x, residual, weight)


def _module() -> Callable[[], object]:
    module, x = normkit.LayerNorm(64), torch.randn(4, 64)

    def call() -> None:
        with torch.no_grad():
            module(x)

    return call


def _converted() -> Callable[[], object]:
    module, x = torch.nn.LayerNorm(64).requires_grad_(False), torch.randn(4, 64)
    normkit.convert(module)
    return lambda: module(x)


def _operator() -> Callable[[], object]:
    x, weight = torch.randn(4, 64), torch.ones(64)
    return lambda: torch.ops.normkit.rms_norm(x, weight)


# With as many calls as take about a second, or as would make 16 bytes each seen.
ROUTES: dict[str, tuple[Callable[[], Callable[[], object]], int]] = {
    "into out": (lambda: _plain(out=True), 1_000_000),
    "allocating": (lambda: _plain(out=False), 70_000),
    "with a residual": (_added, 70_000),
    "of a module": (_module, 70_000),
    "of a converted module": (_converted, 50_000),
    "with gradients": (_gradient, 5_000),
    "refused": (_refused, 20_000),
    "of an operator": (_operator, 10_000),
}


@pytest.mark.skipif(not STATM.exists(), reason="needs /proc")
@pytest.mark.parametrize("route", ROUTES)
def test_calls_leave_no_memory_and_no_references_behind(route: str) -> None:
    make, count = ROUTES[route]
    call = make()

    def measured() -> tuple[int, int]:
        gc.collect()
        return resident(), sum(map(sys.getrefcount, (torch.float32, torch.Tensor, None, True)))

    def left_behind() -> bool:
        memory, references = measured()
        for _ in range(count):
            call()
        memory_after, references_after = measured()
        moved.append((memory_after - memory, references_after - references))
        return moved[-1][0] >= MOST_BYTES or abs(moved[-1][1]) >= count // 20

    for _ in range(count // 20):
        call()
    moved: list[tuple[int, int]] = []
    # What a call leaves is there after every stretch; what earlier tests of the process give
    # back (793 references to None and its like were seen) is so only once.
    assert not all(left_behind() for _ in range(3)), moved


ENDING = """
import sys, threading, torch, normkit
x, weight = torch.randn(64, 4096), torch.ones(4096)
y = normkit.rms_norm(x, weight)
ready = threading.Event()

def work():
    while not stop.is_set():
        normkit.rms_norm(x, weight, out=torch.empty_like(x))
        ready.set()

stop = threading.Event()
threading.Thread(target=work, daemon=DAEMON).start()
ready.wait(30)
if not DAEMON:
    threading.Timer(0.2, stop.set).start()
print("done", flush=True)
sys.exit(7)
"""


def test_a_process_ends_with_its_own_status_after_its_threads() -> None:
    source = ENDING.replace("DAEMON", "False")
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", source], capture_output=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (7, b"done\n", b"")


def test_what_is_alive_at_the_end_of_the_interpreter_is_no_error() -> None:
    source = """
import torch, normkit
module = normkit.RMSNorm(64)
class Late:
    def __del__(self, call=normkit.rms_norm, x=torch.ones(2, 64)):
        call(x)
late = Late()
y = module(torch.ones(2, 64))
kept = torch.nn.LayerNorm(64); report = normkit.convert(kept); kept(torch.ones(2, 64))
"""
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", source], capture_output=True)
    assert (ended.returncode, ended.stderr) == (0, b"")
