"""What of a call its gradients depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from normkit import reference
from normkit._spec import (
    EPS_OUTSIDE,
    FROM_OUTPUT,
    LAYER,
    OF_SUM,
    OPTIONS,
    PER_HEAD,
    Call,
    Options,
    Statistic,
    statistic_of,
)

if TYPE_CHECKING:
    from typing import Protocol

    class Context(Protocol):
        """What autograd keeps of a call of a fused norm."""

        saved_tensors: Any
        backend: str
        options: Any  # what the fusion keeps beside the tensors

        def save_for_backward(self, *tensors: Tensor | None) -> None: ...


# The options that change rstd or mean.
OF_STATISTICS = ("round_sum", "clamp_inf", "round_rstd")
# And those that kernels of gradients have to know.
OF_BACKWARD = ("weight_offset", "round_before_weight", "clamp_inf", "round_weight")
_of_backward = itemgetter(*(OPTIONS.index(name) for name in OF_BACKWARD))

# What of a call decides its formula: what `_C.try_norm` hands to `_C.set_differentiate`'s function.
_OF_CALL = ("kind", "eps", *OPTIONS, "memory_efficient")
values_of = attrgetter(*_OF_CALL)
_BEFORE_WEIGHT, _SUM, _CLAMP = (
    _OF_CALL.index(name) for name in ("round_before_weight", "round_sum", "clamp_inf")
)


def keeps_output(values: tuple[Any, ...]) -> bool:
    """Whether y is kept for the gradients, and what was normalised made of it again."""
    return values[-1] and not values[_BEFORE_WEIGHT] and not values[_CLAMP]


def normalises_sum(values: tuple[Any, ...]) -> bool:
    """Whether what is normalised is residual_out."""
    return values[_SUM] and not values[_CLAMP]


@dataclass
class Formula:
    """What is differentiated: a norm of x or, with a residual, of x + residual in float32."""

    kind: int  # a call's
    eps: float | None
    given: tuple[Any, ...]  # the values of OPTIONS; named only where a gradient is made
    from_output: bool = False  # x is the output, of which xhat is made again

    @classmethod
    def of_call(cls, values: tuple[Any, ...]) -> Formula:
        """That of a call which has these `values_of` it."""
        return cls(values[0], values[1], values[2:-1], keeps_output(values))

    @classmethod
    def of(cls, call: Call) -> Formula:
        """That of a call."""
        return cls.of_call(values_of(call))

    @classmethod
    def of_values(cls, values: Sequence[Any]) -> Formula:
        """That of which `values` are."""
        layer, per_head, from_output, eps, *options, of_sum, eps_outside = values
        kind = layer * LAYER | per_head * PER_HEAD | of_sum * OF_SUM | eps_outside * EPS_OUTSIDE
        return cls(kind, eps, tuple(options), from_output)

    @property
    def layer(self) -> bool:
        """Whether the mean is subtracted."""
        return self.kind & LAYER != 0

    @property
    def eps_outside(self) -> bool:
        """Whether eps bounds the root of the statistic."""
        return self.kind & EPS_OUTSIDE != 0

    @property
    def of_gradients(self) -> int:
        """The kind that kernels of gradients are told."""
        return self.kind & (LAYER | PER_HEAD | OF_SUM) | self.from_output * FROM_OUTPUT

    def of_backward(self) -> tuple[Any, ...]:
        """The values of OF_BACKWARD, quicker than by name."""
        values: tuple[Any, ...] = _of_backward(self.given)
        return values

    def without_offset(self) -> Formula:
        """That of a weight which has been added its offset."""
        values = {**self.options, "weight_offset": 0.0}
        return replace(self, given=tuple(values[name] for name in OPTIONS))

    @property
    def options(self) -> Options:
        """All of OPTIONS, by name."""
        named: Any = dict(zip(OPTIONS, self.given, strict=True))
        options: Options = named
        return options

    def values(self) -> tuple[object, ...]:
        """All of it, one after the other, as operators take it."""
        per_head, of_sum = self.kind & PER_HEAD != 0, self.kind & OF_SUM != 0
        norm = self.layer, per_head, self.from_output, self.eps
        return *norm, *self.given, of_sum, self.eps_outside

    @property
    def statistic(self) -> Statistic:
        """The norm in words."""
        return statistic_of(self.layer, self.kind & OF_SUM != 0)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rstd and mean of x by itself, by operations that torch can differentiate."""
        given = self.options
        return reference.statistics(
            x,
            None,
            self.eps,
            kind=self.statistic,
            clamp_inf=given["clamp_inf"],
            round_rstd=given["round_rstd"],
        )

    def norm_again(
        self,
        source: Tensor,
        rstd: Tensor,
        mean: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        normalised: torch.dtype,
        rounds: bool,
    ) -> Tensor:
        """The norm of `source`, which was of dtype `normalised`; rounds: to that."""
        given = self.options
        return reference.from_statistics(
            source,
            rstd,
            mean,
            weight,
            bias,
            weight_offset=given["weight_offset"],
            round_weight=given["round_weight"],
            clamp_inf=given["clamp_inf"],
            xhat_dtype=normalised if given["round_before_weight"] else None,
            dtype=normalised if rounds else None,
        )
