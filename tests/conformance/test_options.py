"""What each option does, on inputs where doing something else gives another result."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

import normkit
from conformance.gradients import case_of, gradients, wanting
from conformance.support import (
    ADDING,
    AFFINE,
    BARE,
    BARE_ADDING,
    DTYPES,
    EVERY,
    EVERY_AFFINE,
    HEAD_RMS,
    LAYER,
    NOT_GATED_AFFINE_PLAIN,
    NOT_GATED_PLAIN,
    OPS,
    RMS,
    Inputs,
    Op,
    assert_same_bits,
    assert_same_results,
    inputs_for,
    run,
    run_and_check,
    run_in_place,
)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def _differ(a: torch.Tensor, b: torch.Tensor) -> float:
    """The share of elements that differ."""
    return (a != b).float().mean().item()


@pytest.mark.parametrize("op", AFFINE, ids=str)
def test_weight_offset_is_added_in_float32(backend: Any, op: Op) -> None:
    """A weight of 0.003 is lost beside 1 in bfloat16: a sum rounded there is 1 for all."""
    for dtype, weight_dtype in itertools.product(DTYPES, DTYPES):
        inputs = inputs_for(op, 4, 100, dtype, weight_dtype=weight_dtype)
        small = inputs._replace(weight=inputs.weight * 0.003)
        result = run_and_check(backend, op, small, weight_offset=1.0, out_dtype=F32)
        rounded = small._replace(weight=small.weight + 1.0)
        if weight_dtype != F32:
            assert _differ(run(backend, op, rounded, out_dtype=F32).y, result.y) > 0.5
        widened = small._replace(weight=small.weight.float() + 1.0)
        assert_same_results(run(backend, op, widened, out_dtype=F32), result)


@pytest.mark.parametrize("op", AFFINE, ids=str)
def test_without_a_weight_there_is_no_offset(backend: Any, op: Op) -> None:
    for dtype in DTYPES:
        inputs = inputs_for(op, 4, 100, dtype)._replace(weight=None)
        result = run_and_check(backend, op, inputs, weight_offset=1.0)
        assert_same_results(result, run(backend, op, inputs))


@pytest.mark.parametrize("op", EVERY_AFFINE, ids=str)
def test_an_integer_is_a_number(backend: Any, op: Op) -> None:
    inputs = inputs_for(op, 4, 100, F32)
    integers = run(backend, op, inputs, eps=1, weight_offset=2)
    assert_same_results(integers, run(backend, op, inputs, eps=1.0, weight_offset=2.0))


@pytest.mark.parametrize("op", AFFINE, ids=str)
def test_eps_none_is_that_of_float32(backend: Any, op: Op) -> None:
    """Whatever x is; the rows are so small that it decides the result."""
    for dtype in DTYPES:
        inputs = inputs_for(op, 4, 100, dtype, scale=1e-4)
        result = run_and_check(backend, op, inputs, eps=None)
        assert_same_results(run(backend, op, inputs, eps=2.0**-23), result)
        assert not torch.allclose(run(backend, op, inputs, eps=2.0**-22).y, result.y, rtol=0.1)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_out_dtype_follows_out(backend: Any, op: Op) -> None:
    inputs = inputs_for(op, 4, 100, BF16)
    out = torch.empty(4, 100, dtype=F32)
    assert_same_results(run(backend, op, inputs, out=out), run(backend, op, inputs, out_dtype=F32))
    assert_same_results(
        run(backend, op, inputs, out=out, out_dtype=F32), run(backend, op, inputs, out_dtype=F32)
    )


# ------------------------------------------------------------------------ round_before_weight


@pytest.mark.parametrize("op", NOT_GATED_AFFINE_PLAIN, ids=str)
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_round_before_weight_is_the_rounding_of_llama(
    backend: Any, op: Op, dtype: torch.dtype
) -> None:
    """x is 1 and -1 and eps is 2, so xhat is 1/sqrt(3) and no sum can blur where it is rounded."""
    n = 256
    x = torch.ones(2, n, dtype=dtype)
    x[:, ::2] = -1.0
    xhat = torch.full((2, n), 3**-0.5, dtype=torch.float64) * x
    weight = (1 + torch.arange(n) / 128).to(dtype)
    inputs = Inputs(x, x, weight, None)
    twice = (xhat.to(dtype).double() * weight.double()).to(dtype)
    once = (xhat * weight.double()).to(dtype)
    assert _differ(twice, once) > 0.1
    assert_same_bits(run(backend, op, inputs, eps=2.0, round_before_weight=True).y, twice)
    assert_same_bits(run(backend, op, inputs, eps=2.0, round_before_weight=False).y, once)
    wide = run(backend, op, inputs, eps=2.0, round_before_weight=True, out_dtype=F32)
    assert_same_bits(wide.y, xhat.to(dtype).float() * weight.float())


@pytest.mark.parametrize("op", BARE, ids=str)
def test_round_before_weight_without_a_weight_is_seen_in_a_wider_output(
    backend: Any, op: Op
) -> None:
    for dtype in (F16, BF16):
        inputs = inputs_for(op, 4, 100, dtype)._replace(weight=None, bias=None)
        y = run(backend, op, inputs, round_before_weight=True, out_dtype=F32).y
        assert_same_bits(y, y.to(dtype).float())
        assert _differ(run(backend, op, inputs, out_dtype=F32).y, y) > 0.5


@pytest.mark.parametrize("op", AFFINE, ids=str)
def test_round_before_weight_is_accurate_in_every_mix(backend: Any, op: Op) -> None:
    for dtype, weight_dtype, out_dtype, n in itertools.product(DTYPES, DTYPES, DTYPES, (65, 300)):
        inputs = inputs_for(op, 3, n, dtype, weight_dtype=weight_dtype)
        for offset in (0.0, 1.0):
            run_and_check(
                backend,
                op,
                inputs,
                round_before_weight=True,
                weight_offset=offset,
                out_dtype=out_dtype,
            )


@pytest.mark.parametrize("op", BARE_ADDING, ids=str)
def test_round_before_weight_rounds_to_the_dtype_of_what_is_normalised(
    backend: Any, op: Op
) -> None:
    """The rounded sum's, which is residual's; with round_sum=False x's."""
    for dtype, residual_dtype in itertools.product(DTYPES, DTYPES):
        inputs = inputs_for(op, 4, 100, dtype, residual_dtype=residual_dtype)
        inputs = inputs._replace(weight=None, bias=None)
        for round_sum, expected in ((True, residual_dtype), (False, dtype)):
            options = {"round_sum": round_sum, "out_dtype": F32}
            y = run_and_check(backend, op, inputs, round_before_weight=True, **options).y
            assert_same_bits(y, y.to(expected).float())
            if expected == F32:
                assert_same_bits(y, run(backend, op, inputs, **options).y)


