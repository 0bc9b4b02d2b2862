"""What every norm of this package is, in plain torch.

The kernels are held to these functions; with ``compute_dtype=torch.float64`` they are the oracle of
the tests.  They also run the calls that no kernel takes: they are differentiable, can be traced,
and work on any device.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOAT16_MAX = 65504.0
FLOAT16_SMALLEST_NORMAL = 2.0**-14


def norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    kind: str,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    round_each: bool = False,
    z: Tensor | None = None,
    activation: str = "silu",
    norm_before_gate: bool = True,
    eps_outside: bool = False,
    out_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Normalise x over its last dimension.

    ``y = round(n * (1 + scale) + shift)``, or with z ``round(n * act(z))``, with ``n = (x - mean)
    * rstd * (weight + weight_offset) + bias`` and ``rstd = 1 / sqrt(statistic + eps)``; kind "rms"
    has mean 0 and the mean of x^2 as statistic, kind "l2" their sum, kind "layer" has the mean and
    the variance of x.

    Args:
        x: shape (..., n), any floating dtype.
        weight: shape (n,) or (heads, n), or None for ones, to which no offset is added.
        bias: shape (n,) or (heads, n), or None for zeros.
        eps: added to the statistic; None is the smallest step above 1 of the computing dtype.
        kind: "rms", "layer" or "l2".
        weight_offset: added to weight in the computing dtype.
        round_before_weight: round ``(x - mean) * rstd`` to x's dtype before weight multiplies it.
        clamp_inf: let +-inf in a float16 x count as +-65504.
        round_rstd: round rstd to x's dtype before it multiplies.
        round_weight: round weight + weight_offset to weight's dtype.
        scale: x's first dimensions, or ones in their place, and its last; None for zeros.
        shift: likewise.
        round_each: round n to x's dtype, ``1 + scale`` to scale's, and the product and the sum to
            the dtype in which torch computes them of two tensors; n alone where z multiplies it.
        z: x's shape; None for no gate.
        activation: "silu" or "sigmoid".
        norm_before_gate: False: act(z) multiplies x before it is normalised, and not n.
        eps_outside: ``rstd = 1 / max(sqrt(statistic), eps)``.
        out_dtype: the dtype of the result; None is x's.
        compute_dtype: the dtype of everything in between; None is float64 for a float64 x, else
            float32.

    Returns:
        y, of x's shape.  It is rounded once, when it is converted to out_dtype, and also where
        round_before_weight and round_rstd say.

    Raises:
        ValueError: kind is none of these.

    Example:
        >>> import torch
        >>> from normkit import reference
        >>> reference.norm(torch.tensor([3.0, 4.0, 0.0, 0.0]), eps=0.0, kind="rms")
        tensor([1.2000, 1.6000, 0.0000, 0.0000])
    """
    compute = compute_dtype_of(x, compute_dtype)
    row = widened(x, compute, clamp_inf)
    if z is not None and not norm_before_gate:
        row = row * activated(z, activation, compute)
    xhat = _normalised(row, eps, kind, x.dtype if round_rstd else None, eps_outside)
    if round_before_weight:
        xhat = rounded(xhat, x.dtype)
    n = scaled(xhat, weight, bias, weight_offset, round_weight)
    if z is not None:
        if norm_before_gate:
            n = (rounded(n, x.dtype) if round_each else n) * activated(z, activation, compute)
        return n.to(out_dtype or x.dtype)
    y = modulated(n, scale, shift, x.dtype if round_each else None)
    return y.to(out_dtype or x.dtype)


