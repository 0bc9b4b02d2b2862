"""Norms with one thing wrong, as they have been shipped, must not pass for right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.support import DTYPES
from normkit import reference
from normkit.testing import assert_accurate, error_bound, make_inputs

F32, BF16 = torch.float32, torch.bfloat16
EPS = 1e-6


def right(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    kind: str,
    eps: float = EPS,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    mean: Callable[[Tensor], Tensor] = lambda t: t.mean(-1, keepdim=True),
    statistic: Callable[[Tensor], Tensor] = lambda t: (t * t).mean(-1, keepdim=True),
    scale: Callable[[Tensor, float], Tensor] = lambda w, offset: w.float() + offset,
    store: Callable[[Tensor, torch.dtype], Tensor] = lambda y, dtype: y.to(dtype),
) -> Tensor:
    """A norm written apart from the package's, with parts to replace by wrong ones."""
    wide = x.float()
    if kind == "layer":
        wide = wide - mean(wide)
    xhat = wide / torch.sqrt(statistic(wide) + eps)
    if round_before_weight:
        xhat = xhat.to(x.dtype).float()
    return store(xhat * scale(weight, weight_offset) + bias.float(), x.dtype)


def _judge(norm: Callable[..., Tensor], dtype: torch.dtype, kind: str, **options: Any) -> None:
    for per_head in (False, True):
        for scale in (1.0, 1e-3):
            x, _, weight, bias = make_inputs((3, 4, 200), dtype, per_head=per_head, scale=scale)
            y = norm(x, weight, bias, kind=kind, **options)
            assert_accurate(y, x, weight, bias, EPS, kind=kind, **options)


