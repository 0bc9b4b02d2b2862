"""What stands around a norm: a gate, a modulation, a sum behind it, a rotation.

Each operation is what arithmetic of the computing dtype may make of it, fused with its neighbour or
not; where a call rounds, both ends of what may be are rounded.  Nothing is added to that.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fuzz.intervals import Interval
from fuzz.model import Norm
from fuzz.numbers import FLOAT32, Array, rounded, widened
from fuzz.oracle import Values
from normkit._spec import OPS

# docs/fusions.md: act(z) is within 3.5 * 2^-24, and 0 below 2^-126.
_OF_GATE = 3.5 * 2.0**-24
_LEAST_GATE = 2.0**-126


class FusedValues(Values):
    """A norm with what stands around it, as it was before the call."""

    def __init__(self, norm: Norm, *, by_reference: bool = False) -> None:
        super().__init__(norm, by_reference=by_reference)
        self.gate, self.scale, self.shift = (
            self._per_row(t) for t in (norm.gate, norm.scale, norm.shift)
        )
        self.z = self._as_rows(widened(norm.z))
        self.cos, self.sin = widened(norm.cos), widened(norm.sin)
        self.positions = None if norm.positions is None else norm.positions.clone().numpy()
        self.behind: Values | None = None  # the norm behind the sum
        if norm.op.post and norm.op.adds:
            behind = _next(norm)
            self.behind = Values(behind, by_reference=by_reference, arithmetic=self.arithmetic)

    def _per_row(self, t: Any) -> Any:
        values = widened(t)
        if values is None:
            return None
        missing = (1,) * (len(self.shape) - values.ndim)
        return values.reshape(*values.shape[:-1], *missing, values.shape[-1])

    def _times(self, a: Interval, b: Interval) -> Interval:
        return a.times(b, self.arithmetic)

    def _plus(self, a: Interval, b: Interval) -> Interval:
        return a.plus(b, self.arithmetic)

    def _rounded(self, a: Interval, dtype: torch.dtype) -> Interval:
        return a.rounded(dtype, self.arithmetic)

    # ---------------------------------------------------------------- in front of the norm

    def wrong_sum(self, got: Array) -> str:
        norm = self.norm
        if self.gate is None and not norm.op.post:
            return super().wrong_sum(got)
        assert self.sum_dtype is not None
        if norm.op.post:
            self.normalise(None)
            total, unknown = self._sum_behind(), self.unknown
        else:
            total, unknown = self._gated_sum(), np.zeros((), bool)
        return total.wrong(got, self.sum_dtype, self.arithmetic, unknown)

    def _gated_sum(self) -> Interval:
        total = Interval.of(self.clamped(self.x, self.dtype))
        if self.gate is not None:
            total = self._times(total, Interval.of(self.gate))
            if self.norm.round_each:
                dtype = torch.promote_types(self.dtype, self.norm.gate.dtype)
                total = self._rounded(total, dtype)
        return self._plus(total, Interval.of(self.residual))

    def normalised(self, total: Any) -> tuple[Array, torch.dtype]:
        norm = self.norm
        self.error = np.zeros(1)  # of what is returned
        x = self.clamped(self.x, self.dtype)
        if norm.op.gated and not norm.norm_before_gate:
            act = self._activated()
            made = self._times(Interval.of(x), act)
            self.error = np.nan_to_num(made.high - made.low, nan=np.inf)
            return made.exact, self.dtype
        if norm.op.adds and not norm.op.post:
            if norm.round_sum:
                return super().normalised(total)
            made = self._gated_sum()
            self.error = np.nan_to_num(made.high - made.low, nan=np.inf)
            return made.exact, self.dtype
        return x, self.dtype

    def _activated(self) -> Interval:
        divisor = 1 + np.exp(-self.z)
        exact = (1.0 if self.norm.activation == "sigmoid" else self.z) / divisor
        of_gate = _OF_GATE if self.arithmetic is FLOAT32 else self.arithmetic.unit
        act = Interval.of(exact, of_gate * np.abs(exact) + self.arithmetic.underflow)
        if self.arithmetic is FLOAT32:
            lost = np.abs(exact) <= 1.01 * _LEAST_GATE * np.maximum(np.abs(self.z), 1)
            act.low = np.where(lost, np.minimum(act.low, 0.0), act.low)
            act.high = np.where(lost, np.maximum(act.high, 0.0), act.high)
        return act

    # ---------------------------------------------------------------- the norm

    def normalise(self, total: Any) -> None:
        self.total = total
        if not hasattr(self, "xhat"):
            super().normalise(total)

    def slack(self) -> Array:
        error = self.rstd * (self.error + self.error.mean(-1, keepdims=True))
        return np.asarray(super().slack() + error + np.abs(self.xhat) * self._error_of_rstd())

    def _error_of_rstd(self) -> Array:
        """What that of s makes of it, relatively."""
        size = np.abs(self.s) + (np.abs(self.s).mean(-1, keepdims=True) if self.layer else 0)
        return np.asarray(self.rstd**2 * ((size + self.error) * self.error).mean(-1, keepdims=True))

    def _round_rstd(self, dtype: torch.dtype, error: Array) -> None:
        super()._round_rstd(dtype, error + self._error_of_rstd() / self.unit)

    def _xhat(self) -> Interval:
        if self.candidates[0] is not self.xhat:
            low, high = self.candidates[0], self.candidates[-1]
            return Interval(low, rounded(self.xhat, self.rounded_to), high)
        return Interval.of(self.xhat, self.slack())

    def _norm(self) -> Interval:
        n = self._xhat()
        if self.w is not None:
            error = 2.0**-24 * np.abs(self.w) if self.norm.weight_offset else 0.0
            n = self._times(n, Interval.of(self.w, error))
        if self.bias is not None:
            n = self._plus(n, Interval.of(self.bias))
        return n

    # ---------------------------------------------------------------- behind it

    def wrong(self, got: Array, dtype: torch.dtype) -> str:
        if self.behind is not None:
            return self._wrong_behind(got, dtype)
        op = self.norm.op
        if op.post:
            y = self._sum_behind()
        elif op.rotated:
            y = self._rotated()
        elif op.modulated:
            y = self._modulated()
        else:
            y = self._gated()
        return y.wrong(self._as_rows(got), dtype, self.arithmetic, self.unknown)

    def _wrong_behind(self, got: Array, dtype: torch.dtype) -> str:
        assert self.behind is not None
        self.behind.x = self.total
        self.behind.normalise(None)
        return self.behind.wrong(got, dtype)

    def _modulated(self) -> Interval:
        norm, n = self.norm, self._norm()
        dtype = self.rounded_to if norm.round_each else torch.float64
        n = self._rounded(n, dtype)
        if norm.scale is not None:
            factor = self._plus(Interval.of(self.scale), Interval.of(np.ones(())))
            factor = self._rounded(factor, norm.scale.dtype) if norm.round_each else factor
            dtype = torch.promote_types(dtype, norm.scale.dtype)
            n = self._rounded(self._times(n, factor), dtype)
        if norm.shift is not None:
            dtype = torch.promote_types(dtype, norm.shift.dtype)
            n = self._rounded(self._plus(n, Interval.of(self.shift)), dtype)
        return n

    def _gated(self) -> Interval:
        n = self._norm()
        if not self.norm.norm_before_gate:
            return n
        if self.norm.round_each:
            n = self._rounded(n, self.dtype)
        act = self._activated()
        y = self._times(n, act)
        if self.arithmetic is FLOAT32 and self.w is not None:
            # The weight may be what act(z) multiplies first: that product may be subnormal, or inf.
            lost = self.arithmetic.underflow * np.abs(self.xhat)
            first = self._times(Interval.of(self.w), act)
            lost = np.where(np.isnan(first.low) & ~np.isnan(first.exact), np.nan, lost)
            y = self._plus(y, Interval(-lost, np.zeros_like(lost), lost))
        return y

    def _sum_behind(self) -> Interval:
        norm, n, kept = self.norm, self._norm(), Interval.of(self.residual)
        assert self.sum_dtype is not None
        of_norm, of_kept = (
            (self.dtype, self.sum_dtype) if norm.round_norm else (torch.float64, torch.float64)
        )
        n = self._rounded(n, of_norm)
        alpha, beta = (self._option(float(factor)) for factor in (norm.alpha, norm.beta))
        if beta != 1:
            n = self._rounded(self._times(n, Interval.of(np.array(beta))), of_norm)
        if alpha != 1:
            kept = self._rounded(self._times(kept, Interval.of(np.array(alpha))), of_kept)
        return self._plus(kept, n)

    def _rotated(self) -> Interval:
        norm, n = self.norm, self._norm()
        if norm.round_norm or norm.round_each:
            n = self._rounded(n, self.dtype)
        cos, sin = (Interval.of(self._of_token(t)) for t in (self.cos, self.sin))
        count = 2 * self.cos.shape[-1]
        dtype = torch.float64
        if norm.round_each:
            dtype = torch.promote_types(self.dtype, norm.cos.dtype)
        firsts, seconds = slice(0, count // 2), slice(count // 2, count)
        if norm.interleaved:
            firsts, seconds = slice(0, count, 2), slice(1, count, 2)
        a, b = (_columns(n, columns) for columns in (firsts, seconds))

        def product(one: Interval, two: Interval) -> Interval:
            return self._rounded(self._times(one, two), dtype)

        first = self._plus(product(a, cos), product(b, sin).negated())
        second = self._plus(product(b, cos), product(a, sin))
        ends = []
        for name in ("low", "exact", "high"):
            end = np.array(np.broadcast_to(getattr(n, name), self.shape))
            end[..., firsts], end[..., seconds] = getattr(first, name), getattr(second, name)
            ends.append(end)
        return Interval(*ends)

    def _of_token(self, table: Array) -> Array:
        """The rows of cos or sin, NaN for a position outside of them."""
        if self.positions is None:
            return table[..., None, :]
        inside = (self.positions >= 0) & (self.positions < len(table))
        rows = np.full((*self.positions.shape, table.shape[-1]), np.nan)
        rows[inside] = table[self.positions[inside]]
        return rows[..., None, :]


def _columns(n: Interval, columns: slice) -> Interval:
    return Interval(n.low[..., columns], n.exact[..., columns], n.high[..., columns])


def _next(norm: Norm) -> Norm:
    """The norm behind the sum; what it normalises is not known yet, but like the residual."""
    return Norm(
        OPS["layer_norm" if norm.layer else "rms_norm"],
        norm.layer,
        False,
        norm.residual,
        weight=norm.next_weight,
        bias=norm.next_bias,
        eps=norm.eps if norm.next_eps is None else norm.next_eps,
        weight_offset=norm.weight_offset,
        round_before_weight=norm.round_before_weight,
        clamp_inf=norm.clamp_inf,
        round_rstd=norm.round_rstd,
        round_weight=norm.round_weight,
    )
