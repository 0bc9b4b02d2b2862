"""Worker processes, forked and spawned, compute what their parent computes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import normkit
from conformance.support import threads
from torch_integration import workers
from torch_integration.support import assert_equal_bits, randomised

START = multiprocessing.get_all_start_methods()
# From 3.12 on Python warns of forks after threads, which is what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def received(method: str, target: Callable[..., None], *args: Any, seconds: float = 60) -> Any:
    context = multiprocessing.get_context(method)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(there, *args), daemon=True)
    process.start()
    there.close()
    try:
        assert here.poll(seconds), "the worker hangs, or died"
        return here.recv()
    finally:
        process.join(5)
        if process.is_alive():
            process.kill()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_compute_what_the_parent_did_with_threads(method: str) -> None:
    with threads(2):
        expected = workers.norms()
        own_threads = 2 if method == "spawn" else 1
        made = received(method, workers.send_norms, own_threads)
    for name, t in expected.items():
        assert_equal_bits(torch.from_numpy(made[name]), t)


def test_modules_are_handed_to_workers() -> None:
    module, x = randomised(normkit.HeadNorm(3, 8, bias=True)), torch.randn(2, 3, 8)
    made = received("spawn", workers.send_module, module, x)
    assert_equal_bits(torch.from_numpy(made), module(x))


@pytest.mark.parametrize("method", START)
def test_data_loaders_norm_in_their_workers(method: str) -> None:
    dataset = workers.Normed(3, (256, 512))
    with threads(2):
        expected = [dataset[i] for i in range(len(dataset))]
        loader = DataLoader(
            dataset, batch_size=None, num_workers=1, multiprocessing_context=method, timeout=60
        )
        assert_equal_bits(list(loader), expected)


def test_the_parent_goes_on_after_a_fork() -> None:
    with threads(2):
        expected = workers.norms()
        received("fork", workers.send_norms, 1)
        assert_equal_bits(list(workers.norms().values()), list(expected.values()))
