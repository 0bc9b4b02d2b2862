"""Inputs and bounds to test a norm with.

The package tests itself with these, and a model can be tested with them too.  The measure is the
float64 result for inputs as they are stored, never another implementation; the bound is that of
docs/numerics.md: half a step of the output dtype, and a few roundings of float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from normkit import reference
from normkit._spec import Activation

__all__ = ["Inputs", "assert_accurate", "error_bound", "make_inputs"]

_STORE = 1 + 2.0**-9  # of half a step of the output dtype
_ARITHMETIC = 4 * 2.0**-24  # of the magnitude that the arithmetic in float32 handles
_OFFSET = 2.0**-24  # of it again, for the rounding of weight + weight_offset
_MODULATION = 3 * 2.0**-24  # of it again, for 1 + scale, its product, and the sum with the shift
# Likewise for act(z) and its product; and where that is normalised, since rstd is taken of it, too.
_GATE_BEHIND, _GATE_BEFORE = 5 * 2.0**-24, 8 * 2.0**-24
_LEAST_GATE = 2.0**-126  # what is below counts as 0
_UNDERFLOW = 2.0**-150  # half the smallest number of float32
_FLOAT32_MAX = torch.finfo(torch.float32).max


class Inputs(NamedTuple):
    """What `make_inputs` makes."""

    x: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor


def make_inputs(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    weight_dtype: torch.dtype | None = None,
    bias_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    per_head: bool = False,
    scale: float = 1.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Inputs:
    """Make inputs for which every part of a norm matters.

    ``x = scale * normal(0.5, 1.5)``, the same for residual; ``weight = normal(1, 0.5)``; ``bias =
    normal(0, 0.5)``.  The mean is not 0 and the weights are not 1, so that a norm that loses one of
    them is wrong by far.

    Args:
        shape: x's and residual's shape, (..., n).
        dtype: x's dtype.
        weight_dtype: None for x's.
        bias_dtype: None for x's.
        residual_dtype: None for x's.
        per_head: give weight and bias the shape of x's last two dimensions; False: (n,).
        scale: what x and residual are multiplied by.
        seed: the same seed makes the same inputs, on every device.
        device: where they lie.

    Returns:
        Inputs(x, residual, weight, bias), each rounded once, to its dtype.

    Raises:
        ValueError: shape has no dimension, or only one and per_head is set.

    Example:
        >>> from normkit.testing import make_inputs
        >>> make_inputs((2, 3, 8), per_head=True).weight.shape
        torch.Size([3, 8])
    """
    affine_dims = 2 if per_head else 1
    if len(shape) < affine_dims:
        raise ValueError(f"shape: expected at least {affine_dims} dimensions, got {shape}")
    generator = torch.Generator().manual_seed(seed)

    def normal(
        size: tuple[int, ...], mean: float, std: float, stored: torch.dtype | None
    ) -> Tensor:
        sample = torch.randn(size, generator=generator, dtype=torch.float64) * std + mean
        return sample.to(device=device, dtype=stored or dtype)

    affine = shape[-affine_dims:]
    return Inputs(
        x=normal(shape, 0.5 * scale, 1.5 * scale, dtype),
        residual=normal(shape, 0.5 * scale, 1.5 * scale, residual_dtype),
        weight=normal(affine, 1.0, 0.5, weight_dtype),
        bias=normal(affine, 0.0, 0.5, bias_dtype),
    )


def error_bound(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    kind: str,
    out_dtype: torch.dtype | None = None,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
    eps_outside: bool = False,
) -> Tensor:
    """How far each element of a norm may be from `reference.norm` in float64.

        bound = ulp / 2 * (1 + 2^-9) + 4 * 2^-24 * t + 2^-150 * u
        rms, l2: t = |x| * rstd * |w| + |bias|                u = |w|
        layer:   t = (|x| + mean(|x|)) * rstd * |w| + |bias|   u = (1 + rstd) * |w|

    w is weight + weight_offset, and with an offset the 4 before t is a 5, for its rounding; ulp is
    the step of out_dtype at the float64 result, never below its smallest number; u is for means and
    normalised values that are subnormal in float32.  With round_before_weight and a 16-bit x, an
    element whose normalised value lies within 4 * 2^-24 * t (that of a weight of 1) of the middle
    between two neighbours may be rounded to either, and its bound reaches as far.  So it does with
    round_rstd in a row whose rstd lies so close to such a middle (with the t of a row: rstd, or
    (1 + mean(|x|) * rstd) * rstd for layer); t and u have the rounded rstd.  A row of squares whose
    sum float32 cannot hold is measured against float32's own result.

    Args:
        x: shape (..., n): what is normalised.  For a fused add it is the sum: residual_out, or with
            round_sum=False ``x.float() + residual.float()``.
        weight: (n,) or (heads, n), or None.
        bias: (n,) or (heads, n), or None.
        eps: None for float32's, or for a float64 x float64's.
        kind: "rms", "layer" or "l2".
        out_dtype: float32, float16 or bfloat16; None for x's dtype.
        weight_offset: as in the call.
        round_before_weight: as in the call.
        clamp_inf: as in the call.
        round_rstd: as in the call.
        round_weight: as in the call.
        eps_outside: as in the call.

    Returns:
        The bound in float64, of x's shape; NaN where the result is NaN or infinite.

    Raises:
        TypeError: out_dtype is none of float32, float16 and bfloat16.
        ValueError: kind is none of these.

    Example:
        >>> import torch
        >>> from normkit.testing import error_bound
        >>> x = torch.tensor([1.0, 1.0], dtype=torch.bfloat16)
        >>> bool((error_bound(x, kind="rms", eps=0.0) < 2**-8 * 1.01).all())
        True
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    _check_dtype("out_dtype", out_dtype)
    oracle = _Oracle(
        x,
        weight,
        bias,
        eps,
        kind,
        weight_offset,
        x.dtype if round_before_weight else None,
        x.dtype if round_rstd else None,
        clamp_inf,
        eps_outside,
        round_weight,
    )
    around = oracle.stated()
    reach = [(y - around).abs() + bound for y, bound in oracle.accepted(out_dtype)]
    return torch.stack(reach).amax(0).where(around.isfinite(), torch.nan)


