"""A call runs on its tensors' device, whatever the current one is, and leaves that as it was."""

from __future__ import annotations

import threading

import first_calls
import pytest
import torch
from gpu_support import EVERY, call, inputs_on, overwrite

import normkit
import starting
from conformance.support import Op


@pytest.fixture
def second() -> torch.device:
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip(f"needs two CUDA devices, there is {count}")
    return torch.device("cuda", 1)


@pytest.mark.parametrize("op", EVERY, ids=str)
def test_tensors_on_the_second_device_while_the_first_is_current(
    op: Op, second: torch.device
) -> None:
    expected = call(op, inputs_on(op, 5, 4096))
    torch.cuda.set_device(0)
    result = call(op, inputs_on(op, 5, 4096, device=second))
    assert torch.cuda.current_device() == 0
    assert result.y.device == second
    assert torch.equal(result.y.cpu(), expected.y.cpu())


@pytest.mark.parametrize("op", EVERY, ids=str)
def test_the_stream_is_that_of_the_tensors_device(op: Op, second: torch.device) -> None:
    old, new = (inputs_on(op, 5, 4096, seed=seed, device=second) for seed in (1, 2))
    expected = call(op, new)
    stream = torch.cuda.Stream(second)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        overwrite(old, new, non_blocking=True)
        with torch.cuda.device(0):
            result = call(op, old)
    torch.cuda.synchronize(second)
    assert torch.equal(result.y, expected.y)


def test_tensors_on_two_devices_are_refused(second: torch.device) -> None:
    x, weight = torch.ones(2, 8, device="cuda:0"), torch.ones(8, device=second)
    with pytest.raises(ValueError, match="weight"):
        normkit.rms_norm(x, weight)


def test_tensors_on_the_host_and_the_device_are_refused() -> None:
    with pytest.raises(ValueError, match="weight"):
        normkit.rms_norm(torch.ones(2, 8, device="cuda"), torch.ones(8))


def test_a_process_that_uses_the_second_device_has_no_context_on_the_first(
    second: torch.device,
) -> None:
    assert starting.run(first_calls.use_the_second_device_only) == 0


def test_a_thread_without_a_context_has_none_afterwards() -> None:
    x = torch.randn(5, 4096, device="cuda")
    y, expected = torch.zeros_like(x), normkit.rms_norm(x)
    torch.cuda.synchronize()
    found: list[bool] = []

    def work() -> None:
        with normkit.use_backend("cuda"):
            found.append(first_calls.has_context())
            normkit.rms_norm(x, out=y)
            found.append(first_calls.has_context())
            torch.cuda.synchronize(x.device)
            found.append(first_calls.has_context())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False, False, True]
    assert torch.equal(y, expected)
