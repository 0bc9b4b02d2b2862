"""Norms in front of a sum: that they are the unfused formula, and where that is rounded."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import normkit
from conformance.support import (
    DTYPES,
    POST,
    Inputs,
    Op,
    Result,
    assert_same_bits,
    assert_same_results,
    formula,
    inputs_for,
    needs_kernels,
    run,
    run_and_check,
    run_in_place,
    threads,
)

BY_KIND = tuple(op._replace(kind=kind) for op in POST for kind in ("rms", "layer"))
every_op = pytest.mark.parametrize("op", BY_KIND, ids=str)
MULTIPLES: tuple[dict[str, Any], ...] = (
    {},
    {"alpha": 0.7, "beta": 1.3},
    {"alpha": 2.0},
    {"beta": -0.1},
)
F32, F16, BF16 = DTYPES


def unfused(
    call: Any,
    op: Op,
    inputs: Inputs,
    *,
    eps: float = 1e-6,
    next_eps: float | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    out_dtype: torch.dtype | None = None,
    **options: Any,
) -> Result:
    """The same in torch's operations, round norms of the same backend."""
    n = call(f"{op.kind}_norm", inputs.x, inputs.weight, inputs.bias, eps, **options)
    n = n if beta == 1.0 else beta * n
    h = inputs.residual if alpha == 1.0 else alpha * inputs.residual
    h = (h + n).to(inputs.residual.dtype)
    if not op.has_next:
        return Result(h, None)
    second = h, inputs.next_weight, inputs.next_bias, eps if next_eps is None else next_eps
    out_dtype = out_dtype or inputs.x.dtype
    return Result(call(f"{op.kind}_norm", *second, out_dtype=out_dtype, **options), h)


# ---------------------------------------------------------------------------------------- rounding


@every_op
@pytest.mark.parametrize("n", [7, 64, 130, 1000, 4104])
def test_fused_equals_unfused_bit_for_bit_in_every_mix_of_dtypes(
    backend: Any, op: Op, n: int
) -> None:
    for x, residual, weight in itertools.product(DTYPES, DTYPES, DTYPES):
        inputs = inputs_for(op, (3, 2), n, x, residual_dtype=residual, weight_dtype=weight)
        for multiples in MULTIPLES[:2]:
            assert_same_results(
                run(backend, op, inputs, **multiples), unfused(backend, op, inputs, **multiples)
            )


@every_op
def test_fused_equals_unfused_with_every_option(backend: Any, op: Op) -> None:
    options: tuple[dict[str, Any], ...] = (
        {"weight_offset": 1.0},
        {"round_before_weight": True},
        {"round_rstd": True},
        {"weight_offset": 1.0, "round_before_weight": True, "round_rstd": True, "eps": 0.3},
        {"clamp_inf": True},
    )
    for x, residual in itertools.product(DTYPES, DTYPES):
        inputs = inputs_for(op, 5, 200, x, residual_dtype=residual)
        for given, multiples in itertools.product(options, MULTIPLES):
            if "clamp_inf" in given and x == F16:
                inputs.x[1, 3] = torch.inf
            both = given | multiples | ({"next_eps": 0.1} if op.has_next else {})
            got, expected = run(backend, op, inputs, **both), unfused(backend, op, inputs, **both)
            assert_same_results(got, expected)


@every_op
def test_fused_equals_unfused_without_any_of_the_weights(backend: Any, op: Op) -> None:
    inputs = inputs_for(op, 5, 65, BF16)
    names = [name for name in op.takes if name.endswith(("weight", "bias"))]
    for absent in itertools.product((False, True), repeat=len(names)):
        left_out = {name: None for name, gone in zip(names, absent, strict=True) if gone}
        given = inputs._replace(**left_out)
        for offset in (0.0, 1.0):
            got = run(backend, op, given, weight_offset=offset)
            assert_same_results(got, unfused(backend, op, given, weight_offset=offset))


