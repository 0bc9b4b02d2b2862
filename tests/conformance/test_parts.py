"""Rows whose columns are split into parts: what the extension makes of the parts is the norm of
whole rows, and its gradients.

The parts are put together here as several processes would put them together.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from conformance.gradients import Case, Gradients, case_of
from conformance.gradients import check as check_gradients
from conformance.support import (
    DTYPES,
    HEAD_LAYER,
    HEAD_RMS,
    LAYER,
    RMS,
    Op,
    assert_same_bits,
    inputs_for,
    threads,
)
from devices import call_on
from normkit._dispatch import natives
from normkit.testing import Inputs, assert_accurate

OPS = (RMS, LAYER, HEAD_RMS, HEAD_LAYER)
COUNTS = (1, 2, 3, 4, 8)
SIZES = (1, 2, 7, 64, 65, 130, 1000, 4100)  # of a part; the last is beyond one step of every lane


class Native:
    """The extension's functions for parts; a refusal fails the test that does not look for it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def try_(self, function: str, *args: Any) -> Any:
        served_by = getattr(natives[self.name].parts, function)
        return call_on("cuda", served_by, *args) if self.name == "cuda" else served_by(*args)

    def __call__(self, function: str, *args: Any) -> Any:
        result = self.try_(function, *args)
        assert not isinstance(result, str), result
        return result


@pytest.fixture(scope="session")
def native(kernels: Any) -> Native:
    if natives[kernels.name].parts is None:
        pytest.skip(f"{kernels} has no kernels for parts")
    return Native(kernels.name)


class Made(NamedTuple):
    y: Tensor
    rstd: Tensor
    mean: Tensor | None


def kind_of(op: Op) -> int:
    return int(op.kind == "layer") + 2 * op.per_head


def chunks(t: Tensor | None, count: int) -> tuple[Tensor | None, ...]:
    return (None,) * count if t is None else t.chunk(count, -1)


def eps_of(op: Op, options: dict[str, Any]) -> float:
    return options.get("eps", 1e-5 if op is LAYER else 1e-6)


def statistics(native: Native, op: Op, x: Tensor, count: int, clamp_inf: bool = False) -> Tensor:
    """Those of every part, as a collective gathers them."""
    return torch.stack(
        [native("part_statistics", kind_of(op), part, clamp_inf) for part in chunks(x, count)]
    )


def run(native: Native, op: Op, inputs: Inputs, count: int, **options: Any) -> Made:
    """All parts of a norm, one after the other."""
    clamp_inf = options.get("clamp_inf", False)
    gathered = statistics(native, op, inputs.x, count, clamp_inf)
    made = [
        Made(
            *native(
                "part_apply",
                kind_of(op),
                x,
                weight,
                bias,
                eps_of(op, options),
                options.get("weight_offset", 0.0),
                options.get("round_before_weight", False),
                clamp_inf,
                options.get("out_dtype"),
                gathered,
            )
        )
        for x, weight, bias in zip(*(chunks(t, count) for t in used(inputs)), strict=True)
    ]
    for part in made:  # every process has the same statistics of whole rows
        assert_same_bits(part.rstd, made[0].rstd)
        assert_same_bits(part.mean, made[0].mean)
    return made[0]._replace(y=torch.cat([part.y for part in made], -1))


def used(inputs: Inputs) -> tuple[Tensor | None, ...]:
    return inputs.x, inputs.weight, inputs.bias


def run_and_check(native: Native, op: Op, inputs: Inputs, count: int, **options: Any) -> Made:
    made = run(native, op, inputs, count, **options)
    assert made.y.dtype == (options.pop("out_dtype", None) or inputs.x.dtype)
    options["eps"] = eps_of(op, options)
    assert_accurate(made.y, *used(inputs), kind=op.kind, **options)
    return made


def gradients(native: Native, case: Case, count: int, x_dtype: torch.dtype | None) -> Gradients:
    """All parts of a forward and a backward pass."""
    op, inputs, options = case.op, case.inputs, case.options
    made = run(native, op, inputs, count, **options)
    offset = options.get("weight_offset", 0.0)
    rounds = options.get("round_before_weight", False)
    saved = made.rstd, made.mean
    parts = list(zip(*(chunks(t, count) for t in (case.grad_y, *used(inputs))), strict=True))
    gathered = torch.stack(
        [
            native("part_backward_statistics", kind_of(op), grad_y, x, weight, *saved, offset)
            for grad_y, x, weight, _ in parts
        ]
    )
    of_parts = [
        native(
            "part_backward_apply", kind_of(op), *part, *saved, offset, rounds, x_dtype, 3, gathered
        )
        for part in parts
    ]
    x, weight, bias = (
        None if of[0] is None else torch.cat(of, -1) for of in zip(*of_parts, strict=True)
    )
    return Gradients(x, None, weight, bias)


def make_and_check(native: Native, case: Case, count: int) -> Gradients:
    made = gradients(native, case, count, case.inputs.x.dtype)
    check_gradients(case, made)
    return made


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
        DTYPES, (False, True), (0.0, 1.0), (0.3, 1e-6)
    ):
        inputs = inputs_for(op, (2, 3), 132, dtype)
        options = {"round_before_weight": rounds, "weight_offset": offset, "eps": eps}
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
    for dtype, rounds, offset in itertools.product(DTYPES, (False, True), (0.0, 1.0)):
        inputs = inputs_for(op, (2, 3), 132, dtype)
        options = {"round_before_weight": rounds, "weight_offset": offset}
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


