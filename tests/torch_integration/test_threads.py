"""Python threads that share modules and weights do not see each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

import normkit
from normkit._serving import backends
from torch_integration.support import (
    FUNCTIONS,
    MODULES,
    assert_equal_bits,
    clones,
    listed,
    loss_of,
    randomised,
    results_and_gradients,
    tensors,
)

COUNT = 4


def at_once(task: Callable[[int], Any], count: int = COUNT) -> list[Any]:
    """Run task(0), task(1), ... in threads that start together; raise what one raises."""
    barrier = threading.Barrier(count)

    def start(index: int) -> Any:
        barrier.wait(30)
        return task(index)

    with ThreadPoolExecutor(count) as pool:
        return [f.result(60) for f in [pool.submit(start, i) for i in range(count)]]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_threads_over_shared_weights_compute_what_one_does(name: str) -> None:
    function = getattr(normkit, name)
    shape = (24, 3, 640)
    *_, weight, bias = tensors(name, shape)
    inputs = [tensors(name, shape, seed=seed)[:-2] for seed in range(COUNT)]
    expected = [listed(function(*x, weight, bias)) for x in inputs]

    def task(index: int) -> None:
        for _ in range(10):
            assert_equal_bits(function(*inputs[index], weight, bias), expected[index])
            given = clones(inputs[index])
            getattr(normkit, f"{name}_")(*given, weight, bias)
            assert_equal_bits(given, expected[index])

    at_once(task)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_threads_compute_gradients_at_once(name: str) -> None:
    given = [tensors(name, (24, 3, 160), seed=seed) for seed in range(COUNT)]
    function = getattr(normkit, name)
    expected = [results_and_gradients(function, one)[1] for one in given]

    def task(index: int) -> None:
        for _ in range(3):
            assert_equal_bits(results_and_gradients(function, given[index])[1], expected[index])

    at_once(task)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", MODULES)
def test_replicas_of_a_module_run_in_threads(kind: str, grad: bool) -> None:
    """As DataParallel does it: replicas share the parameters, whose gradients add up."""
    module = randomised(MODULES[kind](64))
    replicas = [module._replicate_for_data_parallel() for _ in range(COUNT)]
    for replica in replicas:
        for key, p in module._parameters.items():
            setattr(replica, key, None if p is None else p.view_as(p))
            replica._parameters.pop(key, None)
    x = [torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(i)) for i in range(COUNT)]

    def task(index: int) -> Any:
        with torch.set_grad_enabled(grad):
            return replicas[index](x[index], x[index])

    made = at_once(task)
    for got, given in zip(made, x, strict=True):
        assert_equal_bits(got, module(given, given))
        assert got[0].requires_grad == grad
    if grad:
        sum(loss_of(got) for got in made).backward()
        expected = [p.grad.clone() for p in module.parameters()]
        module.zero_grad()
        sum(loss_of(module(given, given)) for given in x).backward()
        torch.testing.assert_close(expected, [p.grad for p in module.parameters()])


def test_a_backend_is_chosen_for_one_thread_only() -> None:
    x = torch.randn(3, 8)
    inside, leave = threading.Event(), threading.Event()

    def task(index: int) -> str:
        if index == 0:
            with normkit.use_backend("reference"):
                inside.set()
                assert leave.wait(30)
                return normkit.explain("rms_norm", x).backend
        assert inside.wait(30)
        chosen = backends.wanted_backend()
        leave.set()
        return chosen

    assert at_once(task, 2) == ["reference", "auto"]
    assert backends.wanted_backend() == "auto"


def test_backends_of_threads_do_not_leak_into_each_other() -> None:
    given = tensors("rms_norm", (64, 3, 96))
    names = ["auto", "cpu", "reference", "auto"]
    expected = []
    for name in names:
        with normkit.use_backend(name):
            expected.append(results_and_gradients(normkit.rms_norm, given)[1])

    def task(index: int) -> None:
        for _ in range(20):
            with normkit.use_backend(names[index]):
                assert backends.wanted_backend() == names[index]
                got = results_and_gradients(normkit.rms_norm, given)[1]
            assert backends.wanted_backend() == "auto"
            assert_equal_bits(got, expected[index])

    at_once(task)


def test_backward_goes_by_the_backend_of_the_forward_pass() -> None:
    given = tensors("rms_norm", (64, 3, 96), torch.bfloat16)

    def gradients(forward: str, backward: str) -> Any:
        wanting = clones(given, grad=True)
        with normkit.use_backend(forward):
            loss = loss_of(normkit.rms_norm(*wanting))
        with normkit.use_backend(backward):
            loss.backward()
        return [t.grad for t in wanting]

    for forward in ("cpu", "reference"):
        assert_equal_bits(gradients(forward, "auto"), gradients(forward, forward))
        assert_equal_bits(gradients(forward, "reference"), gradients(forward, forward))


def test_threads_compile_one_module_each() -> None:
    torch._dynamo.reset()
    modules = [randomised(nn.Sequential(normkit.RMSNorm(8)), seed) for seed in range(2)]
    x = torch.randn(3, 8)
    compiled = [torch.compile(m, backend="aot_eager", fullgraph=True) for m in modules]
    for index, made in enumerate(at_once(lambda i: compiled[i](x), 2)):
        assert_equal_bits(made, modules[index](x))
