"""Columns that are further apart than an element, as the channels of an image: read and written."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given as examples
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

import normkit
from conformance.support import (
    ADD_RMS,
    DTYPES,
    LAYER,
    RMS,
    STRIDED,
    Guarded,
    Inputs,
    Op,
    assert_same_bits,
    assert_same_results,
    dtypes,
    inputs_for,
    run,
    run_and_check,
    threads,
)

Strides = tuple[int, ...]
# Beyond squares of 4 by 4 and 8 by 8, and not; blocks of rows across images, and within.
WIDTHS = (2, 5, 8, 33, 70)


@pytest.fixture(scope="session")
def writing(backend: Any) -> Any:
    """A backend that writes strided columns; plain torch runs what Triton's kernels do not."""
    if backend.name == "triton":
        pytest.skip("its kernels write dense columns only")
    return backend


def in_order(
    shape: tuple[int, ...], order: tuple[int, ...], gap: int = 0, step: int = 1
) -> Strides:
    """Strides of a tensor whose dimensions lie in memory in this order, the innermost last."""
    strides = [0] * len(shape)
    for d in reversed(order):
        strides[d] = step
        step = shape[d] * step + gap
    return tuple(strides)


def layouts(shape: tuple[int, ...]) -> Iterator[tuple[str, Strides]]:
    """Of memory with strided columns, for rows of two dimensions and more."""
    *outer, last = range(len(shape))
    yield "channels first", in_order(shape, (outer[0], last, *outer[1:]))
    yield "channels outermost", in_order(shape, (last, *outer), gap=3)
    yield "rows in another order", in_order(shape, (last, *reversed(outer)))
    yield "every second element", in_order(shape, (*outer, last), step=2)
    yield "every third element", in_order(shape, (last, *outer), step=3)


def moved(inputs: Inputs, strides: Strides, offset: int = 0) -> tuple[Inputs, Guarded]:
    x = Guarded(tuple(inputs.x.shape), inputs.x.dtype, strides, offset)
    x.fill(inputs.x)
    return inputs._replace(x=x.tensor), x


@pytest.mark.parametrize("op", STRIDED, ids=str)
def test_strided_columns_give_the_bits_of_packed_ones(backend: Any, op: Op) -> None:
    for dtype, n in itertools.product(DTYPES, WIDTHS):
        out_dtype = torch.float32 if dtype is torch.float16 else None
        for rows in ((2, 49), (1, 2, 2, 5)):
            plain = inputs_for(op, rows, n, dtype)
            expected = run(backend, op, plain, out_dtype=out_dtype)
            for name, strides in layouts(tuple(plain.x.shape)):
                strided, x = moved(plain, strides)
                result = run_and_check(backend, op, strided, out_dtype=out_dtype)
                assert_same_results(result, expected)
                assert result.y.is_contiguous(), name
                x.assert_only_elements_written()


@pytest.mark.parametrize("op", STRIDED, ids=str)
def test_strided_columns_are_written_and_nothing_round_them(writing: Any, op: Op) -> None:
    for (dtype, out_dtype), n in itertools.product(
        ((DTYPES[0], DTYPES[0]), (DTYPES[2], DTYPES[2]), (DTYPES[1], DTYPES[0])), WIDTHS
    ):
        plain = inputs_for(op, (2, 3, 17), n, dtype)
        shape = tuple(plain.x.shape)
        expected = run(writing, op, plain, out_dtype=out_dtype)
        for _, strides in layouts(shape):
            for given in (plain, moved(plain, strides, 1)[0]):
                out = Guarded(shape, out_dtype, strides, 2)
                result = run(writing, op, given, out=out.tensor)
                assert result.y is out.tensor
                assert_same_bits(result.y.contiguous(), expected.y)
                out.assert_only_elements_written()
            strided = moved(plain, strides)[0]
            dense = Guarded(shape, out_dtype, None, 1)
            assert_same_bits(run(writing, op, strided, out=dense.tensor).y, expected.y)
            dense.assert_only_elements_written()


