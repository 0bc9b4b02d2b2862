"""What a norm must give: float64 by hand, with the bound of docs/numerics.md."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from fuzz import numbers
from fuzz.model import Norm
from fuzz.numbers import (
    FLOAT32,
    FLOAT32_MAX,
    FLOAT64,
    Arithmetic,
    Array,
    rounded,
    step,
    widened,
    within,
)

_STORE = 1 + 2.0**-9  # of half a step of the output's dtype
# One more where an offset is added, as docs/numerics.md has it; two in plain torch, which adds up a
# row in another order, and was seen to come to 4.7.
_BEYOND = 2.0**-24


class Values:
    """A norm's inputs as they were before the call, and what is made of them."""

    def __init__(
        self, norm: Norm, *, by_reference: bool = False, arithmetic: Arithmetic | None = None
    ) -> None:
        self.norm = norm
        self.layer: bool = norm.layer
        self.dtype: torch.dtype = norm.x.dtype
        of_x = FLOAT64 if numbers.is_double(norm.x) else FLOAT32
        self.arithmetic = arithmetic or of_x
        self.shape = tuple(norm.x.shape)
        self.x = self._as_rows(widened(norm.x))
        self.residual = self._as_rows(widened(norm.residual))
        self.weight, self.bias = (self._affine(t) for t in (norm.weight, norm.bias))
        self.unit = self.arithmetic.unit
        if self.arithmetic is FLOAT32:
            self.unit += _BEYOND * ((2 if by_reference else 0) + (norm.weight_offset != 0))
        eps = self.arithmetic.epsilon if norm.eps is None else float(norm.eps)
        self.eps = self._option(eps)
        self.w = self._offset_weight()
        self.sum_dtype = None if norm.residual is None else norm.residual.dtype

    def _offset_weight(self) -> Any:
        if self.weight is None or not self.norm.weight_offset:
            return self.weight
        w = self.weight + self._option(float(self.norm.weight_offset))
        if not self.norm.round_weight:
            return w
        # Between two of the weight's dtype its rounding to float32 decides.
        w = w if self.norm.weight.dtype == torch.float64 else rounded(w, torch.float32)
        return rounded(w, self.norm.weight.dtype)

    def _as_rows(self, values: Any) -> Any:
        """Several normalised dimensions are one, and groups of columns are rows."""
        ending, group_size = self.norm.ending, self.norm.group_size
        if values is not None and group_size is not None:
            groups = values.shape[-1] // group_size
            return values.reshape(*values.shape[:-1], groups, group_size)
        if values is None or ending is None or self.norm.per_head:
            return values
        return values.reshape(*self.shape[: len(self.shape) - len(ending)], math.prod(ending))

    def _affine(self, t: Any) -> Any:
        values = widened(t)
        if values is not None and self.norm.group_size is not None:
            return self._as_rows(values)
        if values is None or self.norm.ending is None or self.norm.per_head:
            return values
        return values.reshape(-1)

    def _option(self, value: float) -> float:
        """Options are numbers of the computing dtype."""
        return value if self.arithmetic is FLOAT64 else float(np.float32(value))

    # ---------------------------------------------------------------- the sum

    def clamped(self, values: Array, dtype: torch.dtype | None) -> Array:
        if self.norm.clamp_inf and dtype == torch.float16:
            return np.clip(values, -65504.0, 65504.0)
        return values

    def unrounded_sum(self) -> Array:
        x = self.clamped(self.x, self.dtype)
        if self.arithmetic is FLOAT64:
            return np.asarray(x + self.residual)
        return (x.astype(np.float32) + self.residual.astype(np.float32)).astype(np.float64)

    def wrong_sum(self, got: Array) -> str:
        """Words, if got is not the sum, rounded once."""
        assert self.sum_dtype is not None
        got = self._as_rows(got)
        total = self.unrounded_sum()
        expected = rounded(total, self.sum_dtype)
        if numbers.same_values(got, expected):
            return ""
        # On its way from float64 to 16 bits torch stops at float32.
        by_float32 = rounded(rounded(total, torch.float32), self.sum_dtype)
        if self.arithmetic is FLOAT64 and numbers.same_values(got, by_float32):
            return ""
        right = (got == expected) & (np.signbit(got) == np.signbit(expected))
        right |= np.isnan(got) & np.isnan(expected)
        return numbers.worst(got, expected, np.zeros_like(got), right)

    # ---------------------------------------------------------------- the norm

    def normalise(self, total: Any) -> None:
        """Take the statistics of x, or of the sum, which is given as residual_out has it."""
        s, rounded_to = self.normalised(total)
        self.s, self.rounded_to = s, rounded_to
        n = s.shape[-1]
        size = np.abs(s)
        centred, around = s, np.zeros(())
        if self.layer:
            centred = s - s.sum(-1, keepdims=True) / n
            around = size.sum(-1, keepdims=True) / n
        squares = (centred * centred).sum(-1, keepdims=True)
        self.unknown = np.zeros_like(squares, dtype=bool)
        self.rstd = self._rstd(squares, 1 if self.norm.op.of_sum else n)
        if self.layer:  # of equal values, the error of their mean may be all that is left
            error = self.unit * size.max(-1, keepdims=True)
            self.unknown = (squares + n * self.eps <= n * error * error) & (error > 0)
        if self.arithmetic is FLOAT32:
            self._see_limits_of_float32(squares, size, n)
        narrower = numbers.DTYPES[rounded_to].bits < self.arithmetic.bits
        if self.norm.round_rstd and narrower:
            self._round_rstd(rounded_to, 1 + around * self.rstd)
        self.xhat = centred * self.rstd
        self.t = (size + around) * self.rstd  # for a weight of 1 and no bias
        self.u = 1 + self.rstd if self.layer else np.ones(())
        rounds = self.norm.round_before_weight and narrower
        self.candidates = self._rounded_xhat(rounded_to) if rounds else [self.xhat]

    def normalised(self, total: Any) -> tuple[Array, torch.dtype]:
        """X or the sum, and the dtype that roundings of its norm are to."""
        if not self.norm.op.adds:
            return self.clamped(self.x, self.dtype), self.dtype
        if not self.norm.round_sum:
            return self.unrounded_sum(), self.dtype
        assert self.sum_dtype is not None
        return self.clamped(self._as_rows(total), self.sum_dtype), self.sum_dtype

    def _rstd(self, squares: Array, n: int) -> Array:
        if not self.norm.eps_outside:
            return np.asarray(1 / np.sqrt(squares / n + self.eps))
        length = np.sqrt(squares / n)
        self.divided_by_eps = length < self.eps  # and not by how long it is
        return np.asarray(1 / np.maximum(length, self.eps))

    def _see_limits_of_float32(self, squares: Array, size: Array, n: int) -> None:
        """Where it cannot hold the sum of squares, float32 has 1 / infinity."""
        finite = np.isfinite(squares)
        if (squares[finite] < 1e36).all() and (squares >= n * 2.0**-90).all():
            return
        overflows = finite & (squares > FLOAT32_MAX)
        self.rstd = np.where(overflows, 0.0, self.rstd)
        # Close to the limits, the order of the additions decides.
        self.unknown |= finite & (np.abs(squares / FLOAT32_MAX - 1) < 2.0**-10)
        if self.layer:
            self.unknown |= finite & (size.sum(-1, keepdims=True) > FLOAT32_MAX / 4)
        if self.eps < 2.0**-90:
            self.unknown |= (squares > 0) & (squares < n * 2.0**-90)

    def _round_rstd(self, dtype: torch.dtype, error: Array) -> None:
        """Where it is close to the middle between two, either is right for the whole row."""
        slack = self.unit * error * self.rstd
        if self.arithmetic is FLOAT64 and numbers.DTYPES[dtype].bits < 24:
            slack = slack + 2.0**-24 * self.rstd  # torch rounds to float32 in between
        low, high = rounded(self.rstd - slack, dtype), rounded(self.rstd + slack, dtype)
        self.unknown = self.unknown | ((low != high) & np.isfinite(self.rstd))
        self.rstd = rounded(self.rstd, dtype)

    def slack(self) -> Array:
        """The error of xhat."""
        of_float32 = self.arithmetic.underflow * self.u if self.arithmetic is FLOAT32 else 0.0
        return np.asarray(self.unit * self.t + of_float32)  # where u may be infinite

    def _rounded_xhat(self, dtype: torch.dtype) -> list[Array]:
        """What round_before_weight may make of it: either neighbour, close to their middle."""
        slack = self.slack()
        if self.arithmetic is FLOAT64 and numbers.DTYPES[dtype].bits < 24:
            slack = slack + 2.0**-24 * np.abs(self.xhat)  # torch rounds to float32 in between
        low, high = rounded(self.xhat - slack, dtype), rounded(self.xhat + slack, dtype)
        # Where the slack is many steps, anything in it will do.
        self.unknown = self.unknown | (np.abs(high - low) > 1.5 * step(self.xhat, dtype))
        return [low] if np.array_equal(low, high, equal_nan=True) else [low, high]

    def wrong(self, got: Array, dtype: torch.dtype) -> str:
        """Words, if got, stored in dtype, is not the norm."""
        got = self._as_rows(got)
        scale = 1.0 if self.w is None else np.abs(self.w)
        shift = 0.0 if self.bias is None else np.abs(self.bias)
        arithmetic = self.unit * (self.t * scale + shift)
        arithmetic = arithmetic + self.arithmetic.underflow * self.u * scale
        right = np.broadcast_to(self.unknown, got.shape)
        for xhat in self.candidates:
            scaled = xhat if self.w is None else xhat * self.w
            y = scaled if self.bias is None else scaled + self.bias
            bound = step(y, dtype) / 2 * _STORE + arithmetic
            right = right | within(got, y, bound, dtype)
            if self.arithmetic is FLOAT32:
                too_large = np.maximum(np.abs(scaled), scale) > FLOAT32_MAX
                right = right | (too_large & np.isfinite(scaled))
            # An error of xhat times infinity.
            right = right | (np.isinf(scale) & (np.abs(xhat) <= self.unit * self.t))
        return "" if right.all() else numbers.worst(got, y, np.broadcast_to(bound, y.shape), right)
