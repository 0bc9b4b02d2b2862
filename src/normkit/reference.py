"""What every norm of this package is, in plain torch.

The kernels are held to these two functions; with ``compute_dtype=torch.float64`` they are the
oracle of the tests.  They also serve the calls no kernel serves: they are differentiable, can be
traced, and run on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOAT16_MAX = 65504.0


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
    out_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Normalise x over its last dimension.

    ``y = round((x - mean) * rstd * (weight + weight_offset) + bias)`` with ``rstd = 1 /
    sqrt(statistic + eps)``; kind "rms" has mean 0 and the mean of x^2 as statistic, kind "layer"
    has the mean and the variance of x.

    Args:
        x: shape (..., n), any floating dtype.
        weight: shape (n,) or (heads, n), or None for ones, to which no offset is added.
        bias: shape (n,) or (heads, n), or None for zeros.
        eps: added to the statistic; None is the smallest step above 1 of the computing dtype.
        kind: "rms" or "layer".
        weight_offset: added to weight in the computing dtype.
        round_before_weight: round ``(x - mean) * rstd`` to x's dtype before weight multiplies it.
        clamp_inf: let +-inf in a float16 x count as +-65504.
        out_dtype: the dtype of the result; None is x's.
        compute_dtype: the dtype of everything in between; None is float64 for a float64 x, else
            float32.

    Returns:
        y, of x's shape.  It is rounded once, when it is converted to out_dtype, and also where
        round_before_weight says.

    Raises:
        ValueError: kind is neither "rms" nor "layer".

    Example:
        >>> import torch
        >>> from normkit import reference
        >>> reference.norm(torch.tensor([3.0, 4.0, 0.0, 0.0]), eps=0.0, kind="rms")
        tensor([1.2000, 1.6000, 0.0000, 0.0000])
    """
    compute = _compute_dtype(x, compute_dtype)
    xhat = _normalised(_widened(x, compute, clamp_inf), eps, kind)
    if round_before_weight:
        xhat = xhat.to(x.dtype).to(compute)
    return _scaled(xhat, weight, bias, weight_offset).to(out_dtype or x.dtype)


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
    out_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a residual to x, and normalise the sum over its last dimension.

    ``residual_out = round(x + residual)``; ``y = norm(residual_out)``, or of the sum before
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
        out_dtype: the dtype of y; None is x's.
        compute_dtype: as in `norm`.

    Returns:
        (y, residual_out): y as `norm` rounds it; residual_out in residual's dtype, rounded once and
        never clamped.

    Raises:
        ValueError: kind is neither "rms" nor "layer".

    Example:
        >>> import torch
        >>> from normkit import reference
        >>> x = torch.tensor([1.0, 3.0])
        >>> reference.add_norm(x, residual=torch.tensor([2.0, 1.0]), eps=0.0, kind="layer")
        (tensor([-1.,  1.]), tensor([3., 4.]))
    """
    compute = _compute_dtype(x, compute_dtype)
    total = _widened(x, compute, clamp_inf) + residual.to(compute)
    residual_out = total.to(residual.dtype)
    if round_sum:
        total = _widened(residual_out, compute, clamp_inf)
    xhat = _normalised(total, eps, kind)
    if round_before_weight:
        xhat = xhat.to(residual.dtype if round_sum else x.dtype).to(compute)
    return _scaled(xhat, weight, bias, weight_offset).to(out_dtype or x.dtype), residual_out


def _compute_dtype(x: Tensor, asked: torch.dtype | None) -> torch.dtype:
    if asked is not None:
        return asked
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _widened(x: Tensor, compute: torch.dtype, clamp_inf: bool) -> Tensor:
    # Contiguous, because the strides choose the order in which torch adds up a mean.
    wide = x.to(compute).contiguous()
    if clamp_inf and x.dtype == torch.float16:
        wide = wide.clamp(-FLOAT16_MAX, FLOAT16_MAX)
    return wide


def _normalised(x: Tensor, eps: float | None, kind: str) -> Tensor:
    if eps is None:
        eps = torch.finfo(x.dtype).eps
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    elif kind != "rms":
        raise ValueError(f'kind: expected "rms" or "layer", got {kind!r}')
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)


def _scaled(
    xhat: Tensor, weight: Tensor | None, bias: Tensor | None, weight_offset: float
) -> Tensor:
    if weight is not None:
        scale = weight.to(xhat.dtype)
        if weight_offset != 0.0:  # adding 0.0 would turn a weight of -0.0 into +0.0
            scale = scale + weight_offset
        xhat = xhat * scale
    if bias is not None:
        xhat = xhat + bias.to(xhat.dtype)
    return xhat