def add_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    kind: str,
    round_sum: bool = True,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    round_each: bool = False,
    out_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a residual to x, and normalise the sum over its last dimension.

    ``residual_out = round(gate * x + residual)``; ``y = norm(residual_out)``, or of the sum before
    rounding.

    Args:
        x: shape (..., n), any floating dtype.
        residual: x's shape.
        weight: as in `norm`.
        bias: as in `norm`.
        eps: as in `norm`.
        kind: "rms" or "layer".
        round_sum: normalise residual_out; False: the sum before it was rounded.
        weight_offset: as in `norm`.
        round_before_weight: round the normalised value before weight multiplies it: to residual's
            dtype, or to x's with round_sum=False.
        clamp_inf: let +-inf in a float16 x, and with round_sum=True in a float16 residual_out where
            it is normalised, count as +-65504.
        round_rstd: round rstd before it multiplies, to the same dtype as round_before_weight.
        round_weight: as in `norm`.
        gate: as scale; None for ones.
        scale: as in `norm`.
        shift: as in `norm`.
        round_each: as in `norm`, of the dtype of round_before_weight; and the product with gate.
        out_dtype: the dtype of y; None is x's.
        compute_dtype: as in `norm`.

    Returns:
        (y, residual_out): y as `norm` rounds it; residual_out in residual's dtype, rounded once and
        never clamped.

    Raises:
        ValueError: kind is none of these.

    Example:
        >>> import torch
        >>> from normkit import reference
        >>> x = torch.tensor([1.0, 3.0])
        >>> reference.add_norm(x, residual=torch.tensor([2.0, 1.0]), eps=0.0, kind="layer")
        (tensor([-1.,  1.]), tensor([3., 4.]))
    """
    total = added(
        x, residual, gate, round_each=round_each, clamp_inf=clamp_inf, compute_dtype=compute_dtype
    )
    residual_out = total.to(residual.dtype)
    if round_sum:
        total = _rounded_sum(total, residual.dtype, clamp_inf)
    dtype = _dtype_normalised(x, residual, round_sum)
    xhat = _normalised(total, eps, kind, dtype if round_rstd else None)
    if round_before_weight:
        xhat = rounded(xhat, dtype)
    n = scaled(xhat, weight, bias, weight_offset, round_weight)
    y = modulated(n, scale, shift, dtype if round_each else None)
    return y.to(out_dtype or x.dtype), residual_out


def norm_add(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    kind: str,
    alpha: float = 1.0,
    beta: float = 1.0,
    round_norm: bool = True,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return ``round(alpha * residual + beta * norm(x))``, in residual's dtype.

    round_norm: round the norm, and its product with beta, to x's dtype, and ``alpha * residual`` to
    residual's; False: all of it is in the computing dtype.  The others are those of `norm`.

    Example:
        >>> import torch
        >>> from normkit import reference
        >>> x, residual = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0])
        >>> reference.norm_add(x, residual, eps=0.0, kind="layer")
        tensor([1., 2.])
    """
    compute = compute_dtype_of(x, compute_dtype)
    n = norm(
        x,
        weight,
        bias,
        eps,
        kind=kind,
        weight_offset=weight_offset,
        round_before_weight=round_before_weight,
        clamp_inf=clamp_inf,
        round_rstd=round_rstd,
        round_weight=round_weight,
        out_dtype=compute,
        compute_dtype=compute,
    )
    kept = residual.to(compute)
    if round_norm:
        n = rounded(n, x.dtype)
    if beta != 1.0:
        n = rounded(n * beta, x.dtype) if round_norm else n * beta
    if alpha != 1.0:
        kept = rounded(kept * alpha, residual.dtype) if round_norm else kept * alpha
    return (kept + n).to(residual.dtype)


