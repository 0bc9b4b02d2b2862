"""What is kept for the backward pass: nothing twice, and nothing at all where it is recomputed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import normkit
from torch_integration.support import (
    FUNCTIONS,
    MODULES,
    adds,
    assert_equal_bits,
    listed,
    loss_of,
    operator,
    randomised,
    results_and_gradients,
    tensors,
)


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm, self.linear = randomised(MODULES[kind](8)), nn.Linear(8, 8)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y, residual = self.norm(x, residual)
        return self.linear(y).relu(), residual


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", MODULES)
def test_checkpointed_gradients_are_the_same_bits(kind: str, use_reentrant: bool) -> None:
    block, given = Block(kind), tensors("add_rms_norm")[:2]

    def recomputed(*given: Tensor) -> Any:
        return checkpoint(block, *given, use_reentrant=use_reentrant)

    results = []
    for function in (recomputed, block):
        block.zero_grad()
        made, gradients = results_and_gradients(function, given)
        results.append([*made, *gradients, *(p.grad for p in block.parameters())])
    assert_equal_bits(*results)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_sequence_of_norms_can_be_checkpointed(use_reentrant: bool) -> None:
    model = nn.Sequential(*(randomised(normkit.RMSNorm(8, memory_efficient=True)) for _ in "1234"))
    given = tensors("rms_norm")[:1]

    def recomputed(x: Tensor) -> Any:
        return checkpoint_sequential(model, 2, x, use_reentrant=use_reentrant)

    assert_equal_bits(
        results_and_gradients(recomputed, given)[1], results_and_gradients(model, given)[1]
    )


def test_a_compiled_block_can_be_checkpointed() -> None:
    torch._dynamo.reset()
    block, given = Block("RMSNorm"), tensors("add_rms_norm")[:2]

    @torch.compile(backend="aot_eager", fullgraph=True)
    def recomputed(*given: Tensor) -> Any:
        return checkpoint(block, *given, use_reentrant=False)

    assert_equal_bits(
        results_and_gradients(recomputed, given)[1], results_and_gradients(block, given)[1]
    )


@contextmanager
def kept() -> Iterator[list[Tensor]]:
    """List what autograd keeps."""
    tensors: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        tensors.append(t)
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        yield tensors


def places(tensors: list[Tensor]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors}


def statistics_of(name: str, shape: tuple[int, ...], memory_efficient: bool) -> int:
    per_row = 2 if "layer" in name and not memory_efficient else 1
    return per_row * 4 * torch.Size(shape[:-1]).numel()


@pytest.mark.parametrize("dispatched", [False, True])
@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_is_kept_twice(name: str, memory_efficient: bool, dispatched: bool) -> None:
    shape = (4, 3, 16)
    given = tensors(name, shape, torch.bfloat16, grad=True)
    function = operator(name) if dispatched else getattr(normkit, name)
    with kept() as saved:
        made = listed(function(*given, memory_efficient=memory_efficient))
    source = made[0] if memory_efficient else made[1] if adds(name) else given[0]
    own = [t for t in saved if t.untyped_storage().data_ptr() not in places([source, *given[-2:]])]
    assert places([source, *given[-2:]]) <= places(saved)
    size = sum(t.numel() * t.element_size() for t in own)
    assert size == statistics_of(name, shape, memory_efficient)
    inputs = given[: 1 + adds(name)]
    assert source is given[0] or not places(inputs) & places(saved)


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm"])
def test_what_loses_too_much_is_not_undone(name: str) -> None:
    given = tensors(name, dtype=torch.float16, grad=True)
    for option in ("round_before_weight", "clamp_inf"):
        with kept() as saved:
            made = listed(getattr(normkit, name)(*given, memory_efficient=True, **{option: True}))
        assert not places(made[:1]) & places(saved)


def test_the_float32_sum_is_made_again_from_both_of_its_parts() -> None:
    given = tensors("add_rms_norm", dtype=torch.bfloat16, grad=True)
    with kept() as saved:
        _, total = normkit.add_rms_norm(*given, round_sum=False)
    assert places(given[:2]) <= places(saved)
    assert not places([total]) & places(saved)


def test_nothing_is_kept_without_a_gradient() -> None:
    given = tensors("rms_norm", grad=True)
    with kept() as saved, torch.no_grad():
        normkit.rms_norm(*given)
    with kept() as saved_of_constants:
        normkit.rms_norm(*(t.detach() for t in given))
    assert saved == saved_of_constants == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_kept_may_be_moved_away_and_back(name: str) -> None:
    given = tensors(name, dtype=torch.bfloat16)
    expected = results_and_gradients(getattr(normkit, name), given)[1]
    with save_on_cpu():
        got = results_and_gradients(getattr(normkit, name), given)[1]
    assert_equal_bits(got, expected)


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_overwriting_what_is_kept_is_an_error(name: str, memory_efficient: bool) -> None:
    leaves = tensors(name, grad=True)
    given = [t * 1 for t in leaves]
    made = listed(getattr(normkit, name)(*given, memory_efficient=memory_efficient))
    loss = loss_of(made)
    with torch.no_grad():
        (made[0] if memory_efficient else made[1] if adds(name) else given[0]).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_place_norms_tell_autograd_that_they_write() -> None:
    x, kept_tensor = torch.rand(2, 8), torch.rand(2, 8)
    weight = torch.rand(2, 8, requires_grad=True)
    loss = (weight * kept_tensor).sum() + (weight * x).sum()
    normkit.add_rms_norm_(x, kept_tensor)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