# --------------------------------------------------------------------------------- round_rstd


def _deepseek(x: torch.Tensor, eps: float) -> torch.Tensor:
    """The norm without a weight of DeepSeek-V4 and GLM-5, in torch's operations."""
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return x * rstd.to(x.dtype)


def _rows_of_clear_rstd(x: torch.Tensor, eps: float) -> torch.Tensor:
    """The rows whose rstd is rounded alike in whatever order their squares are added up."""
    rstd = (x.double().square().mean(-1) + eps).rsqrt()
    low, high = ((rstd * (1 + step)).to(x.dtype) for step in (-(2.0**-20), 2.0**-20))
    return x[low == high]


@pytest.mark.parametrize("op", [RMS, HEAD_RMS], ids=str)
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_round_rstd_is_the_rounding_of_deepseek(backend: Any, op: Op, dtype: torch.dtype) -> None:
    for n, eps in itertools.product((64, 100, 512), (1e-6, 0.3)):
        x = _rows_of_clear_rstd(inputs_for(op, 40, n, dtype).x, eps)
        assert len(x) > 30
        x = x.unsqueeze(1) if op.per_head else x
        inputs = inputs_for(op, 1, n, dtype)._replace(x=x, residual=x, weight=None, bias=None)
        expected = _deepseek(inputs.x, eps)
        for form in (run, run_in_place):
            assert_same_bits(form(backend, op, inputs, eps=eps, round_rstd=True).y, expected)
        assert _differ(run(backend, op, inputs, eps=eps).y, expected) > 0.1  # a quarter of many


