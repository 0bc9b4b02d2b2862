"""What `recognise` says of a module."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from normkit._spec import Activation, NormSpec

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

Layout = Literal["as x", "packed", ""]
Dtypes = tuple[torch.dtype, torch.dtype]  # of x and of a gate


@dataclass(frozen=True)
class Form:
    """How rows lie in a module's x, and what else it takes.

    Attributes:
        heads: rows of weights, for x (..., heads, n); 0 where weights have one row.
        groups: parts of a row, each with a statistic of its own.
        channels_first: whether x is (batch, n, ...).
        gate: "", or where a gate multiplies and through what: "before-silu", "after-silu",
            "after-sigmoid".
    """

    heads: int = 0
    groups: int = 1
    channels_first: bool = False
    gate: str = ""

    @property
    def activation(self) -> Activation:
        """Of the gate."""
        return "sigmoid" if self.gate.endswith("sigmoid") else "silu"

    @property
    def norm_before_gate(self) -> bool:
        """Whether the gate multiplies the norm, and not what is normalised."""
        return self.gate.startswith("after")


@dataclass(frozen=True)
class Function:
    """A norm by what it computes in float32.

    Attributes:
        spec: its options.
        weight: name of the parameter that multiplies, or None.
        bias: name of the parameter that is added, or None.
        is_l2: the statistic is the sum of squares, not their mean, and eps is added to it: an
            rms_norm with a weight of n**-0.5 and an eps of eps / n.
    """

    spec: NormSpec
    weight: str | None
    bias: str | None
    is_l2: bool = False


@dataclass(frozen=True)
class Recognition:
    """What a module computes, measured by `recognise`.

    Attributes:
        specs: for each dtype of x in which it is known, what the norm computes.
        equal_shares: for these dtypes, the share of elements with the bits of normkit's.
        reasons: for the other dtypes, why it is not known.
        reason: why the module is no norm that normkit computes in its own dtype; "" if it is.
        function: the norm by what it computes in float32, whether or not its rounding in 16 bits
            is known, and the names of its parameters; None for no norm.
        form: how rows lie in x.
        layout: how y lies in memory where the outer dimensions of x do not lie in order: "as x",
            "packed", or "" for neither or not known.  Of channels-first images, "packed" is
            channels-last for every x, and "as x" holds for contiguous and for channels-last ones.
        writes_x: whether a call changes its x.
        round_each: of a norm with a gate, for the dtypes of x and of the gate in which it is known,
            whether the norm is rounded to x's dtype before the gate multiplies it; the rounding of
            `gated_norm`.
        gateless: the dtypes of x for which it is the norm alone when the gate is None.
    """

    specs: Mapping[torch.dtype, NormSpec] = field(default_factory=dict)
    equal_shares: Mapping[torch.dtype, float] = field(default_factory=dict)
    reasons: Mapping[torch.dtype, str] = field(default_factory=dict)
    reason: str = ""
    function: Function | None = None
    form: Form = Form()
    layout: Layout = ""
    writes_x: bool = False
    round_each: Mapping[Dtypes, bool] = field(default_factory=dict)
    gateless: Collection[torch.dtype] = ()

    def computes_as(self, other: Recognition) -> bool:
        """Whether both say the same of the module, whatever the shares that showed it."""
        mine, others = (
            (one.specs, one.function, one.reason, one.form, one.round_each, one.gateless)
            for one in (self, other)
        )
        return mine == others