def assert_accurate(
    y: Tensor,
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    kind: str,
    residual: Tensor | None = None,
    residual_out: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    z: Tensor | None = None,
    activation: Activation = "silu",
    norm_before_gate: bool = True,
    round_sum: bool = True,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
    eps_outside: bool = False,
) -> None:
    """Check that y is the norm of x, within the error that normkit promises.

    y must lie within `error_bound` of the float64 result, be NaN exactly where that is NaN, and be
    infinite exactly where it is infinite or rounds to infinity.  residual_out must be the sum
    rounded once, bit for bit; y is then measured against the norm of that sum.

    Args:
        y: what a norm returned, in float32, float16 or bfloat16.
        x: shape (..., n), as it was before the call.
        weight: (n,) or (heads, n), or None.
        bias: (n,) or (heads, n), or None.
        eps: None for float32's, or for a float64 x float64's.
        kind: "rms", "layer" or "l2".
        residual: as it was before the call; None if nothing was added.
        residual_out: what the call returned next to y; needed with a residual.
        gate: of a modulated norm without round_each, as in the call.
        scale: likewise; with it or a shift the 4 before t is a 7, for ``1 + scale``, its product
            and the sum, and in t ``w * (1 + scale)`` is w and ``|bias * (1 + scale)| + |shift|``
            the bias.
        shift: likewise.
        z: of a gated norm without round_each, as in the call; with it the 4 before t is a 9, or a
            12 where the gate comes first, and in t ``w * act(z)`` is w, or ``x * act(z)`` is x.
        activation: as in the call.
        norm_before_gate: as in the call.
        round_sum: as in the call.
        weight_offset: as in the call.
        round_before_weight: as in the call.
        clamp_inf: as in the call.
        round_rstd: as in the call.
        round_weight: as in the call.
        eps_outside: as in the call.

    Raises:
        AssertionError: an element is out of bounds; the message names the worst, its error and its
            bound.
        TypeError: y is none of float32, float16 and bfloat16.
        ValueError: kind is none of these, y is not of x's shape, or only one of
            residual and residual_out was given.

    Example:
        >>> import normkit
        >>> from normkit.testing import assert_accurate, make_inputs
        >>> x, _, weight, _ = make_inputs((4, 64))
        >>> assert_accurate(normkit.rms_norm(x, weight), x, weight, kind="rms")
    """
    _check_dtype("y", y.dtype)
    if y.shape != x.shape:
        raise ValueError(f"y: expected x's shape {tuple(x.shape)}, got {tuple(y.shape)}")
    if (residual is None) != (residual_out is None):
        raise ValueError("residual and residual_out: expected both or none")
    rounded_to = x.dtype
    if residual is not None and residual_out is not None:
        total = _sum(x, residual, gate, clamp_inf)
        _assert_same_bits(residual_out, total.to(residual.dtype))
        rounded_to = residual.dtype if round_sum else x.dtype
        x = residual_out if round_sum else total
    if z is not None and not norm_before_gate:
        x = _clamped(x, clamp_inf) * reference.activated(z, activation, torch.float64)
    oracle = _Oracle(
        x,
        weight,
        bias,
        eps,
        kind,
        weight_offset,
        rounded_to if round_before_weight else None,
        rounded_to if round_rstd else None,
        clamp_inf,
        eps_outside,
        round_weight,
    )
    oracle.modulate(scale, shift)
    if z is not None and norm_before_gate:
        oracle.gate(z, activation)
    elif z is not None:
        oracle.arithmetic += _GATE_BEFORE
    _assert_within(y, oracle)


