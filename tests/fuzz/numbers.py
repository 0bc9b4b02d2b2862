"""Floating-point dtypes by hand: rounding, steps, and when a value counts as right."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

FLOAT32_MAX = 2.0**128 - 2.0**104


class Dtype(NamedTuple):
    """Bits of the mantissa, exponents of the smallest number and of the first beyond all."""

    bits: int
    smallest: int
    beyond: int


DTYPES = {
    torch.float16: Dtype(11, -24, 16),
    torch.bfloat16: Dtype(8, -133, 128),
    torch.float32: Dtype(24, -149, 128),
    torch.float64: Dtype(53, -1074, 1024),
}


class Arithmetic(NamedTuple):
    """The dtype that a norm computes in: what its roundings may add up to."""

    bits: int
    unit: float  # of the magnitude that it handles
    underflow: float  # half its smallest number
    epsilon: float  # an eps of None


FLOAT32 = Arithmetic(24, 4 * 2.0**-24, 2.0**-150, 2.0**-23)
# Plain torch makes these, in an order of its own.
FLOAT64 = Arithmetic(53, 256 * 2.0**-53, 0.0, 2.0**-52)


def widened(t: Any) -> Any:
    """A tensor's values as they are now; None for None."""
    if t is None:
        return None
    t = t.detach().resolve_neg()
    return t.to(torch.float64, copy=True).numpy()


def rounded(values: Array, dtype: torch.dtype) -> Array:
    """Round to nearest even."""
    d = DTYPES[dtype]
    if d.bits == 53:
        return values
    exponent = _exponent_of_step(values, d)
    made = np.ldexp(np.rint(np.ldexp(values, -exponent)), exponent)
    beyond = np.abs(made) >= 2.0**d.beyond
    if beyond.any():
        made = np.where(beyond, np.copysign(np.inf, values), made)
    return np.where(np.isfinite(values), made, values)


def step(values: Array, dtype: torch.dtype) -> Array:
    """The distance of neighbours in dtype, as if its exponents went on upwards."""
    d = DTYPES[dtype]
    return np.ldexp(1.0, _exponent_of_step(values, d))


def _exponent_of_step(values: Array, d: Dtype) -> Any:
    exponents = np.frexp(values)[1] - d.bits
    return np.where(values == 0, d.smallest, np.maximum(exponents, d.smallest))


def within(got: Array, value: Array, bound: Array, dtype: torch.dtype) -> NDArray[np.bool_]:
    """Where a value stored in dtype is within a bound of what it should be."""
    # What lies beyond the largest number rounds to infinity, the next one.
    if DTYPES[dtype].beyond < 1024:
        infinity = 2.0 ** DTYPES[dtype].beyond
        close = np.abs(np.clip(got, -infinity, infinity) - np.clip(value, -infinity, infinity))
    else:
        close = np.abs(got - value)
    right = close <= bound
    right &= np.isfinite(value)
    return right | (got == value) | (np.isnan(got) & np.isnan(value))


def worst(got: Array, value: Array, bound: Array, right: NDArray[np.bool_]) -> str:
    """Words for the worst element that is not right."""
    with np.errstate(all="ignore"):
        over = np.where(right, -1.0, np.nan_to_num(np.abs(got - value) / bound, nan=np.inf))
    at = np.unravel_index(int(over.argmax()), got.shape)
    return (
        f"{int((~right).sum())} of {right.size} elements; at {[int(i) for i in at]} expected"
        f" {value[at]:.9g}, got {got[at]:.9g}, bound {bound[at]:.3g}"
    )


def same_values(one: Array, two: Array) -> bool:
    """Bit for bit, but for what kind of NaN."""
    same = (one == two) & (np.signbit(one) == np.signbit(two))
    return bool((same | (np.isnan(one) & np.isnan(two))).all())


def is_double(t: Tensor) -> bool:
    return t.dtype == torch.float64
