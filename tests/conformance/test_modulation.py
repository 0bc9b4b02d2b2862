"""Modulated norms: which row of gate, scale and shift a row of x takes, and where it is rounded."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import normkit
from conformance.support import (
    DTYPES,
    OPS,
    Inputs,
    Op,
    assert_same_bits,
    assert_same_results,
    formula,
    inputs_for,
    needs_kernels,
    run,
    run_and_check,
    run_in_place,
)
from normkit import reference
from normkit.testing import make_inputs

MODULATED = tuple(op._replace(kind=kind) for op in OPS if op.modulated for kind in ("rms", "layer"))
every_op = pytest.mark.parametrize("op", MODULATED, ids=str)

# Shapes of gate, scale and shift for an x of (3, 5, n): 3 and 5 tell row // 5 and row % 5 apart.
ROWS = ((), (3,), (3, 1), (1, 1), (1, 5), (3, 5))
F32, F16, BF16 = DTYPES


def modulators(rows: tuple[int, ...], n: int, dtype: torch.dtype, seed: int = 3) -> list[Tensor]:
    return list(make_inputs((3, *rows, n), dtype, seed=seed).x.clamp(-3, 3))


def modulated(op: Op, inputs: Inputs, rows: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    t = modulators(rows, inputs.x.shape[-1], dtype)
    made = dict(zip(("gate", "scale", "shift"), t, strict=True))
    return inputs._replace(**{name: t for name, t in made.items() if name in op.takes})


def unfused(call: Any, op: Op, inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor | None]:
    """The same in torch's operations, round a norm of the same backend."""
    h = inputs.x
    if op.adds:
        gate = inputs.gate
        h = inputs.residual + (h if gate is None else reference.per_row(gate, h) * h)
        h = h.to(inputs.residual.dtype)
    n = call(f"{op.kind}_norm", h, inputs.weight, inputs.bias, op.eps, **options)
    y = n if inputs.scale is None else n * (1 + reference.per_row(inputs.scale, h))
    y = y if inputs.shift is None else y + reference.per_row(inputs.shift, h)
    return y, (h if op.adds else None)


# ------------------------------------------------------------------------------------------- rows


@every_op
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_every_row_takes_that_of_its_sample_or_token(
    backend: Any, op: Op, rows: tuple[int, ...]
) -> None:
    for dtype, of_modulators, n in itertools.product(DTYPES, DTYPES, (7, 64, 200)):
        inputs = modulated(op, inputs_for(op, (3, 5), n, dtype), rows, of_modulators)
        whole = run_and_check(backend, op, inputs)
        for sample, token in ((0, 0), (1, 4), (2, 3)):
            alone = {"x": inputs.x[sample, token], "residual": inputs.residual[sample, token]}
            for name in ("gate", "scale", "shift"):
                if (t := getattr(inputs, name)) is not None:
                    alone[name] = reference.per_row(t, inputs.x).expand(3, 5, n)[sample, token]
            one = run(backend, op, inputs._replace(**alone))
            assert_same_bits(one.y, whole.y[sample, token])
            if op.adds:
                assert_same_bits(one.residual_out, whole.residual_out[sample, token])


@every_op
def test_rows_with_and_without_modulation_by_each(backend: Any, op: Op) -> None:
    inputs = modulated(op, inputs_for(op, (3, 5), 40, BF16), (3,), BF16)
    names = [name for name in op.takes if name in ("gate", "scale", "shift", "weight", "bias")]
    for absent in itertools.product((False, True), repeat=len(names)):
        left_out = {name: None for name, gone in zip(names, absent, strict=True) if gone}
        for round_each in (False, True):
            given = inputs._replace(**left_out)
            result = run(backend, op, given, round_each=round_each)
            expected = formula(op, given, round_each=round_each)
            torch.testing.assert_close(result.y, expected.y, rtol=2**-7, atol=2**-7)
            if op.adds:
                assert_same_bits(result.residual_out, expected.residual_out)


@every_op
def test_chunks_of_one_tensor_are_read_where_they_are(backend: Any, op: Op) -> None:
    for n, dtype in itertools.product((24, 65), DTYPES):
        inputs = inputs_for(op, (3, 5), n, dtype)
        of_sample = make_inputs((3, 3 * n), dtype, seed=5).x
        of_token = make_inputs((3, 5, 3, n), dtype, seed=5).x
        for chunks in (of_sample.chunk(3, -1), of_token.unbind(2)):
            gate, scale, shift = chunks
            here = inputs._replace(gate=gate, scale=scale, shift=shift)
            apart = here._replace(gate=chunks[0].clone(), scale=chunks[1].clone())
            if backend.name != "reference":
                assert "copied" not in explanation(backend, op, here).reason
            assert_same_results(run(backend, op, here), run(backend, op, apart))