# --------------------------------------------------------------------------------------- refusals


class Call(NamedTuple):
    """The arguments of a call by name, in their order."""

    function: str
    arguments: dict[str, Any]

    def but(self, **changed: Any) -> tuple[Any, ...]:
        assert changed.keys() <= self.arguments.keys()
        return self.function, *(self.arguments | changed).values()


X = torch.ones(2, 3, 8)
ROW = torch.ones(8)
VALUES = torch.ones(2, 3)
GATHERED = torch.ones(4, 2, 2, 3)
STATISTICS = Call("part_statistics", {"kind": 1, "x": X, "clamp_inf": False})
APPLY = Call(
    "part_apply",
    {"kind": 1, "x": X, "weight": ROW, "bias": ROW, "eps": 1e-5, "weight_offset": 0.0}
    | {"round_before_weight": False, "clamp_inf": False, "out_dtype": None, "gathered": GATHERED},
)
GRADIENTS = {"kind": 1, "grad_y": X, "x": X, "weight": ROW}
SAVED = {"rstd": VALUES, "mean": VALUES, "weight_offset": 0.0}
BACKWARD_STATISTICS = Call("part_backward_statistics", GRADIENTS | SAVED)
BACKWARD_APPLY = Call(
    "part_backward_apply",
    GRADIENTS
    | {"bias": ROW}
    | SAVED
    | {"round_before_weight": False, "x_dtype": torch.float32, "wanted": 3, "gathered": GATHERED},
)
CALLS = (STATISTICS, APPLY, BACKWARD_STATISTICS, BACKWARD_APPLY)


class Subclass(torch.Tensor):
    pass


# What is wrong with an argument of this name, whatever function it is of.
WRONG: dict[str, list[Any]] = {
    "x": [
        None,
        1.0,
        torch.ones(()),
        torch.ones(2, 3, 0),
        torch.ones(2, 3, 8, dtype=torch.float64),
        torch.ones(2, 3, 8, dtype=torch.int32),
        torch.ones(2, 8, 3).transpose(1, 2),
        torch.ones(2, 3, 8, device="meta"),
        torch.ones(2, 3, 8).as_subclass(Subclass),
    ],
    "grad_y": [None, torch.ones(2, 3, 7), torch.ones(6, 8), torch.ones(2, 8, 3).transpose(1, 2)],
    "weight": [torch.ones(7), torch.ones(3, 8), torch.ones(16)[::2], ROW.double()],
    "bias": [torch.ones(7), torch.ones(3, 8), torch.ones(16)[::2], ROW.double()],
    "rstd": [None, VALUES.half(), torch.ones(6), torch.ones(2, 4), torch.ones(3, 2).t()],
    "mean": [None, VALUES.half(), torch.ones(6), torch.ones(2, 4), torch.ones(3, 2).t()],
    "eps": ["1", -1.0, float("nan"), float("inf"), True],
    "weight_offset": ["1", float("nan"), float("inf"), None],
    "round_before_weight": [1, None],
    "clamp_inf": [1, None],
    "out_dtype": [torch.float64, torch.int8, "float32"],
    "x_dtype": [torch.float64, torch.int8, "float32"],
    "gathered": [
        None,
        GATHERED.half(),
        GATHERED.double(),
        torch.ones(0, 2, 2, 3),
        torch.ones(4, 1, 2, 3),
        torch.ones(4, 3, 2, 3),
        torch.ones(4, 2, 6),
        torch.ones(4, 2, 3, 2),
        torch.ones(4, 2, 2, 3, 1),
        torch.ones(2, 4, 2, 3).transpose(0, 1),
        torch.ones(1, 2, 2, 3).expand(4, 2, 2, 3),
        torch.ones(4, 2, 2, 3, device="meta"),
        torch.ones(()),
    ],
}


@pytest.mark.parametrize(
    ("call", "name"),
    [(call, name) for call in CALLS for name in call.arguments if name in WRONG],
    ids=lambda v: v.function if isinstance(v, Call) else v,
)
def test_what_cannot_be_served_is_refused_by_name(native: Native, call: Call, name: str) -> None:
    native(*call.but())
    for wrong in WRONG[name]:
        said = native.try_(*call.but(**{name: wrong}))
        assert isinstance(said, str), (name, wrong)
        # That x is another one may show in what has to fit it.
        about = [name] if name != "x" else list(call.arguments)
        assert any(said.startswith(f"{a} ") or f"or {a} " in said for a in about), (wrong, said)


def test_an_rms_norm_has_no_mean_and_one_plane(native: Native) -> None:
    one_plane = torch.ones(4, 1, 2, 3)
    y, rstd, mean = native(*APPLY.but(kind=0, gathered=one_plane))
    assert (y.shape, rstd.shape, mean) == (X.shape, (2, 3), None)
    assert native.try_(*APPLY.but(kind=0)).startswith("gathered")
    assert native.try_(*BACKWARD_STATISTICS.but(kind=0)).startswith("mean")
    native(*BACKWARD_APPLY.but(kind=0, mean=None, gathered=one_plane))


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.function)
def test_the_number_of_arguments_is_checked(native: Native, call: Call) -> None:
    function, *arguments = call.but()
    with pytest.raises(TypeError, match="positional arguments"):
        native.try_(function, *arguments[:-1])
    with pytest.raises(TypeError, match="positional arguments"):
        native.try_(function, *arguments, None)