@pytest.mark.parametrize("op", AFFINE, ids=str)
def test_round_rstd_is_accurate_in_every_mix(backend: Any, op: Op) -> None:
    for dtype, weight_dtype, out_dtype, n in itertools.product(DTYPES, DTYPES, DTYPES, (65, 300)):
        inputs = inputs_for(op, 3, n, dtype, weight_dtype=weight_dtype)
        for rounds, offset in itertools.product((False, True), (0.0, 1.0)):
            options = {"round_before_weight": rounds, "weight_offset": offset}
            run_and_check(backend, op, inputs, round_rstd=True, out_dtype=out_dtype, **options)


@pytest.mark.parametrize("op", AFFINE, ids=str)
def test_round_rstd_is_seen_in_16_bits_only(backend: Any, op: Op) -> None:
    for dtype in DTYPES:
        inputs = inputs_for(op, 8, 100, dtype)
        results = [run(backend, op, inputs, round_rstd=r, out_dtype=F32) for r in (False, True)]
        if dtype == F32:
            assert_same_results(*results)
        else:
            assert _differ(results[0].y, results[1].y) > 0.5


@pytest.mark.parametrize("op", ADDING, ids=str)
def test_round_rstd_rounds_to_the_dtype_of_what_is_normalised(backend: Any, op: Op) -> None:
    """The rounded sum's, which is residual's; with round_sum=False x's."""
    for dtype, residual_dtype in itertools.product(DTYPES, DTYPES):
        inputs = inputs_for(op, 6, 100, dtype, residual_dtype=residual_dtype)
        for round_sum, expected in ((True, residual_dtype), (False, dtype)):
            options = {"round_sum": round_sum, "out_dtype": F32}
            rounded = run_and_check(backend, op, inputs, round_rstd=True, **options).y
            same = torch.equal(rounded, run(backend, op, inputs, **options).y)
            assert same == (expected == F32)


def test_round_rstd_reaches_the_ends_of_float16(backend: Any) -> None:
    """Its subnormal numbers, and infinity."""
    x = torch.tensor([[2.0**-16], [2.0**-16 * 1.125], [40000.0], [60000.0]], dtype=F16)
    inputs = inputs_for(RMS, 4, 1, F16)._replace(x=x, weight=None, bias=None)
    y = run_and_check(backend, RMS, inputs, eps=0.0, round_rstd=True, out_dtype=F32).y
    assert_same_bits(y, x.float() * (1 / x.float()).half().float())
    assert y.flatten().isinf().tolist() == [True, False, False, False]


def test_modules_round_rstd() -> None:
    x = inputs_for(HEAD_RMS, (8, 3), 64, BF16).x
    for module, function in (
        (normkit.RMSNorm(64, elementwise_affine=False, round_rstd=True), normkit.rms_norm),
        (normkit.LayerNorm(64, dtype=BF16, round_rstd=True), normkit.layer_norm),
        (normkit.HeadNorm(3, 64, bias=True, round_rstd=True), normkit.head_norm),
    ):
        affine = (module.weight, module.bias, module.eps)
        assert_same_bits(module(x), function(x, *affine, round_rstd=True))
        assert _differ(module(x), function(x, *affine)) > 0.1
        assert ", round_rstd=True" in str(module)


@pytest.mark.parametrize("op", AFFINE, ids=str)
def test_gradients_have_the_rstd_of_the_forward_pass(backend: Any, op: Op) -> None:
    """Also those that are differentiated again, which take it from x once more."""
    for dtype in (F16, BF16):
        leaves = wanting(op, inputs_for(op, (4, 3), 65, dtype))
        result = run(backend, op, leaves, round_rstd=True, out_dtype=F32)
        grad_y = torch.linspace(-1, 1, result.y.numel()).view_as(result.y)
        first, again = (
            torch.autograd.grad(result.y, leaves.x, grad_y, retain_graph=True, create_graph=twice)
            for twice in (False, True)
        )
        torch.testing.assert_close(again[0].detach(), first[0], rtol=2**-8, atol=1e-6)
        assert again[0].requires_grad


