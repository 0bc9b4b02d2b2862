"""The oracle of everything else, held to numbers and formulas that are not its own."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conformance.support import DTYPES, assert_same_bits
from normkit import reference
from normkit.testing import make_inputs

F32, F16, F64 = torch.float32, torch.float16, torch.float64


def test_by_hand() -> None:
    x = torch.tensor([[1.0, 7.0, 1.0, 7.0], [5.0, -5.0, -5.0, 5.0]])
    weight, bias = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.5, 0.0, 0.0, -1.0])
    # mean of squares 25, with eps 11: 36; the second row 25 + 11
    rms = reference.norm(x, weight, bias, 11.0, kind="rms")
    expected = [
        [1 / 6 + 0.5, 14 / 6, 3 / 6, 28 / 6 - 1],
        [5 / 6 + 0.5, -10 / 6, -15 / 6, 20 / 6 - 1],
    ]
    torch.testing.assert_close(rms, torch.tensor(expected))
    # mean 4 and variance 9, with eps 7: 16; mean 0 and variance 25, with eps 7: 32
    layer = reference.norm(x, weight, None, 7.0, kind="layer")
    root = 32**0.5
    expected = [[-0.75, 1.5, -2.25, 3.0], [5 / root, -10 / root, -15 / root, 20 / root]]
    torch.testing.assert_close(layer, torch.tensor(expected))
    y, total = reference.add_norm(x, 2 * x, weight, None, 63.0, kind="layer", weight_offset=-1.0)
    assert torch.equal(total, 3 * x)  # variance 81, with eps 63: 144
    torch.testing.assert_close(y[0], torch.tensor([0.0, 0.75, -1.5, 2.25]))


@pytest.mark.parametrize("eps", [None, 1e-6, 0.3])
def test_it_is_torchs_norm_in_float64(eps: float | None) -> None:
    x, residual, weight, bias = make_inputs((5, 33), F64)
    rms = F.rms_norm(x, (33,), weight, eps)
    torch.testing.assert_close(reference.norm(x, weight, None, eps, kind="rms"), rms)
    if eps is not None:
        layer = F.layer_norm(x, (33,), weight, bias, eps)
        torch.testing.assert_close(reference.norm(x, weight, bias, eps, kind="layer"), layer)
    y, total = reference.add_norm(x, residual, weight, None, eps, kind="rms")
    torch.testing.assert_close(y, F.rms_norm(x + residual, (33,), weight, eps))
    torch.testing.assert_close(total, x + residual)


def test_eps_none_is_that_of_the_computing_dtype() -> None:
    for dtype, compute in itertools.product((*DTYPES, F64), (None, F32, F64)):
        x = torch.full((1, 4), 1e-7, dtype=F64).to(dtype)
        used = compute or (F64 if dtype == F64 else F32)
        given = reference.norm(x, eps=None, kind="rms", compute_dtype=compute, out_dtype=F64)
        eps = torch.finfo(used).eps
        expected = reference.norm(x, eps=eps, kind="rms", compute_dtype=compute, out_dtype=F64)
        assert torch.equal(given, expected)


def _llama(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def _gemma(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * (1.0 + weight.float())).type_as(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_its_roundings_are_those_of_model_families(dtype: torch.dtype) -> None:
    for seed in range(20):
        x, _, weight, _ = make_inputs((50, 96), dtype, seed=seed)
        llama = reference.norm(x, weight, kind="rms", round_before_weight=True)
        assert_same_bits(llama, _llama(x, weight, 1e-6))
        gemma = reference.norm(x, weight, kind="rms", weight_offset=1.0)
        assert_same_bits(gemma, _gemma(x, weight, 1e-6))
        if dtype != F32:
            assert not torch.equal(llama, _gemma(x, weight - 1, 1e-6))


def test_clamped_infinities() -> None:
    x = torch.tensor([[torch.inf, 0.0, 0.0, -torch.inf], [torch.nan, 1.0, torch.inf, 2.0]])
    clamped = reference.norm(x.half(), kind="rms", clamp_inf=True)
    root = 2**0.5  # [c, 0, 0, -c] / sqrt(c^2 / 2)
    assert_same_bits(clamped[0], torch.tensor([root, 0.0, 0.0, -root]).half())
    assert clamped[1].isnan().all()
    for dtype in (F32, torch.bfloat16):
        assert reference.norm(x.to(dtype), kind="rms", clamp_inf=True)[0, 0].isnan()
    big = torch.full((1, 4), 60000.0, dtype=F16)
    y, total = reference.add_norm(big, big, kind="rms", clamp_inf=True)
    assert total.isposinf().all()
    torch.testing.assert_close(y, torch.ones_like(y))
    y, total = reference.add_norm(x.half()[:1], x.float()[:1] * 0 + 1.0, kind="rms", clamp_inf=True)
    assert total[0].isnan()[0]


def test_rounding_of_a_sum() -> None:
    x, residual = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0**-9, 1.0]])
    low = residual.bfloat16()
    rounded, total = reference.add_norm(x, low, kind="rms", eps=0.0, round_sum=True)
    assert total.dtype == torch.bfloat16
    assert total.tolist() == [[1.0, 2.0]]
    torch.testing.assert_close(rounded, torch.tensor([[1.0, 2.0]]) / 2.5**0.5)
    unrounded, again = reference.add_norm(x, low, kind="rms", eps=0.0, round_sum=False)
    assert torch.equal(again, total)
    exact = torch.tensor([[1 + 2.0**-9, 2.0]], dtype=F64)
    exact /= (exact**2).mean().sqrt()
    torch.testing.assert_close(unrounded, exact.float())
    assert not torch.allclose(unrounded, rounded, rtol=1e-4)


def test_an_unknown_kind_is_an_error() -> None:
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"^kind: expected"):
        reference.norm(x, kind="batch")
    with pytest.raises(ValueError, match=r"^kind: expected"):
        reference.add_norm(x, x, kind="batch")


def test_it_can_be_exported() -> None:
    class Norm(torch.nn.Module):
        def forward(self, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return reference.add_norm(x, residual, weight, kind="layer", clamp_inf=True)

    x, residual, weight, _ = make_inputs((3, 8), F16)
    program = torch.export.export(Norm(), (x, residual, weight))
    got = program.module()(x, residual, weight)
    for mine, theirs in zip(got, Norm()(x, residual, weight), strict=True):
        assert_same_bits(mine, theirs)
