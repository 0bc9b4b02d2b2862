"""`ModulatedNorm` is the norm of AdaLN layers, as a module."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkit
from normkit import testing


def made(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, residual, and gate, scale and shift for each sample."""
    x, residual, *_ = testing.make_inputs((2, 5, 64), dtype, residual_dtype=dtype)
    gate, scale, shift = testing.make_inputs((3, 2, 1, 64), dtype, seed=3).x
    return x, residual, gate, scale, shift


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("affine", [False, True])
def test_it_computes_what_models_of_diffusers_do(dtype: torch.dtype, affine: bool) -> None:
    x, residual, gate, scale, shift = made(dtype)
    norm = normkit.ModulatedNorm(
        64, elementwise_affine=affine, bias=affine, round_each=True, dtype=dtype
    )
    theirs = nn.LayerNorm(64, 1e-6, elementwise_affine=affine, dtype=dtype)
    if affine:
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias, 0, 0.3)
        theirs.load_state_dict(norm.state_dict())
    y, total = norm(x, scale, shift, residual=residual, gate=gate)
    assert torch.equal(total, residual + gate * x)
    for got, source in ((norm(x, scale, shift), x), (y, total)):
        expected = theirs(source) * (1 + scale) + shift
        if dtype == torch.float32:
            torch.testing.assert_close(got, expected)
        else:
            assert (got == expected).float().mean() > 0.995


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_it_is_its_function(kind: Any) -> None:
    x, residual, gate, scale, shift = made(torch.bfloat16)
    norm = normkit.ModulatedNorm(64, 1e-5, kind=kind, elementwise_affine=True)
    nn.init.normal_(norm.weight, 1, 0.3)
    given = (scale, shift, norm.weight, None, 1e-5)
    assert torch.equal(norm(x, scale, shift), normkit.modulated_norm(x, *given, kind=kind))
    expected = normkit.add_modulated_norm(x, residual, gate, *given, kind=kind)
    for got, one in zip(norm(x, scale, shift, residual=residual, gate=gate), expected, strict=True):
        assert torch.equal(got, one)
    assert torch.equal(norm(x), normkit.modulated_norm(x, None, None, *given[2:], kind=kind))


def test_it_is_a_module() -> None:
    norm = normkit.ModulatedNorm(8, elementwise_affine=True, bias=True, dtype=torch.float16)
    assert list(norm.state_dict()) == ["weight", "bias"]
    assert torch.equal(norm.weight, torch.ones(8, dtype=torch.float16))
    assert torch.equal(norm.bias, torch.zeros(8, dtype=torch.float16))
    assert repr(norm) == "ModulatedNorm(8, eps=1e-06, elementwise_affine=True, bias=True)"
    assert repr(copy.deepcopy(norm)) == repr(norm)
    other = normkit.ModulatedNorm(8, kind="rms", round_each=True)
    assert list(other.state_dict()) == []
    assert repr(other) == "ModulatedNorm(8, eps=1e-06, kind='rms', round_each=True)"


def test_it_has_gradients_for_what_modulates_and_for_its_own() -> None:
    x, residual, gate, scale, shift = (t.requires_grad_() for t in made(torch.float32))
    norm = normkit.ModulatedNorm(64, elementwise_affine=True, bias=True)
    y, total = norm(x, scale, shift, residual=residual, gate=gate)
    (y.square().sum() + total.sum()).backward()
    for t in (x, residual, gate, scale, shift, norm.weight, norm.bias):
        assert t.grad is not None
        assert t.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: normkit.ModulatedNorm(0), ValueError, r"^hidden_size: expected at least 1, got 0"),
        (lambda: normkit.ModulatedNorm(8, kind="l2"), ValueError, r'^kind: expected "rms" or'),
        (lambda: normkit.ModulatedNorm(8, eps=-1.0), ValueError, r"^eps: expected a number >= 0"),
        (
            lambda: normkit.ModulatedNorm(8)(torch.ones(2, 9)),
            ValueError,
            r"^x: expected a shape that ends in \(8,\), got \(2, 9\)",
        ),
        (
            lambda: normkit.ModulatedNorm(8)(torch.ones(2, 8), gate=torch.ones(8)),
            ValueError,
            r"^gate: expected None without a residual, got a tensor",
        ),
    ],
)
def test_errors_name_the_argument(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
