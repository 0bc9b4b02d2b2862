"""Norms of Hugging Face transformers, through its package `kernels`.

    import kernels
    from normkit.integrations import hf_kernels

    kernels.register_kernel_mapping(hf_kernels.mapping())
    model.set_use_kernels(True)

One name stands for layers that round in different places: of the classes that transformers calls
"RMSNorm" every tenth is not Llama's, and of those that it calls "RMSNormGated" four of nine round
once.  So what a layer computes is measured, by
`normkit.recognise`, when it is first called, and a call that is not known runs the layer's own
forward.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.compiler import assume_constant_result, is_dynamo_compiling

from normkit._spec import Activation, Kind
from normkit.functional import layer_norm, rms_norm
from normkit.fusions import gated_norm
from normkit.recognition import recognise

__all__ = [
    "GATED_NAMES",
    "GATED_NORM",
    "NAMES",
    "NORM",
    "GatedNorm",
    "Norm",
    "Repository",
    "mapping",
]

# What transformers calls the layers that are norms of rows and nothing else, and with a gate.
NAMES = ("RMSNorm", "RMSNormZeroCentered")
GATED_NAMES = ("RMSNormGated",)
# Compute capabilities; transformers registers its own for all of them, and the narrower range wins.
_CAPABILITIES = (75, 999)


class Plan(NamedTuple):
    """How a layer's calls with an x of one dtype, and a gate of one or none, are run."""

    kind: Kind
    weight: str | None
    bias: str | None
    eps: float | None
    weight_offset: float
    round_before_weight: bool
    round_rstd: bool
    round_weight: bool
    out_dtype: torch.dtype
    activation: Activation = "silu"
    norm_before_gate: bool = True
    round_each: bool = False


class Norm(nn.Module):
    """What `kernels` binds to a layer in the place of its forward: it has no state of its own."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Run the norm that this layer was measured to be, or the layer's own forward."""
        return _run(self, hidden_states)


class GatedNorm(nn.Module):
    """Likewise in the place of a forward that takes a gate."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        """Run the gated norm that this layer was measured to be, or the layer's own forward."""
        return _run_gated(self, hidden_states, gate)


@dataclass(frozen=True)
class Repository:
    """What a mapping of `kernels` points to: it gives the class of the layer, and no hub is asked.

    Example:
        >>> from normkit.integrations import hf_kernels
        >>> hf_kernels.NORM.load().__name__
        'Norm'
    """

    layer: type[nn.Module] = Norm

    @property
    def layer_name(self) -> str:
        """The name of the class."""
        return self.layer.__name__

    def load(self) -> type[nn.Module]:
        """Give the class."""
        return self.layer

    def __str__(self) -> str:
        return f"normkit (layer `{self.layer_name}`)"


NORM = Repository()
GATED_NORM = Repository(GatedNorm)


def mapping() -> dict[str, dict[Any, Repository]]:
    """Make what `kernels.register_kernel_mapping` and `kernels.use_kernel_mapping` take.

    Returns:
        `NORM` for each of `NAMES`, and `GATED_NORM` for each of `GATED_NAMES`, on the CPU and on
        CUDA, there for compute capability 7.5 and up, so that it wins over what transformers
        registers.

    Raises:
        ImportError: the package `kernels` is not installed.
    """
    from kernels import CUDAProperties, Device

    low, high = _CAPABILITIES
    cuda = Device(type="cuda", properties=CUDAProperties(min_capability=low, max_capability=high))
    named = dict.fromkeys(NAMES, NORM) | dict.fromkeys(GATED_NAMES, GATED_NORM)
    return {name: {"cpu": repository, cuda: repository} for name, repository in named.items()}


# ---------------------------------------------------------------- the layer

_PLANS = "_normkit_plans"  # an attribute of the layer, so that it goes where the layer goes