class _Oracle:
    """A norm in float64, and what else counts as it."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float | None,
        kind: str,
        weight_offset: float,
        xhat_dtype: torch.dtype | None,
        rstd_dtype: torch.dtype | None,
        clamp_inf: bool,
        eps_outside: bool,
        round_weight: bool,
    ) -> None:
        # The options are numbers of the computing dtype, as the inputs are of theirs.
        computing = torch.float64 if x.dtype == torch.float64 else torch.float32
        eps = torch.finfo(computing).eps if eps is None else _rounded(eps, computing)
        self.kind, self.xhat_dtype, self.eps_outside = kind, xhat_dtype, eps_outside
        self.weight, self.bias = _widened(weight), _widened(bias)
        self.size_of_bias: Tensor | None = None  # None: that of the bias
        self.arithmetic = _ARITHMETIC
        self.lost: Tensor | float = 0.0  # to gates that count as 0
        if self.weight is not None:
            offset = _rounded(weight_offset, computing)
            if round_weight and weight is not None and weight.dtype.itemsize == 2:
                # Of float32, as it is computed: next to a middle its rounding decides.
                self.weight = reference.offset_weight(weight, offset, computing, True).double()
            else:
                self.arithmetic += _OFFSET if weight_offset else 0.0
                self.weight = self.weight + offset
        self.xhats = self._normalised(x, eps, rstd_dtype, clamp_inf)
        if computing is torch.float32:
            overflows = self._sum_overflows(x, clamp_inf)
            if overflows.any():
                in_float32 = reference.norm(
                    x,
                    eps=eps,
                    kind=kind,
                    clamp_inf=clamp_inf,
                    eps_outside=eps_outside,
                    out_dtype=torch.float64,
                )
                self.xhats = [torch.where(overflows, in_float32, xhat) for xhat in self.xhats]

    def modulate(self, scale: Tensor | None, shift: Tensor | None) -> None:
        """Have weight and bias stand for all that makes y of xhat."""
        if scale is None and shift is None:
            return
        self.arithmetic += _MODULATION
        if scale is not None:
            factor = 1 + reference.per_row(scale, self.xhats[0]).double()
            self.weight = factor if self.weight is None else self.weight * factor
            self.bias = None if self.bias is None else self.bias * factor
        if shift is not None:
            wide = reference.per_row(shift, self.xhats[0]).double()
            self.size_of_bias = wide.abs() + (0.0 if self.bias is None else self.bias.abs())
            self.bias = wide if self.bias is None else self.bias + wide

    def gate(self, z: Tensor, activation: Activation) -> None:
        """Have weight and bias stand for what act(z) makes of them."""
        self.arithmetic += _GATE_BEHIND
        factor = reference.activated(z, activation, torch.float64)
        lost = _LEAST_GATE * z.double().abs().clamp(min=1)
        size = self.t if self.weight is None else self.t * self.weight.abs()
        self.lost = lost * (size if self.bias is None else size + self.bias.abs())
        self.weight = factor if self.weight is None else self.weight * factor
        self.bias = None if self.bias is None else self.bias * factor

    def stated(self) -> Tensor:
        """What `reference.norm` gives in float64."""
        xhat = self.xhats[0]
        return self._scaled(xhat if self.xhat_dtype is None else _narrowed(xhat, self.xhat_dtype))

    def accepted(self, out_dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """The values that count as the norm, each with the bound of the distance from it."""
        candidates = [
            candidate
            for xhat in self.xhats
            for candidate in _roundings(xhat, self.xhat_dtype, _ARITHMETIC * self.t)
        ]
        scale = 1.0 if self.weight is None else self.weight.abs()
        shift: Tensor | float = 0.0
        if self.size_of_bias is not None:
            shift = self.size_of_bias
        elif self.bias is not None:
            shift = self.bias.abs()
        arithmetic = self.arithmetic * (self.t * scale + shift) + _UNDERFLOW * self.u * scale
        arithmetic = arithmetic + self.lost
        values = [self._scaled(xhat) for xhat in candidates]
        return [(y, _ulp(y, out_dtype) / 2 * _STORE + arithmetic) for y in values]

    def _normalised(
        self, x: Tensor, eps: float, rstd_dtype: torch.dtype | None, clamp_inf: bool
    ) -> list[Tensor]:
        """What counts as xhat in float64; and the t and u of the bound, for a weight of 1 alone."""
        wide = _clamped(x, clamp_inf)
        mean = around = torch.zeros_like(wide[..., :1])
        if self.kind == "layer":
            mean, around = wide.mean(-1, keepdim=True), wide.abs().mean(-1, keepdim=True)
        rstd, _ = reference.statistics(
            x,
            eps=eps,
            kind=self.kind,
            clamp_inf=clamp_inf,
            eps_outside=self.eps_outside,
            compute_dtype=torch.float64,
        )
        rstd = rstd.unsqueeze(-1)
        rstds = _roundings(rstd, rstd_dtype, _ARITHMETIC * (1 + around * rstd) * rstd)
        largest = torch.stack(rstds).amax(0)
        self.t = (wide.abs() + around) * largest
        self.u = 1 + largest if self.kind == "layer" else torch.ones_like(largest)
        return [(wide - mean) * rstd for rstd in rstds]

    def _scaled(self, xhat: Tensor) -> Tensor:
        y = xhat if self.weight is None else xhat * self.weight
        return y if self.bias is None else y + self.bias

    def _sum_overflows(self, x: Tensor, clamp_inf: bool) -> Tensor:
        wide = _clamped(x, clamp_inf)
        largest = (wide * wide).sum(-1, keepdim=True)
        if self.kind == "layer":
            centred = wide - wide.mean(-1, keepdim=True)
            total = wide.abs().sum(-1, keepdim=True)
            largest = torch.maximum((centred * centred).sum(-1, keepdim=True), total)
        return (largest > _FLOAT32_MAX) & largest.isfinite()


def _roundings(value: Tensor, dtype: torch.dtype | None, error: Tensor) -> list[Tensor]:
    """What a float64 value may be rounded to: either neighbour, close to their middle."""
    # Rounding to float32 is arithmetic, which the bound has already.
    if dtype not in (torch.float16, torch.bfloat16):
        return [value]
    nearest = _narrowed(value, dtype)
    step = _ulp(value, dtype)
    off = value - nearest
    neighbour = nearest + step.copysign(off)
    return [nearest, neighbour.where(off.abs() >= step / 2 - error, nearest)]


def _narrowed(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype).double()


def _widened(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


def _rounded(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=dtype).item()


def _clamped(x: Tensor, clamp_inf: bool) -> Tensor:
    wide = x.double()
    if clamp_inf and x.dtype == torch.float16:
        return wide.clamp(-reference.FLOAT16_MAX, reference.FLOAT16_MAX)
    return wide


def _sum(x: Tensor, residual: Tensor, gate: Tensor | None, clamp_inf: bool) -> Tensor:
    """The sum in float32: normalised without round_sum, and rounded for residual_out."""
    wide = _clamped(x, clamp_inf).float()
    if gate is not None:
        wide = wide * reference.per_row(gate, wide).float()
    return wide + residual.float()


def _ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The step of dtype at a float64 value, as if the exponents of dtype went on upwards."""
    info = torch.finfo(dtype)
    magnitude = value.abs().clamp(min=info.smallest_normal)
    power_of_2 = magnitude / torch.frexp(magnitude).mantissa / 2
    return power_of_2 * info.eps