@every_op
def test_without_round_norm_only_the_sum_is_rounded(backend: Any, op: Op) -> None:
    for x, residual in itertools.product(DTYPES, DTYPES):
        inputs = inputs_for(op, 5, 256, x, residual_dtype=residual)
        for multiples in MULTIPLES:
            got = run_and_check(backend, op, inputs, round_norm=False, **multiples)
            given = inputs.x, inputs.weight, inputs.bias
            n = backend(f"{op.kind}_norm", *given, 1e-6, out_dtype=F32)
            kept = multiples.get("alpha", 1.0) * inputs.residual.float()
            h = (kept + multiples.get("beta", 1.0) * n).to(residual)
            assert_same_bits(got.residual_out if op.has_next else got.y, h)
    inputs = inputs_for(op, 5, 256, BF16, residual_dtype=F32)
    once, often = (run(backend, op, inputs, round_norm=r) for r in (False, True))
    of_sum = "residual_out" if op.has_next else "y"
    assert (getattr(once, of_sum) != getattr(often, of_sum)).float().mean() > 0.05


@every_op
def test_every_multiple_is_accurate(backend: Any, op: Op) -> None:
    for x, residual, multiples in itertools.product(DTYPES, DTYPES, MULTIPLES):
        run_and_check(backend, op, inputs_for(op, 5, 96, x, residual_dtype=residual), **multiples)


@every_op
def test_a_float64_x_is_the_formula_in_float64(op: Op) -> None:
    inputs = Inputs(*(None if t is None else t.double() for t in inputs_for(op, 3, 24, F32)))
    got, expected = run(_call, op, inputs, alpha=0.3), formula(op, inputs, alpha=0.3)
    torch.testing.assert_close(got.y, expected.y, rtol=1e-14, atol=1e-14)
    assert got.y.dtype == torch.float64


# ------------------------------------------------------------------------------------------- rows


@every_op
def test_threads_strides_and_numbers_of_rows_change_no_bit(backend: Any, op: Op) -> None:
    inputs = inputs_for(op, (37, 4), 520, BF16)
    options = {"alpha": 0.7, "beta": 1.3}
    whole = run(backend, op, inputs, **options)
    for count in (1, 2):
        with threads(count):
            assert_same_results(run(backend, op, inputs, **options), whole)
    wide = torch.zeros(37, 4, 2, 540, dtype=BF16)
    x, residual = wide[:, :, 0, 3:523], wide[:, :, 1, 5:525]
    x.copy_(inputs.x)
    residual.copy_(inputs.residual)
    strided = inputs._replace(x=x, residual=residual)
    assert_same_results(run(backend, op, strided, **options), whole)
    one = run(backend, op, inputs._replace(x=x[5, 2], residual=residual[5, 2]), **options)
    assert_same_bits(one.y, whole.y[5, 2])


@every_op
def test_in_place_is_out_of_place_in_every_dtype(backend: Any, op: Op) -> None:
    for dtype, n in itertools.product(DTYPES, (7, 65, 520)):
        inputs = inputs_for(op, (3, 5), n, dtype)
        for multiples in MULTIPLES[:2]:
            expected = run(backend, op, inputs, **multiples)
            assert_same_results(run_in_place(backend, op, inputs, **multiples), expected)


@every_op
def test_outputs_may_be_either_input(backend: Any, op: Op) -> None:
    inputs = inputs_for(op, (3, 5), 130, F16)
    expected = run(backend, op, inputs)
    for first, second in (("x", "residual"), ("residual", "x")):
        given = inputs._replace(x=inputs.x.clone(), residual=inputs.residual.clone())
        outputs = {"out": getattr(given, first)}
        if op.has_next:
            outputs["residual_out"] = getattr(given, second)
        assert_same_results(run(backend, op, given, **outputs), expected)


@every_op
def test_in_place_leaves_x_alone_unless_y_takes_its_place(backend: Any, op: Op) -> None:
    inputs = inputs_for(op, 3, 24, BF16)
    given = inputs._replace(x=inputs.x.clone(), residual=inputs.residual.clone())
    backend(f"{op.name}_", *op.tensors(given), **op.selected)
    assert torch.equal(given.x, inputs.x) != op.has_next
    assert not torch.equal(given.residual, inputs.residual)


