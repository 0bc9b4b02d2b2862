"""Tests that run on several ranks at once.

`on_ranks(2, 4)` makes a test of a function of (rank, world): its body runs in that many processes,
with their process group, and the test fails if it does on any of them.  Starting processes takes
seconds, so those of one number run all the tests that were collected, one after the other.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import starting

GROUP_TIMEOUT = timedelta(seconds=30)
LIMIT = 240  # seconds for all tests of one number of ranks

COLLECTIVES = (
    *("all_gather_single", "all_gather_into_tensor", "all_gather", "all_gather_object"),
    *("all_reduce", "broadcast", "reduce", "reduce_scatter_tensor", "all_to_all", "barrier"),
)

# What one message is among them.
GATHER = ["all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"]

Body = Callable[[int, int], None]


def on_ranks(*worlds: int) -> Callable[[Body], Callable[..., None]]:
    def decorate(body: Body) -> Callable[..., None]:
        @pytest.mark.parametrize("world", worlds)
        def test(world: int, request: pytest.FixtureRequest) -> None:
            outcome = _outcomes(world, _collected(request.session, world))
            for rank, said in enumerate(outcome[_key(body)]):
                assert said == "passed", f"rank {rank} of {world}:\n{said}"

        test.__name__, test.__doc__ = body.__name__, body.__doc__
        test.body, test.worlds = body, worlds  # type: ignore[attr-defined]
        return test

    return decorate


def _key(body: Body) -> str:
    return f"{body.__module__}:{body.__name__}"


def _collected(session: pytest.Session, world: int) -> tuple[str, ...]:
    found = [getattr(item, "function", None) for item in session.items]
    bodies = [test.body for test in found if world in getattr(test, "worlds", ())]
    return tuple(dict.fromkeys(map(_key, bodies)))


@cache
def _outcomes(world: int, keys: tuple[str, ...]) -> dict[str, list[str]]:
    """What each rank said to each test."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        run_processes(_run_all, world, keys, str(folder))
        said = []
        for rank in range(world):
            file = folder / f"{rank}.json"
            said.append(json.loads(file.read_text()) if file.exists() else {})
    return {key: [ranks.get(key, "did not run, or did not end") for ranks in said] for key in keys}


def run_processes(work: Callable[..., None], world: int, *args: Any) -> list[int | None]:
    """Run work(rank, world, *args) in processes; return how they ended, None for killed by us."""
    context = mp.get_context(starting.METHOD)
    processes = [context.Process(target=work, args=(rank, world, *args)) for rank in range(world)]
    for process in processes:
        process.start()
    end = time.monotonic() + LIMIT
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def join(rank: int, world: int, folder: str) -> None:
    """Become a rank of the default group."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=GROUP_TIMEOUT,
    )


def whole(part: torch.Tensor, dim: int = -1, group: Any = None) -> torch.Tensor:
    """The parts of all ranks, one behind the other."""
    parts = [torch.empty_like(part.contiguous()) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.detach().contiguous(), group=group)
    return torch.cat(parts, dim)


def part_of(t: Any, rank: int, world: int, dim: int = -1) -> Any:
    """What a rank has of a tensor, or None of None."""
    return None if t is None else t.chunk(world, dim)[rank]


@contextmanager
def counted() -> Iterator[list[str]]:
    """Names of the collectives that run inside."""
    names = [name for name in COLLECTIVES if hasattr(dist, name)]
    before, made = {name: getattr(dist, name) for name in names}, list[str]()

    def watched(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            made.append(name)
            return before[name](*args, **options)

        return call

    for name in names:
        setattr(dist, name, watched(name))
    try:
        yield made
    finally:
        for name in names:
            setattr(dist, name, before[name])


def _run_all(rank: int, world: int, keys: tuple[str, ...], folder: str) -> None:
    warnings.simplefilter("error")
    join(rank, world, folder)
    said: dict[str, str] = {}
    for key in keys:
        module, name = key.split(":")
        body = getattr(importlib.import_module(module), name).body
        try:
            body(rank, world)
            said[key] = "passed"
        except BaseException:
            said[key] = traceback.format_exc()
        Path(folder, f"{rank}.json").write_text(json.dumps(said))
        if said[key] != "passed":  # the others may wait for us now: what follows means nothing
            sys.exit(1)
        dist.barrier()
    os._exit(0)  # gloo may abort a process that shuts down and has lost another
