"""One call for several devices: one GPU named several times, and others where there are some."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from gpu_support import sleep
from torch import Tensor

import normkit
from normkit.parallel import TPContext, broadcast, head_norm_tp, layer_norm_tp, rms_norm_tp

SHAPE = (5, 8, 512)


def operands(count: int, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    made = torch.Generator().manual_seed(seed)
    xs = [torch.randn(SHAPE, generator=made).to("cuda", torch.bfloat16) for _ in range(count)]
    weights = [torch.rand(SHAPE[-1], generator=made).cuda() for _ in range(count)]
    return xs, weights


def warmed_up(context: TPContext) -> TPContext:
    """Load the kernels: the first time may wait for the device."""
    rms_norm_tp(*operands(len(context.devices)), context=context)
    torch.cuda.synchronize()
    return context


@pytest.mark.parametrize("norm_tp", [rms_norm_tp, layer_norm_tp, head_norm_tp])
@pytest.mark.parametrize("inside", [False, True])
def test_one_device_may_be_named_several_times(
    norm_tp: Callable[..., list[Tensor]], inside: bool
) -> None:
    context = TPContext(["cuda"] * 3)
    xs, weights = operands(3)
    with context.use_streams() if inside else nullcontext():
        made = norm_tp(xs, weights, context=context)
    alone = getattr(normkit, norm_tp.__name__.removesuffix("_tp"))
    for y, x, weight in zip(made, xs, weights, strict=True):
        assert torch.equal(y, alone(x, weight))


@pytest.mark.parametrize("inside", [False, True])
def test_results_come_after_the_inputs_and_before_later_work(inside: bool) -> None:
    """Behind a slow kernel x is still the old one, and what reads y comes at once."""
    context = warmed_up(TPContext(["cuda"] * 2))
    (old, weights), (new, _) = operands(2, seed=1), operands(2, seed=2)
    expected = [normkit.rms_norm(x, weight) + 1 for x, weight in zip(new, weights, strict=True)]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        sleep()
        for to, source in zip(old, new, strict=True):
            to.copy_(source, non_blocking=True)
        with context.use_streams() if inside else nullcontext():
            made = rms_norm_tp(old, weights, context=context)
        later = [y + 1 for y in made]
        returned_early = not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    assert returned_early, "the call waited for the device"
    for got, want in zip(later, expected, strict=True):
        assert torch.equal(got, want)


def test_kernels_run_in_the_contexts_stream() -> None:
    stream = torch.cuda.Stream()
    context = warmed_up(TPContext(["cuda"], [stream]))
    xs, weights = operands(1)
    with torch.cuda.stream(stream):
        sleep()
    (y,) = rms_norm_tp(xs, weights, context=context)
    behind = not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    assert behind, "the call did not wait for what its stream has"
    assert torch.equal(y, normkit.rms_norm(xs[0], weights[0]))


def test_threads_do_not_disturb_each_others_order() -> None:
    context = TPContext(["cuda"] * 2)
    failures: list[int] = []

    def work(seed: int) -> None:
        xs, weights = operands(2, seed)
        expected = [normkit.rms_norm(x, weight) for x, weight in zip(xs, weights, strict=True)]
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                fresh = [x + 0 for x in xs]
                made = rms_norm_tp(fresh, weights, outs=fresh, context=context)
                if not all(torch.equal(a, b) for a, b in zip(made, expected, strict=True)):
                    failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_graph_captures_all_devices() -> None:
    context = warmed_up(TPContext(["cuda"] * 2))
    xs, weights = operands(2)
    outs = [torch.zeros_like(x) for x in xs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rms_norm_tp(xs, weights, outs=outs, context=context)
    for x in xs:
        x.mul_(3)
    graph.replay()
    torch.cuda.synchronize()
    for out, x, weight in zip(outs, xs, weights, strict=True):
        assert torch.equal(out, normkit.rms_norm(x, weight))


def test_the_host_and_a_device_work_in_one_call() -> None:
    context = TPContext(["cpu", "cuda"])
    x = torch.randn(SHAPE)
    made = rms_norm_tp(broadcast(x, context), context=context)
    assert [y.device.type for y in made] == ["cpu", "cuda"]
    torch.testing.assert_close(made[1].cpu(), made[0], rtol=1e-6, atol=1e-6)


def test_every_device_works_and_the_current_one_stays() -> None:
    count = torch.cuda.device_count()
    if count < 2:
        pytest.skip(f"needs two CUDA devices, there is {count}")
    context = TPContext(list(range(count)))
    for current in range(count):
        with torch.cuda.device(current):
            xs = broadcast(torch.randn(SHAPE, device="cuda"), context)
            made = rms_norm_tp(xs, context=context)
            assert torch.cuda.current_device() == current
            with context.use_streams():
                assert torch.cuda.current_device() == current
        assert [y.device.index for y in made] == list(range(count))
        for y, x in zip(made, xs, strict=True):
            assert torch.equal(y, normkit.rms_norm(x))