@every_op
def test_every_instruction_set_gives_the_same_bits(kernels: Any, op: Op) -> None:
    if kernels.name not in ("auto", "cpu"):
        pytest.skip("those of the CPU")
    from normkit import _C

    cases = [
        (inputs_for(op, 3, n, x, residual_dtype=residual), multiples)
        for n in (1, 33, 65, 200, 4104)
        for x, residual in itertools.product(DTYPES, DTYPES)
        for multiples in MULTIPLES[:2]
    ]
    first = _C.cpu_instruction_set()
    expected = [run(kernels, op, inputs, **multiples) for inputs, multiples in cases]
    try:
        for name in _C.cpu_instruction_sets():
            _C.use_cpu_instruction_set(name)
            for (inputs, multiples), result in zip(cases, expected, strict=True):
                assert_same_results(run(kernels, op, inputs, **multiples), result)
    finally:
        _C.use_cpu_instruction_set(first)


# ---------------------------------------------------------------------------------- memory, errors


@every_op
def test_outputs_share_no_memory_with_weights(backend: Any, op: Op) -> None:
    inputs = inputs_for(op, (1, 1), 8, F32)
    for name in [name for name in op.takes if name.endswith(("weight", "bias"))]:
        out = getattr(inputs, name).view(1, 1, 8)
        with pytest.raises(ValueError, match=rf"^out: expected memory apart from {name}'s"):
            run(backend.unexplained, op, inputs, out=out)


@every_op
def test_what_is_wrong_is_named_and_nothing_is_written(backend: Any, op: Op) -> None:
    inputs = inputs_for(op, (3, 5), 8, F32)
    before = inputs.residual.clone()
    wrong: dict[str, tuple[Any, type[Exception]]] = {
        "alpha": (torch.inf, ValueError),
        "beta": ("1", TypeError),
        "round_norm": (1, TypeError),
    }
    if op.has_next:
        wrong["next_eps"] = -1.0, ValueError
    for name, (value, error) in wrong.items():
        with pytest.raises(error, match=rf"^{name}: expected"):
            backend.unexplained(f"{op.name}_", *op.tensors(inputs), **op.selected, **{name: value})
    for name in op.takes:
        shapes = [(torch.ones(7), ValueError)] if name != "x" else []
        for value, error in (*shapes, (3.0, TypeError)):
            with pytest.raises(error, match=rf"^{name}: expected"):
                run(backend.unexplained, op, inputs._replace(**{name: value}))
    assert torch.equal(inputs.residual, before)


def test_the_sum_has_residuals_dtype_and_y_that_of_x(backend: Any) -> None:
    rms, sandwich = (op for op in BY_KIND if op.kind == "rms")
    for x, residual in itertools.product(DTYPES, DTYPES):
        inputs = inputs_for(rms, 3, 8, x, residual_dtype=residual)
        assert run(backend, rms, inputs).y.dtype == residual
        other = next(dtype for dtype in DTYPES if dtype != residual)
        with pytest.raises(TypeError, match="^out: expected residual's dtype"):
            run(backend.unexplained, rms, inputs, out=torch.empty(3, 8, dtype=other))
        inputs = inputs_for(sandwich, 3, 8, x, residual_dtype=residual)
        for out_dtype in (None, *DTYPES):
            made = run(backend, sandwich, inputs, out_dtype=out_dtype)
            assert made.residual_out is not None
            assert made.residual_out.dtype == residual
            assert made.y.dtype == (out_dtype or x)
            assert_same_results(made, unfused(backend, sandwich, inputs, out_dtype=out_dtype))


