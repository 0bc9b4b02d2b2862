"""What torch.jit.script compiles in the place of a module of this package.

TorchScript has no keyword-only arguments, no result that is one tensor or two, and no way into the
extension; it has operators.  A script calls those of `torch.ops.normkit`, so whoever loads one has
to import normkit first.
"""

# No `from __future__ import annotations`: TorchScript reads annotations as objects.
from typing import Protocol

import torch
from torch import Tensor

from normkit._spec import FIELDS, PLAIN_OPTIONS


class Scriptable(Protocol):
    """A module of this package."""

    @property
    def weight(self) -> Tensor | None: ...
    @property
    def bias(self) -> Tensor | None: ...

    eps: float | None
    memory_efficient: bool


class ScriptableNorm(torch.nn.Module):
    """The norm of x alone, by operators, on the parameters of the module it stands for.

    shape is what x ends in: of a head norm (heads, head_dim), or (head_dim,) for any heads.
    """

    eps: float | None
    shape: list[int]

    def __init__(self, norm: Scriptable, kind: str, shape: list[int], *, per_head: bool) -> None:
        super().__init__()
        self.weight = norm.weight
        self.bias = norm.bias
        self.eps = norm.eps
        options = [getattr(norm, name, FIELDS[name].default) for name in PLAIN_OPTIONS]
        self.options = (*options, None, norm.memory_efficient)  # None: out_dtype
        self.kind = kind
        self.shape = shape
        self.per_head = per_head

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x; out_dtype is x's."""
        dims = len(self.shape)
        if list(x.size()[-dims:]) != self.shape:
            raise ValueError(f"x: expected a shape that ends in {self.shape}, got {x.size()}")
        weight, bias = self.weight, self.bias
        if self.per_head:
            of_heads: Tensor = torch.ops.normkit.head_norm(
                x, weight, bias, self.eps, self.kind, *self.options
            )[0]
            return of_heads
        rows = x.flatten(-dims)
        if weight is not None:
            weight = weight.flatten()
        if bias is not None:
            bias = bias.flatten()
        if self.kind == "layer":
            y: Tensor = torch.ops.normkit.layer_norm(rows, weight, bias, self.eps, *self.options)[0]
        else:
            y = torch.ops.normkit.rms_norm(rows, weight, bias, self.eps, *self.options)[0]
        return y.view(x.size())
