"""Norms of Hugging Face transformers, through its package `kernels`.

    import kernels
    from normkit.integrations import hf_kernels

    kernels.register_kernel_mapping(hf_kernels.mapping())
    model.set_use_kernels(True)

One name stands for layers that round in different places: of the classes that transformers calls
"RMSNorm" every tenth is not Llama's.  So what a layer computes is measured, by
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

from normkit._spec import Kind
from normkit.functional import layer_norm, rms_norm
from normkit.recognition import recognise

__all__ = ["NAMES", "NORM", "Norm", "Repository", "mapping"]

# What transformers calls the layers that are norms of rows and nothing else.
NAMES = ("RMSNorm", "RMSNormZeroCentered")
# Compute capabilities; transformers registers its own for all of them, and the narrower range wins.
_CAPABILITIES = (75, 999)


class Plan(NamedTuple):
    """How a layer's calls with an x of one dtype are run."""

    kind: Kind
    weight: str | None
    bias: str | None
    eps: float | None
    weight_offset: float
    round_before_weight: bool
    round_rstd: bool
    round_weight: bool
    out_dtype: torch.dtype


class Norm(nn.Module):
    """What `kernels` binds to a layer in the place of its forward: it has no state of its own."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Run the norm that this layer was measured to be, or the layer's own forward."""
        return _run(self, hidden_states)


@dataclass(frozen=True)
class Repository:
    """What a mapping of `kernels` points to: it gives the class of the layer, and no hub is asked.

    Example:
        >>> from normkit.integrations import hf_kernels
        >>> hf_kernels.NORM.load().__name__
        'Norm'
    """

    layer_name: str = Norm.__name__

    def load(self) -> type[nn.Module]:
        """Give the class."""
        return Norm

    def __str__(self) -> str:
        return f"normkit (layer `{self.layer_name}`)"


NORM = Repository()


def mapping() -> dict[str, dict[Any, Repository]]:
    """Make what `kernels.register_kernel_mapping` and `kernels.use_kernel_mapping` take.

    Returns:
        `NORM` for each of `NAMES` on the CPU and on CUDA, there for compute capability 7.5 and up,
        so that it wins over what transformers registers.

    Raises:
        ImportError: the package `kernels` is not installed.
    """
    from kernels import CUDAProperties, Device

    low, high = _CAPABILITIES
    cuda = Device(type="cuda", properties=CUDAProperties(min_capability=low, max_capability=high))
    return {name: {"cpu": NORM, cuda: NORM} for name in NAMES}


# ---------------------------------------------------------------- the layer

_PLANS = "_normkit_plans"  # an attribute of the layer, so that it goes where the layer goes


def _run(layer: nn.Module, x: Tensor) -> Tensor:
    plan = _plan_of(layer, x.dtype, getattr(getattr(layer, "weight", None), "dtype", None))
    if plan is None:
        return cast(Tensor, type(layer).forward(layer, x))
    norm = layer_norm if plan.kind == "layer" else rms_norm
    return norm(
        x,
        None if plan.weight is None else getattr(layer, plan.weight),
        None if plan.bias is None else getattr(layer, plan.bias),
        plan.eps,
        weight_offset=plan.weight_offset,
        round_before_weight=plan.round_before_weight,
        round_rstd=plan.round_rstd,
        round_weight=plan.round_weight,
        out_dtype=plan.out_dtype,
    )


def _plan_of(layer: nn.Module, dtype: torch.dtype, weight_dtype: torch.dtype | None) -> Plan | None:
    """The plan for an x of a dtype; measured again for a weight that has been cast."""
    plans = getattr(layer, _PLANS, None)
    if plans is not None and (dtype, weight_dtype) in plans:
        return cast("Plan | None", plans[dtype, weight_dtype])
    if is_dynamo_compiling():
        return cast("Plan | None", _constant_plan(layer, dtype))
    plan = _measured(layer, dtype)
    if type(torch.empty(0)) is Tensor:  # of fake tensors nothing can be measured
        layer.__dict__.setdefault(_PLANS, {})[dtype, weight_dtype] = plan
    return plan


def _measured(layer: nn.Module, dtype: torch.dtype) -> Plan | None:
    bare = copy.copy(layer)
    for name in ("forward", _PLANS):  # what was bound to the layer, and is not of its class
        bare.__dict__.pop(name, None)
    found = recognise(bare)
    spec, function = found.specs.get(dtype), found.function
    if spec is None or function is None or function.is_l2 or not found.form.is_a_row:
        return None
    names = (function.weight, function.bias)
    if any(name is not None and getattr(layer, name).ndim != 1 for name in names):
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
    )


# While Dynamo traces, it is measured all the same, and the plan becomes part of the graph.
_constant_plan = assume_constant_result(_measured)  # type: ignore[no-untyped-call]
