"""Python threads that call at once: each gets its own results, and makes its own choices.

On a free-threaded interpreter they really run at once, the quick path too; on others those calls do
that release the interpreter's lock, and the rest takes turns.
"""

from __future__ import annotations

import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import normkit
from normkit import _C
from normkit._spec import NATIVE, Call

THREADS = 12
ROUNDS = 25
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def frequent_switches() -> Iterator[None]:
    """Where there is a lock, it changes hands a hundred times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(before)


def at_once(*works: Callable[[], None]) -> None:
    """Run each in a thread of its own, all from one moment on, and raise what the first raised."""
    together = threading.Barrier(len(works))
    errors: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        together.wait(20)
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def randn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def results(seed: int) -> list[Tensor]:
    """Calls of every way into the extension, which use each scratch that a thread keeps."""
    # Beyond 2^15 elements a call lets go of the lock; half of these are.
    n, dtype = (96, 1000)[seed % 2] + seed, DTYPES[seed % 3]
    x, residual = randn(40, n, dtype=dtype, seed=seed), randn(40, n, dtype=dtype, seed=seed + 1)
    weight, bias = (randn(n, dtype=torch.float16, seed=seed + i) for i in (2, 3))
    out = torch.empty_like(x)
    made = [
        normkit.rms_norm(x, weight, weight_offset=1.0),
        normkit.layer_norm(x, weight, bias, out=out),
        *normkit.add_layer_norm(x, residual, weight, bias, round_sum=False),
        normkit.rms_norm_(x.clone(), weight, clamp_inf=True),
    ]
    leaf = x.clone().requires_grad_()
    normkit.layer_norm(leaf, weight, bias).sum().backward()
    assert leaf.grad is not None
    return [*made, leaf.grad]


@pytest.fixture(scope="module")
def expected() -> list[list[Tensor]]:
    return [results(seed) for seed in range(THREADS)]


def check(seed: int, expected: list[list[Tensor]]) -> None:
    for made, before in zip(results(seed), expected[seed], strict=True):
        assert torch.equal(made, before), f"of thread {seed}"


def test_every_op_has_the_bits_of_a_call_alone(expected: list[list[Tensor]]) -> None:
    def work(seed: int) -> None:
        for _ in range(ROUNDS):
            check(seed, expected)

    at_once(*(lambda seed=seed: work(seed) for seed in range(THREADS)))  # type: ignore[misc]


def test_another_instruction_set_amid_calls_changes_no_bits(expected: list[list[Tensor]]) -> None:
    best, names = _C.cpu_instruction_set(), _C.cpu_instruction_sets()
    done = threading.Event()

    def switch() -> None:
        while not done.wait(1e-4):
            for name in names:
                _C.use_cpu_instruction_set(name)

    def work(seed: int) -> None:
        for _ in range(ROUNDS):
            check(seed, expected)

    switching = threading.Thread(target=switch)
    switching.start()
    try:
        at_once(*(lambda seed=seed: work(seed) for seed in range(4)))  # type: ignore[misc]
    finally:
        done.set()
        switching.join()
        _C.use_cpu_instruction_set(best)


def test_the_backend_of_one_thread_is_not_that_of_another() -> None:
    x = randn(3, 64, dtype=torch.float32, seed=1)

    def work(name: str) -> None:
        for _ in range(4 * ROUNDS):
            with normkit.use_backend(name):
                told = normkit.explain("rms_norm", x)
                normkit.rms_norm(x)
            assert told.backend == name

    def automatic() -> None:
        for _ in range(8 * ROUNDS):
            assert _C.try_norm(*rms_fields(x)) is not None  # the quick path is on in this thread

    at_once(*[lambda: work("reference"), lambda: work("cpu"), automatic] * 3)


def rms_fields(x: Tensor) -> list[object]:
    given = {"kind": 0, "x": x, "eps": 1e-6, "weight_offset": 0.0}
    return [given.get(name, getattr(Call, name, None)) for name in NATIVE]


def test_errors_are_those_of_the_thread_that_made_them() -> None:
    def work(n: int) -> None:
        x, weight = torch.ones(2, n), torch.ones(n + 1)
        for _ in range(ROUNDS):
            with pytest.raises(ValueError, match=rf"weight: expected .*{n}.*got .*{n + 1}"):
                normkit.rms_norm(x, weight)

    at_once(*(lambda n=n: work(n) for n in range(10, 90, 10)))  # type: ignore[misc]


@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this interpreter has a lock"
)
def test_importing_the_extension_leaves_the_lock_off() -> None:
    assert not sys._is_gil_enabled()  # type: ignore[attr-defined]
