"""Every op can be captured in a CUDA graph, and a replay works on what its inputs hold by then."""

from __future__ import annotations

import first_calls
import pytest
import torch
from gpu_support import (
    EVERY,
    SIZES,
    call,
    call_in_place,
    inputs_on,
    overwrite,
    tensors_of,
    warm_up,
)

import starting
from conformance.support import Inputs, Op, Result, assert_same_results


@pytest.mark.parametrize("op", EVERY, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_a_replay_takes_the_inputs_of_the_moment(op: Op, n: int) -> None:
    inputs = inputs_on(op, 5, n, seed=0)
    warm_up(op, inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(op, inputs)
    for seed in (1, 2, 3):
        new = inputs_on(op, 5, n, seed=seed)
        overwrite(inputs, new)
        for t in tensors_of(result):
            t.fill_(float("nan"))
        graph.replay()
        assert_same_results(result, call(op, new))


@pytest.mark.parametrize("op", EVERY, ids=str)
def test_in_place_forms_and_out_can_be_captured(op: Op) -> None:
    inputs, out = inputs_on(op, 5, 4096), inputs_on(op, 5, 4096)
    outs = {"out": out.x} | ({"residual_out": out.residual} if op.returns_both else {})
    in_place = inputs_on(op, 5, 4096)
    warm_up(op, inputs)

    def both() -> tuple[Result, Result]:
        return call(op, inputs, **outs), call_in_place(op, in_place)

    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = both()
    for seed in (1, 2):
        new = inputs_on(op, 5, 4096, seed=seed)
        overwrite(inputs, new)
        overwrite(in_place, new)
        expected = call(op, new)
        graph.replay()
        torch.cuda.synchronize()
        for got in written:
            assert_same_results(got, expected)


def test_a_captured_chain_replays_as_it_was_made() -> None:
    """Layers in a row, as in a decoding step: each node depends on the one before."""
    op = next(op for op in EVERY if str(op) == "add_rms_norm")
    first = inputs_on(op, 8, 4096)
    warm_up(op, first)

    def chain(inputs: Inputs) -> list[torch.Tensor]:
        states = []
        for _ in range(60):
            result = call(op, inputs)
            inputs = inputs._replace(x=result.y, residual=result.residual_out)
            states += tensors_of(result)
        return states

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(first)
    for seed in (1, 2):
        new = inputs_on(op, 8, 4096, seed=seed)
        overwrite(first, new)
        graph.replay()
        for got, expected in zip(captured, chain(new), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("loading", ["LAZY", "EAGER"])
@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_the_first_calls_of_a_process_can_be_captured(mode: str, loading: str) -> None:
    """Asking for the device and loading a kernel are nothing that a capture has to record."""
    assert starting.run(first_calls.capture, mode, loading) == 0


def test_nothing_is_allocated_beyond_the_outputs() -> None:
    for op in EVERY:
        inputs = inputs_on(op, 5, 4096)
        warm_up(op, inputs)
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        call(op, inputs)
        after = torch.cuda.memory_stats()["allocation.all.allocated"]
        assert after - before == (2 if op.returns_both else 1)
