"""Norms of jagged nested tensors: of their values, which hold the rows of all sequences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from normkit._spec import Call


def is_jagged(t: Any) -> bool:
    """Whether t is a nested tensor of torch's jagged layout."""
    return isinstance(t, Tensor) and t.layout == torch.jagged


def norm_of_values(call: Call) -> Call:
    """Return the call on the values of its tensors, all of one ragged structure.

    Raises:
        ValueError: the ragged dimension is normalised, or a tensor is not ragged as x is.
    """
    x: Any = call.x
    rows = [(name, t) for name, t in call.tensors() if name not in ("weight", "bias")]
    t: Any
    for name, t in rows:
        if not is_jagged(t):
            raise ValueError(f"{name}: expected a jagged tensor, as x is, got {t.layout}")
        if t.shape != x.shape or t._ragged_idx != x._ragged_idx:
            raise ValueError(f"{name}: expected x's shape {x.shape}, got {t.shape}")
    if x._ragged_idx == x.ndim - 1:
        raise ValueError(f"x: expected rows of one length, got shape {x.shape}")
    values: dict[str, Any] = {name: t.values() for name, t in rows}
    if call.in_place:
        values["out"] = values["x"]
        if call.residual is not None:
            values["residual_out"] = values["residual"]
    return replace(call, **values)


def ragged_as(x: Any, values: Tensor) -> Tensor:
    """Return values as a nested tensor with the sequences of x."""
    return torch.nested.nested_tensor_from_jagged(
        values, x.offsets(), x.lengths(), jagged_dim=x._ragged_idx
    )