@every_op
def test_rows_at_no_one_stride_are_copied_and_explain_says_so(backend: Any, op: Op) -> None:
    n = 24
    inputs = modulated(op, inputs_for(op, (3, 5), n, BF16), (3, 5), BF16)
    scale = inputs.scale
    gaps = torch.empty(3, 9, n, dtype=BF16)[:, :5].copy_(scale)
    steps = torch.empty(3, 5, 2 * n, dtype=BF16)[..., ::2].copy_(scale)
    expected = run(backend, op, inputs)
    for given in (gaps, steps):
        odd = inputs._replace(scale=given)
        assert_same_results(run(backend, op, odd), expected)
        if backend.name != "reference":
            assert explanation(backend, op, odd).reason.endswith("kernels take: scale")
    mixed = inputs._replace(shift=inputs.shift[:, :1].clone())  # a row a sample beside one a token
    whole = mixed._replace(shift=mixed.shift.expand(3, 5, n).clone())
    assert_same_results(run(backend, op, mixed), run(backend, op, whole))
    x = inputs.x.reshape(3, 5, 4, 6).contiguous()
    outer = make_inputs((3, 1, 4, 6), BF16, seed=9).x  # between its rows lies a dimension of x
    y = backend("modulated_norm", x, outer, kind=op.kind)
    assert_same_bits(y, backend("modulated_norm", x, outer.expand(x.shape).clone(), kind=op.kind))


def explanation(backend: Any, op: Op, inputs: Inputs) -> normkit.Explanation:
    with normkit.use_backend(backend.name):
        return normkit.explain(op.name, *op.tensors(inputs), **op.selected)


@every_op
@pytest.mark.parametrize("rows", [(3,), (3, 5)], ids=str)
def test_many_rows_in_several_launches_or_blocks(
    backend: Any, op: Op, rows: tuple[int, ...]
) -> None:
    """Blocks of rows, threads and the emulation's launches of 64 rows begin inside of a sample."""
    for tokens, n in ((50, 16), (131, 64)):
        inputs = inputs_for(op, (3, tokens), n, BF16)
        inputs = modulated(op, inputs, (3, tokens)[: len(rows)], BF16)
        whole = run_and_check(backend, op, inputs)
        for sample in range(3):
            alone = {
                name: t[sample : sample + 1]
                for name in ("x", "residual", "gate", "scale", "shift")
                if (t := getattr(inputs, name)) is not None
            }
            one = run(backend, op, inputs._replace(**alone))
            assert_same_bits(one.y[0], whole.y[sample])


# ---------------------------------------------------------------------------------------- rounding


@every_op
def test_round_each_gives_the_bits_of_torchs_operations(backend: Any, op: Op) -> None:
    """In every mix of dtypes, with weight and bias and without them."""
    for dtype, of_modulators, residual_dtype in itertools.product(DTYPES, DTYPES, DTYPES):
        if not op.adds and residual_dtype != dtype:
            continue
        for rows, affine, n in (((3,), False, 130), ((3, 5), True, 64)):
            inputs = inputs_for(op, (3, 5), n, dtype, residual_dtype=residual_dtype)
            inputs = modulated(op, inputs, rows, of_modulators)
            if not affine:
                inputs = inputs._replace(weight=None, bias=None)
            y, h = unfused(backend, op, inputs)
            result = run(backend, op, inputs, round_each=True, out_dtype=y.dtype)
            if residual_dtype == dtype:
                assert_same_bits(result.y, y)
            assert_same_bits(result.residual_out, h)


@every_op
def test_without_round_each_only_the_store_rounds(backend: Any, op: Op) -> None:
    inputs = modulated(op, inputs_for(op, (3, 5), 256, BF16), (3,), F32)
    once = run_and_check(backend, op, inputs).y
    often = run(backend, op, inputs, round_each=True).y
    assert (once != often).float().mean() > 0.05


@needs_kernels
def test_what_is_rounded_to_one_dtype_and_stored_as_another_is_plain_torch() -> None:
    x, scale, shift = torch.randn(2, 5, 8).bfloat16(), *torch.randn(2, 2, 8).bfloat16()
    cases = {"the output": (scale, shift, F32), "shift": (scale, shift.half(), BF16)}
    for argument, (*given, out_dtype) in cases.items():
        options = {"round_each": True, "out_dtype": out_dtype}
        found = normkit.explain("modulated_norm", x, *given, **options)
        assert found.backend == "reference"
        assert found.reason.startswith(argument)
        n = normkit.layer_norm(x, eps=1e-6)
        y = n * (1 + given[0][:, None]) + given[1][:, None]
        assert_same_bits(normkit.modulated_norm(x, *given, **options), y.to(out_dtype))


# ---------------------------------------------------------------------------------- memory, errors