# ------------------------------------------------------------------------------- round_weight


def _with_its_offset(inputs: Inputs, offset: float) -> Inputs:
    """The weight that a model multiplies with which adds the offset in the weight's dtype."""
    assert inputs.weight is not None
    return inputs._replace(weight=inputs.weight + offset)


@pytest.mark.parametrize("op", AFFINE, ids=str)
def test_round_weight_is_the_rounding_of_models(backend: Any, op: Op) -> None:
    for dtype, weight_dtype, out_dtype, n in itertools.product(DTYPES, DTYPES, DTYPES, (65, 256)):
        inputs = inputs_for(op, (4, 3), n, dtype, weight_dtype=weight_dtype)
        for offset, form in ((1.0, run), (0.3125, run), (1.0, run_in_place)):
            options = {"round_before_weight": offset != 1.0}
            if form is run:
                options |= {"out_dtype": out_dtype}
            expected = form(backend, op, _with_its_offset(inputs, offset), **options)
            rounded = form(backend, op, inputs, weight_offset=offset, round_weight=True, **options)
            assert_same_results(rounded, expected)


@pytest.mark.parametrize("op", AFFINE, ids=str)
def test_round_weight_is_accurate(backend: Any, op: Op) -> None:
    for dtype, weight_dtype in itertools.product(DTYPES, DTYPES):
        inputs = inputs_for(op, (4, 3), 130, dtype, weight_dtype=weight_dtype)
        run_and_check(backend, op, inputs, weight_offset=1.0, round_weight=True)


@pytest.mark.parametrize("op", AFFINE, ids=str)
def test_round_weight_is_seen_where_a_weight_of_16_bits_has_an_offset(backend: Any, op: Op) -> None:
    for weight_dtype, offset in itertools.product(DTYPES, (0.0, 1.0)):
        inputs = inputs_for(op, 8, 100, F32, weight_dtype=weight_dtype)
        plain, rounded = (
            run(backend, op, inputs, weight_offset=offset, round_weight=r).y for r in (False, True)
        )
        if weight_dtype == F32 or offset == 0.0:
            assert_same_bits(rounded, plain)
        else:
            assert _differ(rounded, plain) > 0.1


@pytest.mark.parametrize("op", AFFINE, ids=str)
def test_gradients_have_the_weight_that_multiplied(backend: Any, op: Op) -> None:
    for dtype, weight_dtype in itertools.product(DTYPES, (F16, BF16)):
        inputs = inputs_for(op, (4, 3), 65, dtype, weight_dtype=weight_dtype)
        options: dict[str, Any] = {} if op.fused else {"memory_efficient": dtype == F16}
        made = [
            gradients(backend, case_of(op, given, **options, **more))
            for given, more in (
                (inputs, {"weight_offset": 1.0, "round_weight": True}),
                (_with_its_offset(inputs, 1.0), {}),
            )
        ]
        for got, expected in zip(*made, strict=True):
            assert_same_bits(got, expected)


def test_round_weight_without_a_weight_is_nothing(backend: Any) -> None:
    x = inputs_for(RMS, 4, 64, BF16).x
    assert_same_bits(
        backend("rms_norm", x, weight_offset=1.0, round_weight=True), backend("rms_norm", x)
    )


def test_modules_round_weight() -> None:
    x = inputs_for(HEAD_RMS, (8, 3), 64, BF16).x
    given: dict[str, Any] = {"dtype": BF16, "weight_offset": 1.0, "round_weight": True}
    for module, function in (
        (normkit.RMSNorm(64, **given), normkit.rms_norm),
        (normkit.LayerNorm(64, **given), normkit.layer_norm),
        (normkit.HeadNorm(3, 64, **given), normkit.head_norm),
    ):
        with torch.no_grad():
            module.weight.copy_(torch.linspace(-1, 1, module.weight.numel()).view_as(module.weight))
        affine = (module.weight + 1.0, module.bias, module.eps)
        assert_same_bits(module(x), function(x, *affine))
        assert (
            _differ(
                module(x), function(x, *affine[:0], module.weight, *affine[1:], weight_offset=1.0)
            )
            > 0.01
        )
        assert ", round_weight=True" in str(module)


