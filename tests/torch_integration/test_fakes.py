"""Fake and meta tensors come out of the norms as real ones do: shape, dtype and strides."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import normkit
from conformance.support import DTYPES
from normkit._spec import DEFAULT_OPTIONS
from torch_integration.support import (
    FUNCTIONS,
    MODULES,
    NAMES,
    adds,
    layouts,
    listed,
    operator,
    per_head,
    tensors,
)

Looks = list[tuple[tuple[int, ...], torch.dtype, tuple[int, ...], int]]


def looks(made: Any) -> Looks:
    """Say what can be seen; torch's own fakes have other strides where a size is 1."""
    return [(tuple(t.shape), t.dtype, strides(t), t.storage_offset()) for t in listed(made)]


def strides(t: Tensor) -> tuple[int, ...]:
    return tuple(
        stride if size > 1 else -1 for size, stride in zip(t.shape, t.stride(), strict=True)
    )


def faked(function: Any, given: list[Any], **options: Any) -> Looks:
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in given]
        return looks(function(*fakes, **options))


def several(name: str) -> Iterator[tuple[str, list[Tensor]]]:
    """Arguments of every memory layout of x and residual, and of few and many dimensions."""
    *_, weight, bias = tensors(name)
    for label, x in layouts((2, 3, 8), torch.float32):
        if not adds(name):
            yield label, [x, weight, bias]
            continue
        for other, residual in layouts((2, 3, 8), torch.float16):
            if "contiguous" in (label, other) or label == other:
                yield f"{label}, {other}", [x, residual, weight, bias]
    shapes = [(0, 3, 8), (2, 3, 1), (1, 3, 8), (3, 8), (2, 2, 3, 8)]
    for shape in shapes if per_head(name) else [*shapes, (8,), (1,)]:
        yield str(shape), tensors(name, shape, torch.bfloat16)
    ones = torch.randn(40).as_strided((1, 3, 8), (5, 8, 1))
    yield "an odd stride of one element", [ones, *([ones] if adds(name) else []), weight, bias]
    thin = torch.randn(2, 3, 8)[..., 5:6]
    yield "rows of one", [thin, *([thin] if adds(name) else []), weight[..., :1], bias[..., :1]]


@pytest.mark.parametrize("name", NAMES)
def test_fake_operators_give_what_real_ones_give(name: str) -> None:
    for label, given in several(name):
        real = looks(operator(name)(*given))
        assert faked(operator(name), given) == real, label


@pytest.mark.parametrize("name", NAMES)
def test_fake_operators_follow_dtypes_and_options(name: str) -> None:
    for dtype, other in itertools.product((*DTYPES, torch.float64), DTYPES):
        given = tensors(name, dtype=dtype, residual_dtype=other, weight_dtype=other)
        for options in ({}, {"out_dtype": other}, {"memory_efficient": True}):
            real = looks(operator(name)(*given, **options))
            assert faked(operator(name), given, **options) == real
    if per_head(name):
        for options in ({"kind": "rms"}, {"kind": "layer"}):
            real = looks(operator(name)(*given, **options))
            assert faked(operator(name), given, **options) == real


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_fakes_give_what_kernels_give(name: str) -> None:
    function = getattr(normkit, name)
    for label, given in several(name):
        real = looks(function(*given))
        assert faked(function, given) == real, label
        assert looks(operator(name)(*given)[: 1 + adds(name)]) == real, label


@pytest.mark.parametrize("wanted", [(1, 1, 1, 1), (1, 0, 0, 0), (0, 1, 0, 1), (0, 0, 1, 0)])
@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "head_norm"])
def test_fake_gradients_are_laid_out_as_real_ones(name: str, wanted: tuple[int, ...]) -> None:
    of_x, of_residual, of_weight, of_bias = map(bool, wanted)
    for label, given in several(name):
        x, weight, bias = given[0], *given[-2:]
        for of_sum in (x.dtype, torch.float64 if x.dtype == torch.float64 else torch.float32):
            arguments = [
                *(torch.randn(x.shape).to(x.dtype), torch.randn(x.shape), x, None, weight, bias),
                torch.ones(x.shape[:-1]),
                torch.zeros(x.shape[:-1]) if "layer" in name else None,
                *("layer" in name, per_head(name), False, 1e-6, *DEFAULT_OPTIONS.values()),
                *(False, False),  # no L2 norm
                *(x.dtype if of_x else None, of_sum if of_residual else None, of_weight, of_bias),
            ]
            real = looks(operator("norm_backward")(*arguments))
            assert faked(operator("norm_backward"), arguments) == real, label


@pytest.mark.parametrize("name", FUNCTIONS)
def test_meta_tensors_have_shapes_and_no_values(name: str) -> None:
    given = tensors(name, dtype=torch.bfloat16, residual_dtype=torch.float32)
    made = getattr(normkit, name)(*(t.to("meta") for t in given))
    assert all(t.is_meta for t in listed(made))
    assert looks(made) == looks(getattr(normkit, name)(*given))
    with pytest.raises(ValueError, match="weight: expected shape"):
        getattr(normkit, name)(*(t.to("meta") for t in given[:-2]), torch.ones(7, device="meta"))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_in_place_forms_take_fake_and_meta_tensors(name: str) -> None:
    given = tensors(name)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in given]
        made = listed(getattr(normkit, f"{name}_")(*fakes))
        assert all(a is b for a, b in zip(made, fakes, strict=False))
        out = torch.empty(2, 3, 8)
        assert listed(getattr(normkit, name)(*fakes, out=out))[0] is out
    metas = [t.to("meta") for t in given]
    assert listed(getattr(normkit, f"{name}_")(*metas))[0] is metas[0]


@pytest.mark.parametrize("kind", MODULES)
def test_modules_can_be_run_without_memory(kind: str) -> None:
    with torch.device("meta"):
        module, x = MODULES[kind](8), torch.empty(2, 3, 8)
    y, total = module(x, x)
    assert (y.is_meta, total.is_meta, y.shape) == (True, True, (2, 3, 8))
    y.sum().backward()
    assert all(p.grad.is_meta for p in module.parameters())
