"""What a converted module does with a call: normkit's kernels, or nothing it is sure of."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from normkit._serving import dispatch
from normkit._serving.backends import falls_back, quick, wanted_backend
from normkit._serving.refusal import Refusal
from normkit._serving.serve import PLAIN, serve
from normkit._spec import (
    ADD,
    BEHIND_GATING,
    FLOATS,
    LAYER,
    MODULATED,
    OF_SUM,
    PER_HEAD,
    Call,
    NormSpec,
    gated,
)
from normkit.recognition import Recognition, recognise
from normkit.recognition._result import Function, Layout
from normkit.recognition._screen import gate_of, parameters_of, row_shape, widths
from normkit.reference import is_transformed

# The dtypes of x and of the parameters, None where there are none.
Dtypes = tuple[torch.dtype, torch.dtype | None]


class NotConvertible(Exception):
    """Why a module is left as it is, and what it computes if that is known."""

    def __init__(self, reason: str, function: Function | None = None) -> None:
        super().__init__(reason)
        self.function = function


@dataclass(frozen=True)
class Plan:
    """How the calls of a module are run.

    Attributes:
        specs: what the norm computes, for each pair of dtypes that is known.
        weight: name of the parameter that multiplies, or None.
        bias: name of the parameter that is added, or None.
        shape: that of the parameters; None where there are none.
        width: the last size of x, where no parameter says it and the module takes no other.
        heads: whether parameters have a row for each head.
        is_l2: whether the statistic is the sum of squares.
        layout: as in `Recognition`.
        groups: parts of a row, each with a statistic of its own.
        gate: the name of the argument that is a gate, or None.
        gating: with a gate, the bits of such a call.
        round_each: as in `Recognition`, by the dtypes of x, of the parameters and of the gate.
        gateless: the dtypes for which it is the norm alone where the gate is None.
        channels_first: whether x is an image (batch, n, height, width).
    """

    specs: Mapping[Dtypes, NormSpec]
    weight: str | None
    bias: str | None
    shape: torch.Size | None
    width: int | None
    heads: bool
    is_l2: bool
    layout: Layout
    groups: int = 1
    gate: str | None = None
    gating: int = 0
    round_each: Mapping[tuple[torch.dtype, torch.dtype | None, torch.dtype], bool] = field(
        default_factory=dict
    )
    gateless: Collection[Dtypes] = ()
    channels_first: bool = False

    def run(
        self,
        module: nn.Module,
        x: Tensor,
        residual: Tensor | None = None,
        modulation: Sequence[Tensor] = (),
        z: Any = None,
    ) -> Any:
        """Give y, or None where the module's own forward has to run.

        With a residual, which is like x: y of residual + x, and that sum; with a scale and shift of
        x's dtype, modulated by them; None where they have to be apart.  z is what a module with a
        gate was given for it.
        """
        if type(x) not in PLAIN or x.layout is not torch.strided:
            return None
        weight = bias = dtype = None
        if self.weight is not None:
            weight = tensor_of(module, self.weight)
            if not self._is_expected(weight):
                return None
            dtype = weight.dtype
        if self.bias is not None:
            bias = tensor_of(module, self.bias)
            if not self._is_expected(bias) or bias.dtype is not (dtype or bias.dtype):
                return None
            dtype = bias.dtype
        spec = self.specs.get((x.dtype, dtype))
        if self.channels_first and spec is not None:
            is_alone = residual is None and not modulation and x.ndim == 4
            return self._of_channels(x, weight, bias, spec) if is_alone else None
        if spec is None or (self.width is not None and x.shape[-1:] != (self.width,)):
            return None
        if modulation and (self.heads or spec.out_dtype not in (None, x.dtype)):
            return None
        if self.is_l2 and (modulation or residual is not None):
            return None
        if self.groups > 1 and (residual is not None or modulation or not self._is_of_parts(x)):
            return None
        each = False if self.gate is None else self._rounds_each(x, z, dtype)
        if each is None:
            return None
        if residual is not None or modulation:
            if not x.is_contiguous() or not (residual is None or residual.is_contiguous()):
                return None
            fused = (None, *modulation, True, None) if modulation else ()
            return self._norm(x, weight, bias, spec, residual, fused)
        order = None
        if not x.is_contiguous():
            if self.layout == "packed":
                x = x if x.stride(-1) == 1 else x.contiguous()
            else:
                order = self._order(x)
                if order is None:
                    return None
                x = x.permute(order)
        if z is None:
            y = self._norm(x, weight, bias, spec)
        else:
            z = z if order is None else z.permute(order)
            if not _lies_in_order(z):
                return None
            y = self._norm(x, weight, bias, spec, None, (None, None, None, each, z))
        if y is None or order is None:
            return y
        return y.permute([order.index(d) for d in range(x.ndim)])

    def _of_channels(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, spec: NormSpec
    ) -> Any:
        """Give y for an image, which the kernels read as it lies, and write where y lies so."""
        if self.width is not None and x.shape[1] != self.width:
            return None
        rows, out = x.permute(0, 2, 3, 1), None
        stays_first = self.layout == "as x" and x.is_contiguous()
        if stays_first and not _needs_gradient(x, weight, bias):
            out = torch.empty_like(x, dtype=spec.out_dtype).permute(0, 2, 3, 1)
        elif self.layout == "as x" and not (
            stays_first or x.is_contiguous(memory_format=torch.channels_last)
        ):
            return None
        made = self._norm(rows, weight, bias, spec, out=out)
        if made is None:
            return None
        y = made.permute(0, 3, 1, 2)
        return y.contiguous() if stays_first else y

    def _is_expected(self, parameter: Tensor | None) -> TypeGuard[Tensor]:
        return type(parameter) in PLAIN and cast(Tensor, parameter).shape == self.shape

    def _is_of_parts(self, x: Tensor) -> bool:
        return x.ndim > 0 and x.shape[-1] % self.groups == 0

    def _rounds_each(self, x: Tensor, z: Any, dtype: torch.dtype | None) -> bool | None:
        """Whether the norm is rounded before this gate; None where nothing is known of it."""
        if z is None:
            return False if (x.dtype, dtype) in self.gateless else None
        if type(z) not in PLAIN or z.layout is not torch.strided or z.shape != x.shape:
            return None
        return self.round_each.get((x.dtype, dtype, z.dtype))

    def _order(self, x: Tensor) -> list[int] | None:
        """The dimensions of x as they lie in memory, in which y lies too."""
        *outer, last = x.stride()
        if self.layout != "as x" or last != 1 or 0 in outer:
            return None
        order = sorted(range(x.ndim - 1), key=lambda dim: -outer[dim])
        if self.heads and order[-1] != x.ndim - 2:
            return None
        return [*order, x.ndim - 1]

    def _norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        spec: NormSpec,
        residual: Tensor | None = None,
        fused: Sequence[Any] = (),
        out: Tensor | None = None,
    ) -> Any:
        """Run the call, with FUSED arguments or none."""
        if self.shape is not None and len(self.shape) != 1 + self.heads:  # (1, n), (n, 1, 1)
            shape = row_shape(weight if weight is not None else cast(Tensor, bias))
            weight, bias = (None if t is None else t.reshape(shape) for t in (weight, bias))
        if self.groups > 1:
            x, weight, bias, *fused = map(self._in_parts, (x, weight, bias, *fused))
        kind = PER_HEAD * (self.heads or self.groups > 1) | LAYER * (spec.kind == "layer")
        if self.is_l2:
            kind = OF_SUM
        if fused:
            kind |= MODULATED if fused[-1] is None else self.gating
        call = (
            kind | ADD * (residual is not None), x, residual, weight, bias, spec.eps,
            spec.weight_offset, spec.round_before_weight, True, False, spec.round_rstd,
            spec.round_weight, spec.out_dtype, out, None, False,
        )  # fmt: skip
        y: Any = quick(*call, *fused, *BEHIND_GATING) if fused else quick(*call)
        if y is None:
            y = _slowly(Call(*call, False, *fused))
        return y.flatten(-2) if y is not None and self.groups > 1 else y

    def _in_parts(self, t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return t.view(*t.shape[:-1], self.groups, t.shape[-1] // self.groups)


def _lies_in_order(z: Tensor) -> bool:
    """Whether a product with a contiguous tensor is contiguous, whichever comes first."""
    strides = [stride for size, stride in zip(z.shape, z.stride(), strict=True) if size != 1]
    return strides == sorted(strides, reverse=True) and strides[-1:] in ([], [1])


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    """A parameter, or what stands in its place: parametrised, sharded or replicated."""
    try:  # the attribute takes ten times as long
        return module._parameters[name]
    except KeyError:
        return getattr(module, name, None)


def _slowly(call: Call) -> object:
    """Run what the quick path left: gradients, and a backend asked for by name.

    Where no kernel would run, the module's own forward is the better plain torch.
    """
    if is_transformed() or torch._C._len_torch_dispatch_stack() > 0:
        return None
    if falls_back(wanted_backend()) and not _has_kernel(call):
        return None
    return serve(call)


def _has_kernel(call: Call) -> bool:
    plan = dispatch.native_for(call.x, wanted_backend()).plan
    with torch.no_grad():
        return not isinstance(plan(*call.native()), Refusal)


# ------------------------------------------------------------------------------------------ making


def plan_of(module: nn.Module) -> tuple[Plan, Recognition]:
    """Measure a module, and plan its calls, also those after `.to(dtype)` and `.train()`.

    It is one that `refusal` does not refuse.

    Raises:
        NotConvertible: it is none of normkit's norms; the reason is the message.
    """
    # as it is trained: a norm that drops elements then is none
    found = recognise(_as_it_may_become(module))
    _check(found, module)
    parameters = parameters_of(module).values()
    own = own_dtype(module)
    specs: dict[Dtypes, NormSpec] = {(dtype, own): spec for dtype, spec in found.specs.items()}
    round_each = {(dtype, own, z): each for (dtype, z), each in found.round_each.items()}
    gateless = {(dtype, own) for dtype in found.gateless}
    for other in FLOATS if own is not None else ():
        cast_to = found if other == own else recognise(_as_it_may_become(module, other))
        if not cast_to.reason and _is_alike(cast_to, found):
            specs |= {(dtype, other): spec for dtype, spec in cast_to.specs.items()}
            round_each |= {(d, other, z): each for (d, z), each in cast_to.round_each.items()}
            gateless |= {(dtype, other) for dtype in cast_to.gateless}
    form = found.form
    function = cast(Function, found.function)
    width = widths(module)
    plan = Plan(
        specs=specs,
        weight=function.weight,
        bias=function.bias,
        shape=next((p.shape for p in parameters), None),
        width=width[0] if own is None and len(width) == 1 else None,
        heads=form.heads > 0,
        is_l2=function.is_l2,
        layout=found.layout,
        groups=form.groups,
        gate=gate_of(module) if form.gate else None,
        gating=gated("rms", form.activation, form.norm_before_gate) if form.gate else 0,
        round_each=round_each,
        gateless=frozenset(gateless),
        channels_first=form.channels_first,
    )
    return plan, found


def own_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of the first parameter; None where there is none."""
    return next((p.dtype for p in parameters_of(module).values()), None)


