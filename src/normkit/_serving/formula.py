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


_option_values = attrgetter(*OPTIONS)
# The options that change rstd or mean.
OF_STATISTICS = ("round_sum", "clamp_inf", "round_rstd")
# And those that kernels of gradients have to know.
OF_BACKWARD = ("weight_offset", "round_before_weight", "clamp_inf", "round_weight")
_of_backward = itemgetter(*(OPTIONS.index(name) for name in OF_BACKWARD))


@dataclass
class Formula:
    """What is differentiated: a norm of x or, with a residual, of x + residual in float32.

    No NamedTuple, for the reason that `Call` is none.
    """

    layer: bool
    per_head: bool
    from_output: bool  # x is the output, of which xhat is made again
    eps: float | None
    given: tuple[object, ...]  # the values of OPTIONS; named only where a gradient is made
    of_sum: bool = False
    eps_outside: bool = False

    @classmethod
    def of(cls, call: Call) -> Formula:
        """That of a call."""
        layer, per_head = call.kind & LAYER != 0, call.kind & PER_HEAD != 0
        from_output = call.memory_efficient and call.keeps_output
        of_sum, eps_outside = call.kind & OF_SUM != 0, call.kind & EPS_OUTSIDE != 0
        options = _option_values(call)
        return cls(layer, per_head, from_output, call.eps, options, of_sum, eps_outside)

    @classmethod
    def of_values(cls, values: Sequence[Any]) -> Formula:
        """That of which `values` are."""
        layer, per_head, from_output, eps, *options, of_sum, eps_outside = values
        return cls(layer, per_head, from_output, eps, tuple(options), of_sum, eps_outside)

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
        options: Any = dict(zip(OPTIONS, self.given, strict=True))  # no cast, as in Call.named
        named: Options = options
        return named

    def values(self) -> tuple[object, ...]:
        """All of it, one after the other, as operators take it."""
        norm = self.layer, self.per_head, self.from_output, self.eps
        return *norm, *self.given, self.of_sum, self.eps_outside

    @property
    def statistic(self) -> Statistic:
        """The norm in words."""
        return statistic_of(self.layer, self.of_sum)

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
