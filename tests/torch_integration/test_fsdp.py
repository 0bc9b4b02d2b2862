"""Two processes do what one does: FSDP, and calls whose rows are split among them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch without gloo", allow_module_level=True)

import normkit
import starting
from torch_integration import sharding

N, WORLD = 16, 2


def run_processes(work: Callable[..., None], *args: Any) -> None:
    """Run work(rank, *args) in each of the processes, and fail rather than wait for ever."""
    context = mp.start_processes(work, args, WORLD, join=False, start_method=starting.METHOD)
    end = time.monotonic() + 120
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, "the processes hang"
    finally:
        for process in context.processes:
            process.kill()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train in both precisions, and return where the weights are."""
    folder = tmp_path_factory.mktemp("sharded")
    run_processes(sharding.shard_and_train, WORLD, N, str(folder))
    return folder


@pytest.mark.parametrize(
    ("precision", "rtol", "atol"), [(torch.float32, 1e-5, 1e-6), (torch.bfloat16, 2e-2, 2e-2)]
)
def test_two_sharded_processes_train_what_one_does(
    folder: Path, precision: torch.dtype, rtol: float, atol: float
) -> None:
    trained = torch.load(folder / f"{precision}.pt")
    alone = sharding.initialised(N)
    before = {name: t.clone() for name, t in alone.state_dict().items()}
    sharding.train(alone, torch.cat([sharding.data(rank, WORLD, N) for rank in range(WORLD)]))
    assert trained.keys() == before.keys()
    for name, t in alone.state_dict().items():
        assert trained[name].dtype == torch.float32
        torch.testing.assert_close(trained[name], t, rtol=rtol, atol=atol)
        assert not torch.equal(t, before[name])


def test_two_processes_with_split_rows_get_what_one_gets(tmp_path: Path) -> None:
    """Outputs, gradients of x, and those of weight and bias, which are sums over the processes."""
    run_processes(sharding.split_rows, WORLD, str(tmp_path))
    found = torch.load(tmp_path / "rows.pt")
    assert len(found) == 3 * len(sharding.AFFINE)
    for (name, _), made in found.items():
        (x, weight, bias, grad_y), options = sharding.split_calls(name)
        leaves = [t.requires_grad_() for t in (x, weight, bias)]
        y = getattr(normkit, name)(*leaves, **options)
        expected = [y, *torch.autograd.grad(y, leaves, grad_y), y]
        for got, wanted in zip(made, expected, strict=True):
            torch.testing.assert_close(got, wanted.detach())