def _check(found: Recognition, module: nn.Module) -> None:
    form = found.form
    reasons: tuple[tuple[bool, str], ...] = (
        (bool(found.reason), found.reason),
        (form.channels_first and (form.groups > 1 or form.heads > 0 or form.gate != ""),
         "more than a norm of the channels of an image"),
        (form.groups > 1 and form.heads > 0, "a statistic for each of several parts of a head"),
        (found.writes_x, "writes into x"),
        (found.layout == "", "y does not lie in memory as x does"),
        (len({(p.dtype, p.shape) for p in parameters_of(module).values()}) > 1,
         "weight and bias are of different dtypes or shapes"),
    )  # fmt: skip
    for is_so, reason in reasons:
        if is_so:
            raise NotConvertible(reason, found.function)


def _is_alike(found: Recognition, other: Recognition) -> bool:
    """Whether they differ in nothing but where they round."""
    mine = (found.function, found.form, found.layout, found.writes_x)
    return mine == (other.function, other.form, other.layout, other.writes_x)


def _as_it_may_become(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A shallow copy in training, perhaps with parameters of another dtype, without elements."""
    try:
        other = copy.copy(module)
    except Exception as error:  # whatever a module's own code raises
        raise NotConvertible(f"cannot be copied: {type(error).__name__}") from error
    other.training = True
    if dtype is not None:
        other._parameters = {
            name: p if p is None else nn.Parameter(torch.empty_like(p, dtype=dtype, device="meta"))
            for name, p in module._parameters.items()
        }
    return other
