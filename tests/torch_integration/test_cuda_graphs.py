"""A training step can be captured in a CUDA graph, and replays on the inputs of the moment."""

from __future__ import annotations

import pytest
import torch

import normkit
from torch_integration.support import (
    FUNCTIONS,
    MODULES,
    assert_equal_bits,
    listed,
    loss_of,
    needs_cuda,
    randomised,
    tensors,
)

pytestmark = [needs_cuda, pytest.mark.gpu]
SHAPE = (4, 3, 256)


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_and_backward_are_captured_together(name: str, memory_efficient: bool) -> None:
    function = getattr(normkit, name)
    given = [t.cuda().requires_grad_() for t in tensors(name, SHAPE, torch.bfloat16)]

    def step() -> list[torch.Tensor]:
        made = listed(function(*given, memory_efficient=memory_efficient))
        ones = [torch.ones_like(t) for t in made]
        return [*made, *torch.autograd.grad(made, given, ones)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        with torch.no_grad():
            for t, new in zip(given, tensors(name, SHAPE, torch.bfloat16, seed=seed), strict=True):
                t.copy_(new)
            for t in captured:
                t.fill_(float("nan"))
        graph.replay()
        assert_equal_bits([t.cpu() for t in captured], [t.cpu() for t in step()])


@pytest.mark.parametrize("kind", MODULES)
def test_modules_can_be_graphed_callables(kind: str) -> None:
    module = randomised(MODULES[kind](256)).cuda()
    plain = randomised(MODULES[kind](256)).cuda()
    sample = torch.randn(SHAPE, device="cuda", requires_grad=True)
    graphed = torch.cuda.make_graphed_callables(module, (sample,))
    for _ in range(2):
        x = torch.randn(SHAPE, device="cuda", requires_grad=True)
        made, expected = graphed(x), plain(x)
        assert_equal_bits(made.cpu(), expected.cpu())
        of_x = [torch.autograd.grad(loss_of(y), x)[0].cpu() for y in (made, expected)]
        assert_equal_bits(*of_x)