@needs_kernels
def test_explain_says_what_runs_and_how_gradients_are_made() -> None:
    inputs = inputs_for(BY_KIND[0], 3, 8, BF16)
    x, residual = inputs.x, inputs.residual
    assert normkit.explain("norm_add", x, residual).backend == "cpu"
    leaf = x.clone().requires_grad_()
    found = normkit.explain("norm_add", leaf, residual)
    assert found.reason.endswith("gradients too, each norm by itself, which is taken again")
    found = normkit.explain("norm_add", leaf, residual, clamp_inf=True)
    assert "the gradients by plain torch: clamp_inf" in found.reason
    found = normkit.explain("norm_add", x.double(), residual)
    assert (found.backend, found.reason) == ("reference", "x is float64")


# --------------------------------------------------------------------------------------- gradients


@every_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_the_formula_in_float64(
    backend: Any, op: Op, dtype: torch.dtype
) -> None:
    step = torch.finfo(dtype).eps
    for n, multiples, round_norm in itertools.product((7, 200), MULTIPLES, (False, True)):
        inputs = inputs_for(op, (3, 5), n, dtype)
        made = gradients(backend, op, inputs, round_norm=round_norm, **multiples)
        exact = gradients(None, op, inputs, round_norm=False, **multiples)
        for name, got, right in zip(op.takes, made, exact, strict=True):
            assert got.dtype == dtype
            assert got.shape == getattr(inputs, name).shape
            # Roundings of n and h count as the identity, and move each term by a step or two.
            bound = (8 * step + 2e-6) * right.abs().max()
            assert (got.double() - right).abs().max() <= bound, name


def gradients(call: Any, op: Op, inputs: Inputs, **options: Any) -> tuple[Tensor, ...]:
    """Those of a call, or without one of the formula in float64."""
    leaves = [t.detach() if call else t.detach().double() for t in op.tensors(inputs)]
    leaves = [t.requires_grad_() for t in leaves]
    given = inputs._replace(**dict(zip(op.takes, leaves, strict=True)))
    result = run(call, op, given, **options) if call else formula(op, given, **options)
    outputs = [t for t in result if t is not None]
    weights = [torch.linspace(-1, 2, t.numel()).to(t.dtype).view(t.shape) for t in outputs]
    return torch.autograd.grad(outputs, leaves, weights)


@every_op
def test_each_output_and_each_input_has_a_gradient_by_itself(backend: Any, op: Op) -> None:
    inputs = inputs_for(op, 3, 24, F32)
    for wanted, output in itertools.product(op.takes, ("y", "residual_out")):
        if output == "residual_out" and not op.has_next:
            continue
        leaf = getattr(inputs, wanted).clone().requires_grad_()
        given = inputs._replace(**{wanted: leaf})
        made = getattr(run(backend, op, given), output)
        depends = output == "y" or not wanted.startswith("next")
        assert made.requires_grad == depends
        if depends:
            # Of a square: a layer norm by itself sums to nothing.
            right = torch.autograd.grad(getattr(formula(op, given), output).square().sum(), leaf)[0]
            got = torch.autograd.grad(made.square().sum(), leaf)[0]
            torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


@every_op
def test_gradients_can_be_differentiated_again(op: Op) -> None:
    inputs = inputs_for(op, 2, 4, F32)
    leaves = [t.double().requires_grad_() for t in op.tensors(inputs)]

    def call(*given: Tensor) -> Any:
        return _call(op.name, *given, kind=op.kind, alpha=0.5, beta=2.0, eps=0.1)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@every_op
def test_a_clamped_infinity_has_no_gradient(backend: Any, op: Op) -> None:
    inputs = inputs_for(op, (3, 5), 24, F16)
    inputs.x[1, 2, 3] = torch.inf
    leaf = inputs.x.clone().requires_grad_()
    result = run(backend, op, inputs._replace(x=leaf), clamp_inf=True)
    gradient = torch.autograd.grad(result.y.float().sum(), leaf)[0]
    assert gradient.isfinite().all()
    assert gradient[1, 2, 3] == 0


def _call(name: str, *tensors: Any, **options: Any) -> Any:
    return getattr(normkit, name)(*tensors, **options)
