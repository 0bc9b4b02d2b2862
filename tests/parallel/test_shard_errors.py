"""Calls on split rows that do not fit: errors on every rank, and no rank that waits for ever."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch without gloo", allow_module_level=True)

import normkit
from conformance.support import assert_same_bits
from normkit.parallel import _gather, sharded_layer_norm, sharded_rms_norm
from parallel.processes import GATHER, counted, join, on_ranks, run_processes


@on_ranks(2, 4)
def test_parts_of_different_sizes_are_an_error_on_every_rank(rank: int, world: int) -> None:
    sizes = [8] * (world - 1) + [9]
    with counted() as made:
        sharded_rms_norm(torch.ones(2, 8))  # a size that was right before is compared again
        with pytest.raises(ValueError, match=f"n = {', '.join(map(str, sizes))} on ranks 0 to"):
            sharded_rms_norm(torch.ones(2, sizes[rank]))
    assert made == GATHER * 2
    sharded_rms_norm(torch.ones(2, 8))


@on_ranks(2, 4)
def test_different_rows_are_an_error_on_every_rank(rank: int, world: int) -> None:
    for rows in ([3] * (world - 1) + [5], [10_000] + [7] * (world - 1)):
        said = f"the same number of rows on every rank, got rows = {', '.join(map(str, rows))}"
        with pytest.raises(ValueError, match=said):
            sharded_layer_norm(torch.ones(rows[rank], 8))
    sharded_layer_norm(torch.ones(3, 8))


@on_ranks(2)
def test_different_calls_are_an_error_on_every_rank(rank: int, world: int) -> None:
    with pytest.raises(ValueError, match="expected the same call on every rank, got other planes"):
        (sharded_rms_norm, sharded_layer_norm)[rank](torch.ones(3, 8))
    with pytest.raises(ValueError, match="expected the same call on every rank, got other bytes"):
        sharded_rms_norm(torch.ones(3, 8, dtype=(torch.float32, torch.float64)[rank]))
    with pytest.raises(ValueError, match="eps: expected the same on every rank, got 1e-06, 3 on"):
        sharded_rms_norm(torch.ones(3, 8), eps=(1e-6, 3.0)[rank])
    sharded_rms_norm(torch.ones(3, 8), eps=(None, torch.finfo(torch.float32).eps)[rank])
    y = sharded_rms_norm(torch.ones(3, 8, requires_grad=True))
    with pytest.raises(ValueError, match="expected the same call on every rank, got other pass"):
        sharded_rms_norm(torch.ones(3, 8)) if rank else y.sum().backward()


@on_ranks(2)
def test_where_messages_are_not_looked_at_every_one_says_its_size(rank: int, world: int) -> None:
    ranks = _gather.Ranks("sharded_rms_norm", dist.new_group(), None)

    def exchange(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        values = torch.tensor([1.0, 2.0, 3.0], dtype=dtype) + 10 * rank
        rows = torch.zeros(world, 3, dtype=dtype)
        _gather._exchange_on_device(n, values, rows, ranks)
        return rows

    for dtype in (torch.float32, torch.float64):
        assert exchange(8, dtype).tolist() == [[1, 2, 3], [11, 12, 13]]
    with counted() as made:
        for n in (8 + rank, 9 - rank, 2**24 + rank):  # one of which each rank has seen before
            with pytest.raises(RuntimeError, match="expected a part of the same size on every"):
                exchange(n)
    assert made == GATHER * 3
    assert exchange(8).tolist() == [[1, 2, 3], [11, 12, 13]]


@on_ranks(2)
def test_wrong_arguments_raise_before_anything_is_sent(rank: int, world: int) -> None:
    x = torch.ones(2, 8)
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, "x: expected a torch.Tensor, got list", {"x": [1.0]}),
        (
            TypeError,
            "weight: expected float32, .* got torch.int64",
            {"weight": torch.ones(8).long()},
        ),
        (ValueError, r"bias: expected shape \(8,\), got \(7,\)", {"bias": torch.ones(7)}),
        (ValueError, r"weight: expected shape .*, got \(3, 8\)", {"weight": torch.ones(3, 8)}),
        (ValueError, "eps: expected a number >= 0, got -1.0", {"eps": -1.0}),
        (TypeError, "clamp_inf: expected True or False", {"clamp_inf": 1}),
        (TypeError, "timeout: expected seconds or a timedelta, got str", {"timeout": "2"}),
        (ValueError, "timeout: expected 0.001 to 1e9 seconds, got 0", {"timeout": 0}),
        (ValueError, "timeout: .* got 0.0009", {"timeout": 9e-4}),
        (ValueError, r"timeout: .* got 1e\+300", {"timeout": 1e300}),
        (ValueError, "timeout: .* got nan", {"timeout": float("nan")}),
        (ValueError, "group: expected a process group .* got 'tp'", {"group": "tp"}),
    ]
    with counted() as made:
        for error, said, given in wrong:
            with pytest.raises(error, match=said):
                sharded_rms_norm(**{"x": x, **given})
        with (
            normkit.use_backend("cuda"),
            pytest.raises(ValueError, match=r'use_backend\("cuda"\) cannot serve this sharded_rms'),
        ):
            sharded_rms_norm(x)
    assert made == []
    sharded_rms_norm(x, timeout=1e9)


@on_ranks(2)
def test_a_backend_asked_for_by_name_serves_or_raises(rank: int, world: int) -> None:
    x = torch.randn(4, 8)
    expected = sharded_rms_norm(x)
    if normkit.backends()["cpu"].usable:
        with normkit.use_backend("cpu"):
            assert_same_bits(sharded_rms_norm(x), expected)
            with pytest.raises(ValueError, match="cannot serve this sharded_rms_norm: .*float64"):
                sharded_rms_norm(x.double())
    with normkit.use_backend("triton"), pytest.raises(ValueError, match="no kernels for rows that"):
        sharded_rms_norm(x)


@on_ranks(2)
def test_transforms_that_do_not_cross_ranks_raise_before_anything_is_sent(
    rank: int, world: int
) -> None:
    x = torch.ones(2, 8)
    said = "sharded_rms_norm: torch.func and forward-mode AD cannot cross ranks"
    calls: list[Callable[[], Any]] = [
        lambda: torch.func.vmap(sharded_rms_norm)(x),
        lambda: torch.func.grad(lambda x: sharded_rms_norm(x).sum())(x),
        lambda: torch.func.jvp(sharded_rms_norm, (x,), (x,)),
    ]
    with counted() as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch itself says of its forward mode
        for call in calls:
            with pytest.raises(RuntimeError, match=said):
                call()
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=said):
            sharded_rms_norm(forward_ad.make_dual(x, x))
    assert made == []


def test_without_a_process_group_it_says_how_to_get_one() -> None:
    with pytest.raises(RuntimeError, match="sharded_rms_norm: expected a process group, got none"):
        sharded_rms_norm(torch.ones(2, 4))


@on_ranks(2, 4)
def test_a_rank_that_does_not_come_is_an_error_within_the_timeout(rank: int, world: int) -> None:
    for timeout in (0.5, timedelta(seconds=0.5)):
        group = dist.new_group()
        begin = time.monotonic()
        if rank == 0:  # its own argument is wrong
            with pytest.raises(ValueError, match="eps"):
                sharded_rms_norm(torch.ones(2, 4), eps=-1.0, group=group, timeout=timeout)
        else:
            said = f"sharded_rms_norm: rank {rank} of the {world} of group '{group.group_name}'"
            with pytest.raises(RuntimeError, match=said + ".* within 0.[5-9] s") as caught:
                sharded_rms_norm(torch.ones(2, 4), group=group, timeout=timeout)
            assert isinstance(caught.value.__cause__, RuntimeError)
            assert time.monotonic() - begin < 5
        dist.barrier()


@on_ranks(2)
def test_a_group_that_lost_a_message_is_not_used_again(rank: int, world: int) -> None:
    """A late rank would take the next message for the one before."""
    group, x = dist.new_group(), torch.ones(2, 4)
    if rank == 0:
        with pytest.raises(RuntimeError, match="did not hear from all others"):
            sharded_rms_norm(x, group=group, timeout=0.2)
        with counted() as made, pytest.raises(RuntimeError, match="lost a message"):
            sharded_rms_norm(2 * x, group=group, timeout=0.2)
        assert made == []
    dist.barrier()
    assert_same_bits(sharded_rms_norm(x, group=dist.new_group()), sharded_rms_norm(x))


def lose_a_rank(rank: int, world: int, folder: str) -> None:
    join(rank, world, folder)
    x = torch.ones(2, 4, requires_grad=True)
    y = sharded_layer_norm(x)
    if rank == world - 1:
        os._exit(9)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="did not hear from all others"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="sharded_layer_norm: expected a .* lost a message"):
        sharded_layer_norm(x)
    assert time.monotonic() - begin < 10
    os._exit(0)  # gloo may abort when a process ends that has lost another


@pytest.mark.parametrize("world", [3])
def test_a_rank_that_dies_is_an_error_on_the_others(world: int, tmp_path: Path) -> None:
    assert run_processes(lose_a_rank, world, str(tmp_path)) == [0] * (world - 1) + [9]
