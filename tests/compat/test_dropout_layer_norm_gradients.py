"""The backward functions of `normkit.compat.dropout_layer_norm`."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import normkit
from compat.dropout_calls import (
    AUTO,
    BFLOAT16,
    DTYPES,
    EPS,
    FLOAT32,
    Options,
    backward,
    call,
    forward,
    normalised,
    random,
    subset,
    summed,
)
from conformance.support import assert_same_bits, threads
from normkit.compat import dropout_layer_norm

both_kinds = pytest.mark.parametrize("is_rms_norm", [False, True], ids=["layer", "rms"])
# Steps of a dtype in which a gradient is stored; 16-bit x is kept rounded, which tells more.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}


def assert_near(got: Tensor | None, expected: Tensor | None, *seen: torch.dtype) -> None:
    """Differ by no more of the largest element than the coarsest dtype seen on the way explains."""
    assert got is not None
    assert expected is not None
    assert got.shape == expected.shape
    coarsest = max(TOLERANCE[dtype] for dtype in (got.dtype, *seen))
    error = (got.double() - expected).abs().max()
    assert error <= coarsest * expected.abs().max(), f"{error:.3g} of {expected.abs().max():.3g}"


def wanting(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double().requires_grad_()


def check_gradients(
    backend: Any,
    x0: Tensor,
    residual: Tensor | None,
    gamma: Tensor,
    options: Options,
    *,
    has_dx: bool,
) -> None:
    """Hold every gradient to that of autograd in float64."""
    n = x0.shape[1]
    beta = random(n, dtype=gamma.dtype, seed=9)
    made = forward(backend, x0, residual, gamma, beta, options)
    z, x, dmask = made[:3]
    dz = random(*z.shape, dtype=z.dtype, seed=10)
    kept = x0 if x is None else x
    dx = random(*kept.shape, dtype=kept.dtype, seed=11) if has_dx else None
    got = backward(backend, dz, dx, made, x0, residual, gamma, options)

    leaves = [wanting(t) for t in (x0, residual, gamma, beta, options.colscale)]
    wide_x0, wide_residual, wide_gamma, wide_beta, wide_colscale = leaves
    assert wide_x0 is not None
    assert wide_gamma is not None
    assert wide_beta is not None
    xf = summed(wide_x0, wide_residual, dmask, options._replace(colscale=wide_colscale))
    y = normalised(xf, options.is_rms_norm) * wide_gamma + wide_beta
    if options.z_subset is not None:
        y = y[options.z_subset > 0]
        dz = dz[: y.shape[0]]
    score = (y * dz.double()).sum()
    if dx is not None:
        score = score + (xf * dx.double()).sum()
    score.backward()

    seen = () if kept.dtype == FLOAT32 else (kept.dtype,)
    dx0, dresidual, dgamma, dbeta, dgamma_part, dbeta_part, *of_colscale = got
    assert dx0.dtype == x0.dtype
    assert_near(dx0, wide_x0.grad, *seen)
    if residual is None or wide_residual is None:
        assert dresidual is None
    else:
        assert dresidual.dtype == residual.dtype
        assert_near(dresidual, wide_residual.grad, *seen)
        assert dresidual.data_ptr() != dx0.data_ptr()
    sums = [(dgamma, dgamma_part, wide_gamma), (dbeta, dbeta_part, wide_beta)]
    if options.colscale is not None and wide_colscale is not None:
        sums.append((*of_colscale, wide_colscale))
    else:
        assert not of_colscale
    for gradient, part, leaf in sums:
        assert part.dtype == FLOAT32
        assert part.shape[1:] == gradient.shape
        assert_near(part.sum(0), leaf.grad, *seen)
        assert_same_bits(gradient, part.sum(0).to(gamma.dtype))
        assert gradient.data_ptr() != part.data_ptr()


@both_kinds
@pytest.mark.parametrize("has_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_gradients_are_those_of_the_formula(
    backend: Any,
    dtypes: tuple[torch.dtype, ...],
    dropout_p: float,
    has_residual: bool,
    is_rms_norm: bool,
) -> None:
    x0 = random(6, 40, dtype=dtypes[0])
    residual = random(6, 40, dtype=dtypes[1], seed=1) if has_residual else None
    gamma = random(40, dtype=dtypes[2], seed=2)
    for has_dx, has_rowscale, has_colscale in product((False, True), repeat=3):
        options = Options(
            random(6, dtype=dtypes[0], seed=3) if has_rowscale else None,
            random(40, dtype=dtypes[2], seed=4) if has_colscale else None,
            dropout_p=dropout_p,
            residual_in_fp32=dtypes[1] == FLOAT32,
            is_rms_norm=is_rms_norm,
        )
        check_gradients(backend, x0, residual, gamma, options, has_dx=has_dx)


@both_kinds
@pytest.mark.parametrize("n", [1, 5, 192, 8200, 16384])
def test_every_hidden_size_has_gradients(backend: Any, n: int, is_rms_norm: bool) -> None:
    x0, residual, gamma = random(3, n), random(3, n, seed=1), random(n, seed=2)
    if n == 1 and not is_rms_norm:
        made = forward(backend, x0, residual, gamma, None, Options())
        got = backward(backend, torch.ones(3, 1), None, made, x0, residual, gamma, Options())
        # A row of one element is its own mean; what rounding leaves is times rsigma.
        torch.testing.assert_close(got[0], torch.zeros(3, 1), rtol=0, atol=2e-5)
        return
    options = Options(is_rms_norm=is_rms_norm)
    check_gradients(backend, x0, residual, gamma, options, has_dx=True)


@both_kinds
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("has_residual", [False, True], ids=["", "residual"])
def test_gradients_go_the_way_of_the_subsets(
    backend: Any, has_residual: bool, dropout_p: float, is_rms_norm: bool
) -> None:
    x0, gamma = random(3, 40, dtype=BFLOAT16), random(40, seed=2)
    residual = random(5, 40, seed=1) if has_residual else None
    for has_dx, has_colscale in product((False, True), repeat=2):
        options = Options(
            None,
            random(40, seed=4) if has_colscale else None,
            subset([1, 0, 0, 1, 0]),
            subset([1, 0, 0, 1, 0] if not has_residual else [0, 1, 0, 1, 1]),
            dropout_p,
            rowscale_const=2.0,
            z_numrows=4,
            residual_in_fp32=True,
            is_rms_norm=is_rms_norm,
        )
        check_gradients(backend, x0, residual, gamma, options, has_dx=has_dx)


def test_a_row_that_no_number_names_reaches_no_sum(backend: Any) -> None:
    x0, residual = random(2, 8), random(2, 8, seed=1)
    x0[0], residual[1] = torch.nan, torch.nan
    gamma, colscale = random(8, seed=2), random(8, seed=3)
    numbers = torch.tensor([2, 0], dtype=torch.int32), torch.tensor([1, 0], dtype=torch.int32)
    for kind in (False, True):
        options = Options(None, colscale, *numbers, z_numrows=1, is_rms_norm=kind)
        made = forward(backend, x0, residual, gamma, None, options)
        got = backward(backend, torch.ones(1, 8), None, made, x0, residual, gamma, options)
        assert all(t.isfinite().all() for t in got)
        assert not got[0][0].any()


def test_what_was_dropped_reaches_no_sum(backend: Any) -> None:
    x0, gamma, colscale = random(4, 8), random(8, seed=1), random(8, seed=2)
    options = Options(None, colscale, dropout_p=0.5)
    made = forward(backend, x0, None, gamma, None, options)
    x0[made[2] == 0] = torch.nan
    got = backward(backend, torch.ones(4, 8), None, made, x0, None, gamma, options)
    assert all(t is None or t.isfinite().all() for t in got)
    assert not got[0][made[2] == 0].any()


@both_kinds
def test_zero_rows_have_gradients_of_zeros(backend: Any, is_rms_norm: bool) -> None:
    x0, residual = torch.empty(0, 24, dtype=BFLOAT16), torch.empty(0, 24)
    gamma, colscale = torch.ones(24), torch.ones(24)
    options = Options(None, colscale, dropout_p=0.5, is_rms_norm=is_rms_norm)
    made = forward(backend, x0, residual, gamma, None, options)
    got = backward(backend, x0, residual, made, x0, residual, gamma, options)
    assert got[0].shape == got[1].shape == (0, 24)
    for gradient in (got[2], got[3], got[6]):
        assert_same_bits(gradient, torch.zeros(24))


def test_two_runs_and_any_threads_give_the_same_bits(kernels: Any) -> None:
    x0, residual = random(300, 96, dtype=BFLOAT16), random(300, 96, seed=1)
    gamma, options = random(96, seed=2), Options(None, random(96, seed=3))
    made = forward(kernels, x0, residual, gamma, None, options)
    given = random(300, 96, dtype=BFLOAT16, seed=4), residual, made, x0, residual, gamma, options
    with threads(1):
        first = backward(kernels, *given)
    with threads(2):
        second = backward(kernels, *given)
    for got, expected in zip(second, first, strict=True):
        assert_same_bits(got, expected)


@pytest.mark.parametrize("scaled", [False, True])
def test_what_is_given_for_gradients_is_never_written(backend: Any, scaled: bool) -> None:
    x0, residual, gamma = random(4, 40), random(4, 40, seed=1), random(40, seed=2)
    options = Options(random(4, seed=3), random(40, seed=4), dropout_p=0.5) if scaled else Options()
    made = forward(backend, x0, residual, gamma, None, options)
    dz, dx = random(4, 40, seed=5), random(4, 40, seed=6)
    given = [t for t in (dz, dx, *made, x0, residual, gamma, *options[:2]) if t is not None]
    before = [t.clone() for t in given]
    for t in backward(backend, dz, dx, made, x0, residual, gamma, options):
        t.fill_(7)
    for t, old in zip(given, before, strict=True):
        assert torch.equal(t, old)


# ---------------------------------------------------------------- two summands, two norms


@both_kinds
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("dtypes", DTYPES[:5], ids=str)
def test_gradients_of_two_norms_are_those_of_the_formula(
    backend: Any, dtypes: tuple[torch.dtype, ...], dropout_p: float, is_rms_norm: bool
) -> None:
    for has_x1, has_residual, has_second, has_dx in product((False, True), repeat=4):
        x0 = random(6, 40, dtype=dtypes[0])
        x1 = random(6, 40, dtype=dtypes[0], seed=1) if has_x1 else None
        residual = random(6, 40, dtype=dtypes[1], seed=2) if has_residual else None
        weights: list[Tensor | None] = [random(40, dtype=dtypes[2], seed=s) for s in range(3, 7)]
        if not has_second:
            weights[2:] = [None, None]
        made = call(
            backend,
            dropout_layer_norm.dropout_add_ln_parallel_residual_fwd,
            *(x0, x1, residual, *weights, dropout_p, EPS, None),
            *(dtypes[1] == FLOAT32, is_rms_norm),
        )
        z0, z1, x, dmask0, dmask1, mu, rsigma = made
        kept = x0 if x is None else x
        dz = [None if z is None else random(6, 40, dtype=z.dtype, seed=7) for z in (z0, z1)]
        dx = random(6, 40, dtype=kept.dtype, seed=8) if has_dx else None
        got = call(
            backend,
            dropout_layer_norm.dropout_add_ln_parallel_residual_bwd,
            *(*dz, dx, kept, dmask0, dmask1, mu, rsigma, weights[0], weights[2]),
            *(dropout_p, has_x1, has_residual, is_rms_norm),
        )
        leaves = [wanting(t) for t in (x0, x1, residual, *weights)]
        options = Options(dropout_p=dropout_p)
        xf = summed(leaves[0], leaves[2], dmask0, options)  # type: ignore[arg-type]
        if leaves[1] is not None:
            xf = summed(leaves[1], xf, dmask1, options)
        xhat = normalised(xf, is_rms_norm)
        score = xf.new_zeros(()) if dx is None else (xf * dx.double()).sum()
        for grad, gamma, beta in zip(dz, leaves[3::2], leaves[4::2], strict=True):
            if grad is not None and gamma is not None and beta is not None:
                score = score + ((xhat * gamma + beta) * grad.double()).sum()
        score.backward()
        seen = () if kept.dtype == FLOAT32 else (kept.dtype,)
        for gradient, given, leaf in zip(
            got[:7], (x0, x1, residual, *weights), leaves, strict=True
        ):
            if given is None or leaf is None:
                assert gradient is None
                continue
            assert gradient.dtype == given.dtype
            assert_near(gradient, leaf.grad, *seen)
        for gradient, part in zip(got[3:7], got[7:], strict=True):
            if gradient is not None:
                assert_same_bits(gradient, part[0].to(gradient.dtype))
        rows = [t.data_ptr() for t in got[:3] if t is not None]
        assert len(set(rows)) == len(rows)  # no two gradients share their memory


def test_autograd_records_nothing() -> None:
    x0, gamma, colscale = (t.requires_grad_() for t in (random(4, 8), random(8), random(8)))
    for options in (Options(), Options(None, colscale)):
        made = forward(AUTO, x0, None, gamma, None, options)
        got = backward(AUTO, x0.exp(), None, made, x0, None, gamma, options)
        assert not any(t is not None and t.requires_grad for t in got)


def test_autograd_records_nothing_of_two_norms() -> None:
    x0, x1, gamma = (t.requires_grad_() for t in (random(4, 8), random(4, 8, seed=1), random(8)))
    forward = dropout_layer_norm.dropout_add_ln_parallel_residual_fwd
    backward = dropout_layer_norm.dropout_add_ln_parallel_residual_bwd
    for name in ("auto", "reference"):
        with normkit.use_backend(name):
            made = forward(x0, x1, None, gamma, None, gamma, None, 0.5, EPS, None)
            dz = x0.exp()
            got = backward(dz, dz, dz, *made[2:], gamma, gamma, 0.5, True, False)
        assert not any(t is not None and t.requires_grad for t in (*made, *got))
