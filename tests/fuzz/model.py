"""What a call is: one norm or several, and how it is called."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from normkit._spec import FIELDS, NEXT, Op

TENSORS = tuple(name for name, field in FIELDS.items() if field.type.startswith("Tensor"))
OUTPUTS = ("out", "residual_out")
INDICES = ("positions",)
INPUTS = tuple(name for name in TENSORS if name not in (*OUTPUTS, *INDICES))
AFFINE = ("weight", "bias", *NEXT)
NUMBERS = tuple(name for name, field in FIELDS.items() if field.type.startswith("float"))
FLAGS = tuple(name for name, field in FIELDS.items() if field.type == "bool")


@dataclass
class Norm:
    """One norm, as its arguments ask for it; whatever they are."""

    op: Op
    layer: bool
    in_place: bool
    x: Any
    residual: Any = None
    weight: Any = None
    bias: Any = None
    out: Any = None
    residual_out: Any = None
    gate: Any = None
    scale: Any = None
    shift: Any = None
    z: Any = None
    next_weight: Any = None
    next_bias: Any = None
    cos: Any = None
    sin: Any = None
    positions: Any = None
    eps: Any = 1e-6
    next_eps: Any = None
    alpha: Any = 1.0
    beta: Any = 1.0
    weight_offset: Any = 0.0
    round_before_weight: Any = False
    round_sum: Any = True
    clamp_inf: Any = False
    round_rstd: Any = False
    round_weight: Any = False
    round_each: Any = False
    round_norm: Any = False
    memory_efficient: Any = False
    eps_outside: Any = False
    interleaved: Any = False
    norm_before_gate: Any = True
    activation: Any = "silu"
    group_size: Any = None
    out_dtype: Any = None
    ending: tuple[int, ...] | None = None  # of a module: the shape that x ends in
    # What errors call the arguments; a list of these has xs[1] for x.
    names: dict[str, str] = field(default_factory=dict)

    @property
    def per_head(self) -> bool:
        """Whether x has to have heads."""
        return self.op.per_head and not self.op.gated

    @property
    def returns_both(self) -> bool:
        return self.op.adds

    @property
    def is_sum(self) -> bool:
        """Whether y is a sum, of residual's dtype."""
        return self.op.post and not self.op.adds

    @property
    def needed(self) -> tuple[str, ...]:
        """The tensors without which there is no call."""
        op = self.op
        residual, table = ("residual",) * (op.adds or op.post), ("cos", "sin") * op.rotated
        return ("x", *residual, *("z",) * op.gated, *table)

    @property
    def y_dtype(self) -> torch.dtype:
        """What y is made in."""
        made: torch.dtype = self.residual.dtype if self.is_sum else self.out_dtype or self.x.dtype
        return made

    @cached_property
    def given(self) -> dict[str, Any]:
        """The arguments that are tensors, or should be."""
        values = {name: getattr(self, name) for name in TENSORS}
        return {name: t for name, t in values.items() if t is not None or name in self.needed}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.given.items() if isinstance(t, Tensor)}

    @cached_property
    def written(self) -> dict[str, Tensor]:
        """What the call writes, by the names that its function has for it."""
        names = tuple(self.op.written.values()) if self.in_place else OUTPUTS
        return {name: t for name, t in self.tensors.items() if name in names}

    @property
    def sum_out(self) -> str:
        """What the call's function calls the tensor where the sum goes."""
        return "residual" if self.in_place else "residual_out"

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
