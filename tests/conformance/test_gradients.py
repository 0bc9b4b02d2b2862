"""Every op gives the right gradients: sizes, dtypes, options, strides; twice the same bits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import normkit
from conformance.gradients import (
    Case,
    Gradients,
    call,
    case_of,
    check,
    gradients,
    make_and_check,
    wanting,
)
from conformance.support import (
    ADD_RMS,
    ADDING,
    AFFINE,
    BARE,
    BARE_ADDING,
    DTYPES,
    HEAD_LAYER,
    HEAD_RMS,
    LAYER,
    OPS,
    RMS,
    ROUNDINGS,
    Op,
    assert_same_bits,
    dtypes,
    inputs_for,
    lazily_negated,
    run,
    threads,
)
from normkit._serving import dispatch
from normkit.testing import make_inputs

SIZES = (1, 2, 7, 64, 65, 100, 129, 257, 1024, 1030, 4096, 8200)


def assert_same_gradients(got: Gradients, expected: Gradients) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        assert_same_bits(mine, theirs)


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_gradients_of_every_size_are_accurate(backend: Any, op: Op, n: int) -> None:
    for dtype in DTYPES:
        make_and_check(backend, case_of(op, inputs_for(op, (2, 3), n, dtype, seed=n)))


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 63, 65, 130, 1000])
def test_gradients_of_every_number_of_rows_are_accurate(backend: Any, op: Op, rows: int) -> None:
    for n, dtype in itertools.product((8, 33), DTYPES):
        make_and_check(backend, case_of(op, inputs_for(op, (rows, 3), n, dtype)))


@pytest.mark.parametrize("op", AFFINE, ids=str)
def test_gradients_of_no_rows_are_zeros(backend: Any, op: Op) -> None:
    made = gradients(backend, case_of(op, inputs_for(op, (0, 3), 8, torch.bfloat16)))
    assert made.x.numel() == 0
    assert made.weight.count_nonzero() == 0
    assert made.bias.count_nonzero() == 0


@pytest.mark.parametrize("op", BARE, ids=str)
def test_backward_only_reads_what_it_is_given(backend: Any, op: Op) -> None:
    for dtype, memory_efficient in itertools.product(DTYPES, (False, True)):
        case = case_of(op, inputs_for(op, (4, 3), 130, dtype), memory_efficient=memory_efficient)
        given = [t for t in (*case.inputs, case.grad_y, case.grad_residual_out) if t is not None]
        kept = [t.clone() for t in given]
        gradients(backend, case)
        for t, before in zip(given, kept, strict=True):
            assert_same_bits(t, before)


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("n", [24, 260])
def test_gradients_of_mixed_dtypes_are_accurate(backend: Any, op: Op, n: int) -> None:
    for dtype, weight_dtype, bias_dtype in itertools.product(DTYPES, repeat=3):
        inputs = inputs_for(op, (3, 5), n, dtype, weight_dtype=weight_dtype, bias_dtype=bias_dtype)
        make_and_check(backend, case_of(op, inputs))
    for dtype, out_dtype in itertools.product(DTYPES, repeat=2):
        inputs = inputs_for(op, (3, 5), n, dtype)
        make_and_check(backend, case_of(op, inputs, out_dtype=out_dtype))


@pytest.mark.parametrize("op", ADDING, ids=str)
@pytest.mark.parametrize("round_sum", [True, False])
def test_gradients_of_mixed_residuals_are_accurate(backend: Any, op: Op, round_sum: bool) -> None:
    for dtype, residual_dtype, out_dtype in itertools.product(DTYPES, repeat=3):
        inputs = inputs_for(op, 5, 70, dtype, residual_dtype=residual_dtype)
        options = {"round_sum": round_sum, "out_dtype": out_dtype}
        make_and_check(backend, case_of(op, inputs, **options))


@pytest.mark.parametrize("op", AFFINE, ids=str)
def test_gradients_follow_the_options(backend: Any, op: Op) -> None:
    for dtype, flag, eps in itertools.product(DTYPES, ("", *ROUNDINGS), (0.3, 1e-6)):
        options = {"weight_offset": 1.0, "eps": eps, **({flag: True} if flag else {})}
        make_and_check(backend, case_of(op, inputs_for(op, (6, 3), 130, dtype), **options))


@pytest.mark.parametrize("op", OPS, ids=str)
def test_gradients_without_weight_or_bias(backend: Any, op: Op) -> None:
    for dtype in DTYPES:
        made = inputs_for(op, (6, 3), 130, dtype)
        for absent in ({"weight": None}, {"bias": None}, {"weight": None, "bias": None}):
            make_and_check(backend, case_of(op, made._replace(**absent)))


@pytest.mark.parametrize("op", [HEAD_RMS, HEAD_LAYER], ids=str)
def test_gradients_of_affines_for_all_heads_or_for_each(backend: Any, op: Op) -> None:
    for dtype, heads in itertools.product(DTYPES, (1, 2, 3, 8, 40)):
        each = make_inputs((7, heads, 24), dtype, per_head=True)
        for_all = make_inputs((7, heads, 24), dtype)
        for weight, bias in itertools.product(
            (each.weight, for_all.weight), (each.bias, for_all.bias)
        ):
            make_and_check(backend, case_of(op, each._replace(weight=weight, bias=bias)))


@pytest.mark.parametrize("with_bias", [False, True])
def test_gradients_of_an_affine_expanded_over_heads_are_sums(backend: Any, with_bias: bool) -> None:
    """Its rows have a stride of 0, and a gradient each all the same."""
    x, grad = (torch.arange(4.0 * 3 * 8).view(4, 3, 8).cos() * scale for scale in (1, 2))
    shared = [torch.linspace(0.5, 2, 8, requires_grad=True) for _ in range(1 + with_bias)]
    expected = torch.autograd.grad(normkit.head_norm(x, *shared), shared, grad)
    got = torch.autograd.grad(normkit.head_norm(x, *(t.expand(3, 8) for t in shared)), shared, grad)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_gradients_of_strided_tensors_are_those_of_dense_ones(backend: Any, op: Op) -> None:
    """Of slices, of permuted outer dimensions, and of an expanded grad_y."""
    dense = case_of(op, inputs_for(op, (4, 6), 40, torch.bfloat16))
    expected = gradients(backend, dense)

    def apart(t: Any) -> Any:
        return None if t is None else torch.stack([t, -t], dim=-2)[..., 0, :]

    def turned(t: Any) -> Any:
        return None if t is None else t.transpose(0, 1).contiguous().transpose(0, 1)

    def columns(t: Any) -> Any:
        return None if t is None else torch.stack([t, -t], dim=-1)[..., 0]

    for change in (apart, turned, columns):
        inputs = dense.inputs._replace(
            x=change(dense.inputs.x), residual=change(dense.inputs.residual)
        )
        for grad_y, grad_total in (
            (dense.grad_y, dense.grad_residual_out),
            (change(dense.grad_y), change(dense.grad_residual_out)),
        ):
            case = dense._replace(inputs=inputs, grad_y=grad_y, grad_residual_out=grad_total)
            assert_same_gradients(gradients(backend, case), expected)
    for shape in ((1, 1, 40), (4, 1, 40), (1, 1, 1)):
        once = dense.grad_y[tuple(slice(0, size if size > 1 else 1) for size in shape)]
        expanded = dense._replace(grad_y=once.expand(4, 6, 40))
        copied = dense._replace(grad_y=once.expand(4, 6, 40).contiguous())
        assert_same_gradients(gradients(backend, expanded), gradients(backend, copied))


@pytest.mark.parametrize("op", OPS, ids=str)
def test_a_gradient_of_a_row_does_not_depend_on_the_batch(kernels: Any, op: Op) -> None:
    for dtype, n in itertools.product(DTYPES, (24, 1100)):
        case = case_of(op, inputs_for(op, (50, 3), n, dtype))
        whole = gradients(kernels, case)
        for rows in (slice(7, 8), slice(3, 9), slice(20, 50)):
            part = case._replace(
                inputs=case.inputs._replace(
                    x=case.inputs.x[rows], residual=case.inputs.residual[rows]
                ),
                grad_y=case.grad_y[rows],
                grad_residual_out=case.grad_residual_out[rows] if op.adds else None,
            )
            assert_same_bits(gradients(kernels, part).x, whole.x[rows])


@pytest.mark.parametrize("op", OPS, ids=str)
def test_gradients_have_the_same_bits_on_every_run(kernels: Any, op: Op) -> None:
    for shape, n in (((300, 3), 24), ((40, 3), 1100)):
        case = case_of(op, inputs_for(op, shape, n, torch.bfloat16))
        expected = gradients(kernels, case)
        for count in (1, 2, 1):
            with threads(count):
                assert_same_gradients(gradients(kernels, case), expected)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_only_the_gradients_that_are_needed_are_made(backend: Any, op: Op) -> None:
    made = inputs_for(op, (4, 3), 40, torch.bfloat16)
    made = made._replace(z=op.tensor("z", made) if op.gated else None)
    case = case_of(op, made)
    expected = gradients(backend, case)
    for name in Gradients._fields:
        if getattr(expected, name) is None:
            continue
        leaf = getattr(made, name).detach().requires_grad_()
        result = run(backend, op, made._replace(**{name: leaf}))
        outputs, grads = [result.y], [case.grad_y]
        if op.adds and name in ("x", "residual", "gate"):
            outputs, grads = [*outputs, result.residual_out], [*grads, case.grad_residual_out]
        assert_same_bits(torch.autograd.grad(outputs, leaf, grads)[0], getattr(expected, name))


@pytest.mark.parametrize("op", BARE_ADDING, ids=str)
def test_a_gradient_may_come_through_one_output_only(backend: Any, op: Op) -> None:
    case = case_of(op, inputs_for(op, 4, 40, torch.float32))
    leaves = wanting(op, case.inputs)
    result = run(backend, op, leaves)
    through_sum = torch.autograd.grad(
        result.residual_out, [leaves.x, leaves.residual], case.grad_residual_out, retain_graph=True
    )
    assert torch.equal(through_sum[0], case.grad_residual_out)
    assert torch.equal(through_sum[1], case.grad_residual_out)
    only_y = torch.autograd.grad(result.y, op.tensors(leaves), case.grad_y)
    check(case._replace(grad_residual_out=None), Gradients(*only_y))


@pytest.mark.parametrize("op", BARE, ids=str)
def test_gradients_from_the_output_are_near_those_from_the_input(backend: Any, op: Op) -> None:
    """memory_efficient: y as it was rounded is undone, so float32 is as good as ever."""
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)):
        for weight_offset in (0.0, 1.0):
            inputs = inputs_for(op, (6, 3), 130, dtype)
            inputs = inputs._replace(weight=inputs.weight.abs() + 0.5)
            case = case_of(op, inputs, weight_offset=weight_offset)
            expected = gradients(backend, case)
            case.options["memory_efficient"] = True
            for got, near in zip(gradients(backend, case), expected, strict=True):
                if near is not None:
                    scale = near.float().abs().max().item()
                    torch.testing.assert_close(got, near, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("op", [RMS, LAYER], ids=str)
def test_a_weight_of_zero_has_no_gradient_from_the_output(backend: Any, op: Op) -> None:
    inputs = inputs_for(op, 6, 40, torch.float32)
    inputs.weight[5] = 0.0
    made = gradients(backend, case_of(op, inputs, memory_efficient=True))
    assert made.weight[5] == 0
    assert made.weight.isfinite().all()
    assert made.x.isfinite().all()


def test_what_clamp_inf_clamps_is_a_constant(backend: Any) -> None:
    inputs = inputs_for(ADD_RMS, 3, 16, torch.float16)
    inputs.x[0, 3] = torch.inf
    inputs.x[1, 4] = -torch.inf
    made = gradients(backend, case_of(ADD_RMS, inputs, clamp_inf=True))
    assert made.x[0, 3] == 0
    assert made.x[1, 4] == 0
    assert made.x[2].count_nonzero() == 16
    assert all(t.isfinite().all() for t in made if t is not None)


@given(
    op=st.sampled_from(AFFINE),
    outer=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    n=st.integers(1, 200),
    dtype=dtypes,
    weight_dtype=dtypes,
    out_dtype=dtypes,
    rounds=st.sets(st.sampled_from(ROUNDINGS)),
    seed=st.integers(0, 2**31),
)
def test_gradients_of_random_calls_are_accurate(
    backend: Any,
    op: Op,
    outer: list[int],
    n: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    out_dtype: torch.dtype,
    rounds: set[str],
    seed: int,
) -> None:
    shape = tuple(outer) if not op.per_head else (*outer, 3)
    inputs = inputs_for(op, shape, n, dtype, weight_dtype=weight_dtype, seed=seed)
    options = {"out_dtype": out_dtype, "weight_offset": 0.5, **dict.fromkeys(rounds, True)}
    make_and_check(backend, case_of(op, inputs, **options))


@pytest.mark.parametrize("op", OPS, ids=str)
def test_kernels_make_the_gradients_too(kernels: Any, op: Op) -> None:
    leaves = wanting(op, inputs_for(op, (4, 3), 40, torch.bfloat16))
    with normkit.use_backend(kernels.name):
        explanation = kernels._call("explain", op.name, *op.tensors(leaves), **op.selected)
        assert explanation.reason.endswith("gradients too")
        clamped = kernels._call(
            "explain", op.name, *op.tensors(leaves), **op.selected, clamp_inf=True
        )
        assert "by plain torch: clamp_inf" in clamped.reason


@pytest.mark.parametrize("op", OPS, ids=str)
def test_gradients_of_special_values_stay_in_their_row(kernels: Any, op: Op) -> None:
    for value in (torch.nan, torch.inf):
        case = case_of(op, inputs_for(op, (6, 3), 40, torch.float32))
        clean = gradients(kernels, case)
        case.inputs.x[2, 1, 7] = value
        made = gradients(kernels, case)
        assert made.x[2, 1].isnan().any()
        others = torch.ones(6, 3, dtype=torch.bool)
        others[2, 1] = False
        assert_same_bits(made.x[others], clean.x[others])


def test_gradients_of_a_case_that_breaks_a_bound_are_found(backend: Any) -> None:
    """The check itself: one step of float32 in a million rows' sum is not let through."""
    case: Case = case_of(RMS, inputs_for(RMS, 5, 40, torch.float32))
    made = gradients(backend, case)
    for name in ("x", "weight", "bias"):
        broken = getattr(made, name).clone()
        broken.view(-1)[3] *= 1 + 2.0**-15
        with pytest.raises(AssertionError, match=f"gradient of {name}"):
            check(case, made._replace(**{name: broken}))


