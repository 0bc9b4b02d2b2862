"""Every op gives the right numbers: every size, every dtype mix, with weight and bias or not."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import normkit
from conformance.support import (
    ADD_HEAD_LAYER,
    ADD_HEAD_RMS,
    ADD_LAYER,
    ADD_RMS,
    ADDING,
    AFFINE,
    BARE_ADDING,
    BARE_PLAIN,
    DTYPES,
    EVERY,
    EVERY_AFFINE,
    HEAD_LAYER,
    HEAD_RMS,
    LAYER,
    OPS,
    RMS,
    SIZES,
    Op,
    assert_same_bits,
    assert_same_results,
    dtypes,
    inputs_for,
    kinds_of,
    run,
    run_and_check,
    run_in_place,
)
from normkit import _spec, testing
from normkit._spec import FLAGS


@pytest.mark.parametrize("op", EVERY, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_every_size_is_accurate(backend: Any, op: Op, n: int) -> None:
    for dtype in DTYPES:
        run_and_check(backend, op, inputs_for(op, 3, n, dtype, seed=n))


@pytest.mark.parametrize("op", EVERY, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 1000])
def test_every_number_of_rows_is_accurate(backend: Any, op: Op, rows: int) -> None:
    for n, dtype in itertools.product((1, 8, 33, 128), DTYPES):
        run_and_check(backend, op, inputs_for(op, rows, n, dtype))


@pytest.mark.parametrize("op", EVERY, ids=str)
def test_no_rows_in_any_dimension(backend: Any, op: Op) -> None:
    for outer in ((0, 3), (3, 0), (2, 0, 4)):
        inputs = inputs_for(op, outer, 5, torch.bfloat16)
        result = run_and_check(backend, op, inputs)
        assert result.y.numel() == 0


@pytest.mark.parametrize("op", OPS, ids=str)
def test_one_dimension_is_one_row(backend: Any, op: Op) -> None:
    if op.per_head:
        with pytest.raises(ValueError, match=r"^x: expected shape .*heads, head_dim"):
            run(backend.unexplained, op, testing.make_inputs((9,)))
        return
    run_and_check(backend, op, testing.make_inputs((9,)))


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("n", [65, 768])
def test_x_and_output_of_any_two_dtypes(backend: Any, op: Op, n: int) -> None:
    for dtype, out_dtype in itertools.product(DTYPES, DTYPES):
        inputs = inputs_for(op, 3, n, dtype)
        result = run_and_check(backend, op, inputs, out_dtype=out_dtype)
        out = torch.empty_like(inputs.x, dtype=out_dtype)
        again = run(backend, op, inputs, out=out)
        assert again.y is out
        assert_same_results(again, result)


@pytest.mark.parametrize("op", ADDING, ids=str)
@pytest.mark.parametrize("n", [65, 768])
def test_x_and_residual_of_any_two_dtypes(backend: Any, op: Op, n: int) -> None:
    for dtype, residual_dtype in itertools.product(DTYPES, DTYPES):
        inputs = inputs_for(op, 3, n, dtype, residual_dtype=residual_dtype)
        result = run_and_check(backend, op, inputs)
        residual_out = torch.empty_like(inputs.residual)
        again = run(backend, op, inputs, residual_out=residual_out)
        assert again.residual_out is residual_out
        assert_same_results(again, result)


@pytest.mark.parametrize("op", EVERY, ids=str)
@pytest.mark.parametrize("n", [9, 257])
def test_weight_and_bias_each_present_or_absent(backend: Any, op: Op, n: int) -> None:
    for dtype, weight_dtype in itertools.product(DTYPES, DTYPES):
        whole = inputs_for(op, 3, n, dtype, weight_dtype=weight_dtype, bias_dtype=weight_dtype)
        for absent in ({}, {"weight": None}, {"bias": None}, {"weight": None, "bias": None}):
            run_and_check(backend, op, whole._replace(**absent))


@pytest.mark.parametrize("op", EVERY, ids=str)
def test_in_place_gives_the_bits_of_out_of_place(backend: Any, op: Op) -> None:
    for dtype, residual_dtype, n in itertools.product(DTYPES, DTYPES, (1, 65, 300)):
        inputs = inputs_for(op, 5, n, dtype, residual_dtype=residual_dtype)
        assert_same_results(run_in_place(backend, op, inputs), run(backend, op, inputs))


@pytest.mark.parametrize("op", [RMS, LAYER, HEAD_RMS], ids=str)
@pytest.mark.parametrize("n", [9, 64, 100, 200, 3474])
def test_a_row_may_be_its_own_weight_or_bias_in_place(backend: Any, op: Op, n: int) -> None:
    """Exactly the memory of y: what is read of it is what was there before."""
    for dtype, offset in itertools.product(DTYPES, (0.0, 1.0)):
        made = inputs_for(op, (40,) if op.per_head else (), n, dtype)
        for name in ("weight", "bias"):
            before = made._replace(**{name: made.x.clone()})
            expected = run(backend, op, before, weight_offset=offset).y
            x = made.x.clone()
            given = op.tensors(made._replace(**{"x": x, name: x}))
            backend(f"{op.name}_", *given, weight_offset=offset, **op.selected)
            assert_same_bits(x, expected)


@pytest.mark.parametrize("op", EVERY_AFFINE, ids=str)
def test_default_eps(backend: Any, op: Op) -> None:
    """At this scale the mean of squares is about eps, so 1e-6 and 1e-5 are told apart."""
    inputs = inputs_for(op, 4, 100, torch.float32, scale=1e-3)
    result = run_and_check(backend, op, inputs)
    assert_same_results(run(backend, op, inputs, eps=op.eps), result)
    other = run(backend, op, inputs, eps=1.1e-5 - op.eps)
    assert not torch.allclose(other.y, result.y, rtol=0.1)


@pytest.mark.parametrize("op", [RMS, LAYER], ids=str)
@pytest.mark.parametrize("n", [100_003, 2_000_000])
def test_long_rows_keep_the_bound(backend: Any, op: Op, n: int) -> None:
    run_and_check(backend, op, inputs_for(op, 1, n, torch.float32))


@pytest.mark.parametrize("op", OPS, ids=str)
def test_every_scale_is_accurate(backend: Any, op: Op) -> None:
    for dtype, scale, eps in itertools.product(DTYPES, (1e-4, 1.0, 1e3), (None, 0.3, 1e-6)):
        inputs = inputs_for(op, 3, 129, dtype, scale=scale)
        run_and_check(backend, op, inputs, eps=eps)


@st.composite
def _any_call(draw: st.DrawFn) -> tuple[Op, Any, dict[str, Any]]:
    op = draw(st.sampled_from(AFFINE))
    outer = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    inputs = testing.make_inputs(
        (*outer, draw(st.integers(1, 300))),
        draw(dtypes),
        weight_dtype=draw(dtypes),
        bias_dtype=draw(dtypes),
        residual_dtype=draw(dtypes),
        per_head=op.per_head and draw(st.booleans()),
        scale=10.0 ** draw(st.integers(-4, 3)),
        seed=draw(st.integers(0, 2**32)),
    )
    absent = [name for name in ("weight", "bias") if draw(st.booleans())]
    options = {
        "eps": draw(st.sampled_from([None, 0.3, 1e-6, 0.0])),
        "weight_offset": draw(st.sampled_from([0.0, 1.0, -0.37])),
        "out_dtype": draw(st.none() | dtypes),
        **{flag: draw(st.booleans()) for flag in FLAGS if op.adds or flag != "round_sum"},
    }
    return op, inputs._replace(**dict.fromkeys(absent)), options


@given(_any_call())
def test_any_mix_of_dtypes_and_options_is_accurate(
    backend: Any, case: tuple[Op, Any, dict[str, Any]]
) -> None:
    op, inputs, options = case
    if op.kind == "layer" and inputs.x.shape[-1] == 1 and options["eps"] == 0.0:
        options["eps"] = 0.3  # 0 / sqrt(0)
    run_and_check(backend, op, inputs, **options)


@given(_any_call())
def test_any_call_in_place_gives_the_bits_of_out_of_place(
    backend: Any, case: tuple[Op, Any, dict[str, Any]]
) -> None:
    op, inputs, options = case
    options.pop("out_dtype")
    assert_same_results(
        run_in_place(backend, op, inputs, **options), run(backend, op, inputs, **options)
    )


def test_every_instruction_set_gives_the_same_bits(kernels: Any) -> None:
    from normkit import _C

    calls = [
        (op, inputs_for(op, 3, n, dtype, residual_dtype=residual_dtype), out_dtype)
        for op in OPS
        for n in (1, 33, 65, 200, 4104)
        for dtype, residual_dtype, out_dtype in itertools.product(DTYPES, DTYPES, DTYPES)
    ]
    first = _C.cpu_instruction_set()
    expected = [run(kernels, op, inputs, out_dtype=out_dtype) for op, inputs, out_dtype in calls]
    try:
        for name in _C.cpu_instruction_sets():
            _C.use_cpu_instruction_set(name)
            for (op, inputs, out_dtype), result in zip(calls, expected, strict=True):
                plan = normkit.explain(op.name, *op.tensors(inputs), **op.selected).plan
                assert plan.startswith(f"{name},")
                assert_same_results(run(kernels, op, inputs, out_dtype=out_dtype), result)
    finally:
        _C.use_cpu_instruction_set(first)


def test_fused_equals_unfused(backend: Any) -> None:
    """With round_sum=True: add in torch, then the norm, is the fused op, bit for bit."""
    for op, plain in zip(BARE_ADDING, BARE_PLAIN, strict=True):
        for dtype, residual_dtype, n in itertools.product(DTYPES, DTYPES, (9, 64, 1000, 2176)):
            inputs = inputs_for(op, 4, n, dtype, residual_dtype=residual_dtype)
            fused = run(backend, op, inputs)
            total = (inputs.x.float() + inputs.residual.float()).to(residual_dtype)
            assert_same_bits(fused.residual_out, total)
            alone = run(backend, plain, inputs._replace(x=total), out_dtype=dtype)
            assert_same_bits(fused.y, alone.y)


def test_one_weight_for_all_heads_is_the_norm_of_rows(backend: Any) -> None:
    pairs = {HEAD_RMS: RMS, HEAD_LAYER: LAYER, ADD_HEAD_RMS: ADD_RMS, ADD_HEAD_LAYER: ADD_LAYER}
    inputs = testing.make_inputs((2, 4, 3, 40), torch.bfloat16)
    for heads, rows in pairs.items():
        for options in ({}, {"round_sum": False})[: 1 + heads.adds]:
            got = run(backend, heads, inputs, eps=1e-6, **options)
            assert_same_results(got, run(backend, rows, inputs, eps=1e-6, **options))


def test_every_op_of_the_table_is_reached_in_both_forms() -> None:
    reached = set()

    def call(name: str, *given: Any, **options: Any) -> Any:
        call = _spec.OPS[name.rstrip("_")].call({"x": given[0], **options})
        reached.add((name, call.statistic))
        return getattr(normkit, name)(*given, **options)

    for op in EVERY:
        inputs = inputs_for(op, 3, 16, torch.float32)
        assert_same_results(run_in_place(call, op, inputs), run_and_check(call, op, inputs))
    assert reached == {
        (name + form, kind)
        for name, spec in _spec.OPS.items()
        for kind in kinds_of(spec)
        for form in ("", "_")
    }
