"""The promises of docs/numerics.md, each with a test of its name."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import normkit
from conformance.support import (
    DTYPES,
    EVERY,
    NOT_GATED,
    NOT_GATED_AFFINE,
    OPS,
    POST,
    RMS,
    Guarded,
    Inputs,
    Op,
    assert_same_bits,
    assert_same_results,
    dtypes,
    inputs_for,
    run,
    run_and_check,
    run_in_place,
    threads,
)
from normkit.testing import make_inputs

ops = st.sampled_from(OPS)


def rows_of(inputs: Inputs, rows: slice) -> Inputs:
    return inputs._replace(x=inputs.x[rows], residual=inputs.residual[rows])


# -------------------------------------------------------------------------------------- promise 1


@pytest.mark.parametrize("op", [*NOT_GATED, *POST], ids=str)
def test_promise_1_statistics_are_float32(backend: Any, op: Op) -> None:
    """These squares overflow float16, and a sum in bfloat16 would stop at 256 terms."""
    for dtype in DTYPES:
        run_and_check(backend, op, inputs_for(op, 2, 5000, dtype, scale=300.0))


@pytest.mark.parametrize("op", [op for op in OPS if op.kind == "layer"], ids=str)
def test_promise_1_layer_norm_takes_two_passes(backend: Any, op: Op) -> None:
    """With a mean of 1000 standard deviations, E[x^2] - E[x]^2 in float32 has hardly a right digit.

    The bound grows with the mean and would let that pass.  Here it need not: the deviations are
    whole numbers, and every step of the two passes is exact but for rstd.
    """
    n = 256
    deviation = torch.tensor([3.0, -3.0, 1.0, -1.0]).repeat(n // 4)
    for mean in (0.0, 1024.0, 2.0**20):
        inputs = Inputs(
            (mean + deviation).repeat(2, 1), torch.zeros(2, n), torch.ones(n), torch.zeros(n)
        )
        y = run(backend, op, inputs, eps=0.0).y
        assert torch.allclose(y, (deviation / math.sqrt(5)).repeat(2, 1), rtol=2**-22, atol=0)


@pytest.mark.parametrize("out_dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("op", NOT_GATED_AFFINE, ids=str)
def test_promise_1_rounding_is_to_nearest_even(
    backend: Any, op: Op, out_dtype: torch.dtype
) -> None:
    """With xhat exactly 1 and -1, y is the weight or its negative: ties and their neighbours."""
    upper = 14 if out_dtype == torch.float16 else 126  # one binade below the last
    lower = -26 if out_dtype == torch.float16 else -135  # below the smallest subnormal
    bits_kept = 10 if out_dtype == torch.float16 else 7
    parts = torch.arange(0, 2 ** (bits_kept + 2), 1 if bits_kept == 7 else 37).double()
    binades = torch.arange(lower, upper + 2).double()
    weight = (2.0 ** binades[:, None] * (1 + parts / 2 ** (bits_kept + 2))).flatten()
    weight = torch.cat([weight, weight * (1 + 2.0**-23), weight * (1 - 2.0**-23)])
    weight = weight.float()[: weight.numel() // 2 * 2]
    x = torch.ones(1, weight.numel())
    x[:, 1::2] = -1.0
    inputs = Inputs(x, torch.zeros_like(x), weight, None)
    result = run(backend, op, inputs, eps=0.0, out_dtype=out_dtype)
    assert_same_bits(result.y, (x * weight).to(out_dtype))


@pytest.mark.parametrize("op", [op for op in OPS if op.adds], ids=str)
@pytest.mark.parametrize("residual_dtype", DTYPES[1:], ids=str)
def test_promise_1_the_sum_is_rounded_to_nearest_even(
    backend: Any, op: Op, residual_dtype: torch.dtype
) -> None:
    """Every upper half of a float32, with a tie in the lower half, and just beside it."""
    patterns = torch.arange(0, 2**16, dtype=torch.int32) << 16
    x = torch.stack([patterns + low for low in (0x0000, 0x8000, 0x8001, 0x7FFF, 0x1000, 0x3000)])
    x = x.view(torch.float32)
    x = torch.where(x.isnan(), 1.0, x)
    residual = torch.full_like(x, -0.0, dtype=residual_dtype)
    result = run(backend, op, Inputs(x, residual, None, None))
    assert_same_bits(result.residual_out, x.to(residual_dtype))


# -------------------------------------------------------------------------------------- promise 2


@given(
    op=ops,
    dtype=dtypes,
    out_dtype=dtypes,
    n=st.integers(1, 2000),
    scale=st.integers(-4, 3),
    spike=st.floats(0, 4),
    mean=st.floats(-100, 100),
    eps=st.sampled_from([1e-6, 0.3]),
    seed=st.integers(0, 2**32),
)
def test_promise_2_error_within_the_bound(
    backend: Any,
    op: Op,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    n: int,
    scale: int,
    spike: float,
    mean: float,
    eps: float,
    seed: int,
) -> None:
    inputs = inputs_for(op, 2, n, dtype, scale=10.0**scale, seed=seed)
    x = inputs.x.float() + mean * 10.0**scale
    x[1, seed % n] *= 10.0**spike
    inputs = inputs._replace(x=x.clamp(-6e4, 6e4).to(dtype))
    run_and_check(backend, op, inputs, eps=eps, out_dtype=out_dtype)


@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_promise_2_rstd_is_rounded_once(kernels: Any, mean: float) -> None:
    """What is left is the error of the sum; each step after it could add one of its own."""
    if kernels.name in ("cuda", "triton"):
        pytest.skip("the tensors are on the CPU, and Triton saves nothing")
    x = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(0)) + mean
    with normkit.use_backend(kernels.name):
        _, rstd, _ = torch.ops.normkit.layer_norm(x)
    deviation = (x.double() - x.double().mean(-1, keepdim=True)).square().mean(-1)
    error = rstd.double() * (deviation + 1e-5).sqrt() - 1
    # In float32 these steps would make it 0.74.
    assert error.square().mean().sqrt().item() < 0.65 * 2.0**-24


# -------------------------------------------------------------------------------------- promise 3


@pytest.mark.parametrize("op", EVERY, ids=str)
@pytest.mark.parametrize("n", [7, 64, 129, 1000, 2176, 4104])
def test_promise_3_a_row_does_not_depend_on_the_batch(backend: Any, op: Op, n: int) -> None:
    if op.gated and backend.name == "reference":
        pytest.skip("torch's silu has other bits at the end of a tensor")
    for dtype, rows in itertools.product(DTYPES, (2, 5, 67)):
        inputs = inputs_for(op, (rows, 1), n, dtype)
        whole = run(backend, op, inputs)
        for row in {0, 1, rows // 2, rows - 1}:
            alone = run(backend, op, rows_of(inputs, slice(row, row + 1)))
            assert_same_bits(alone.y[0], whole.y[row])
            if op.adds:
                assert_same_bits(alone.residual_out[0], whole.residual_out[row])


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("n", [1, 33, 130, 1000, 4099])
def test_promise_3_a_row_does_not_depend_on_strides_or_alignment(
    backend: Any, op: Op, n: int
) -> None:
    for dtype, out_dtype in itertools.product(DTYPES, DTYPES):
        inputs = inputs_for(op, (3, 2), n, dtype)
        plain = run(backend, op, inputs, out_dtype=out_dtype)
        for offset, gap in itertools.product((0, 1, 3), (0, 1, 5)):
            strides = (2 * (n + gap) + 7, n + gap, 1)
            place = (inputs.x.shape, strides, offset)
            moved = inputs._replace(
                x=Guarded(place[0], dtype, *place[1:]).fill(inputs.x),
                residual=Guarded(place[0], dtype, *place[1:]).fill(inputs.residual),
                weight=Guarded(inputs.weight.shape, dtype, None, offset).fill(inputs.weight),
                bias=Guarded(inputs.bias.shape, dtype, None, 3 - offset).fill(inputs.bias),
            )
            out = Guarded(place[0], out_dtype, strides, 3 - offset)
            assert_same_results(run(backend, op, moved, out=out.tensor), plain)
            out.assert_only_elements_written()


@pytest.mark.parametrize("op", EVERY, ids=str)
def test_promise_3_a_row_does_not_depend_on_the_number_of_threads(backend: Any, op: Op) -> None:
    """Shapes with enough bytes for two threads, in rows and heads that do not divide evenly."""
    shapes = (((3, 1), 12289), ((43, 3), 500), ((143, 7), 64), ((1667, 3), 7))
    for dtype, (outer, n) in itertools.product(DTYPES, shapes):
        inputs = inputs_for(op, outer, n, dtype)
        with threads(1):
            serial = run(backend, op, inputs)
        with threads(2):
            parallel = run(backend, op, inputs)
            in_place = run_in_place(backend, op, inputs)
        assert_same_results(parallel, serial)
        assert_same_results(in_place, serial)


def test_threads_are_used(kernels: Any) -> None:
    """Or the test above compares a thread with itself."""
    import normkit

    x = torch.ones(1001, 512)
    for count, text in ((1, "1 thread,"), (2, "2 threads,")):
        with threads(count):
            assert text in normkit.explain(RMS.name, x).plan


# -------------------------------------------------------------------------------------- promise 4


@pytest.mark.parametrize("op", EVERY, ids=str)
def test_promise_4_two_runs_give_the_same_bits(backend: Any, op: Op) -> None:
    for dtype, n in itertools.product(DTYPES, (65, 4096)):
        inputs = inputs_for(op, 100, n, dtype)
        with threads(2):
            first = run(backend, op, inputs)
            for _ in range(3):
                assert_same_results(run(backend, op, inputs), first)


@pytest.mark.parametrize("op", EVERY, ids=str)
def test_promise_4_two_backward_runs_give_the_same_bits(op: Op) -> None:
    import normkit

    def gradients() -> list[torch.Tensor]:
        made = inputs_for(op, (50, 8), 96, torch.float32)
        made = made._replace(z=made.x.clone() if op.gated else None)
        inputs = Inputs(*(t if t is None else t.requires_grad_() for t in made))
        y = run(lambda name, *args, **kw: getattr(normkit, name)(*args, **kw), op, inputs).y
        (y * torch.arange(96)).sum().backward()
        return [t.grad for t in inputs if t is not None and t.grad is not None]

    with threads(2):
        first = gradients()
        assert len(first) == len(op.takes)
        for again in (gradients(), gradients()):
            for a, b in zip(again, first, strict=True):
                assert_same_bits(a, b)


# -------------------------------------------------------------------------------------- promise 5


@pytest.mark.parametrize("op", EVERY, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_promise_5_nan_and_inf_stay_in_their_row_and_show(backend: Any, op: Op, bad: float) -> None:
    for dtype, n, where in itertools.product(DTYPES, (1, 7, 64, 200), ("x", "residual")):
        if where == "residual" and not op.adds:
            continue
        clean = inputs_for(op, (5, 1), n, dtype)
        expected = run(backend, op, clean)
        for column in {0, n // 2, n - 1}:
            spoilt = getattr(clean, where).clone()
            spoilt[2, 0, column] = bad
            spoilt[4, 0, column] = bad
            inputs = clean._replace(**{where: spoilt})
            result = run_and_check(backend, op, inputs)
            for row in (0, 1, 3):
                assert_same_bits(result.y[row], expected.y[row])
            assert result.y[2, 0, column].isnan()
            assert result.y[4, 0, column].isnan()


# -------------------------------------------------------------------------------------- promise 6


@contextmanager
def operators_of_torch() -> Iterator[list[str]]:
    """Those that are called inside, without those that they call.  No mode: it would be obeyed."""
    names: list[str] = []
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        yield names
    called = [event.name for event in profiler.events() if event.cpu_parent is None]
    names += [name for name in called if name != "aten::resolve_neg"]  # which returns its argument


@pytest.mark.parametrize("op", OPS, ids=str)
def test_promise_6_nothing_is_allocated_beyond_the_outputs(kernels: Any, op: Op) -> None:
    """Nor copied: torch is asked for the outputs, and for nothing at all where they are given."""
    if kernels.name == "cuda":
        pytest.skip("tests/gpu asks the device's allocator")
    shape = (4, 6, 100)
    big = make_inputs((4, 6, 300), torch.bfloat16, per_head=op.per_head)
    inputs = Inputs(
        big.x[..., 100:200], big.residual[..., 1:101], big.weight[..., :100], big.bias[..., 7:107]
    )
    given: dict[str, Any] = {"out": torch.empty(shape, dtype=torch.bfloat16)}
    if op.adds:
        given["residual_out"] = torch.empty(shape, dtype=torch.bfloat16)
    with operators_of_torch() as made:
        run(kernels, op, inputs)
    with operators_of_torch() as given_calls:
        run(kernels, op, inputs, **given)
    # The runner asks explain() first, which makes nothing.
    assert made == ["aten::empty_like"] * (1 + op.adds)
    assert given_calls == []
