"""L2 norms: what divides a row by its length, and what of eps_outside torch's `normalize` has."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import normkit
from conformance import gradients
from conformance.gradients import case_of, make_and_check
from conformance.support import (
    DTYPES,
    OPS,
    Inputs,
    assert_same_bits,
    inputs_for,
    run,
    run_and_check,
    run_in_place,
    threads,
)
from normkit import testing

(L2,) = (op for op in OPS if op.of_sum)
SIZES = (1, 7, 64, 100, 128, 256, 1000, 4100)
both = pytest.mark.parametrize("eps_outside", [False, True])


def lengths(n: int, dtype: torch.dtype, eps: float) -> Tensor:
    """Rows shorter and longer than eps, one of zeros and one with NaN."""
    x = inputs_for(L2, 12, n, dtype).x.double()
    x = x / x.norm(dim=-1, keepdim=True)
    x = x * eps * torch.logspace(-2, 2, 12, dtype=torch.float64)[:, None]
    x[3] = 0.0
    x[5, n // 2] = torch.nan
    return x.to(dtype)


@both
@pytest.mark.parametrize("n", SIZES)
def test_the_error_is_bounded_in_every_mix(backend: Any, n: int, eps_outside: bool) -> None:
    for dtype, out_dtype, eps in itertools.product(DTYPES, DTYPES, (0.3, 1e-6)):
        inputs = inputs_for(L2, 12, n, dtype)._replace(x=lengths(n, dtype, eps))
        options = {"eps": eps, "eps_outside": eps_outside, "out_dtype": out_dtype}
        made = run_and_check(backend, L2, inputs, **options)
        assert made.y[5].isnan().all()
        assert not made.y[3].any()
        place = inputs_for(L2, 12, n, out_dtype)._replace(x=inputs.x.to(out_dtype))
        del options["out_dtype"]
        expected = run(backend, L2, place, **options)
        assert_same_bits(run_in_place(backend, L2, place, **options).y, expected.y)


def test_the_bound_tells_an_l2_norm_from_others(backend: Any) -> None:
    x = inputs_for(L2, 4, 64, torch.float32).x
    for wrong in (
        backend("rms_norm", x),
        backend("l2_norm", x, eps=1.0),
        backend("l2_norm", x, eps=1.0, eps_outside=True),
    ):
        with pytest.raises(AssertionError, match="out of bounds"):
            testing.assert_accurate(wrong, x, kind="l2", eps=0.5)


def test_eps_outside_is_that_of_normalize(backend: Any) -> None:
    for n, eps in itertools.product(SIZES, (1e-12, 1e-3)):
        x = lengths(n, torch.float32, max(eps, 1e-6))
        expected = F.normalize(x.double(), dim=-1, eps=eps).float()
        made = backend("l2_norm", x, eps, eps_outside=True)
        torch.testing.assert_close(made, expected, rtol=2**-22, atol=0, equal_nan=True)


@pytest.mark.parametrize("eps", [0.0, 1e-300])
def test_an_eps_that_float32_has_not_is_zero(backend: Any, eps: float) -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    y = backend("l2_norm", x, eps, eps_outside=True)
    torch.testing.assert_close(y[0], torch.tensor([0.6, 0.8]))
    assert y[1].isnan().all()
    (gradient,) = torch.autograd.grad(y[0].sum(), x)
    torch.testing.assert_close(gradient[0], torch.tensor([0.032, -0.024]))


def test_an_eps_of_none_is_that_of_float32(backend: Any) -> None:
    for dtype, eps_outside in itertools.product(DTYPES, (False, True)):
        x = lengths(64, dtype, 2.0**-23)
        made = backend("l2_norm", x, None, eps_outside=eps_outside)
        assert_same_bits(made, backend("l2_norm", x, 2.0**-23, eps_outside=eps_outside))


@both
def test_heads_are_read_where_they_are(backend: Any, eps_outside: bool) -> None:
    """Those of q and k in a packed qkv, as linear attention has them."""
    for dtype in DTYPES:
        packed = inputs_for(L2, (2, 5), 3 * 4 * 32, dtype).x
        q, k, _ = packed.view(2, 5, 3, 4, 32).unbind(2)
        for heads in (q, k):
            inputs = Inputs(heads, heads, None, None)
            made = run_and_check(backend.unexplained, L2, inputs, eps_outside=eps_outside)
            whole = backend("l2_norm", heads.contiguous(), eps_outside=eps_outside)
            assert_same_bits(made.y, whole)
            if backend.name != "reference":
                with normkit.use_backend(backend.name):
                    reason = normkit.explain("l2_norm", heads, eps_outside=eps_outside).reason
                assert reason == "served natively"


@both
def test_bits_do_not_follow_threads_or_other_rows(kernels: Any, eps_outside: bool) -> None:
    for dtype, n in itertools.product(DTYPES, (64, 128, 1000)):
        x = inputs_for(L2, 300, n, dtype).x
        expected = kernels("l2_norm", x, eps_outside=eps_outside)
        for count in (1, 2):
            with threads(count):
                assert_same_bits(kernels("l2_norm", x, eps_outside=eps_outside), expected)
        alone = kernels("l2_norm", x[7:8], eps_outside=eps_outside)
        assert_same_bits(alone, expected[7:8])


def test_infinity_counts_as_the_largest_float16_where_it_is_asked_for(backend: Any) -> None:
    for eps_outside in (False, True):
        inputs = inputs_for(L2, 3, 64, torch.float16)
        inputs.x[1, 5] = torch.inf
        options = {"eps_outside": eps_outside, "clamp_inf": True}
        assert run_and_check(backend, L2, inputs, **options).y[1, 5] == 1.0


# ---------------------------------------------------------------------------------- gradients


@both
@pytest.mark.parametrize("n", [1, 7, 128, 1000])
def test_gradients_are_accurate(backend: Any, n: int, eps_outside: bool) -> None:
    for dtype, eps in itertools.product(DTYPES, (0.3, 1e-3)):
        x = lengths(n, dtype, eps)
        x = x[x.isfinite().all(-1)]
        inputs = Inputs(x, x.clone(), None, None)
        make_and_check(backend, case_of(L2, inputs, eps=eps, eps_outside=eps_outside))


@both
def test_gradients_are_those_of_the_formula_and_differentiable(
    backend: Any, eps_outside: bool
) -> None:
    x = lengths(5, torch.float64, 0.3)
    x = x[x.isfinite().all(-1)].requires_grad_()

    def ours(x: Tensor) -> Tensor:
        made: Tensor = gradients.call("l2_norm", x, 0.3, eps_outside=eps_outside)
        return made

    def formula(x: Tensor) -> Tensor:
        if eps_outside:
            return F.normalize(x, dim=-1, eps=0.3)
        return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 0.3)

    grad_y = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    torch.testing.assert_close(
        *(torch.autograd.grad(f(x), x, grad_y)[0] for f in (ours, formula)), rtol=1e-7, atol=1e-9
    )
    assert torch.autograd.gradcheck(ours, x)
    assert torch.autograd.gradgradcheck(ours, x)
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(lambda row: (ours(row) ** 3).sum()))(x.detach()),
        torch.autograd.grad((formula(x) ** 3).sum(), x)[0],
    )


def test_the_backward_pass_is_the_kernels(kernels: Any) -> None:
    x = inputs_for(L2, 3, 64, torch.bfloat16).x.requires_grad_()
    with normkit.use_backend(kernels.name):
        for eps_outside in (False, True):
            explained = normkit.explain("l2_norm", x, eps_outside=eps_outside)
            assert explained.reason == "served natively, gradients too"


# ---------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["l2_norm", "l2_norm_"])
def test_errors_name_the_argument(name: str) -> None:
    call, x = getattr(normkit, name), torch.ones(2, 4)
    with pytest.raises(TypeError, match="eps_outside: expected True or False, got str"):
        call(x, eps_outside="yes")
    with pytest.raises(ValueError, match="eps: expected a number >= 0, got -1"):
        call(x, -1.0)
    with pytest.raises(TypeError, match="weight"):
        call(x, weight=torch.ones(4))
