"""Gradients in float64 by hand, with their bound.

With s what is normalised, g = grad_y * (weight + weight_offset) and xhat = (s - mean(s)) * rstd,
that of s is rstd * (g - mean(g) - xhat * mean(g * xhat)), without mean(g) for rms; l2 has a sum in
place of the second mean, and none where eps has divided.  The bound is that of docs/numerics.md,
for a u of |s| * rstd, or (|s| + mean(|s|)) * rstd for layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fuzz import numbers
from fuzz.numbers import Array, rounded, step, widened, within
from fuzz.oracle import Values

_STORE = 1 + 2.0**-9


class Gradients:
    """What comes back to a norm; `values` has seen its forward pass."""

    def __init__(self, values: Values, y: Tensor, grad_y: Any, grad_total: Any) -> None:
        self.v = values
        norm = values.norm
        self.from_output = (
            norm.memory_efficient and not norm.round_before_weight and not norm.clamp_inf
        )
        self.grad_y = values._as_rows(widened(grad_y))
        self.grad_total = values._as_rows(widened(grad_total))
        if self.grad_y is None:
            self.grad_y = np.zeros_like(values.s)
        self.xhat, self.u = values.xhat, values.t
        if self.from_output:
            self._undo(values._as_rows(widened(y)))
        self.g = self.grad_y if values.w is None else self.grad_y * values.w

    def _undo(self, y: Array) -> None:
        """memory_efficient makes xhat again of y, with y's rounding."""
        shift = 0.0 if self.v.bias is None else self.v.bias
        scale = np.ones(()) if self.v.w is None else self.v.w
        some = scale != 0
        self.xhat = np.where(some, (y - shift) / np.where(some, scale, 1.0), 0.0)
        handled = (np.abs(y) + np.abs(shift)) / np.abs(np.where(some, scale, 1.0))
        self.u = np.where(some, handled, 0.0)

    def wrong(self, name: str, got: Tensor) -> str:
        """Words, if a gradient is not right."""
        values = widened(got)
        if name in ("x", "residual"):
            expected, t = self._of_summand(name)
            known = np.broadcast_to(~self.v.unknown, expected.shape)
            values = self.v._as_rows(values)
        else:
            expected, t = self._of_weight() if name == "weight" else self._of_bias()
            values = values.reshape(expected.shape)
            known = np.broadcast_to(not self.v.unknown.any(), expected.shape)
        # The other of two xhats may lie where steps are wider.
        reach = np.abs(expected) + np.where(np.isfinite(t), self.v.unit * t, 0.0)
        bound = step(reach, got.dtype) / 2 * _STORE + self.v.unit * t
        # Products that underflow in float32.
        bound = bound + 2.0**-140
        known = known & np.isfinite(expected) & np.isfinite(t) & ~self._may_overflow(name, t)
        right = within(values, expected, bound, got.dtype) | ~known
        return "" if right.all() else numbers.worst(values, expected, bound, right)

    def _may_overflow(self, name: str, t: Array) -> Any:
        """Whether sums and products of a row may be beyond float32, and its gradient not."""
        handled = np.maximum(np.abs(self.g), 1) * np.maximum(self.u, 1)
        if name in ("x", "residual"):
            return np.maximum(handled, t).max(-1, keepdims=True) > 2.0**100
        return handled.max(initial=0.0) > 2.0**100

    def _of_summand(self, name: str) -> tuple[Array, Array]:
        v, g = self.v, self.g
        size = np.abs(g)

        def mean(values: Array) -> Array:
            return np.asarray(values.sum(-1, keepdims=True) / values.shape[-1])

        def over_row(values: Array) -> Array:
            return mean(values) * (values.shape[-1] if v.norm.op.of_sum else 1)

        made = g - self.xhat * over_row(g * self.xhat)
        t = size + self.u * over_row(size * self.u)
        if v.norm.eps_outside:
            made = np.where(v.divided_by_eps, g, made)
        if v.layer:
            made, t = made - mean(g), t + mean(size)
        made, t = made * v.rstd, 2 * t * v.rstd
        if self.from_output:
            # xhat is the one that y has, errors and all; but rstd is that of the forward pass, and
            # how far it is from v.rstd cannot be seen in y.  An error e of xhat is one of
            # 2 xhat e + e^2 in (its mean square + eps) * rstd^2, and half of that in rstd.  Where
            # elements are equal and eps is small, xhat is 0 and the square is what counts.
            e = v.unit * v.t
            t = t + np.abs(made) * mean(np.abs(v.xhat) * e + e * e / 2) / v.unit
        half = v.norm.clamp_inf and v.sum_dtype == torch.float16
        if half and v.norm.round_sum:  # a sum that was clamped is a constant
            made = np.where(np.isinf(rounded(v.unrounded_sum(), torch.float16)), 0.0, made)
        if self.grad_total is not None:
            made, t = made + self.grad_total, t + np.abs(self.grad_total)
        if name == "x" and v.norm.clamp_inf and v.dtype == torch.float16:
            made = np.where(np.isinf(v.x), 0.0, made)
        return made, t

    def _of_weight(self) -> tuple[Array, Array]:
        forward = self.xhat if self.from_output else self.v.candidates[0]
        size = np.abs(self.grad_y)
        t = self.u * size
        for other in self.v.candidates[1:]:
            t = t + np.abs(other - forward) * size / self.v.unit
        return _summed(self.grad_y * forward, self.v.weight), _summed(t, self.v.weight)

    def _of_bias(self) -> tuple[Array, Array]:
        return _summed(self.grad_y, self.v.bias), _summed(np.abs(self.grad_y), self.v.bias)


def _summed(values: Array, affine: Array) -> Array:
    """Over rows, to the shape of a weight or bias."""
    return np.asarray(values.sum(tuple(range(values.ndim - affine.ndim))))
