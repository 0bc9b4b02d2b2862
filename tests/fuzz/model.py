"""What a call is: one norm or several, and how it is called."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

TENSORS = ("x", "residual", "weight", "bias", "out", "residual_out")
INPUTS = TENSORS[:4]
FLAGS = ("round_before_weight", "round_sum", "clamp_inf", "round_rstd", "memory_efficient")


@dataclass
class Norm:
    """One norm, as its arguments ask for it; whatever they are."""

    layer: bool
    per_head: bool
    adds: bool
    in_place: bool
    x: Any
    residual: Any = None
    weight: Any = None
    bias: Any = None
    out: Any = None
    residual_out: Any = None
    eps: Any = 1e-6
    weight_offset: Any = 0.0
    round_before_weight: Any = False
    round_sum: Any = True
    clamp_inf: Any = False
    round_rstd: Any = False
    memory_efficient: Any = False
    out_dtype: Any = None
    ending: tuple[int, ...] | None = None  # of a module: the shape that x ends in
    # What errors call the arguments; a list of these has xs[1] for x.
    names: dict[str, str] = field(default_factory=dict)

    @cached_property
    def given(self) -> dict[str, Any]:
        """The arguments that are tensors, or should be."""
        needed = ("x", "residual") if self.adds else ("x",)
        values = {name: getattr(self, name) for name in TENSORS}
        return {name: t for name, t in values.items() if t is not None or name in needed}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.given.items() if isinstance(t, Tensor)}

    @cached_property
    def written(self) -> dict[str, Tensor]:
        """What the call writes, by the names that its function has for it."""
        if self.in_place:
            names: tuple[str, ...] = ("x", "residual") if self.adds else ("x",)
        else:
            names = ("out", "residual_out")
        return {name: t for name, t in self.tensors.items() if name in names}

    def name(self, argument: str) -> str:
        return self.names.get(argument, argument)


@dataclass
class Call:
    """A call of something public."""

    form: str  # "function", "module", "parallel" or "operator"
    name: str
    norms: list[Norm]
    arguments: dict[str, Any]  # of the function, of the operator, or of a module's forward
    positional: int = 0  # how many of them are passed without their names
    explains: bool = False
    backend: str | None = None
    mode: str = "grad"  # or "no_grad", "inference"
    module: dict[str, Any] = field(default_factory=dict)
    wrong: list[tuple[str, tuple[type[Exception], ...]]] = field(default_factory=list)
    # Gradients that come back to y and residual_out; None where no backward pass is run.
    grads: dict[str, Tensor] | None = None

    def tensors(self) -> dict[str, Tensor]:
        return {norm.name(name): t for norm in self.norms for name, t in norm.tensors.items()}

    def written(self) -> dict[str, Tensor]:
        """What a call writes that is accepted."""
        if self.explains:
            return {}
        return {norm.name(name): t for norm in self.norms for name, t in norm.written.items()}

    def grad_enabled(self) -> bool:
        return self.mode == "grad"


def is_dense(t: Any) -> bool:
    """Whether a tensor is one of strides and memory."""
    return isinstance(t, Tensor) and t.layout == torch.strided and not t.is_nested


def has_memory(t: Tensor) -> bool:
    return is_dense(t) and not t.is_meta and (t.numel() == 0 or t.data_ptr() != 0)
