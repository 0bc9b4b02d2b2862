"""The Triton kernels: a cross-section of the conformance suite, and what compilers make of them.

They run on the CPU under Triton's interpreter, and as they are where there is a GPU.
NORMKIT_TEST_BACKENDS=triton has the whole suite run on them.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import normkit
import triton_backend
from conformance.support import (
    BARE,
    BARE_ADDING,
    BARE_PLAIN,
    DTYPES,
    HEAD_LAYER,
    HEAD_RMS,
    LAYER,
    RMS,
    Guarded,
    Inputs,
    Op,
    assert_same_bits,
    assert_same_results,
    inputs_for,
    run,
    run_and_check,
    run_in_place,
)
from devices import call_on
from normkit import reference
from normkit._serving import backends
from normkit._serving import triton as _triton
from normkit.testing import make_inputs
from starting import loaded

pytestmark = pytest.mark.usefixtures("triton_is_there")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SIZES = (1, 2, 3, 31, 64, 100, 128, 257, 1000, 1025, 4104, 8192)
LONG = (16384, 16385, 40_000)


class Triton:
    """Calls ops on a device, and fails when another backend serves them."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, op: str, *tensors: Any, **options: Any) -> Any:
        with normkit.use_backend("triton"):
            served_by = self._call("explain", op, *tensors, **options).backend
            assert served_by == "triton"
            return self._call(op, *tensors, **options)

    def _call(self, name: str, *args: Any, **options: Any) -> Any:
        function = getattr(normkit, name)
        if self.device == "cpu":
            return function(*args, **options)
        return call_on(self.device, function, *args, **options)


def mixes(n: int) -> list[tuple[torch.dtype, torch.dtype]]:
    """Pairs of dtypes: all, but of long rows, which take the interpreter seconds, one of the same
    and each dtype on either side of another: what loads and stores them is in both kernels alike.
    """
    if n <= 2000:
        return list(itertools.product(DTYPES, DTYPES))
    return [(F32, F32), (F16, F32), (F32, BF16), (BF16, F16)]


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")


@pytest.fixture(
    scope="module", params=["cpu", pytest.param("cuda", marks=[NO_GPU, pytest.mark.gpu])]
)
def triton(request: pytest.FixtureRequest) -> Triton:
    return Triton(request.param)


# ------------------------------------------------------------------------------------- accuracy


@pytest.mark.parametrize("op", BARE, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_every_size_is_accurate(triton: Any, op: Op, n: int) -> None:
    for dtype in DTYPES:
        run_and_check(triton, op, inputs_for(op, 3, n, dtype, seed=n))


@pytest.mark.parametrize("op", BARE, ids=str)
@pytest.mark.parametrize("n", LONG)
def test_long_rows_are_accurate(triton: Any, op: Op, n: int) -> None:
    run_and_check(triton, op, inputs_for(op, 2, n, BF16, residual_dtype=F32), out_dtype=F32)


@pytest.mark.parametrize("op", [RMS, LAYER], ids=str)
@pytest.mark.parametrize("value", [None, 0.1])
def test_very_long_rows_keep_the_bound(triton: Any, op: Op, value: float | None) -> None:
    """Rounding errors of equal elements do not cancel."""
    inputs = inputs_for(op, 1, 2_000_000, F32)
    if value is not None:
        inputs = inputs._replace(x=torch.full_like(inputs.x, value))
    run_and_check(triton, op, inputs)


@pytest.mark.parametrize("op", BARE, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 2, 1000])
def test_every_number_of_rows_is_accurate(triton: Any, op: Op, rows: int) -> None:
    for n, dtype in itertools.product((1, 33, 128), DTYPES):
        run_and_check(triton, op, inputs_for(op, rows, n, dtype))


@pytest.mark.parametrize("op", BARE, ids=str)
def test_any_mix_of_dtypes_is_accurate(triton: Any, op: Op) -> None:
    for dtype, weight_dtype, out_dtype in itertools.product(DTYPES, DTYPES, DTYPES):
        inputs = inputs_for(
            op, 3, 65, dtype, weight_dtype=weight_dtype, bias_dtype=out_dtype,
            residual_dtype=weight_dtype,
        )  # fmt: skip
        for absent in ({}, {"weight": None}, {"bias": None}):
            run_and_check(triton, op, inputs._replace(**absent), out_dtype=out_dtype)


