"""add_head_norm is add_rms_norm or add_layer_norm of every head."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from conformance.support import DTYPES, assert_same_bits
from normkit.testing import assert_accurate, make_inputs

KINDS = ("rms", "layer")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 33, 128])
def test_it_is_the_head_norm_of_the_sum(backend: Any, kind: str, n: int) -> None:
    for dtype, residual_dtype in itertools.product(DTYPES, DTYPES):
        inputs = make_inputs((5, 3, n), dtype, residual_dtype=residual_dtype, per_head=True)
        x, residual, weight, bias = inputs
        y, total = backend("add_head_norm", x, residual, weight, bias, 1e-5, kind=kind)
        assert (y.dtype, total.dtype) == (dtype, residual_dtype)
        assert_same_bits(total, (x.float() + residual.float()).to(residual_dtype))
        assert_accurate(y, x, weight, bias, 1e-5, kind=kind, residual=residual, residual_out=total)
        unfused = backend("head_norm", total, weight, bias, 1e-5, kind=kind, out_dtype=dtype)
        assert_same_bits(y, unfused)
        a, b = x.clone(), residual.clone()
        made = backend("add_head_norm_", a, b, weight, bias, 1e-5, kind=kind)
        assert made[0] is a
        assert made[1] is b
        assert_same_bits(a, y)
        assert_same_bits(b, total)


@pytest.mark.parametrize("kind", KINDS)
def test_one_weight_for_all_heads_is_the_norm_of_rows(backend: Any, kind: str) -> None:
    x, residual, weight, bias = make_inputs((2, 4, 3, 40), torch.bfloat16)
    for round_sum in (True, False):
        got = backend("add_head_norm", x, residual, weight, bias, kind=kind, round_sum=round_sum)
        expected = backend(f"add_{kind}_norm", x, residual, weight, bias, 1e-6, round_sum=round_sum)
        for one, other in zip(got, expected, strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_unfused_norm(backend: Any, kind: str) -> None:
    made = []
    for fused in (True, False):
        inputs = make_inputs((5, 3, 24), torch.float32, per_head=True)
        x, residual, weight, bias = leaves = [t.requires_grad_() for t in inputs]
        if fused:
            y, total = backend("add_head_norm", x, residual, weight, bias, kind=kind)
        else:
            total = x + residual
            y = backend("head_norm", total, weight, bias, kind=kind)
        made.append(torch.autograd.grad([y, total], leaves, [y.detach(), total.detach()]))
    for got, expected in zip(*made, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