def _check_dtype(name: str, dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {dtype}")


def _assert_same_bits(residual_out: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(
        residual_out,
        expected,
        rtol=0,
        atol=0,
        equal_nan=True,
        msg=lambda text: f"residual_out is not the rounded sum: {text}",
    )


def _assert_within(y: Tensor, oracle: _Oracle) -> None:
    # Infinity is the next number above the largest, and what lies beyond it rounds to it.
    infinity = 2.0 ** math.frexp(torch.finfo(y.dtype).max)[1]
    got = y.double().clamp(-infinity, infinity)
    accepted = oracle.accepted(y.dtype)
    right = torch.zeros_like(y, dtype=torch.bool)
    for value, bound in accepted:
        low = (value - bound).clamp(-infinity, infinity)
        high = (value + bound).clamp(-infinity, infinity)
        infinite = value.isinf()  # where the bound is infinite or NaN too
        right |= torch.where(infinite, y.double() == value, (low <= got) & (got <= high))
    value, bound = accepted[0]
    right |= value.isnan() & y.isnan()
    if right.all():
        return
    error = (y.double() - value).abs()
    over = (error / bound).nan_to_num(torch.inf, torch.inf).where(~right, -1.0)
    worst = tuple(int(i) for i in torch.unravel_index(over.argmax(), y.shape))
    raise AssertionError(
        f"{int((~right).sum())} of {y.numel()} elements are out of bounds;"
        f" the worst is y{list(worst)}: expected {value[worst].item()!r}, got {y[worst].item()!r},"
        f" an error of {error[worst].item():.3g} where {bound[worst].item():.3g} is allowed"
    )
