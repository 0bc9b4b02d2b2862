"""Every layout of the outer dimensions gives the same bits; nothing outside is written."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import normkit
from conformance.support import (
    DTYPES,
    EVERY,
    HEAD_LAYER,
    HEAD_RMS,
    OPS,
    STRIDED,
    Guarded,
    Inputs,
    Op,
    assert_same_bits,
    assert_same_results,
    bits,
    dtypes,
    inputs_for,
    lazily_negated,
    run,
    run_and_check,
)
from normkit.testing import make_inputs

IN_PLACE_DTYPES = [(x, r) for x in DTYPES for r in DTYPES]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [HEAD_RMS, HEAD_LAYER], ids=str)
def test_query_and_key_of_a_packed_qkv_in_place(backend: Any, op: Op, dtype: torch.dtype) -> None:
    tokens, heads, key_heads, n = 5, 4, 2, 24
    packed = make_inputs((tokens, (heads + 2 * key_heads) * n), dtype).x
    before = packed.clone()
    for first, count in ((0, heads), (heads, key_heads)):
        view = packed.view(tokens, -1, n)[:, first : first + count]
        affine = make_inputs((count, n), dtype, per_head=True, seed=count)
        expected = run(backend, op, affine._replace(x=view.contiguous()))
        made = backend(f"{op.name}_", view, affine.weight, affine.bias, **op.selected)
        assert made is view
        assert_same_bits(view, expected.y)
    values = (heads + key_heads) * n
    assert_same_bits(packed[:, values:], before[:, values:])
    assert (bits(packed[:, :values]) != bits(before[:, :values])).float().mean() > 0.9


@pytest.mark.parametrize("op", EVERY, ids=str)
def test_expanded_inputs(backend: Any, op: Op) -> None:
    for dtype, n in itertools.product(DTYPES, (9, 128)):
        inputs = inputs_for(op, (1, 3), n, dtype)
        expanded = inputs._replace(
            x=inputs.x.expand(5, 3, n), residual=inputs.residual[:, :1].expand(5, 3, n)
        )
        plain = inputs._replace(x=expanded.x.contiguous(), residual=expanded.residual.contiguous())
        assert_same_results(run_and_check(backend, op, expanded), run(backend, op, plain))


# Windows of step 1 and other rows that share memory, gaps, other orders, odd strides of size 1.
SHAPES_AND_STRIDES = [
    ((2, 3), (1, 1)),
    ((63, 64), (1, 1)),
    ((64, 64), (1, 1)),
    ((5, 7, 16), (0, 1, 1)),
    ((3, 8, 16), (1, 8, 1)),
    ((3, 5, 16), (7, 2, 1)),
    ((4, 24), (30, 1)),
    ((4, 3, 8), (8, 32, 1)),
    ((1, 24), (64, 1)),
    ((4, 1, 24), (24, 7, 1)),
    ((3, 2, 1), (2, 1, 5)),
]


def packed_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _laid_out(inputs: Inputs, strides: tuple[int, ...]) -> Inputs:
    """x and residual of these strides; where rows share memory, so do their values."""
    moved = []
    for t in (inputs.x, inputs.residual):
        memory = torch.randn(4096, generator=torch.Generator().manual_seed(1)).to(t.dtype)
        moved.append(memory[3:].as_strided(t.shape, strides))
    return inputs._replace(x=moved[0], residual=moved[1])


@pytest.mark.parametrize(("shape", "strides"), SHAPES_AND_STRIDES, ids=str)
@pytest.mark.parametrize("op", OPS, ids=str)
def test_outputs_that_are_not_given_are_packed(
    backend: Any, op: Op, shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    """As torch's own norms make them; torch.empty_like would keep gaps, and sort equal strides."""
    for dtype, out_dtype in ((torch.float32, None), (torch.bfloat16, torch.float16)):
        inputs = make_inputs(shape, dtype, residual_dtype=torch.float16, per_head=False)
        moved = _laid_out(inputs, strides)
        plain = moved._replace(
            x=moved.x.clone(memory_format=torch.contiguous_format),
            residual=moved.residual.clone(memory_format=torch.contiguous_format),
        )
        result = run(backend, op, moved, out_dtype=out_dtype)
        assert_same_results(result, run_and_check(backend, op, plain, out_dtype=out_dtype))
        for made in (result.y, result.residual_out):
            assert made is None or made.stride() == packed_strides(shape)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_outputs_are_memory_of_torch(backend: Any, op: Op) -> None:
    """Storage.resize_, which FSDP calls, and record_stream are for no other memory."""
    for out_dtype in (None, torch.float16):
        result = run(backend, op, inputs_for(op, 3, 64, torch.bfloat16), out_dtype=out_dtype)
        for made in (result.y, result.residual_out):
            assert made is None or made.untyped_storage().resizable()


