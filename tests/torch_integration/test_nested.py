"""Jagged nested tensors: a norm of them is one of their values, as with torch's own norms."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import normkit
from normkit import HeadNorm, LayerNorm, RMSNorm
from torch_integration.support import assert_equal_bits, randomised


def jagged(*ending: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(9, *ending, generator=generator).to(dtype)
    return torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, 2, 2, 9]))


def with_offsets_of(x: Any, values: Tensor) -> Any:
    return torch.nested.nested_tensor_from_jagged(values, x.offsets())


@pytest.mark.parametrize(
    ("norm", "ending"),
    [
        (RMSNorm(8), (8,)),
        (RMSNorm(8, elementwise_affine=False), (8,)),
        (LayerNorm(8), (8,)),
        (RMSNorm((4, 8)), (4, 8)),
        (HeadNorm(4, 8), (4, 8)),
        (HeadNorm(None, 8, kind="layer", bias=True), (4, 8)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_modules_normalise_the_values(norm: Any, ending: tuple[int, ...], dtype: Any) -> None:
    norm = randomised(norm)
    x = jagged(*ending, dtype=dtype)
    with torch.no_grad():
        y = norm(x)
        assert y.shape == x.shape
        assert (y + x).shape == x.shape  # of one ragged structure
        assert_equal_bits(y.values(), norm(x.values()))
        residual = with_offsets_of(x, x.values() * 2)
        y, total = norm(x, residual)
        expected = norm(x.values(), residual.values())
        assert_equal_bits(y.values(), expected[0])
        assert_equal_bits(total.values(), expected[1])


def test_gradients_are_those_of_the_values() -> None:
    norm = randomised(LayerNorm(8))
    grads = []
    for is_jagged in (True, False):
        norm.zero_grad()
        x = jagged(8).values().clone().requires_grad_()
        given = with_offsets_of(jagged(8), x) if is_jagged else x
        y = norm(given)
        (y.values() if is_jagged else y).square().sum().backward()
        grads.append([x.grad, norm.weight.grad, norm.bias.grad])
    for got, expected in zip(*grads, strict=True):
        assert_equal_bits(got, expected)


def test_in_place_and_into_an_output() -> None:
    x, out = jagged(8), jagged(8, seed=1)
    expected = normkit.rms_norm(x.values())
    out = with_offsets_of(x, out.values())
    assert normkit.rms_norm(x, out=out) is out
    assert_equal_bits(out.values(), expected)
    assert normkit.rms_norm_(x) is x
    assert_equal_bits(x.values(), expected)


def test_rows_in_another_order() -> None:
    """q of (batch, heads, ragged, head_dim), as attention wants it."""
    q = jagged(3, 8).transpose(1, 2)
    y = normkit.head_norm(q)
    assert y.shape == q.shape
    assert_equal_bits(y.transpose(1, 2).values(), normkit.head_norm(jagged(3, 8).values()))


def test_a_compiled_norm_takes_them() -> None:
    norm = randomised(RMSNorm(8)).requires_grad_(False)
    made = torch.compile(norm, fullgraph=True, backend="aot_eager")(jagged(8))
    assert_equal_bits(made.values(), norm(jagged(8)).values())


def test_explain_speaks_of_the_values() -> None:
    assert (
        normkit.explain("rms_norm", jagged(8)).backend
        == normkit.explain("rms_norm", torch.ones(9, 8)).backend
    )


def test_what_is_not_ragged_alike_is_refused_by_name() -> None:
    x = jagged(8)
    with pytest.raises(ValueError, match=r"^x: expected rows of one length"):
        normkit.rms_norm(x.transpose(1, 2))
    with pytest.raises(ValueError, match=r"^residual: expected a jagged tensor"):
        normkit.add_rms_norm(x, torch.ones(9, 8))
    with pytest.raises(ValueError, match=r"^residual: expected x's shape"):
        normkit.add_rms_norm(x, jagged(8))  # of other offsets, though they are equal
    with pytest.raises(ValueError, match=r"^weight: expected shape \(8,\)"):
        normkit.rms_norm(x, torch.ones(7))


@pytest.mark.parametrize("make", [lambda: LayerNorm(8), lambda: RMSNorm(8, bias=True)])
@pytest.mark.parametrize("affine", [True, False])
def test_a_module_refuses_a_strided_nested_tensor_by_name(make: Any, affine: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)])
    norm = make() if affine else RMSNorm(8, elementwise_affine=False)
    with pytest.raises(ValueError, match=r"^x: expected a dense .*strided nested"):
        norm(x)