def _run(layer: nn.Module, x: Tensor) -> Tensor:
    plan = _plan_of(layer, x.dtype)
    if plan is None:
        return cast(Tensor, type(layer).forward(layer, x))
    return _norm(layer, plan, x)


def _run_gated(layer: nn.Module, x: Tensor, gate: Tensor | None) -> Tensor:
    fits = gate is None or gate.shape == x.shape  # one that broadcasts is the layer's business
    plan = _plan_of(layer, x.dtype, None if gate is None else gate.dtype) if fits else None
    if plan is None:
        return cast(Tensor, type(layer).forward(layer, x, gate))
    if gate is None:
        return _norm(layer, plan, x)
    return gated_norm(
        x,
        gate,
        *_parameters(layer, plan),
        plan.eps,
        kind=plan.kind,
        activation=plan.activation,
        norm_before_gate=plan.norm_before_gate,
        round_each=plan.round_each,
        weight_offset=plan.weight_offset,
        round_before_weight=plan.round_before_weight,
        round_rstd=plan.round_rstd,
        round_weight=plan.round_weight,
        out_dtype=plan.out_dtype,
    )


def _norm(layer: nn.Module, plan: Plan, x: Tensor) -> Tensor:
    norm = layer_norm if plan.kind == "layer" else rms_norm
    return norm(
        x,
        *_parameters(layer, plan),
        plan.eps,
        weight_offset=plan.weight_offset,
        round_before_weight=plan.round_before_weight,
        round_rstd=plan.round_rstd,
        round_weight=plan.round_weight,
        out_dtype=plan.out_dtype,
    )


def _parameters(layer: nn.Module, plan: Plan) -> tuple[Tensor | None, Tensor | None]:
    weight = None if plan.weight is None else getattr(layer, plan.weight)
    bias = None if plan.bias is None else getattr(layer, plan.bias)
    return weight, bias


def _plan_of(
    layer: nn.Module, dtype: torch.dtype, gate_dtype: torch.dtype | None = None
) -> Plan | None:
    """The plan for an x and a gate of these dtypes; measured again for a weight that was cast."""
    key = (dtype, getattr(getattr(layer, "weight", None), "dtype", None), gate_dtype)
    plans = getattr(layer, _PLANS, None)
    if plans is not None and key in plans:
        return cast("Plan | None", plans[key])
    if is_dynamo_compiling():
        return cast("Plan | None", _constant_plan(layer, dtype, gate_dtype))
    plan = _measured(layer, dtype, gate_dtype)
    if type(torch.empty(0)) is Tensor:  # of fake tensors nothing can be measured
        layer.__dict__.setdefault(_PLANS, {})[key] = plan
    return plan


def _measured(
    layer: nn.Module, dtype: torch.dtype, gate_dtype: torch.dtype | None = None
) -> Plan | None:
    bare = copy.copy(layer)
    for name in ("forward", _PLANS):  # what was bound to the layer, and is not of its class
        bare.__dict__.pop(name, None)
    found = recognise(bare)
    spec, function, form = found.specs.get(dtype), found.function, found.form
    if spec is None or function is None or function.is_l2:
        return None
    if form.groups > 1 or form.channels_first:
        return None
    round_each: bool | None = False
    if gate_dtype is not None:
        round_each = found.round_each.get((dtype, gate_dtype))
    elif form.gate and dtype not in found.gateless:
        round_each = None
    names = (function.weight, function.bias)
    if round_each is None or any(n is not None and getattr(layer, n).ndim != 1 for n in names):
        return None
    return Plan(
        spec.kind,
        *names,
        spec.eps,
        spec.weight_offset,
        spec.round_before_weight,
        spec.round_rstd,
        spec.round_weight,
        spec.out_dtype or dtype,
        form.activation,
        form.norm_before_gate,
        round_each,
    )


# While Dynamo traces, it is measured all the same, and the plan becomes part of the graph.
_constant_plan = assume_constant_result(_measured)  # type: ignore[no-untyped-call]
