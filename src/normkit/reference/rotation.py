"""Rotary embedding in plain torch: what stands behind a norm of heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normkit import reference


def norm_rope(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    kind: str,
    positions: Tensor | None = None,
    interleaved: bool = False,
    round_norm: bool = False,
    round_each: bool = False,
    out_dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    **options: Any,
) -> Tensor:
    """Return ``rotated(norm(x))``, the norm rounded to x's dtype with round_norm or round_each."""
    compute = reference.compute_dtype_of(x, compute_dtype)
    given = x, weight, bias, eps
    n = reference.norm(*given, kind=kind, out_dtype=compute, compute_dtype=compute, **options)
    if round_norm or round_each:
        n = reference.rounded(n, x.dtype)
    dtype = torch.promote_types(x.dtype, cos.dtype) if round_each else None
    y = rotated(n, cos, sin, positions, interleaved=interleaved, dtype=dtype)
    return y.to(out_dtype or x.dtype)


def rotated(
    n: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Rotate the first columns of n (..., heads, head_dim), in n's dtype.

    A pair (a, b) becomes ``(a * cos - b * sin, b * cos + a * sin)``, each product rounded to dtype
    where there is one; columns from ``2 * cos.shape[-1]`` on stay as they are.
    """
    cos, sin = of_heads(cos, positions, n.dtype), of_heads(sin, positions, n.dtype)
    width = 2 * cos.shape[-1]
    a, b = pairs(n[..., :width], interleaved)

    def product(column: Tensor, factor: Tensor) -> Tensor:
        made = column * factor
        return made if dtype is None else reference.rounded(made, dtype)

    first = product(a, cos) - product(b, sin)
    turned = joined(first, product(b, cos) + product(a, sin), interleaved)
    return torch.cat((turned, n[..., width:]), -1)


def pairs(n: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and the second columns of the pairs."""
    half = n.shape[-1] // 2
    return (n[..., ::2], n[..., 1::2]) if interleaved else (n[..., :half], n[..., half:])


def joined(first: Tensor, second: Tensor, interleaved: bool) -> Tensor:
    """The columns that `pairs` took apart."""
    if interleaved:
        return torch.stack((first, second), -1).flatten(-2)
    return torch.cat((first, second), -1)


def of_heads(table: Tensor, positions: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Cos or sin as heads multiply by it: NaN for a position outside of the table."""
    if positions is None:
        return table.to(dtype).unsqueeze(-2)
    rows = table.shape[0]
    inside = (positions >= 0) & (positions < rows)
    taken = torch.where(inside, positions, 0).long()
    if rows == 0:
        table = table.new_zeros(1, table.shape[1])
    return torch.where(inside.unsqueeze(-1), table[taken].to(dtype), torch.nan).unsqueeze(-2)