@pytest.mark.parametrize("op", BARE, ids=str)
@pytest.mark.parametrize("n", [70, 16_400])
def test_any_mix_of_options_is_accurate(triton: Any, op: Op, n: int) -> None:
    sums = (True, False) if op.adds else (None,)
    flags = itertools.product((0.0, -0.37), (True, False), (True, False), sums, (None, 0.3))
    for i, (offset, rounds, clamps, round_sum, eps) in enumerate(flags):
        if n > 1000 and i % 11:
            continue
        inputs = inputs_for(op, 3, n, DTYPES[i % 3], residual_dtype=DTYPES[i // 3 % 3])
        if inputs.x.dtype == F16 and clamps:
            inputs.x[1, 5] = math.inf
        options: dict[str, Any] = {
            "eps": eps,
            "weight_offset": offset,
            "round_before_weight": rounds,
            "clamp_inf": clamps,
        }
        if op.adds:
            options["round_sum"] = round_sum
        run_and_check(triton, op, inputs, **options)


# ------------------------------------------------------------------------------------- rounding


@pytest.mark.parametrize("out_dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("op", [RMS, LAYER], ids=str)
def test_rounding_is_to_nearest_even(triton: Any, op: Op, out_dtype: torch.dtype) -> None:
    """With xhat exactly 1 and -1, y is the weight or its negative: ties and their neighbours."""
    kept = 10 if out_dtype == F16 else 7
    lower, upper = (-26, 16) if out_dtype == F16 else (-135, 127)
    parts = torch.arange(0, 2 ** (kept + 2), 1 if kept == 7 else 37).double()
    binades = torch.arange(lower, upper).double()
    exact = (2.0 ** binades[:, None] * (1 + parts / 2 ** (kept + 2))).flatten()
    weight = torch.cat([exact, exact * (1 + 2.0**-23), exact * (1 - 2.0**-23)]).float()
    weight = weight[: weight.numel() // 16 * 16].view(-1, 16)
    x = torch.ones(1, *weight.shape)
    x[..., 1::2] = -1.0
    head = HEAD_RMS if op == RMS else HEAD_LAYER
    result = run(triton, head, Inputs(x, x, weight, None), eps=0.0, out_dtype=out_dtype)
    assert_same_bits(result.y, (x * weight).to(out_dtype))


@pytest.mark.parametrize("op", BARE_ADDING, ids=str)
@pytest.mark.parametrize("residual_dtype", [F16, BF16], ids=str)
def test_the_sum_is_rounded_to_nearest_even(
    triton: Any, op: Op, residual_dtype: torch.dtype
) -> None:
    patterns = torch.arange(0, 2**16, dtype=torch.int32) << 16
    x = torch.stack([patterns + low for low in (0x0000, 0x8000, 0x8001, 0x7FFF, 0x1000, 0x3000)])
    x = x.view(F32).view(-1, 64)
    x = torch.where(x.isnan(), 1.0, x)
    residual = torch.full_like(x, -0.0, dtype=residual_dtype)
    result = run(triton, op, Inputs(x, residual, None, None))
    assert_same_bits(result.residual_out, x.to(residual_dtype))


@pytest.mark.parametrize("op", [RMS, LAYER], ids=str)
def test_two_passes(triton: Any, op: Op) -> None:
    """With a large mean, E[x^2] - E[x]^2 has no right digit; two passes are exact here."""
    deviation = torch.tensor([3.0, -3.0, 1.0, -1.0]).repeat(64)
    for mean in (0.0,) if op == RMS else (0.0, 1024.0, 2.0**20):
        x = (mean + deviation).repeat(2, 1)
        y = run(triton, op, Inputs(x, x, None, None), eps=0.0).y
        expected = (deviation / math.sqrt(5)).repeat(2, 1)
        assert torch.allclose(y, expected, rtol=2**-22, atol=0)


# ------------------------------------------------------------------------------- special values


@pytest.mark.parametrize("op", BARE, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_nan_and_inf_stay_in_their_row_and_show(triton: Any, op: Op, bad: float) -> None:
    for dtype, n in itertools.product(DTYPES, (1, 64, 200)):
        clean = inputs_for(op, (4, 1), n, dtype)
        expected = run(triton, op, clean)
        spoilt = clean.x.clone()
        spoilt[2, 0, n // 2] = bad
        result = run_and_check(triton, op, clean._replace(x=spoilt))
        for row in (0, 1, 3):
            assert_same_bits(result.y[row], expected.y[row])
        assert result.y[2, 0, n // 2].isnan()


@pytest.mark.parametrize("op", BARE, ids=str)
def test_zeros_subnormals_and_overflow(triton: Any, op: Op) -> None:
    for dtype, n in itertools.product(DTYPES, (4, 67)):
        inputs = inputs_for(op, 3, n, dtype)._replace(bias=None)
        for name in ("x", "residual", "weight"):
            getattr(inputs, name)[..., ::2] = -0.0
        y = run(triton, op, inputs).y
        total = inputs.x.float() + inputs.residual.float() if op.adds else inputs.x.float()
        expected = reference.norm(total, inputs.weight, kind=op.kind)
        assert torch.equal(y.signbit(), expected.signbit())

        smallest = {F32: 2.0**-149, F16: 2.0**-24, BF16: 2.0**-133}[dtype]
        tiny = smallest * (torch.arange(3 * n, dtype=torch.float64).reshape(3, n) - n)
        inputs = inputs._replace(x=tiny.to(dtype), residual=torch.zeros(3, n, dtype=dtype))
        result = run_and_check(triton, op, inputs, eps=1e-30, out_dtype=F32)
        assert result.y.count_nonzero() > 0
    inputs = inputs_for(op, 3, 64, F32)
    inputs.x[1] *= 1e19
    inputs = inputs._replace(residual=torch.zeros_like(inputs.x), bias=None)
    assert (run_and_check(triton, op, inputs).y[1] == 0).all()


# ----------------------------------------------------------------------------------------- bits


@pytest.mark.parametrize("op", BARE, ids=str)
@pytest.mark.parametrize("n", [7, 129, 1000, 4104])
def test_a_row_does_not_depend_on_the_batch(triton: Any, op: Op, n: int) -> None:
    for dtype, rows in itertools.product(DTYPES, (2, 67)):
        inputs = inputs_for(op, (rows, 1), n, dtype)
        whole = run(triton, op, inputs)
        for row in {0, rows // 2, rows - 1}:
            row_alone = slice(row, row + 1)
            alone = inputs._replace(x=inputs.x[row_alone], residual=inputs.residual[row_alone])
            assert_same_bits(run(triton, op, alone).y[0], whole.y[row])


@pytest.mark.parametrize("op", BARE, ids=str)
@pytest.mark.parametrize("n", [1, 100, 1000, 4099])
def test_bits_are_those_of_the_plan_for_devices(op: Op, n: int) -> None:
    """The interpreter is given more rows of a program than a device."""
    inputs = inputs_for(op, (37, 1), n, BF16)
    usual = run(Triton("cpu"), op, inputs)
    kind = (op.kind == "layer") + 2 * op.per_head + 4 * op.adds
    residual = inputs.residual if op.adds else None
    eps = 1e-6 if op.kind == "rms" or op.per_head else 1e-5
    with triton_backend.interpreting():
        made = _triton.norm_saving(
            kind, inputs.x, residual, inputs.weight, inputs.bias, eps, 0.0, False, True, False,
            None, None, None,
        )  # fmt: skip
    assert_same_bits(made[0], usual.y)
    assert_same_bits(made[1], usual.residual_out)


@pytest.mark.parametrize("op", BARE, ids=str)
@pytest.mark.parametrize("n", [33, 130, 4099])
def test_a_row_does_not_depend_on_strides_or_alignment(triton: Any, op: Op, n: int) -> None:
    for dtype, out_dtype in mixes(n):
        inputs = inputs_for(op, (3, 2), n, dtype)
        plain = run(triton, op, inputs, out_dtype=out_dtype)
        for offset, gap in ((0, 5), (1, 0), (3, 1)):
            strides = (2 * (n + gap) + 7, n + gap, 1)
            place = (inputs.x.shape, strides, offset)
            moved = inputs._replace(
                x=Guarded(place[0], dtype, *place[1:]).fill(inputs.x),
                residual=Guarded(place[0], dtype, *place[1:]).fill(inputs.residual),
                weight=Guarded(inputs.weight.shape, dtype, None, offset).fill(inputs.weight),
            )
            out = Guarded(place[0], out_dtype, strides, 3 - offset)
            assert_same_results(run(triton, op, moved, out=out.tensor), plain)
            out.assert_only_elements_written()


@pytest.mark.parametrize("op", BARE, ids=str)
def test_any_number_of_outer_dimensions(triton: Any, op: Op) -> None:
    shape = (2, 3, 2, 1, 2, 3, 10)
    inputs = make_inputs(shape, F16, per_head=op.per_head)
    plain = run_and_check(triton, op, inputs)
    order = (4, 0, 5, 3, 2, 1)  # no two neighbours merge
    strides = [0] * 6 + [1]
    step = 12
    for d in order:
        strides[d] = step
        step *= shape[d]
    x, out = (Guarded(shape, F16, tuple(strides)) for _ in range(2))
    assert_same_results(run(triton, op, inputs._replace(x=x.fill(inputs.x)), out=out.tensor), plain)
    out.assert_only_elements_written()


@pytest.mark.parametrize("n", [9, 1000, 16_390])
def test_fused_equals_unfused(triton: Any, n: int) -> None:
    for op, plain in zip(BARE_ADDING, BARE_PLAIN, strict=True):
        for (dtype, residual_dtype), round_sum in itertools.product(mixes(n), (True, False)):
            inputs = inputs_for(op, 2, n, dtype, residual_dtype=residual_dtype)
            fused = run(triton, op, inputs, round_sum=round_sum)
            total = inputs.x.float() + inputs.residual.float()
            assert_same_bits(fused.residual_out, total.to(residual_dtype))
            normalised = fused.residual_out if round_sum else total
            alone = run(triton, plain, inputs._replace(x=normalised), out_dtype=dtype)
            assert_same_bits(fused.y, alone.y)


@pytest.mark.parametrize("op", BARE, ids=str)
@pytest.mark.parametrize("n", [1, 65, 4104, 16_390])
def test_in_place_gives_the_bits_of_out_of_place(triton: Any, op: Op, n: int) -> None:
    for dtype, residual_dtype in mixes(n):
        inputs = inputs_for(op, 3, n, dtype, residual_dtype=residual_dtype)
        expected = run(triton, op, inputs)
        assert_same_results(run_in_place(triton, op, inputs), expected)
        if op.adds and dtype == residual_dtype:
            x, residual = inputs.x.clone(), inputs.residual.clone()
            swapped = inputs._replace(x=x, residual=residual)
            made = run(triton, op, swapped, out=residual, residual_out=x)
            assert made.y is residual
            assert_same_results(made, expected)


@pytest.mark.parametrize("op", [HEAD_RMS, HEAD_LAYER], ids=str)
def test_query_of_a_packed_qkv_in_place(triton: Any, op: Op) -> None:
    packed = make_inputs((5, 8 * 24), BF16).x
    before = packed.clone()
    view = packed.view(5, 8, 24)[:, :4]
    affine = make_inputs((4, 24), BF16, per_head=True)
    for bias in (affine.bias, affine.bias[1], None):
        plain = affine._replace(x=before.view(5, 8, 24)[:, :4].contiguous(), bias=bias)
        packed.copy_(before)
        triton(f"{op.name}_", view, affine.weight, bias, **op.selected)
        assert_same_bits(view.contiguous(), run_and_check(triton, op, plain).y)
        assert_same_bits(packed[:, 4 * 24 :], before[:, 4 * 24 :])


# --------------------------------------------------------------------------------- the entry


@pytest.mark.parametrize("op", BARE, ids=str)
@pytest.mark.parametrize("n", [5, 300, 16_390])
def test_saving_gives_what_the_backward_pass_needs(triton: Any, op: Op, n: int) -> None:
    for dtype, round_sum in itertools.product(DTYPES, (True, False) if op.adds else (True,)):
        inputs = inputs_for(op, (2, 3), n, dtype)
        residual = inputs.residual if op.adds else None
        kind = (op.kind == "layer") + 2 * op.per_head + 4 * op.adds
        y, residual_out, rstd, mean = call_on(
            triton.device, backends.natives["triton"].norm_saving, kind, inputs.x, residual,
            inputs.weight, inputs.bias, 1e-6, 0.0, False, round_sum, False, None, None, None,
        )  # fmt: skip
        rest = {"round_sum": round_sum} if op.adds else {}
        expected = run(triton, op, inputs, eps=1e-6, **rest)
        assert_same_bits(y, expected.y)
        assert_same_bits(residual_out, expected.residual_out)
        total = inputs.x.float()
        if residual is not None:
            total = total + residual.float()
            total = total.to(dtype).float() if round_sum else total
        exact = total.double()
        assert rstd.shape == inputs.x.shape[:-1]
        assert rstd.dtype == F32
        if op.kind == "layer":
            torch.testing.assert_close(mean.double(), exact.mean(-1), rtol=1e-6, atol=1e-6)
            exact = exact - exact.mean(-1, keepdim=True)
        else:
            assert mean is None
        statistic = (exact * exact).mean(-1) + 1e-6
        torch.testing.assert_close(rstd.double(), statistic.rsqrt(), rtol=2**-21, atol=0)


def explained(op: str, *tensors: Any, **options: Any) -> Any:
    with normkit.use_backend("triton"):
        return normkit.explain(op, *tensors, **options)


def test_explain_names_the_kernel() -> None:
    for n, name in ((100, "norm_rows"), (100_000, "norm_streamed_row")):
        explanation = explained("rms_norm", torch.ones(2, n))
        assert explanation.backend == "triton"
        assert explanation.plan.startswith(f"{name}: ")
    assert str(_triton.plan(100)) == (
        "norm_rows: 8 rows a program, 128 columns at a time, kept in registers, warps: 1"
    )


def test_what_is_not_served_is_refused_with_the_reason() -> None:
    x = torch.ones(2, 4)
    subclass = x.as_subclass(type("S", (Tensor,), {}))
    cases: dict[str, tuple[Any, ...]] = {
        "x is float64": (x.double(),),
        "x is not a plain torch.Tensor": (subclass,),
        "weight requires a gradient": (x, torch.ones(4, requires_grad=True)),
    }
    for reason, (given, *weight) in cases.items():
        args = (0, given, None, *(weight or [None]), None, 1e-6, 0.0, False, True, False)
        made = backends.natives["triton"].norm(*args, None, None, None)
        assert str(made) == reason
    with torch.no_grad():
        wrong = (0, x, None, torch.ones(3), None, 1e-6, 0.0, False, True, False, None, None, None)
        refused = backends.natives["triton"].norm_saving(*wrong)
        assert (refused.argument, refused.kind) == ("weight", "shape")


def test_writes_are_counted() -> None:
    x, out = torch.ones(2, 4), torch.ones(2, 4)
    before = out._version
    with normkit.use_backend("triton"):
        normkit.rms_norm(x, out=out)
        normkit.rms_norm_(x)
    assert out._version > before
    assert x._version > 0


def test_only_rocm_and_xpu_devices_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    assert "on cuda:0" in _triton.why_not(torch.device("cuda:0"))
    assert "on cpu" in _triton.why_not(torch.device("cpu"))
    assert _triton.why_not(torch.device("xpu:0")) == ""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert _triton.why_not(torch.device("cuda:0")) == ""
    monkeypatch.setattr(_triton, "_kernels", lambda: "Triton could not be loaded: gone")
    assert "gone" in _triton.why_not(torch.device("cuda:0"))


def test_on_the_cpu_compiled_kernels_refuse() -> None:
    x = torch.ones(2, 4)
    args = (0, x, None, None, None, 1e-6, 0.0, False, True, False, None, None, None)
    assert str(_triton.norm(*args)) == "x is on cpu"


def test_importing_normkit_does_not_import_triton() -> None:
    assert "triton" not in loaded()[1]


def test_a_plan_follows_n_alone_and_fills_its_threads() -> None:
    for n in (*range(1, 70), *SIZES, *LONG, 2**31):
        plan = _triton.plan(n)
        assert plan.rows * plan.block >= 64 * plan.warps  # an AMD warp has 64 threads
        assert plan.block >= n or plan.streamed
        assert plan.block & (plan.block - 1) == 0
