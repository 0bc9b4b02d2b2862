"""Rows whose columns are split into parts: what the extension makes of the parts is the norm of
whole rows, and its gradients.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import normkit
from conformance.gradients import case_of
from conformance.parts import (
    Native,
    gradients,
    kind_of,
    make_and_check,
    native_of,
    run,
    run_and_check,
    statistics,
)
from conformance.support import (
    DTYPES,
    HEAD_LAYER,
    HEAD_RMS,
    LAYER,
    RMS,
    ROUNDINGS,
    Inputs,
    Op,
    assert_same_bits,
    inputs_for,
    needs_kernels,
    threads,
)

OPS = (RMS, LAYER, HEAD_RMS, HEAD_LAYER)
COUNTS = (1, 2, 3, 4, 8)
SIZES = (1, 2, 7, 64, 65, 130, 1000, 4100)  # of a part; the last is beyond one step of every lane


@pytest.fixture(scope="session")
def native(kernels: Any) -> Native:
    return native_of(kernels.name)


# ------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_statistics_are_those_of_the_part_itself(native: Native, op: Op, n: int) -> None:
    for dtype in DTYPES:
        x = inputs_for(op, (2, 3), n, dtype, seed=n).x
        planes = native("part_statistics", kind_of(op), x, False)
        wide = x.double()
        expected = [wide.square().sum(-1)]
        if op.kind == "layer":
            mean = wide.mean(-1, keepdim=True)
            expected = [(wide - mean).square().sum(-1), mean.squeeze(-1)]
        assert planes.dtype == torch.float32
        assert planes.is_contiguous()
        torch.testing.assert_close(
            planes.double(), torch.stack(expected), rtol=2.0**-20, atol=n * 2.0**-44
        )


# ---------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_parts_together_are_the_norm_of_whole_rows(native: Native, op: Op, n: int) -> None:
    for count, dtype in itertools.product(COUNTS, DTYPES):
        run_and_check(native, op, inputs_for(op, (2, 3), n * count, dtype, seed=n), count)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_every_mix_of_dtypes_is_served(native: Native, op: Op) -> None:
    for x, weight, bias, out in itertools.product(DTYPES, repeat=4):
        inputs = inputs_for(op, (2, 3), 140, x, weight_dtype=weight, bias_dtype=bias)
        run_and_check(native, op, inputs, 2, out_dtype=out)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_every_option_is_that_of_the_whole_norm(native: Native, op: Op) -> None:
    for dtype, rounds, offset, eps in itertools.product(
        DTYPES, ({}, *({flag: True} for flag in ROUNDINGS)), (0.0, 1.0), (0.3, 1e-6)
    ):
        inputs = inputs_for(op, (2, 3), 132, dtype)
        options = {**rounds, "weight_offset": offset, "eps": eps}
        run_and_check(native, op, inputs, 4, **options)
        run_and_check(native, op, inputs._replace(bias=None), 4, **options)
    bare = inputs._replace(weight=None)
    run_and_check(native, op, bare, 4)
    run_and_check(native, op, bare._replace(bias=None), 4)


@pytest.mark.parametrize("op", [RMS, HEAD_RMS], ids=str)
def test_clamped_infinities_count_as_the_largest_float16_in_every_part(
    native: Native, op: Op
) -> None:
    inputs = inputs_for(op, (2, 3), 66, torch.float16)
    inputs.x[0, 1, 50] = -torch.inf
    run_and_check(native, op, inputs, 3, clamp_inf=True)
    # Of another dtype nothing is clamped.
    wide = inputs._replace(x=inputs.x.bfloat16())
    assert run(native, op, wide, 3, clamp_inf=True).y[0, 1, 50].isnan()


@pytest.mark.parametrize("op", OPS, ids=str)
def test_parts_may_have_any_outer_strides(native: Native, op: Op) -> None:
    inputs = inputs_for(op, (2, 3, 2, 2, 3), 66, torch.bfloat16)
    expected = run_and_check(native, op, inputs, 3)
    for shift in (0, 1, 5):
        memory = torch.zeros(3, 2, 3, 2, 2, 80, dtype=torch.bfloat16)
        moved = memory.permute(1, 2, 3, 4, 0, 5)[..., shift : shift + 66]
        moved.copy_(inputs.x)
        made = run(native, op, inputs._replace(x=moved), 3)
        for got, want in zip(made, expected, strict=True):
            assert_same_bits(got, want)
    row = inputs.x[:1, :1, :1, :1]
    expanded = inputs._replace(x=row.expand(2, 3, 2, 2, 3, 66))
    run_and_check(native, op, expanded, 3)


@pytest.mark.parametrize("count", COUNTS)
def test_a_mean_that_dwarfs_the_deviation_costs_no_accuracy(native: Native, count: int) -> None:
    """E[x^2] - E[x]^2 would lose every digit of the variance."""
    inputs = inputs_for(LAYER, 5, 96 * count, torch.float32)
    centred = (inputs.x - 0.5) / 1.5
    for mean in (1000.0, -3e4):
        run_and_check(native, LAYER, inputs._replace(x=centred + mean), count)
    made = run_and_check(native, LAYER, inputs._replace(x=centred + 1000.0), count)
    torch.testing.assert_close(made.rstd, torch.ones(5), rtol=0.2, atol=0)


@pytest.mark.parametrize("count", COUNTS[1:])
def test_parts_of_different_means_make_one_variance(native: Native, count: int) -> None:
    inputs = inputs_for(LAYER, 5, 40 * count, torch.float32)
    steps = torch.arange(40 * count) // 40 * 50.0
    run_and_check(native, LAYER, inputs._replace(x=inputs.x + steps), count)
    run_and_check(native, LAYER, inputs._replace(x=steps.expand(5, -1)), count)


def test_squares_that_float32_cannot_hold_are_infinite_as_in_whole_rows(native: Native) -> None:
    x = torch.tensor([[1.5e19, -1.5e19], [1.0, 2.0]])  # each square is below the largest float32
    for op in (RMS, LAYER):
        y = run_and_check(native, op, Inputs(x, x, None, None), 2).y
        assert torch.equal(y[0], torch.tensor([0.0, -0.0]))


def test_a_sum_over_many_parts_keeps_the_bound(native: Native) -> None:
    for op in (RMS, LAYER):
        inputs = inputs_for(op, 2, 4 * 512, torch.float32)
        run_and_check(native, op, inputs._replace(x=inputs.x + 3.0), 512)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_a_nan_in_one_part_shows_in_its_row_and_nowhere_else(native: Native, op: Op) -> None:
    for dtype in DTYPES:
        inputs = inputs_for(op, (2, 3), 60, dtype)
        inputs.x[1, 0, 17] = torch.nan
        y = run_and_check(native, op, inputs, 3).y
        expected = torch.zeros(2, 3, dtype=torch.bool)
        expected[1, 0] = True
        assert torch.equal(y.isnan().all(-1), expected)
        assert torch.equal(y.isnan().any(-1), expected)


def rows_of(op: Op, inputs: Inputs, which: slice) -> Inputs:
    return inputs._replace(x=inputs.x[which], residual=inputs.residual[which])


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("n", [3, 64, 600])
def test_a_row_does_not_depend_on_the_batch(native: Native, op: Op, n: int) -> None:
    """Nor on its place in it: 200 rows are several launches of the emulation."""
    for dtype in DTYPES:
        inputs = inputs_for(op, (200, 1), n * 2, dtype)
        made = run(native, op, inputs, 2)
        for first, last in ((0, 1), (63, 65), (130, 131), (199, 200)):
            alone = run(native, op, rows_of(op, inputs, slice(first, last)), 2)
            for got, whole in zip(alone, made, strict=True):
                assert_same_bits(got, None if whole is None else whole[first:last])


@pytest.mark.parametrize("op", OPS, ids=str)
def test_a_row_does_not_depend_on_the_number_of_threads(native: Native, op: Op) -> None:
    inputs = inputs_for(op, (143, 7), 4 * 64, torch.float32)
    case = case_of(op, inputs)
    made = []
    for count in (1, 2):
        with threads(count):
            made.append((*run(native, op, inputs, 4), *gradients(native, case, 4, torch.float32)))
    for serial, parallel in zip(*made, strict=True):
        assert_same_bits(parallel, serial)


# --------------------------------------------------------------------------------------- backward


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_gradients_of_parts_are_those_of_whole_rows(native: Native, op: Op, n: int) -> None:
    for count, dtype in itertools.product(COUNTS, DTYPES):
        inputs = inputs_for(op, (2, 3), n * count, dtype, seed=n)
        make_and_check(native, case_of(op, inputs), count)


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 63, 65, 200])
def test_gradients_of_every_number_of_rows_are_accurate(native: Native, op: Op, rows: int) -> None:
    for dtype in DTYPES:
        make_and_check(native, case_of(op, inputs_for(op, (rows, 3), 40, dtype)), 2)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_gradients_of_every_mix_of_dtypes_are_accurate(native: Native, op: Op) -> None:
    for x, weight, bias, out in itertools.product(DTYPES, repeat=4):
        inputs = inputs_for(op, (2, 3), 140, x, weight_dtype=weight, bias_dtype=bias)
        make_and_check(native, case_of(op, inputs, out_dtype=out), 2)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_gradients_of_every_option_are_accurate(native: Native, op: Op) -> None:
    for dtype, rounds, offset in itertools.product(
        DTYPES, ({}, *({flag: True} for flag in ROUNDINGS)), (0.0, 1.0)
    ):
        inputs = inputs_for(op, (2, 3), 132, dtype)
        options = {**rounds, "weight_offset": offset}
        make_and_check(native, case_of(op, inputs, **options), 4)
        make_and_check(native, case_of(op, inputs._replace(bias=None), **options), 4)
    make_and_check(native, case_of(op, inputs._replace(weight=None)), 4)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_a_gradient_is_none_where_it_is_not_wanted(native: Native, op: Op) -> None:
    inputs = inputs_for(op, (2, 3), 12, torch.float32)
    case = case_of(op, inputs)
    made = run(native, op, inputs, 1)
    saved = made.rstd, made.mean, 0.0
    tensors = case.grad_y, inputs.x, inputs.weight
    gathered = native("part_backward_statistics", kind_of(op), *tensors, *saved)[None]
    whole = gradients(native, case, 1, torch.float32)
    for x_dtype, wanted in itertools.product((None, torch.float32), range(4)):
        got = native(
            "part_backward_apply",
            *(kind_of(op), *tensors, inputs.bias, *saved, False, x_dtype, wanted, gathered),
        )
        assert_same_bits(got[0], whole.x if x_dtype else None)
        assert_same_bits(got[1], whole.weight if wanted & 1 else None)
        assert_same_bits(got[2], whole.bias if wanted & 2 else None)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_a_gradient_of_a_row_does_not_depend_on_the_batch(native: Native, op: Op) -> None:
    for dtype in DTYPES:
        inputs = inputs_for(op, (200, 1), 130, dtype)
        case = case_of(op, inputs)
        whole = gradients(native, case, 2, dtype).x
        for which in (slice(0, 1), slice(63, 65), slice(199, 200)):
            alone = case._replace(inputs=rows_of(op, inputs, which), grad_y=case.grad_y[which])
            assert_same_bits(gradients(native, alone, 2, dtype).x, whole[which])


def test_no_rows_have_statistics_and_gradients_of_zero(native: Native) -> None:
    for op in (RMS, LAYER):
        inputs = inputs_for(op, (0, 3), 24, torch.bfloat16)
        assert statistics(native, op, inputs.x, 2).shape == (2, 1 + (op is LAYER), 0, 3)
        assert run(native, op, inputs, 2).y.shape == (0, 3, 24)
        made = gradients(native, case_of(op, inputs), 2, torch.bfloat16)
        assert made.x.shape == (0, 3, 24)
        assert torch.equal(made.weight, torch.zeros(24, dtype=torch.bfloat16))
        assert torch.equal(made.bias, torch.zeros(24, dtype=torch.bfloat16))


def test_a_tensor_of_one_row_has_no_outer_dimension(native: Native) -> None:
    for op in (RMS, LAYER):
        inputs = inputs_for(op, (), 24, torch.float32)
        assert run_and_check(native, op, inputs, 2).rstd.shape == ()
        make_and_check(native, case_of(op, inputs), 2)


@needs_kernels
@pytest.mark.parametrize("op", OPS, ids=str)
def test_every_instruction_set_gives_the_same_bits(op: Op) -> None:
    """The processes of one norm may run on different processors."""
    native, extension = Native("cpu"), normkit._C
    best = extension.cpu_instruction_set()
    for dtype in DTYPES:
        inputs = inputs_for(op, (5, 3), 2 * 1100, dtype)
        made = []
        try:
            for name in extension.cpu_instruction_sets():
                extension.use_cpu_instruction_set(name)
                of_rows = gradients(native, case_of(op, inputs), 2, dtype)
                made.append((*run(native, op, inputs, 2), *of_rows))
        finally:
            extension.use_cpu_instruction_set(best)
        for other in made[1:]:
            for got, expected in zip(other, made[0], strict=True):
                assert_same_bits(got, expected)