@needs_kernels
@every_op
def test_round_each_rounds_the_norm_where_nothing_modulates_it(op: Op) -> None:
    inputs = inputs_for(op, 5, 24, BF16)._replace(gate=None, scale=None, shift=None)
    given = *op.tensors(inputs), *op.selected.values()
    call = partial(getattr(normkit, op.name), *given[:-1], kind=given[-1], round_each=True)
    made, n = call(out_dtype=F32), call()
    y, n = (made[0], n[0]) if op.adds else (made, n)
    assert_same_bits(y, n.float())
    assert normkit.explain(op.name, *given[:-1], kind=given[-1], round_each=True).backend == "cpu"


@every_op
def test_no_rows_are_modulated_by_none(backend: Any, op: Op) -> None:
    for shape, rows in (
        ((7, 1, 0), (7, 1, 0)),
        ((4, 0), (4, 1)),
        ((0, 5), (0, 5)),
        ((4, 0), (1, 0)),
    ):
        inputs = modulated(op, inputs_for(op, shape, 24, BF16), rows, BF16)
        assert run(backend, op, inputs).y.shape == (*shape, 24)


@every_op
def test_in_place_with_a_row_for_each_sample(backend: Any, op: Op) -> None:
    for rows in ((3,), (3, 5)):
        inputs = modulated(op, inputs_for(op, (3, 5), 65, BF16), rows, BF16)
        for round_each in (False, True):
            assert_same_results(
                run_in_place(backend, op, inputs, round_each=round_each),
                run(backend, op, inputs, round_each=round_each),
            )


@every_op
def test_outputs_share_no_memory_with_what_rows_share(backend: Any, op: Op) -> None:
    inputs = modulated(op, inputs_for(op, (3, 5), 8, F32), (3, 5), F32)
    for name in [name for name in op.takes if name in ("gate", "scale", "shift")]:
        with pytest.raises(ValueError, match=rf"^out: expected memory apart from {name}'s"):
            run(backend.unexplained, op, inputs, out=getattr(inputs, name))


@every_op
def test_shapes_that_are_not_xs_are_errors_and_nothing_is_written(backend: Any, op: Op) -> None:
    inputs = inputs_for(op, (3, 5), 8, F32)
    for shape in ((), (7,), (5, 8), (3, 5, 1), (2, 5, 8), (3, 5, 8, 8), (1, 3, 5, 8)):
        for name in [name for name in op.takes if name in ("gate", "scale", "shift")]:
            wrong = inputs._replace(**{name: torch.ones(shape)})
            with pytest.raises(ValueError, match=rf"^{name}: expected x's first dimensions"):
                run(backend.unexplained, op, wrong)
    for wrong in (3.0, torch.ones(8, dtype=torch.int32)):
        with pytest.raises(TypeError, match="^scale: expected"):
            run(backend.unexplained, op, inputs._replace(scale=wrong))


# --------------------------------------------------------------------------------------- gradients


@every_op
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_gradients_have_the_shape_of_each_and_are_summed_over_its_rows(
    backend: Any, op: Op, rows: tuple[int, ...]
) -> None:
    inputs = modulated(op, inputs_for(op, (3, 5), 24, F32), rows, F32)
    for round_each, round_sum in itertools.product((False, True), repeat=2):
        options = {"round_each": round_each} | ({"round_sum": round_sum} if op.adds else {})
        made = _gradients(partial(run, backend, op, **options), inputs, op, F32)
        expected = _gradients(partial(formula, op), inputs, op, torch.float64)
        for name, got, right in zip(op.takes, made, expected, strict=True):
            assert got.shape == getattr(inputs, name).shape
            torch.testing.assert_close(got.double(), right, rtol=2e-5, atol=2e-5)


def _gradients(call: Any, inputs: Inputs, op: Op, dtype: torch.dtype) -> tuple[Tensor, ...]:
    leaves = [t.detach().to(dtype).requires_grad_() for t in op.tensors(inputs)]
    given = inputs._replace(**dict(zip(op.takes, leaves, strict=True)))
    result = call(given)
    outputs = [t for t in result if t is not None]
    weights = [torch.linspace(-1, 2, t.numel(), dtype=dtype).view(t.shape) for t in outputs]
    return torch.autograd.grad(outputs, leaves, weights)


@every_op
def test_a_clamped_infinity_has_no_gradient(backend: Any, op: Op) -> None:
    inputs = modulated(op, inputs_for(op, (3, 5), 24, F16), (3,), F16)
    inputs.x[1, 2, 3] = torch.inf
    leaf = inputs.x.clone().requires_grad_()
    result = run(backend, op, inputs._replace(x=leaf), clamp_inf=True)
    gradient = torch.autograd.grad(result.y.float().sum(), leaf)[0]
    assert gradient.isfinite().all()
    assert gradient[1, 2, 3] == 0
