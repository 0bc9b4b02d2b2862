"""Layers that leave residual + made, and the norm of it, to one pass of a kernel."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules import module as torch_module

from normkit._serving.checks import is_per_row
from normkit._serving.serve import PLAIN
from normkit.conversion._classes import PLAN, derived_class, is_ours
from normkit.conversion._plan import NotConvertible, Plan
from normkit.conversion._report import Layer
from normkit.conversion._rewriting import MODULATED, SUM_AND_NORM, NotRewritable, rewritten

_FUSED = "_normkit_fused"
_HOOKS_OF_ALL_MODULES = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)
_autocast_is_on = torch._C._is_any_autocast_enabled
_is_tracing = torch._C._is_tracing


# What the report says of a layer, and the class that it gets if sums in it are fused.
_Fused: TypeAlias = tuple[Layer, type[nn.Module] | None]


def fused_layers(
    model: nn.Module, converted: Collection[nn.Module]
) -> Iterator[tuple[nn.Module, _Fused]]:
    """Find the layers in which sums and norms become one, or may for all that is known.

    Args:
        model: any module.
        converted: its norms that are, or will be, converted.
    """
    known: dict[Hashable, _Fused] = {}
    for path, module in model.named_modules():
        own, members = type(module), module._modules.items()
        norms = frozenset(name for name, child in members if child in converted)
        if not norms or is_ours(module):
            continue
        if (own, norms) not in known:
            known[own, norms] = _fused_class(own, norms)
        layer, its_class = known[own, norms]
        replaced = vars(module).get("forward")
        if replaced is not None and getattr(replaced, "__func__", None) is not own.forward:
            layer, its_class = _not_fused(own, "forward is replaced on the instance"), None
        if layer.norms or layer.modulated or layer.reason:
            yield module, (replace(layer, path=path), its_class)


def _not_fused(own: type[nn.Module], reason: str = "") -> Layer:
    return Layer("", own.__name__, (), reason)


def _fused_class(own: type[nn.Module], norms: frozenset[str]) -> _Fused:
    try:
        if issubclass(own, torch.jit.ScriptModule):
            raise NotRewritable("is scripted")
        forward, fused = rewritten(own, norms)
        if not fused:
            return _not_fused(own), None
        # a class whose forward is replaced later gets another class here, too
        members = {
            "forward": forward,
            SUM_AND_NORM: staticmethod(sum_and_norm),
            MODULATED: staticmethod(modulated),
        }
        said = tuple(fused.sums), tuple(fused.modulated)
        made = derived_class(own, _FUSED, (*said, own.forward), lambda: members)
    except (NotConvertible, NotRewritable) as why:
        return _not_fused(own, str(why)), None
    return Layer("", own.__name__, said[0], modulated=said[1]), made


def sum_and_norm(residual: Any, x: Any, norm: Any, *modulation: Any) -> tuple[Any, Any]:
    """A sum and the norm of it, modulated or not, in one pass where that makes no difference."""
    if not _is_as_before() and _is_alike(residual, x) and _modulate_alike(x, modulation):
        plan = _plan_that_runs(norm)
        made = None if plan is None else plan.run(norm, x, residual, modulation)
        if made is not None:
            return made[1], made[0]
    total = residual + x
    return total, modulated(total, norm, *modulation) if modulation else norm(total)


def modulated(x: Any, norm: Any, scale: Any, shift: Any) -> Any:
    """norm(x) * (1 + scale) + shift, in one pass where that makes no difference."""
    if not _is_as_before() and type(x) in PLAIN and _modulate_alike(x, (scale, shift)):
        plan = _plan_that_runs(norm)
        made = None if plan is None else plan.run(norm, x, None, (scale, shift))
        if made is not None:
            return made
    return norm(x) * (1 + scale) + shift


def _is_as_before() -> bool:
    """Whether each operation has to be seen by itself."""
    # Inductor fuses them by itself; in a trace, sizes are no numbers
    return is_dynamo_compiling() or _is_tracing() or _autocast_is_on()


def _modulate_alike(x: Any, modulation: Collection[Any]) -> bool:
    """Whether a product and a sum have x's dtype and shape, and torch's way with them is known."""
    if not modulation:
        return True
    if torch.is_grad_enabled():  # theirs would be rounded elsewhere
        return False
    return all(
        type(t) in PLAIN
        and t.dtype is x.dtype
        and t.device == x.device
        and t.ndim in (1, x.ndim)  # which torch broadcasts as normkit does
        and is_per_row(t.shape, x.shape)
        for t in modulation
    )


def _is_alike(residual: Any, x: Any) -> bool:
    """Whether a sum has the dtype and shape of both, and no rule of a subclass."""
    return (
        type(x) in PLAIN
        and type(residual) in PLAIN
        and x.dtype is residual.dtype
        and x.shape == residual.shape
        and x.device == residual.device
    )


def _plan_that_runs(module: Any) -> Plan | None:
    """The plan of a converted module, if a call of it would be that plan and nothing else."""
    plan: Plan | None = vars(type(module)).get(PLAN)
    if plan is None:
        return None
    does_more = (
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl
        or any(_HOOKS_OF_ALL_MODULES)
    )
    return None if does_more else plan