@pytest.mark.parametrize("op", STRIDED, ids=str)
def test_strided_columns_in_place(writing: Any, op: Op) -> None:
    for dtype, n in itertools.product(DTYPES, WIDTHS):
        plain = inputs_for(op, (2, 3, 17), n, dtype)
        expected = run(writing, op, plain)
        for _, strides in layouts(tuple(plain.x.shape)):
            given, x = moved(plain, strides)
            made = writing(f"{op.name}_", *op.tensors(given), **op.selected)
            assert made is given.x
            assert_same_bits(made.contiguous(), expected.y)
            x.assert_only_elements_written()


@st.composite
def _any_strides(draw: st.DrawFn, shape: tuple[int, ...]) -> Strides:
    strides, step = [0] * len(shape), draw(st.integers(1, 3))
    for d in draw(st.permutations(range(len(shape)))):
        strides[d] = step
        step = shape[d] * step + draw(st.integers(0, 9))
    return tuple(strides)


@st.composite
def _any_columns(draw: st.DrawFn) -> Any:
    op = draw(st.sampled_from(STRIDED))
    shape = (*draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)), draw(st.integers(1, 140)))
    dtype, out_dtype = draw(dtypes), draw(dtypes)
    inputs = inputs_for(op, shape[:-1], shape[-1], dtype, seed=draw(st.integers(0, 9)))
    offset = st.integers(0, 9)
    x = Guarded(shape, dtype, draw(_any_strides(shape)), draw(offset))
    out = Guarded(shape, out_dtype, draw(_any_strides(shape)), draw(offset))
    x.fill(inputs.x)
    return op, inputs, x, out


@settings(max_examples=100)
@examples(_any_columns())
def test_any_order_of_all_dimensions_gives_the_bits_of_the_plain_one(
    writing: Any, case: Any
) -> None:
    op, inputs, x, out = case
    expected = run(writing, op, inputs, out_dtype=out.tensor.dtype)
    strided = inputs._replace(x=x.tensor)
    made = run(writing, op, strided, out=out.tensor).y
    assert_same_bits(made.contiguous(), expected.y)
    same = run(writing, op, inputs)
    writing(f"{op.name}_", *op.tensors(strided), **op.selected)
    assert_same_bits(x.tensor.contiguous(), same.y)
    for guarded in (x, out):
        guarded.assert_only_elements_written()


@pytest.mark.parametrize("op", [RMS, LAYER], ids=str)
def test_images_large_enough_for_threads(writing: Any, op: Op) -> None:
    if writing.name == "emu":
        pytest.skip("there are none, and it takes long")
    for dtype in DTYPES:
        image = torch.randn(3, 96, 31, 33).to(dtype)
        given = inputs_for(op, 1, 96, dtype)._replace(x=image.permute(0, 2, 3, 1))
        expected = run(writing, op, given._replace(x=given.x.contiguous()))
        for count in (1, 2, 3):
            with threads(count):
                assert_same_results(run(writing, op, given), expected)
                out = torch.empty_like(image)
                run(writing, op, given, out=out.permute(0, 2, 3, 1))
                assert_same_bits(out.permute(0, 2, 3, 1).contiguous(), expected.y)


def test_long_rows(backend: Any) -> None:
    """Of one row and of a few: a column each, or fewer rows than fill a cache line."""
    for n, rows in ((5000, 3), (20_000, 1), (140_000, 2)):
        plain = inputs_for(LAYER, rows, n, torch.bfloat16)
        strided = plain._replace(x=plain.x.t().contiguous().t())
        if rows == 1:
            strided = plain._replace(x=plain.x.repeat_interleave(2, -1)[:, ::2])
        assert strided.x.stride(-1) != 1
        assert_same_results(run(backend, LAYER, strided), run(backend, LAYER, plain))


@pytest.mark.parametrize("op", STRIDED, ids=str)
def test_gradients_of_strided_columns_are_those_of_packed_ones(backend: Any, op: Op) -> None:
    plain = inputs_for(op, (2, 3, 5), 33, torch.float32)
    strides = dict(layouts(tuple(plain.x.shape)))["channels first"]
    made = []
    for given in (plain, moved(plain, strides)[0]):
        leaves = [t.detach().requires_grad_() for t in op.tensors(given)]
        y = backend(op.name, *leaves, **op.selected)
        made.append(torch.autograd.grad(y, leaves, torch.cos(y.detach())))
    for got, expected in zip(*made, strict=True):
        assert_same_bits(got.contiguous(), expected.contiguous())


