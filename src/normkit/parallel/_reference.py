"""Norms of rows that are split over ranks, in plain torch: `normkit.reference` for parts."""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.reference import (
    compute_dtype_of,
    normalised_by,
    offset_weight,
    rounded,
    scaled,
    widened,
)


def part_statistics(
    x: Tensor, *, kind: str, clamp_inf: bool = False, compute_dtype: torch.dtype | None = None
) -> Tensor:
    """Return what a part of each row, its columns on one of several ranks, says about the row.

    Planes (1 or 2, *x.shape[:-1]) in the computing dtype: the sum of squares; for kind "layer" that
    of the part less its own mean, and that mean.  The arguments are those of `norm`.
    """
    wide = widened(x, compute_dtype_of(x, compute_dtype), clamp_inf)
    if kind == "rms":
        return (wide * wide).sum(-1).unsqueeze(0)
    mean = wide.mean(-1, keepdim=True)
    centred = wide - mean
    return torch.stack([(centred * centred).sum(-1), mean.squeeze(-1)])


def combined_statistics(
    gathered: Tensor, n: int, eps: float | None, *, kind: str
) -> tuple[Tensor, Tensor | None]:
    """Return (rstd, mean) of rows from the `part_statistics` (parts, planes, ...) of their parts.

    The parts, all of n columns, are added up one after the other.  With k of them

        mean = sum(mean_i) / k,  rstd = 1 / sqrt(sum(squares_i + n (mean_i - mean)^2) / (n k) + eps)

    where kind "rms" has no mean, and its squares nothing to be corrected for.
    """
    parts = len(gathered)
    eps = torch.finfo(gathered.dtype).eps if eps is None else eps
    squares, mean = list(gathered[:, 0]), None
    if kind == "layer":
        means = gathered[:, 1]
        mean = _added_up(list(means)) / parts
        squares = [s + n * (m - mean).square() for s, m in zip(squares, means, strict=True)]
    return torch.rsqrt(_added_up(squares) / (n * parts) + eps), mean


def part_norm(
    x: Tensor,
    gathered: Tensor,
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
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return `norm` of a part x of rows, and the rows' rstd and mean, as `combined_statistics`."""
    rstd, mean = combined_statistics(gathered, x.shape[-1], eps, kind=kind)
    if round_rstd:
        rstd = rounded(rstd, x.dtype)
    xhat = normalised_by(x, rstd, mean, clamp_inf)
    if round_before_weight:
        xhat = rounded(xhat, x.dtype)
    y = scaled(xhat, weight, bias, weight_offset, round_weight).to(out_dtype or x.dtype)
    return y, rstd, mean


def part_backward_statistics(
    grad_y: Tensor,
    x: Tensor,
    rstd: Tensor,
    mean: Tensor | None,
    weight: Tensor | None = None,
    *,
    weight_offset: float = 0.0,
    clamp_inf: bool = False,
) -> Tensor:
    """Return what a part of each row says about the row's gradient, as planes.

    With g as in `norm_backward` and means over the part: that of ``g * xhat`` and, where rows have
    a mean, that of g.
    """
    g = _gradient_of_xhat(grad_y.to(rstd.dtype), weight, weight_offset)
    of_product = (g * normalised_by(x, rstd, mean, clamp_inf)).mean(-1)
    return torch.stack([of_product] if mean is None else [of_product, g.mean(-1)])


def part_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    rstd: Tensor,
    mean: Tensor | None,
    gathered: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    weight_offset: float = 0.0,
    round_before_weight: bool = False,
    clamp_inf: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of `part_norm`, from the `part_backward_statistics` of all parts.

    They are those that `norm_backward` returns for whole rows, of the columns of this part.
    """
    grad_y = grad_y.to(rstd.dtype)
    g = _gradient_of_xhat(grad_y, weight, weight_offset)
    xhat = normalised_by(x, rstd, mean, clamp_inf)
    of_product, *of_g = (
        _added_up(list(plane)).unsqueeze(-1) / len(gathered) for plane in gathered.unbind(1)
    )
    grad = g - xhat * of_product
    if of_g:
        grad = grad - of_g[0]
    grad = grad * rstd.unsqueeze(-1)
    if clamp_inf and x.dtype == torch.float16:
        grad = torch.where(x.isinf(), 0.0, grad)
    if round_before_weight:
        xhat = rounded(xhat, x.dtype)
    of_weight = None if weight is None else (grad_y * xhat).sum_to_size(weight.shape)
    of_bias = None if bias is None else grad_y.sum_to_size(bias.shape)
    return grad, of_weight, of_bias


def _added_up(terms: list[Tensor]) -> Tensor:
    """Return the sum of the terms in their order, which `torch.sum` would not promise."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _gradient_of_xhat(grad_y: Tensor, weight: Tensor | None, weight_offset: float) -> Tensor:
    return grad_y if weight is None else grad_y * offset_weight(weight, weight_offset, grad_y.dtype)
