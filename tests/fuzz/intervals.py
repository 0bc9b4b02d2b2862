"""What arithmetic may make of numbers that are known within bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from fuzz import numbers
from fuzz.numbers import DTYPES, FLOAT32, FLOAT32_MAX, Arithmetic, Array, rounded

_ROUNDING = 2.0**-24


@dataclass
class Interval:
    """What a number is without errors, and the least and the most that it may be with them.

    Where float32 may have infinity and float64 has none, the bounds are NaN: anything will do.
    """

    low: Array
    exact: Array
    high: Array

    @classmethod
    def of(cls, exact: Array, error: Array | float = 0.0) -> Interval:
        finite = np.isfinite(exact)
        error = np.where(finite, error, 0.0)
        return cls(exact - error, exact, exact + error)

    def times(self, other: Interval, arithmetic: Arithmetic) -> Interval:
        """Their product, rounded or not."""
        ends = [a * b for a in (self.low, self.high) for b in (other.low, other.high)]
        low, high = np.minimum.reduce(ends), np.maximum.reduce(ends)
        return Interval(low, self.exact * other.exact, high).computed(arithmetic)

    def plus(self, other: Interval, arithmetic: Arithmetic) -> Interval:
        """Their sum, rounded or not."""
        made = Interval(self.low + other.low, self.exact + other.exact, self.high + other.high)
        return made.computed(arithmetic)

    def negated(self) -> Interval:
        return Interval(-self.high, -self.exact, -self.low)

    def computed(self, arithmetic: Arithmetic) -> Interval:
        """With the rounding of one operation."""
        unit = _ROUNDING if arithmetic is FLOAT32 else arithmetic.unit
        size = np.maximum(np.abs(self.low), np.abs(self.high))
        error = np.where(np.isfinite(size), unit * size + arithmetic.underflow, 0.0)
        low, high = self.low - error, self.high + error
        if arithmetic is FLOAT32:
            overflows = np.isfinite(size) & (size + error > FLOAT32_MAX)
            low, high = (np.where(overflows, math.nan, end) for end in (low, high))
        return Interval(low, self.exact, high)

    def rounded(self, dtype: torch.dtype, arithmetic: Arithmetic) -> Interval:
        """Rounded to a dtype, if it is narrower than what is computed in."""
        if DTYPES[dtype].bits >= arithmetic.bits:
            return self
        low, high = self.low, self.high
        if arithmetic is not FLOAT32 and DTYPES[dtype].bits < FLOAT32.bits:
            # Torch rounds to float32 in between.
            low, high = (
                np.where(np.isfinite(end), end + side * _ROUNDING * np.abs(end), end)
                for side, end in ((-1, low), (1, high))
            )
        return Interval(rounded(low, dtype), rounded(self.exact, dtype), rounded(high, dtype))

    def wrong(self, got: Array, dtype: torch.dtype, arithmetic: Arithmetic, unknown: Array) -> str:
        """Words, if got is not this, rounded to dtype."""
        stored = self.rounded(dtype, arithmetic)
        lost = [np.isnan(end) for end in (stored.low, stored.exact, stored.high)]
        is_nan = np.logical_and.reduce(lost)
        right = np.where(is_nan, np.isnan(got), np.logical_or.reduce(lost))
        right |= (stored.low <= got) & (got <= stored.high)
        right |= np.isneginf(stored.low) & np.isposinf(stored.high)  # 0, or not, times infinity
        right |= np.broadcast_to(unknown, right.shape)
        if right.all():
            return ""
        bound = np.maximum(stored.high - stored.exact, stored.exact - stored.low)
        return numbers.worst(got, stored.exact, bound, right)