def _truncated(y: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == F32:
        return y
    toward_zero = y.to(dtype)
    too_far = toward_zero.float().abs() > y.abs()
    return torch.where(too_far, toward_zero.nextafter(torch.zeros_like(toward_zero)), toward_zero)


def _with(**wrong: Any) -> Callable[..., Tensor]:
    return lambda *tensors, **options: right(*tensors, **(options | wrong))


def _tail_dropped(x: Tensor, *rest: Tensor, **options: Any) -> Tensor:
    y = right(x, *rest, **options)
    y[..., -1] = 0
    return y


def _statistic_without_the_tail(t: Tensor) -> Tensor:
    return (t[..., :-1] ** 2).sum(-1, keepdim=True) / t.shape[-1]


def _one_pass(x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
    """E[x^2] - E[x]^2 of rows far from 0."""
    wide = x.float()
    mean = wide.mean(-1, keepdim=True)
    variance = (wide * wide).mean(-1, keepdim=True) - mean * mean
    xhat = (wide - mean) * torch.rsqrt(variance.clamp(min=0) + EPS)
    return (xhat * weight.float() + bias.float()).to(x.dtype)


def _wrong_head(x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
    return right(x, weight.roll(1, 0) if weight.ndim == 2 else weight, bias, **options)


ALL = ("rms", "layer")
WRONG: dict[str, tuple[Callable[..., Tensor], tuple[str, ...], dict[str, Any]]] = {
    "mean lost": (_with(mean=lambda t: 0.0), ("layer",), {}),
    "mean not of all columns": (
        _with(mean=lambda t: t[..., :-1].mean(-1, keepdim=True)),
        ("layer",),
        {},
    ),
    "unbiased variance": (
        _with(statistic=lambda t: (t * t).sum(-1, keepdim=True) / (t.shape[-1] - 1)),
        ALL,
        {},
    ),
    "statistic lost": (_with(statistic=lambda t: torch.ones_like(t[..., :1])), ALL, {}),
    "statistic without the last column": (
        _with(statistic=_statistic_without_the_tail),
        ALL,
        {},
    ),
    "eps lost": (_with(eps=0.0), ALL, {}),
    "eps of another norm": (_with(eps=1e-5), ALL, {}),
    "last column not written": (_tail_dropped, ALL, {}),
    "weight of another head": (_wrong_head, ALL, {}),
    "offset lost": (_with(weight_offset=0.0), ALL, {"weight_offset": 1.0}),
    "rounding before the weight lost": (
        _with(round_before_weight=False),
        ALL,
        {"round_before_weight": True},
    ),
    "rounding before the weight unasked": (_with(round_before_weight=True), ALL, {}),
    "offset rounded to the weight's dtype": (
        _with(scale=lambda w, offset: (w + offset).float()),
        ALL,
        {"weight_offset": 1.0},
    ),
    "truncated at the store": (_with(store=_truncated), ALL, {}),
}
# Where x and weight are float32 these are no mistakes.
SIXTEEN_BITS = {
    "rounding before the weight lost",
    "rounding before the weight unasked",
    "offset rounded to the weight's dtype",
    "truncated at the store",
}
CASES = [
    (name, kind, dtype)
    for name, (_, kinds, _) in WRONG.items()
    for kind in kinds
    for dtype in DTYPES
    if dtype != F32 or name not in SIXTEEN_BITS
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ALL)
def test_the_right_norm_passes(kind: str, dtype: torch.dtype) -> None:
    for offset in (0.0, 1.0):
        for round_before_weight in (False, True):
            options = {"weight_offset": offset, "round_before_weight": round_before_weight}
            _judge(right, dtype, kind, **options)


@pytest.mark.parametrize(("name", "kind", "dtype"), CASES, ids=str)
def test_a_wrong_norm_does_not_pass(name: str, kind: str, dtype: torch.dtype) -> None:
    norm, _, options = WRONG[name]
    with pytest.raises(AssertionError, match="out of bounds"):
        _judge(norm, dtype, kind, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_single_step_of_the_output_does_not_pass(dtype: torch.dtype) -> None:
    """In 16 bits; in float32 the arithmetic may cost steps, and a part in 2^18 does not pass."""
    x, _, weight, bias = make_inputs((3, 200), dtype)
    y = right(x, weight, bias, kind="rms")
    upwards = torch.full_like(y, torch.inf)
    moved = y * (1 + 2.0**-18) if dtype == F32 else y.nextafter(upwards)
    for column in (0, 77, 199):
        wrong = y.clone()
        wrong[1, column] = moved[1, column]
        with pytest.raises(AssertionError, match=rf"^1 of 600 .* worst is y\[1, {column}\]"):
            assert_accurate(wrong, x, weight, bias, EPS, kind="rms")


def test_variance_in_one_pass_does_not_pass_where_the_mean_is_large() -> None:
    x, _, weight, bias = make_inputs((3, 200), F32)
    far = x + 300.0
    assert_accurate(right(far, weight, bias, kind="layer"), far, weight, bias, kind="layer")
    with pytest.raises(AssertionError):
        assert_accurate(_one_pass(far, weight, bias), far, weight, bias, kind="layer")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_nan_and_infinity_do_not_pass(dtype: torch.dtype) -> None:
    x, _, weight, bias = make_inputs((3, 20), dtype)
    x[1, 3] = torch.nan
    x[2, 5] = torch.inf
    y = right(x, weight, bias, kind="rms")
    assert_accurate(y, x, weight, bias, EPS, kind="rms")
    for place, value in (
        ((1, 3), 0.0),
        ((1, 0), 1.0),
        ((2, 5), torch.inf),
        ((0, 0), torch.nan),
        ((0, 0), torch.inf),
        ((2, 0), torch.nan),
    ):
        wrong = y.clone()
        wrong[place] = value
        with pytest.raises(AssertionError, match=r"^1 of 60 "):
            assert_accurate(wrong, x, weight, bias, EPS, kind="rms")


def test_saturating_instead_of_overflowing_does_not_pass() -> None:
    x, weight = torch.ones(1, 4), torch.tensor([6e4, 1e5, -1e30, 65520.0])
    y = (x * weight).half()
    assert y.isinf().tolist() == [[False, True, True, True]]
    assert_accurate(y, x, weight, eps=0.0, kind="rms")
    for column in (1, 2):
        wrong = y.clone()
        wrong[0, column] = wrong[0, column].clamp(-65504, 65504)
        with pytest.raises(AssertionError, match=r"^1 of 4"):
            assert_accurate(wrong, x, weight, eps=0.0, kind="rms")
    wrong = y.clone()
    wrong[0, 0] = torch.inf
    with pytest.raises(AssertionError, match=r"^1 of 4"):
        assert_accurate(wrong, x, weight, eps=0.0, kind="rms")


def test_flushed_subnormals_do_not_pass() -> None:
    for dtype in DTYPES[1:]:
        x, weight = torch.ones(1, 2), torch.full((2,), torch.finfo(dtype).smallest_normal / 4)
        y = (x * weight).to(dtype)
        assert_accurate(y, x, weight, eps=0.0, kind="rms")
        with pytest.raises(AssertionError, match=r"^2 of 2"):
            assert_accurate(torch.zeros_like(y), x, weight, eps=0.0, kind="rms")


def test_a_residual_that_is_not_the_rounded_sum_does_not_pass() -> None:
    x, residual, weight, _ = make_inputs((3, 50), BF16)
    total = x + residual
    y = right(total, weight, torch.zeros(50), kind="rms")
    options: dict[str, Any] = {"kind": "rms", "residual": residual}
    assert_accurate(y, x, weight, eps=EPS, residual_out=total, **options)
    wrong = total.clone()
    wrong[2, 7] = wrong[2, 7].nextafter(torch.tensor(torch.inf, dtype=BF16))
    for other in (wrong, total.float(), residual):
        with pytest.raises(AssertionError, match="residual_out"):
            assert_accurate(y, x, weight, eps=EPS, residual_out=other, **options)
    with pytest.raises(AssertionError, match="out of bounds"):
        assert_accurate(y, x, weight, eps=EPS, residual_out=total, round_sum=False, **options)


def test_misused_tools_say_so() -> None:
    x = torch.ones(2, 4)
    for error, text, use in (
        (TypeError, "^y: ", lambda: assert_accurate(x.double(), x, kind="rms")),
        (ValueError, "^y: ", lambda: assert_accurate(x[:1], x, kind="rms")),
        (ValueError, "^residual ", lambda: assert_accurate(x, x, kind="rms", residual=x)),
        (ValueError, "^kind: ", lambda: assert_accurate(x, x, kind="no")),
        (TypeError, "^out_dtype: ", lambda: error_bound(x.double(), kind="rms")),
        (ValueError, "^shape: ", lambda: make_inputs((4,), per_head=True)),
        (ValueError, "^shape: ", lambda: make_inputs(())),
    ):
        with pytest.raises(error, match=text):
            use()


def test_error_bound_is_what_assert_accurate_allows() -> None:
    """Rounding the moved values to float32 takes half a step, about a third of the bound."""
    for kind in ALL:
        for options in ({}, {"weight_offset": 1.0}):
            x, _, weight, bias = make_inputs((4, 60), F32)
            exact = reference.norm(
                x,
                weight,
                bias,
                kind=kind,
                out_dtype=torch.float64,
                compute_dtype=torch.float64,
                **options,
            )
            bound = error_bound(x, weight, bias, kind=kind, **options)
            assert (bound > 0).all()
            assert_accurate((exact + 0.5 * bound).float(), x, weight, bias, kind=kind, **options)
            with pytest.raises(AssertionError, match=r"^240 of 240"):
                assert_accurate(
                    (exact + 1.6 * bound).float(), x, weight, bias, kind=kind, **options
                )