def statistics(
    x: Tensor,
    residual: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    kind: str,
    round_sum: bool = True,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    gate: Tensor | None = None,
    round_each: bool = False,
    z: Tensor | None = None,
    activation: str = "silu",
    norm_before_gate: bool = True,
    eps_outside: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return what `norm`, or with a residual `add_norm`, takes of each row: (rstd, mean).

    Both are of x's shape without its last dimension, in the computing dtype.  rstd is as it
    multiplies: rounded, with round_rstd.  mean is None unless kind is "layer".  The arguments are
    those of `norm` and `add_norm`.
    """
    compute = compute_dtype_of(x, compute_dtype)
    total = normalised_row(x, residual, compute, round_sum, clamp_inf, gate, round_each)
    if z is not None and not norm_before_gate:
        total = total * activated(z, activation, compute)
    dtype = _dtype_normalised(x, residual, round_sum) if round_rstd else None
    rstd, mean = _statistics(total, eps, kind, dtype, eps_outside)
    return rstd.squeeze(-1), None if mean is None else mean.squeeze(-1)


def norm_backward(
    grad_y: Tensor,
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    kind: str,
    rstd: Tensor | None = None,
    from_output: bool = False,
    round_sum: bool = True,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
    round_rstd: bool = False,
    round_weight: bool = False,
    eps_outside: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of `norm`, or with a residual of y of `add_norm`.

    With ``g = grad_y * (weight + weight_offset)`` and means over a row, that of what was normalised
    is ``rstd * (g - mean(g) - xhat * mean(g * xhat))``, with ``mean(g)`` for kind "layer" alone,
    with the sum in place of the second mean for kind "l2", and without either in a row that
    eps_outside has divided by eps; that of weight is the sum of ``grad_y * xhat``, and that of bias
    the sum of grad_y.  Roundings count as the identity: with round_rstd, rstd and xhat are those of
    the forward pass, wherever they occur.  A sum that clamp_inf clamped counts as a constant.

    Args:
        grad_y: x's shape.
        x: as in `norm` or `add_norm`.
        residual: as in `add_norm`; None: x was normalised.
        weight: as in `norm`.
        bias: as in `norm`.
        eps: as in `norm`.
        kind: as in `norm`.
        rstd: what `statistics` returned; None: it is taken again, so that the result is
            differentiable itself.
        from_output: x is y; ``xhat = (y - bias) / (weight + weight_offset)``, and 0 where that
            divisor is 0.  rstd must be given.
        round_sum: as in `add_norm`.
        weight_offset: as in `norm`.
        round_before_weight: as in `norm`: the weight's gradient takes xhat as it was rounded.
        clamp_inf: as in `norm`.
        round_rstd: as in `norm`, for an rstd that is taken again.
        round_weight: as in `norm`.
        eps_outside: as in `norm`.
        compute_dtype: as in `norm`.

    Returns:
        Gradients of x or of the sum x + residual, of weight and of bias, in the computing dtype;
        the last two are None where there is no weight or bias.
    """
    compute = compute_dtype_of(x, compute_dtype)
    grad_y = grad_y.to(compute)
    scale = None if weight is None else offset_weight(weight, weight_offset, compute, round_weight)
    g = grad_y if scale is None else grad_y * scale
    mean, dtype = None, _dtype_normalised(x, residual, round_sum)
    if from_output:
        xhat = x.to(compute) if bias is None else x.to(compute) - bias.to(compute)
        if scale is not None:
            xhat = torch.where(scale == 0, 0.0, xhat / scale)
    else:
        total = normalised_row(x, residual, compute, round_sum, clamp_inf)
        again, mean = _statistics(total, eps, kind, dtype if round_rstd else None, eps_outside)
        rstd = again.squeeze(-1) if rstd is None else rstd
        xhat = (total if mean is None else total - mean) * rstd.unsqueeze(-1)
    products = g * xhat
    over_row = products.sum if kind == "l2" else products.mean
    grad = g - xhat * over_row(-1, keepdim=True)
    if eps_outside:
        assert rstd is not None
        grad = torch.where(is_divided_by_eps(rstd, eps).unsqueeze(-1), g, grad)
    if kind == "layer":
        grad = grad - g.mean(-1, keepdim=True)
    assert rstd is not None
    grad = grad * rstd.unsqueeze(-1)
    if clamp_inf and residual is not None and round_sum and residual.dtype == torch.float16:
        total = widened(x, compute, clamp_inf) + residual.to(compute)
        grad = torch.where(rounded(total, residual.dtype).isinf(), 0.0, grad)
    if round_before_weight:
        xhat = rounded(xhat, dtype)
    of_weight = None if weight is None else (grad_y * xhat).sum_to_size(weight.shape)
    of_bias = None if bias is None else grad_y.sum_to_size(bias.shape)
    return grad, of_weight, of_bias


def added(
    x: Tensor,
    residual: Tensor,
    gate: Tensor | None = None,
    *,
    round_each: bool = False,
    clamp_inf: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the sum that `add_norm` normalises with round_sum=False, in the computing dtype."""
    compute = compute_dtype_of(x, compute_dtype)
    wide = widened(x, compute, clamp_inf)
    if gate is not None:
        wide = wide * per_row(gate, x).to(compute)
        if round_each:
            wide = rounded(wide, torch.promote_types(x.dtype, gate.dtype))
    return wide + residual.to(compute)


def per_row(t: Tensor, x: Tensor) -> Tensor:
    """A gate, scale or shift with as many dimensions as x, so that torch broadcasts it."""
    return t[(...,) + (None,) * (x.ndim - t.ndim) + (slice(None),)] if t.ndim < x.ndim else t


def from_statistics(
    x: Tensor,
    rstd: Tensor,
    mean: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    weight_offset: float,
    round_weight: bool,
    clamp_inf: bool,
    xhat_dtype: torch.dtype | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """Return the norm of x again, from its `statistics`, with xhat and itself rounded as asked."""
    xhat = normalised_by(x, rstd, mean, clamp_inf)
    if xhat_dtype is not None:
        xhat = rounded(xhat, xhat_dtype)
    n = scaled(xhat, weight, bias, weight_offset, round_weight)
    return n if dtype is None else rounded(n, dtype)


def activated(z: Tensor, activation: str, compute: torch.dtype) -> Tensor:
    """Return act(z) in the computing dtype: sigmoid(z), or z * sigmoid(z) for "silu"."""
    wide = z.to(compute).contiguous()  # torch has other code for strides, of other bits
    return torch.sigmoid(wide) if activation == "sigmoid" else torch.nn.functional.silu(wide)


def modulated(
    n: Tensor, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype | None
) -> Tensor:
    """Return ``n * (1 + scale) + shift``, each operation rounded; dtype: that of n, None: none."""
    if dtype is not None:
        n = rounded(n, dtype)
    if scale is not None:
        factor = 1 + per_row(scale, n).to(n.dtype)
        n = n * (factor if dtype is None else rounded(factor, scale.dtype))
        if dtype is not None:
            dtype = torch.promote_types(dtype, scale.dtype)
            n = rounded(n, dtype)
    if shift is not None:
        n = n + per_row(shift, n).to(n.dtype)
        if dtype is not None:
            n = rounded(n, torch.promote_types(dtype, shift.dtype))
    return n


def compute_dtype_of(x: Tensor, asked: torch.dtype | None) -> torch.dtype:
    """The dtype of everything in between: the one asked for, or that of x."""
    if asked is not None:
        return asked
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def widened(x: Tensor, compute: torch.dtype, clamp_inf: bool) -> Tensor:
    """Return x in the computing dtype, with its infinities clamped where that is asked for."""
    # Contiguous, because the strides choose the order in which torch adds up a mean.
    return _clamped(x.to(compute).contiguous(), x.dtype, clamp_inf)


def _clamped(wide: Tensor, dtype: torch.dtype, clamp_inf: bool) -> Tensor:
    if clamp_inf and dtype == torch.float16:
        return wide.clamp(-FLOAT16_MAX, FLOAT16_MAX)
    return wide


def normalised_row(
    x: Tensor,
    residual: Tensor | None,
    compute: torch.dtype,
    round_sum: bool,
    clamp_inf: bool,
    gate: Tensor | None = None,
    round_each: bool = False,
) -> Tensor:
    """Return what is normalised, in the computing dtype: x, or the sum."""
    if residual is None:
        return widened(x, compute, clamp_inf)
    total = added(
        x, residual, gate, round_each=round_each, clamp_inf=clamp_inf, compute_dtype=compute
    )
    return _rounded_sum(total, residual.dtype, clamp_inf) if round_sum else total


def _rounded_sum(total: Tensor, dtype: torch.dtype, clamp_inf: bool) -> Tensor:
    return _clamped(rounded(total, dtype), dtype, clamp_inf)


def _dtype_normalised(x: Tensor, residual: Tensor | None, round_sum: bool) -> torch.dtype:
    return x.dtype if residual is None or not round_sum else residual.dtype


def _statistics(
    x: Tensor,
    eps: float | None,
    kind: str,
    rounded_to: torch.dtype | None,
    eps_outside: bool = False,
) -> tuple[Tensor, Tensor | None]:
    if eps is None:
        eps = torch.finfo(x.dtype).eps
    mean = None
    if kind == "layer":
        mean = x.mean(-1, keepdim=True)
        x = x - mean
    elif kind not in ("rms", "l2"):
        raise ValueError(f'kind: expected "rms", "layer" or "l2", got {kind!r}')
    squares = x * x
    statistic = (squares.sum if kind == "l2" else squares.mean)(-1, keepdim=True)
    if eps_outside:
        # Of the square, whose gradient at 0 is 0, where that of the root is infinite.
        info = torch.finfo(x.dtype)
        is_zero = eps <= info.tiny * info.eps / 2  # in the computing dtype
        least = 0.0 if is_zero else max(eps * eps, info.tiny)
        rstd = torch.rsqrt(statistic.clamp_min(least))
        if eps * info.max > 1:  # else 1 / eps is beyond all that it has
            rstd = rstd.clamp_max(1 / eps)
    else:
        rstd = torch.rsqrt(statistic + eps)
    return rstd if rounded_to is None else rounded(rstd, rounded_to), mean


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what dtype holds of x, in x's dtype."""
    by_casts = (
        not is_compiled()
        or torch.compiler.is_exporting()
        or (torch.is_grad_enabled() and x.requires_grad)
        or is_transformed()
    )
    # Inductor leaves a pair of casts out, but not arithmetic of bits, which has no gradient.
    return x.to(dtype).to(x.dtype) if by_casts else _rounded_by_bits(x, dtype)


def _rounded_by_bits(x: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.itemsize != 2:
        return x.to(dtype).to(x.dtype)
    wide = x.to(torch.float32)
    dropped = 16 if dtype == torch.bfloat16 else 13
    bits = wide.view(torch.int32)
    below_half = (1 << (dropped - 1)) - 1
    rounded = (bits + ((bits >> dropped) & 1) + below_half) & -(1 << dropped)
    nearest = rounded.view(torch.float32)
    if dtype == torch.float16:
        # Subnormal ones are multiples of 2^-24, which is the step of numbers from 0.5 on.
        subnormal = torch.copysign((wide.abs() + 0.5) - 0.5, wide)
        nearest = torch.where(wide.abs() < FLOAT16_SMALLEST_NORMAL, subnormal, nearest)
        nearest = torch.where(nearest.abs() > FLOAT16_MAX, nearest * math.inf, nearest)
    return torch.where(wide.isnan(), wide, nearest).to(x.dtype)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.compiles = False


_thread = _Thread()


def is_compiled() -> bool:
    """Whether what runs goes into a compiled or an exported program."""
    return torch.compiler.is_compiling() or _thread.compiles


@contextmanager
def compiled() -> Iterator[None]:
    """What this thread runs inside goes into a compiled program; torch 2.10 does not say so."""
    before, _thread.compiles = _thread.compiles, True
    try:
        yield
    finally:
        _thread.compiles = before


def is_transformed() -> bool:
    """Whether only torch's own operators know what to do, as under torch.func."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_divided_by_eps(rstd: Tensor, eps: float | None) -> Tensor:
    """Where eps_outside took eps for the root of the statistic."""
    eps = torch.finfo(rstd.dtype).eps if eps is None else eps
    # A few roundings below 1 / eps, where kernels may have it.
    largest = (1 - 4 * torch.finfo(rstd.dtype).eps) / eps if eps else math.inf
    return rstd >= largest


def _normalised(
    x: Tensor,
    eps: float | None,
    kind: str,
    rounded_to: torch.dtype | None,
    eps_outside: bool = False,
) -> Tensor:
    rstd, mean = _statistics(x, eps, kind, rounded_to, eps_outside)
    return (x if mean is None else x - mean) * rstd


def normalised_by(x: Tensor, rstd: Tensor, mean: Tensor | None, clamp_inf: bool) -> Tensor:
    """Return xhat of x from its statistics."""
    wide = widened(x, rstd.dtype, clamp_inf)
    return (wide if mean is None else wide - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)


def offset_weight(
    weight: Tensor, weight_offset: float, compute: torch.dtype, round_weight: bool = False
) -> Tensor:
    """Return the weight with its offset, in the computing dtype, perhaps rounded to its own."""
    scale = weight.to(compute)
    if weight_offset == 0.0:  # adding it would turn a weight of -0.0 into +0.0
        return scale
    scale = scale + weight_offset
    return rounded(scale, weight.dtype) if round_weight else scale


def scaled(
    xhat: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_offset: float,
    round_weight: bool = False,
) -> Tensor:
    """Return xhat times the weight with its offset, plus the bias."""
    if weight is not None:
        xhat = xhat * offset_weight(weight, weight_offset, xhat.dtype, round_weight)
    if bias is not None:
        xhat = xhat + bias.to(xhat.dtype)
    return xhat