# ---------------------------------------------------------------------------------- clamp_inf


@pytest.mark.parametrize("op", NOT_GATED_PLAIN, ids=str)
def test_clamp_inf_counts_infinity_as_the_largest_float16(backend: Any, op: Op) -> None:
    for n, out_dtype in itertools.product((3, 64, 67), DTYPES):
        inputs = inputs_for(op, 5, n, F16)
        infinite = inputs.x.clone()
        infinite[1, 0], infinite[2, n - 1], infinite[3, 1], infinite[4, 1] = (
            *(math.inf, -math.inf),
            *(math.inf, math.nan),
        )
        infinite[3, 2] = -math.inf
        clamped = infinite.clamp(-65504, 65504)
        given = inputs._replace(x=infinite)
        result = run_and_check(backend, op, given, clamp_inf=True, out_dtype=out_dtype)
        expected = run(backend, op, inputs._replace(x=clamped), out_dtype=out_dtype)
        assert_same_bits(result.y[:4], expected.y[:4])
        assert result.y[:4].isfinite().all()
        assert result.y[4, 1].isnan()
        hidden = run_and_check(backend, op, given, clamp_inf=False, out_dtype=out_dtype)
        assert hidden.y[1, 0].isnan()


@pytest.mark.parametrize("op", EVERY, ids=str)
def test_clamp_inf_leaves_other_dtypes_alone(backend: Any, op: Op) -> None:
    for dtype in (F32, BF16):
        inputs = inputs_for(op, 3, 64, dtype)
        inputs.x[1, 5] = math.inf
        inputs.x[2] *= 1e6
        result = run_and_check(backend, op, inputs, clamp_inf=True)
        assert_same_results(result, run(backend, op, inputs, clamp_inf=False))
        assert result.y[1, 5].isnan()


@pytest.mark.parametrize("op", BARE_ADDING, ids=str)
def test_clamp_inf_of_a_sum(backend: Any, op: Op) -> None:
    """A float16 x is clamped before the sum, a float16 sum where it is normalised, not stored."""
    for dtype, residual_dtype, round_sum, n in itertools.product(
        DTYPES, DTYPES, (True, False), (3, 67)
    ):
        inputs = inputs_for(op, 4, n, dtype, residual_dtype=residual_dtype)
        inputs.x[1, 0] = math.inf
        inputs.residual[2, 1] = -math.inf
        inputs.x[3], inputs.residual[3] = 50000.0, 40000.0
        result = run_and_check(backend, op, inputs, clamp_inf=True, round_sum=round_sum)
        assert result.residual_out[2, 1].isneginf()
        if dtype == F16:
            largest = 65504.0 + inputs.residual[1, 0].float()
            assert result.residual_out[1, 0] == largest.to(residual_dtype)
        else:
            assert result.residual_out[1, 0].isposinf()
        if residual_dtype == F16:
            assert result.residual_out[3].isposinf().all()
            assert result.y[3].isfinite().all()
            assert result.y[2].isfinite().all() == round_sum


# ---------------------------------------------------------------------------------- round_sum


@pytest.mark.parametrize(("op", "plain"), [(ADDING[0], RMS), (ADDING[1], LAYER)], ids=str)
def test_round_sum_false_normalises_the_float32_sum(backend: Any, op: Op, plain: Op) -> None:
    for dtype, residual_dtype in itertools.product(DTYPES, DTYPES):
        inputs = inputs_for(op, 4, 300, dtype, residual_dtype=residual_dtype)
        result = run_and_check(backend, op, inputs, round_sum=False, out_dtype=F32)
        total = inputs.x.float() + inputs.residual.float()
        assert_same_bits(result.residual_out, total.to(residual_dtype))
        unfused = run(backend, plain, inputs._replace(x=total), out_dtype=F32)
        assert_same_bits(result.y, unfused.y)
        rounded = run(backend, op, inputs, round_sum=True, out_dtype=F32)
        if residual_dtype != F32:
            assert _differ(rounded.y, result.y) > 0.5
        else:
            assert_same_results(rounded, result)