def one_sided(name: str, rows: int) -> torch.Tensor:
    """Magnitudes whose float32 sums lose much: roundings of one sign do not cancel."""
    half_a_step = 2.0**-24
    period = {
        "big and small": [1.0, half_a_step],
        "one of four": [1.0, half_a_step, half_a_step, half_a_step],
        "one of eight": [1.0, *[half_a_step * (1 - 2.0**-20)] * 7],
    }
    if name == "growing":
        return torch.linspace(1e-3, 1, rows)
    if name in period:
        values = torch.tensor(period[name])
        return values.repeat(-(-rows // len(values)))[:rows]
    return torch.full((rows,), float(name))


NAMES_OF_SUMS = ("growing", "big and small", "one of four", "one of eight")
EQUAL = (0.1, 1 / 3, 1 - 2.0**-24, 1 + 2.0**-23, 1.7, 3.0)


@pytest.mark.parametrize("name", [*map(repr, EQUAL), *NAMES_OF_SUMS])
@pytest.mark.parametrize("op", [RMS, HEAD_LAYER], ids=str)
def test_sums_of_one_sign_keep_the_bound(kernels: Any, op: Op, name: str) -> None:
    """Products of one sign for the weight, and gradients of one sign for the bias."""
    most = 16384 if kernels.name == "cpu" else 2000
    for rows, n in ((most, 8), (most // 20, 64), (37, 200)):
        shape = (rows, 5) if op.per_head else (rows,)
        sign = torch.ones(n)
        sign[1::2] = -1
        x = sign.expand(*shape, n).contiguous()
        weight, bias = (torch.full((5, n) if op.per_head else (n,), v) for v in (1.0, 0.0))
        inputs = inputs_for(op, shape, n, torch.float32)._replace(x=x, weight=weight, bias=bias)
        sizes = one_sided(name, rows).view(-1, *[1] * len(shape)).expand(*shape, n)
        case = case_of(op, inputs, eps=0.3)
        for grad_y in (sizes, sizes * sign):
            case = case._replace(grad_y=grad_y)
            check(case, gradients(kernels, case))


@pytest.mark.parametrize("negated", ["x", "grad_y"])
def test_single_columns_that_are_negated_lazily_have_their_signs(negated: str) -> None:
    """Neither strides nor DLPack tell of the negative bit there."""
    tensors = {"x": torch.tensor([[0.5], [-2.0]]), "grad_y": torch.tensor([[1.0], [3.0]])}
    found = []
    for hides in (True, False):
        t = tensors[negated]
        x, grad_y = ({**tensors, negated: lazily_negated(t) if hides else -t}).values()
        x = x.detach().requires_grad_()
        assert x.is_neg() == (hides and negated == "x")
        weight = torch.tensor([1.5], requires_grad=True)
        y = call("rms_norm", x, weight, eps=0.3)
        found.append(torch.autograd.grad(y, (x, weight), grad_y))
    for got, wanted in zip(*found, strict=True):
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "add_rms_norm"])
@pytest.mark.parametrize("memory_efficient", [False, True], ids=["", "memory_efficient"])
def test_calls_with_gradients_do_not_pass_through_python(
    name: str, memory_efficient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward: with its checks they would take a fifth more."""

    def fail(*_: object) -> None:
        raise AssertionError("a call went through Python's checks")

    for place, called in (
        (normkit.functional, "_serve"),
        (normkit.functional, "_serve_both"),
        (dispatch, "backward"),
    ):
        monkeypatch.setattr(place, called, fail)
    x = torch.randn(3, 8, requires_grad=True)
    residual = [torch.randn(3, 8, requires_grad=True)] * name.startswith("add")
    weight = torch.randn(8, requires_grad=True)
    made = getattr(normkit, name)(x, *residual, weight, memory_efficient=memory_efficient)
    y = made[0] if residual else made
    assert y.grad_fn.name() == "_NormBackward"
    y.square().sum().backward()
    assert x.grad is not None
    assert weight.grad is not None


def test_calls_that_users_make_take_this_path() -> None:
    y = call("rms_norm", torch.ones(2, 4, requires_grad=True))
    assert y.grad_fn.name() == "_NormBackward"
