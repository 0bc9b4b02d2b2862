"""Norms of jagged nested tensors: of their values, which hold the rows of all sequences."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from normkit._spec import Call


class Jagged(Protocol):
    """A nested tensor of torch's jagged layout, whose own type is private and has no types."""

    shape: torch.Size
    ndim: int
    _ragged_idx: int

    def values(self) -> Tensor: ...
    def offsets(self) -> Tensor: ...
    def lengths(self) -> Tensor | None: ...


def is_jagged(t: object) -> TypeGuard[Jagged]:
    """Whether t is a nested tensor of torch's jagged layout."""
    return isinstance(t, Tensor) and t.layout == torch.jagged


def norm_of_values(call: Call) -> Call:
    """Return the call on the values of its tensors, all of one ragged structure.

    Raises:
        ValueError: the ragged dimension is normalised, or a tensor is not ragged as x is.
    """
    x = call.x
    assert is_jagged(x)
    values: dict[str, Tensor] = {}
    for name, t in call.tensors():
        if name in ("weight", "bias"):
            continue
        if not is_jagged(t):
            raise ValueError(f"{name}: expected a jagged tensor, as x is, got {t.layout}")
        if t.shape != x.shape or t._ragged_idx != x._ragged_idx:
            raise ValueError(f"{name}: expected x's shape {x.shape}, got {t.shape}")
        values[name] = t.values()
    if x._ragged_idx == x.ndim - 1:
        raise ValueError(f"x: expected rows of one length, got shape {x.shape}")
    rows, residual = values["x"], values.get("residual")
    out, residual_out = values.get("out"), values.get("residual_out")
    if call.in_place:
        out, residual_out = rows, residual
    return replace(call, x=rows, residual=residual, out=out, residual_out=residual_out)


def ragged_as(x: Tensor, values: Tensor) -> Tensor:
    """Return values as a nested tensor with the sequences of x."""
    assert is_jagged(x)
    return torch.nested.nested_tensor_from_jagged(
        values, x.offsets(), x.lengths(), jagged_dim=x._ragged_idx
    )