def test_columns_between_those_of_the_output_do_not_overlap_it(writing: Any) -> None:
    for dtype in DTYPES:
        plain = inputs_for(RMS, (4, 5), 33, dtype)
        both = torch.empty(4, 5, 66, dtype=dtype)
        both[..., ::2] = plain.x
        result = run(writing, RMS, plain._replace(x=both[..., ::2]), out=both[..., 1::2])
        assert_same_bits(result.y.contiguous(), run(writing, RMS, plain).y)
        assert_same_bits(both[..., ::2].contiguous(), plain.x)


def _refused(backend: Any, match: str, op: Op, inputs: Inputs, **outputs: Tensor) -> None:
    memory = [t.untyped_storage() for t in (inputs.x, *outputs.values())]
    before = [bytes(storage) for storage in memory]
    with pytest.raises(ValueError, match=match):
        run(backend.unexplained, op, inputs, **outputs)
    assert [bytes(storage) for storage in memory] == before


def test_outputs_of_strided_columns_that_overlap_are_refused(backend: Any) -> None:
    square = inputs_for(RMS, 8, 8, torch.float32)
    _refused(backend, "^out: expected x's memory or none of it", RMS, square, out=square.x.t())
    cube = inputs_for(RMS, (3, 3), 8, torch.float32)
    _refused(backend, "^out: expected x's", RMS, cube, out=cube.x.transpose(0, 1))
    column = torch.zeros(3, 3, 1).expand(3, 3, 8)
    _refused(backend, "^out: expected rows of their own", RMS, cube, out=column)
    tangled = torch.zeros(99).as_strided((3, 3, 8), (8, 1, 2))
    _refused(backend, "^out: expected rows of their own", RMS, cube, out=tangled)
    behind = torch.zeros(200)
    cube = cube._replace(x=behind[1:].as_strided((3, 3, 8), (1, 3, 9)))
    out = behind.as_strided((3, 3, 8), (1, 3, 9))
    _refused(backend, "^out: expected x's memory or none of it", RMS, cube, out=out)


def test_sums_are_not_written_to_strided_columns(backend: Any) -> None:
    given = inputs_for(ADD_RMS, (2, 3), 8, torch.float32)
    strided = torch.zeros(2, 8, 3).mT
    for name in ("out", "residual_out"):
        _refused(
            backend, f"^{name}: expected a last stride of 1", ADD_RMS, given, **{name: strided}
        )


def test_signs_of_a_lazily_negated_tensor_are_seen(backend: Any) -> None:
    values = torch.randn(3, 5, 33)
    negated = torch.complex(torch.zeros_like(values), values).conj().imag
    for x in (negated, negated.permute(1, 0, 2)):
        assert x.is_neg()
        assert x.stride(-1) == 2
        assert_same_bits(backend("layer_norm", x), backend("layer_norm", x.resolve_neg()))
        _refused(
            backend, "^out: .*negative bit", RMS, inputs_for(RMS, x.shape[:2], 33, x.dtype), out=x
        )
        with pytest.raises(ValueError, match="^x: .*negative bit"):
            backend.unexplained("rms_norm_", x)


def test_explain_says_what_is_done_to_strided_columns(kernels: Any) -> None:
    if kernels.name == "triton":
        pytest.skip("it copies them")
    x = torch.randn(2, 16, 3, 5).permute(0, 2, 3, 1)
    weight = torch.ones(32)[::2]
    with normkit.use_backend(kernels.name):
        said = normkit.explain("layer_norm", x)
        assert "copied" not in said.reason
        assert "strided columns" in said.plan
        assert "strided columns" in normkit.explain("layer_norm_", x).plan
        assert "strided columns" not in normkit.explain("layer_norm", x.contiguous()).plan
        assert normkit.explain("layer_norm", x, weight).reason.endswith("take: weight")
        assert normkit.explain("add_layer_norm", x, x).reason.endswith("take: x, residual")