@pytest.mark.parametrize(("shape", "strides"), SHAPES_AND_STRIDES, ids=str)
@pytest.mark.parametrize("op", EVERY, ids=str)
def test_gradients_are_packed(
    backend: Any, op: Op, shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    inputs = make_inputs(shape, torch.float32, residual_dtype=torch.float16)
    moved = _laid_out(inputs, strides)
    made = []
    for x, residual in (
        (moved.x, moved.residual),
        (moved.x.contiguous(), moved.residual.contiguous()),
    ):
        leaves = [
            t if t is None else t.detach().requires_grad_()
            for t in op.tensors(inputs._replace(x=x, residual=residual))
        ]
        outputs = run(backend, op, _as_inputs(op, leaves))
        given = [t for t in outputs if t is not None]
        weights = [inputs.x.to(t.dtype) for t in given]
        wanted = [t for t in leaves if t is not None]
        made.append(torch.autograd.grad(given, wanted, weights))
    for got, expected in zip(*made, strict=True):
        assert_same_bits(got, expected.contiguous())
        assert got.stride() == packed_strides(tuple(got.shape))


def _as_inputs(op: Op, tensors: list[Any]) -> Inputs:
    """The other way from op.tensors()."""
    given = dict(zip(op.takes, tensors, strict=True))
    return Inputs(**({"residual": given["x"], "weight": None, "bias": None} | given))


@pytest.mark.parametrize("op", EVERY, ids=str)
def test_strides_of_dimensions_of_size_1_are_ignored(backend: Any, op: Op) -> None:
    for stride in (0, 1, 3, 10**12, 2**62):
        for shape, strides in (
            ((4, 1, 12), (12, stride, 1)),
            ((1, 4, 12), (stride, 12, 1)),
            ((4, 3, 1), (3, 1, stride)),
            ((1, 1, 1), (stride, stride, stride)),
        ):
            inputs = make_inputs(shape, torch.bfloat16)
            plain = run(backend, op, inputs)
            odd = Guarded(shape, torch.bfloat16, strides)
            strange = inputs._replace(x=odd.fill(inputs.x))
            assert_same_results(run(backend, op, strange), plain)
            out = Guarded(shape, torch.bfloat16, strides)
            assert_same_results(run(backend, op, strange, out=out.tensor), plain)
            out.assert_only_elements_written()


@pytest.mark.parametrize("op", EVERY, ids=str)
def test_more_than_65535_rows_and_heads(backend: Any, op: Op) -> None:
    run_and_check(backend, op, inputs_for(op, (70_001, 3), 2, torch.float16))
    if op.per_head:
        run_and_check(backend, op, inputs_for(op, (2, 70_001), 3, torch.float16))


@pytest.mark.parametrize("op", EVERY, ids=str)
def test_an_input_whose_last_stride_is_not_1_is_copied(backend: Any, op: Op) -> None:
    """But for an x of the ops of test_columns.py, which kernels read as it lies."""
    for dtype, n in itertools.product(DTYPES, (5, 70)):
        plain = inputs_for(op, (3, 2), n, dtype)
        for name in {"x", "residual", "weight", "bias"}.intersection(op.takes):
            t = getattr(plain, name)
            for moved in (t.mT.contiguous().mT if t.ndim > 1 else None, _every_second(t)):
                if moved is None:
                    continue
                assert moved.stride(-1) != 1
                inputs = plain._replace(**{name: moved})
                assert_same_results(run_and_check(backend, op, inputs), run(backend, op, plain))
                _assert_explained(backend, op, inputs, name)


def _every_second(t: Tensor) -> Tensor:
    return t.repeat_interleave(2, -1)[..., ::2]


def _assert_explained(backend: Any, op: Op, inputs: Inputs, name: str) -> None:
    if backend.name == "reference":
        return
    with normkit.use_backend(backend.name):
        reason = normkit.explain(op.name, *op.tensors(inputs), **op.selected).reason
    if name == "x" and op in STRIDED and backend.name != "triton":
        assert "copied" not in reason
        return
    assert "copied" in reason
    copied = f"{name}, z" if op.gated and inputs.x is op.tensor(name, inputs) else name
    assert reason.endswith(f": {copied}")


@pytest.mark.parametrize("op", [HEAD_RMS, HEAD_LAYER], ids=str)
def test_weights_per_head_of_any_strides(backend: Any, op: Op) -> None:
    for dtype, weight_dtype in itertools.product(DTYPES, DTYPES):
        plain = make_inputs(
            (5, 4, 33), dtype, per_head=True, weight_dtype=weight_dtype, bias_dtype=dtype
        )
        expected = run_and_check(backend, op, plain)
        apart = plain._replace(
            weight=Guarded((4, 33), weight_dtype, (50, 1), 1).fill(plain.weight),
            bias=Guarded((4, 33), dtype, (-(-33 // 8) * 8, 1), 3).fill(plain.bias),
        )
        assert_same_results(run(backend, op, apart), expected)
        one = plain._replace(weight=plain.weight[1].expand(4, 33), bias=plain.bias[2].expand(4, 33))
        shared = plain._replace(weight=plain.weight[1], bias=plain.bias[2])
        assert_same_results(run_and_check(backend, op, one), run_and_check(backend, op, shared))
        mixed = plain._replace(bias=plain.bias[2])
        run_and_check(backend, op, mixed)
        run_and_check(backend, op, plain._replace(weight=plain.weight[3]))
        run_and_check(backend, op, plain._replace(weight=None))
        run_and_check(backend, op, plain._replace(bias=None))


@st.composite
def _strides(draw: st.DrawFn, shape: tuple[int, ...], expanded: bool = False) -> tuple[int, ...]:
    """Strides in any order of the outer dimensions, with gaps; or, expanded, some of 0."""
    strides = [0] * (len(shape) - 1) + [1]
    step = shape[-1]
    for d in draw(st.permutations(range(len(shape) - 1))):
        if shape[d] == 1:
            strides[d] = draw(st.sampled_from([0, 1, 10**9]))
        elif not expanded or draw(st.booleans()):
            strides[d] = step + draw(st.integers(0, 9))
            step = shape[d] * strides[d]
    return tuple(strides)


@st.composite
def _any_layout(draw: st.DrawFn) -> Any:
    op = draw(st.sampled_from(OPS))
    shape = (*draw(st.lists(st.integers(1, 3), min_size=1, max_size=6)), draw(st.integers(1, 140)))
    dtype, residual_dtype, out_dtype = draw(dtypes), draw(dtypes), draw(dtypes)
    inputs = make_inputs(
        shape,
        dtype,
        residual_dtype=residual_dtype,
        weight_dtype=draw(dtypes),
        per_head=op.per_head,
        seed=draw(st.integers(0, 99)),
    )
    offset = st.integers(0, 9)
    expanded = draw(st.booleans())
    x = Guarded(shape, dtype, draw(_strides(shape, expanded)), draw(offset))
    residual = Guarded(shape, residual_dtype, draw(_strides(shape, expanded)), draw(offset))
    x.fill(inputs.x)
    residual.fill(inputs.residual)
    out = Guarded(shape, out_dtype, draw(_strides(shape)), draw(offset))
    residual_out = Guarded(shape, residual_dtype, draw(_strides(shape)), draw(offset))
    return op, inputs, (x, residual, out, residual_out), expanded


@given(_any_layout())
def test_any_layout_gives_the_bits_of_the_plain_one(backend: Any, case: Any) -> None:
    op, inputs, (x, residual, out, residual_out), expanded = case
    moved = inputs._replace(x=x.tensor, residual=residual.tensor)
    plain = inputs._replace(x=x.tensor.contiguous(), residual=residual.tensor.contiguous())
    expected = run_and_check(backend, op, plain, out_dtype=out.tensor.dtype)
    outputs = {"out": out.tensor} | ({"residual_out": residual_out.tensor} if op.adds else {})
    assert_same_results(run(backend, op, moved, **outputs), expected)
    for guarded in (x, residual, out, residual_out):
        guarded.assert_only_elements_written()
    assert_same_bits(x.tensor.contiguous(), plain.x)
    assert_same_bits(residual.tensor.contiguous(), plain.residual)
    if not expanded:
        same = run(backend, op, plain)
        backend(f"{op.name}_", *op.tensors(moved), **op.selected)
        assert_same_bits(x.tensor.contiguous(), same.y)
        if op.adds:
            assert_same_bits(residual.tensor.contiguous(), same.residual_out)
        for guarded in (x, residual):
            guarded.assert_only_elements_written()


def _strided(shape: tuple[int, ...], values: Tensor) -> Tensor:
    return Guarded(shape, values.dtype, (500, 70, 1), 1).fill(values)


@pytest.mark.parametrize("op", EVERY, ids=str)
def test_an_output_may_be_an_input(backend: Any, op: Op) -> None:
    for dtype, n in itertools.product(DTYPES, (3, 65)):
        inputs = inputs_for(op, (4, 5), n, dtype)
        shape = tuple(inputs.x.shape)
        expected = run(backend, op, inputs)
        choices = ["x", "residual", None] if op.adds else ["x"]
        for out, residual_out in itertools.product(choices, choices if op.adds else [None]):
            if out is not None and out == residual_out:
                continue
            for copy in (Tensor.clone, lambda t, shape=shape: _strided(shape, t)):
                moved = inputs._replace(x=copy(inputs.x), residual=copy(inputs.residual))
                named = {"out": out, "residual_out": residual_out}
                given = {k: getattr(moved, v) for k, v in named.items() if v is not None}
                result = run(backend, op, moved, **given)
                assert_same_results(result, expected)
                for name, t in given.items():
                    assert (result.y if name == "out" else result.residual_out) is t


@pytest.mark.parametrize("op", OPS, ids=str)
def test_x_may_be_the_residual(backend: Any, op: Op) -> None:
    if not op.adds:
        inputs = make_inputs((6, 6), torch.float32)
        same = inputs._replace(weight=inputs.x[0], bias=inputs.x[1])  # inputs may overlap at will
        run_and_check(backend, op, same)
        return
    inputs = inputs_for(op, 3, 40, torch.bfloat16)
    run_and_check(backend, op, inputs._replace(residual=inputs.x))


@pytest.mark.parametrize("op", EVERY, ids=str)
def test_rows_interleaved_with_the_output_do_not_overlap_it(backend: Any, op: Op) -> None:
    """With x in the even rows of a tensor and out in the odd ones, only the ranges cross."""
    for dtype, n in itertools.product(DTYPES, (5, 64)):
        inputs = inputs_for(op, 4, n, dtype)
        both = torch.empty(8, n, dtype=dtype)
        both[::2] = inputs.x
        result = run(backend, op, inputs._replace(x=both[::2]), out=both[1::2])
        assert_same_results(result, run(backend, op, inputs))
        assert_same_bits(both[::2].contiguous(), inputs.x)


@pytest.mark.parametrize("op", EVERY, ids=str)
@pytest.mark.parametrize("name", ["x", "residual", "weight", "bias"])
@pytest.mark.parametrize("n", [1, 20])
def test_a_tensor_with_the_negative_bit_counts_as_negative(
    backend: Any, op: Op, name: str, n: int
) -> None:
    if name == "residual" and not op.adds:
        return
    inputs = inputs_for(op, 3, n, torch.float32)
    negated = inputs._replace(**{name: lazily_negated(getattr(inputs, name))})
    plain = inputs._replace(**{name: -getattr(inputs, name)})
    assert_same_results(run(backend.unexplained, op, negated), run(backend, op, plain))


def test_an_out_with_the_negative_bit_is_refused(backend: Any) -> None:
    out = lazily_negated(torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"out: .*negative bit"):
        backend.unexplained("rms_norm", torch.ones(3, 1), out=out)
