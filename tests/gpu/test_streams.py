"""A call is ordered by the stream it was made in, waits for nothing, and shares nothing."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from gpu_support import EVERY, SIZES, call, inputs_on, overwrite, sleep, tensors_of, warm_up

import normkit
from conformance.support import RMS, Op, assert_same_results


@pytest.mark.parametrize("op", EVERY, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_a_call_waits_for_the_work_before_it_in_its_stream(op: Op, n: int) -> None:
    """Behind a slow kernel x is still the old one: a norm in another stream would read that."""
    old, new = inputs_on(op, 3, n, seed=1), inputs_on(op, 3, n, seed=2)
    expected = call(op, new)
    stream = torch.cuda.Stream()
    warm_up(op, old, stream)
    with torch.cuda.stream(stream):
        sleep()
        overwrite(old, new, non_blocking=True)
        result = call(op, old)
        returned_early = not stream.query()
    torch.cuda.synchronize()
    assert returned_early, "the call waited for the device"
    assert_same_results(result, expected)


@pytest.mark.parametrize("op", EVERY, ids=str)
def test_other_streams_do_not_wait_for_a_call(op: Op) -> None:
    inputs = inputs_on(op, 3, 4096)
    expected = call(op, inputs)
    slow, quick = torch.cuda.Stream(), torch.cuda.Stream()
    warm_up(op, inputs, slow)
    warm_up(op, inputs, quick)
    with torch.cuda.stream(slow):
        sleep()
        call(op, inputs)
    with torch.cuda.stream(quick):
        result = call(op, inputs)
    quick.synchronize()
    still_slow = not slow.query()
    torch.cuda.synchronize()
    assert still_slow, "the quick stream waited for the slow one, or the slow kernel was not slow"
    assert_same_results(result, expected)


@pytest.mark.parametrize("op", EVERY, ids=str)
def test_the_next_kernel_sees_what_a_call_wrote(op: Op) -> None:
    """The next kernel may be launched early; what it reads must be there all the same."""
    inputs = inputs_on(op, 64, 8192)
    expected = call(op, inputs)
    for _ in range(50):
        result = call(op, inputs)
        again = [t + 0 for t in tensors_of(result)]
        for t in tensors_of(result):
            t.zero_()
        for got, want in zip(again, tensors_of(expected), strict=True):
            assert torch.equal(got, want)


def test_a_chain_of_calls_is_the_same_as_one_by_one() -> None:
    """Each reads what the one before has written, with nothing in between."""
    for n in SIZES:
        first = inputs_on(RMS, 7, n)
        chained = [first.x]
        for _ in range(40):
            chained.append(call(RMS, first._replace(x=chained[-1])).y)
        torch.cuda.synchronize()
        for x, y in itertools.pairwise(chained):
            alone = call(RMS, first._replace(x=x)).y
            torch.cuda.synchronize()
            assert torch.equal(alone, y)


@pytest.mark.parametrize("n", SIZES)
def test_two_streams_at_once_give_the_bits_of_one(n: int) -> None:
    rows = max(8, 2_000_000 // n)
    work = [(op, inputs_on(op, rows, n, seed=i)) for i, op in enumerate(EVERY)]
    expected = [call(op, inputs) for op, inputs in work]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    found = []
    for turn in range(6):
        for i, (op, inputs) in enumerate(work):
            with torch.cuda.stream(streams[(turn + i) % 2]):
                found.append((i, call(op, inputs)))
    torch.cuda.synchronize()
    for i, result in found:
        assert_same_results(result, expected[i])


def test_two_threads_at_once_give_the_bits_of_one() -> None:
    work = [(op, inputs_on(op, 300, n, seed=n)) for op in EVERY for n in (128, 4096, 65536)]
    expected = [call(op, inputs) for op, inputs in work]
    torch.cuda.synchronize()
    found: dict[int, list] = {}

    def run(thread: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            found[thread] = [call(op, inputs) for _ in range(5) for op, inputs in work]
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results in (found[0], found[1]):
        for i, result in enumerate(results):
            assert_same_results(result, expected[i % len(work)])


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_calls_do_not_synchronise() -> None:
    """torch raises on any operation of its own that would; ours must not need one either."""
    work = [(op, inputs_on(op, 3, 4096)) for op in EVERY]
    for op, inputs in work:
        warm_up(op, inputs)
    sleep()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for op, inputs in work:
            getattr(normkit, op.name)(*op.tensors(inputs), **op.selected)
        returned_early = not torch.cuda.current_stream().query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert returned_early, "a call waited for the device"
