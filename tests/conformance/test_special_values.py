"""Zeros, subnormals, infinities and NaN: what the formula says, in every dtype."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.support import (
    ADDING,
    AFFINE,
    BARE,
    DTYPES,
    EVERY,
    LAYER,
    NOT_GATED,
    NOT_GATED_PLAIN,
    OPS,
    POST,
    RMS,
    Inputs,
    Op,
    assert_same_bits,
    bits,
    inputs_for,
    run,
    run_and_check,
)
from normkit import reference

SMALLEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
LARGEST = {dtype: torch.finfo(dtype).max for dtype in DTYPES}
PLAIN = [op for op in OPS if not op.adds]


def _plain(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Inputs:
    return Inputs(x, torch.zeros_like(x), weight, bias)


@pytest.mark.parametrize("op", BARE, ids=str)
def test_negative_zero_keeps_its_sign(backend: Any, op: Op) -> None:
    """As in the formula: in x, in a residual, and in a weight of any dtype, read by any path."""
    for dtype, weight_dtype, n in itertools.product(DTYPES, DTYPES, (4, 67)):
        inputs = inputs_for(op, 3, n, dtype, weight_dtype=weight_dtype)
        for name in ("x", "residual", "weight"):
            getattr(inputs, name)[..., ::2] = -0.0
        result = run(backend, op, inputs._replace(bias=None))
        total = inputs.x.float() + inputs.residual.float() if op.adds else inputs.x.float()
        expected = reference.norm(total, inputs.weight, kind=op.kind)
        assert torch.equal(result.y.signbit(), expected.signbit())
        assert (result.y[:, ::2] == 0).all()
        if op.adds:
            assert_same_bits(result.residual_out, total.to(dtype))


@pytest.mark.parametrize("op", [*NOT_GATED, *POST], ids=str)
def test_a_bias_of_negative_zero_adds_nothing(backend: Any, op: Op) -> None:
    for dtype, bias_dtype, n in itertools.product(DTYPES, DTYPES, (4, 67)):
        inputs = inputs_for(op, 3, n, dtype, bias_dtype=bias_dtype)
        inputs.weight[..., ::2] = -0.0
        zero = torch.full_like(inputs.bias, -0.0)
        got = run(backend, op, inputs._replace(bias=zero)).y
        assert_same_bits(got, run(backend, op, inputs._replace(bias=None)).y)


@pytest.mark.parametrize("op", NOT_GATED, ids=str)
def test_rows_of_subnormals_are_not_flushed(backend: Any, op: Op) -> None:
    for dtype, out_dtype, n in itertools.product(DTYPES, DTYPES, (1, 4, 67)):
        x = SMALLEST[dtype] * (torch.arange(3 * n, dtype=torch.float64).reshape(3, n) - n)
        inputs = inputs_for(op, 3, n, dtype)
        inputs = inputs._replace(x=x.to(dtype), residual=torch.zeros_like(inputs.x), bias=None)
        result = run_and_check(backend, op, inputs, eps=1e-30, out_dtype=torch.float32)
        assert result.y.count_nonzero() > 0 or n == 1
        run_and_check(backend, op, inputs, eps=1e-6, out_dtype=out_dtype)


@pytest.mark.parametrize("op", NOT_GATED_PLAIN, ids=str)
def test_subnormals_beside_large_numbers_and_in_outputs(backend: Any, op: Op) -> None:
    """Most elements are tiny against their row: xhat, weight and y are subnormal in turn."""
    for dtype, out_dtype, n in itertools.product(DTYPES, DTYPES, (8, 67)):
        powers = torch.linspace(math.log2(SMALLEST[dtype]), 1, n, dtype=torch.float64)
        x = (2.0**powers * 1.37).to(dtype).repeat(2, 1)
        for weight_dtype, exponent in ((torch.float32, -140), (torch.bfloat16, -130), (dtype, 0)):
            weight = (2.0 ** (exponent + torch.arange(n) % 11).double() * 1.7).to(weight_dtype)
            run_and_check(backend, op, _plain(x, weight), eps=1e-6, out_dtype=out_dtype)
            run_and_check(backend, op, _plain(x, weight, weight), eps=1.0, out_dtype=out_dtype)


def _all_ones(dtype: torch.dtype) -> Tensor:
    nan = torch.zeros((), dtype=dtype)
    bits(nan).fill_(-1)
    return nan


@pytest.mark.parametrize("op", AFFINE, ids=str)
@pytest.mark.parametrize("place", ["x", "residual", "weight", "bias"])
def test_nan_of_any_payload_stays_nan(backend: Any, op: Op, place: str) -> None:
    """Rounding the bits of 0xFFFFFFFF as an integer would carry into the sign and give 0."""
    if place == "residual" and not op.adds:
        return
    for dtype, out_dtype, n in itertools.product(DTYPES, DTYPES, (5, 64, 67)):
        for low_bits in (-1, None):
            inputs = inputs_for(op, (2, 1), n, dtype)
            t = getattr(inputs, place)
            row = t[1, 0] if t.ndim == 3 else t.view(-1)
            row[n - 1] = _all_ones(dtype)
            if low_bits is None:  # the smallest payload: 0 once the low half is cut off
                bits(row)[n - 1] = 0x7F800001 if dtype == torch.float32 else bits(row)[n - 1]
            result = run_and_check(backend, op, inputs, out_dtype=out_dtype)
            affected = result.y[1] if t.ndim == 3 else result.y
            assert affected[..., n - 1].isnan().all()
            if place == "residual" or (place == "x" and op.adds):
                assert result.residual_out[1, 0, n - 1].isnan()
                assert result.residual_out.isnan().sum() == 1


@pytest.mark.parametrize("op", ADDING, ids=str)
def test_a_sum_that_is_nan_is_stored_as_nan(backend: Any, op: Op) -> None:
    for dtype, residual_dtype, n in itertools.product(DTYPES, DTYPES, (5, 64, 67)):
        inputs = inputs_for(op, 3, n, dtype, residual_dtype=residual_dtype)
        inputs.x[1, 0], inputs.residual[1, 0] = math.inf, -math.inf
        inputs.x[2, n - 1] = _all_ones(dtype)
        for round_sum in (True, False):
            result = run_and_check(backend, op, inputs, round_sum=round_sum)
            assert result.residual_out[1, 0].isnan()
            assert result.residual_out[2, n - 1].isnan()


@pytest.mark.parametrize("op", AFFINE, ids=str)
@pytest.mark.parametrize("place", ["weight", "bias"])
def test_infinite_weights_and_biases_show(backend: Any, op: Op, place: str) -> None:
    for dtype, n in itertools.product(DTYPES, (5, 67)):
        inputs = inputs_for(op, 3, n, dtype)
        getattr(inputs, place)[..., 0] = math.inf
        getattr(inputs, place)[..., n - 1] = -math.inf
        result = run_and_check(backend, op, inputs)
        assert result.y[:, [0, n - 1]].isinf().all()
        assert result.y[:, 1 : n - 1].isfinite().all()


@pytest.mark.parametrize("op", EVERY, ids=str)
def test_constant_rows(backend: Any, op: Op) -> None:
    for dtype, n, value in itertools.product(DTYPES, (1, 3, 64, 1000), (0.0, 1.0, -3.14, 100.0)):
        inputs = inputs_for(op, 2, n, dtype)
        constant = torch.full_like(inputs.x, value)
        inputs = inputs._replace(x=constant, residual=constant)
        for eps in (1e-6, 0.3):
            run_and_check(backend, op, inputs, eps=eps)


@pytest.mark.parametrize("op", EVERY, ids=str)
def test_a_variance_of_0_with_eps_0_is_nan(backend: Any, op: Op) -> None:
    """0 / 0, as the formula has it: for rows of zeros, and for a layer norm of constant rows."""
    for dtype, n in itertools.product(DTYPES, (1, 64)):
        value = 3.0 if op.kind == "layer" else 0.0
        x = torch.full((2, n), value, dtype=dtype)
        assert run_and_check(backend, op, _plain(x), eps=0.0).y.isnan().all()


@pytest.mark.parametrize("op", EVERY, ids=str)
def test_a_spike_in_a_row(backend: Any, op: Op) -> None:
    for dtype, n in itertools.product(DTYPES, (2, 64, 1000)):
        for spike in (1e3, -6e4):
            inputs = inputs_for(op, 3, n, dtype)
            inputs.x[1, n // 2] = spike
            run_and_check(backend, op, inputs)


@pytest.mark.parametrize("op", BARE, ids=str)
def test_float32_that_overflows_the_statistic_gives_what_the_formula_gives(
    backend: Any, op: Op
) -> None:
    """The sum of squares is infinite, rstd is 0, and so is y; other rows are as ever."""
    n = 64
    inputs = inputs_for(op, 3, n, torch.float32)
    inputs.x[1] *= 1e19
    inputs = inputs._replace(residual=torch.zeros_like(inputs.x), bias=None)
    result = run_and_check(backend, op, inputs)
    assert (result.y[1] == 0).all()
    assert (result.y[[0, 2]] != 0).all()
    below = inputs.x.clone()
    below[1] *= 1e-2  # squares of 1e34: nothing overflows
    fine = run_and_check(backend, op, inputs._replace(x=below))
    assert (fine.y[1] != 0).all()


@pytest.mark.parametrize("op", OPS, ids=str)
def test_rows_near_the_largest_float16(backend: Any, op: Op) -> None:
    for out_dtype, n in itertools.product(DTYPES, (1, 64, 1000)):
        inputs = inputs_for(op, 3, n, torch.float16)
        signs = torch.where(torch.arange(n) % 3 == 0, -1.0, 1.0)
        near = torch.stack([signs * 65504, signs * 60000, signs * 32768]).half()
        zero = torch.zeros_like(near)
        for x, residual in ((near, zero), (zero, near), (near / 2, near / 2)):
            run_and_check(backend, op, inputs._replace(x=x, residual=residual), out_dtype=out_dtype)


@pytest.mark.parametrize("op", ADDING, ids=str)
def test_a_sum_beyond_the_residuals_dtype_is_infinite(backend: Any, op: Op) -> None:
    """And without round_sum only where it is stored: the norm of the float32 sum is finite."""
    x = torch.full((2, 40), 60000.0, dtype=torch.float16)
    x[:, ::2] = -1000.0
    inputs = Inputs(x, x.clone(), None, None)
    rounded = run_and_check(backend, op, inputs, round_sum=True)
    assert rounded.residual_out[:, 1::2].isposinf().all()
    assert rounded.y.isnan().any()
    unrounded = run_and_check(backend, op, inputs, round_sum=False)
    assert unrounded.residual_out[:, 1::2].isposinf().all()
    assert unrounded.y.isfinite().all()


@pytest.mark.parametrize("op", [RMS, LAYER], ids=str)
def test_outputs_beyond_the_largest_number_are_infinite(backend: Any, op: Op) -> None:
    """With xhat 1 and -1; the weights lie on both sides of where rounding to infinity begins."""
    for out_dtype in (torch.float16, torch.bfloat16):
        largest = LARGEST[out_dtype]
        step = largest * torch.finfo(out_dtype).eps / (2 - torch.finfo(out_dtype).eps)
        edge = torch.tensor([largest, largest + step / 2], dtype=torch.float64).float()
        below = edge[1].nextafter(torch.tensor(0.0))
        weight = torch.stack([edge[0], below, edge[1], edge[1] * 1.003])
        x = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
        y = run(backend, op, _plain(x, weight), eps=0.0, out_dtype=out_dtype).y
        assert y[0].tolist() == [largest, -largest, math.inf, -math.inf]
