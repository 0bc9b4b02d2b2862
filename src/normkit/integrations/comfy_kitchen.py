"""Norms of comfy-kitchen, the kernels of ComfyUI, as a backend of its registry.

    from normkit.integrations import comfy_kitchen

    comfy_kitchen.register()

From then on `comfy_kitchen.adaln` and `comfy_kitchen.rms_adaln` run normkit's modulated norms; all
that normkit does not have, and what the registry's rules do not let through, goes on to the other
backends.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from normkit import backends, modulated_norm
from normkit._spec import FLOATS, Kind

__all__ = ["NAME", "adaln", "register", "rms_adaln", "unregister"]

NAME = "normkit"  # of the backend


def adaln(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """`layer_norm(x) * (1 + scale) + shift`, in float32 and rounded once, to x's dtype.

    Args:
        x: (..., n).
        scale: what torch broadcasts to x's shape, in any of the three dtypes.
        shift: likewise.
        eps: added to the variance.
    """
    return _modulated(x, scale, shift, eps, "layer")


def rms_adaln(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    """`rms_norm(x) * (1 + scale) + shift`; as `adaln`."""
    return _modulated(x, scale, shift, eps, "rms")


def _modulated(x: Tensor, scale: Tensor, shift: Tensor, eps: float, kind: Kind) -> Tensor:
    # The registry calls this below autograd, where nothing is recorded.
    with torch.no_grad():
        return modulated_norm(x, _rows_for(x, scale), _rows_for(x, shift), eps=eps, kind=kind)


def _rows_for(x: Tensor, t: Tensor) -> Tensor:
    """A tensor with x's dimensions, or ones in their place, as torch broadcasts it."""
    if t.ndim == 0 or t.shape[-1] == 1:
        t = t.expand(*t.shape[:-1], x.shape[-1])
    return t[(None,) * (x.ndim - t.ndim)] if t.ndim < x.ndim else t


def register() -> None:
    """Have comfy-kitchen ask normkit first, for x on devices that normkit has kernels for.

    A second call does nothing new.  A priority that is set after it replaces the one set here.

    Raises:
        ImportError: comfy-kitchen is not installed.
        RuntimeError: normkit has kernels for no device here.
    """
    from comfy_kitchen.constraints import FunctionConstraints, MinDims, ParamConstraint
    from comfy_kitchen.registry import registry

    there = backends()
    devices = frozenset(name for name in ("cpu", "cuda") if there[name].usable)
    if not devices:
        reasons = "; ".join(f"{name}: {there[name].reason}" for name in ("cpu", "cuda"))
        raise RuntimeError(f"comfy_kitchen: expected kernels for a device, got none: {reasons}")
    floats = frozenset(FLOATS)
    constraints = FunctionConstraints(
        params={
            "x": ParamConstraint(dtypes=floats, shape_rules=(MinDims(1),)),
            "scale": ParamConstraint(dtypes=floats),
            "shift": ParamConstraint(dtypes=floats),
        },
        default_devices=devices,
    )
    functions = dict.fromkeys(("adaln", "rms_adaln"), constraints)
    registry.register(NAME, sys.modules[__name__], functions)
    registry.enable(NAME)
    registry.set_priority([NAME, *_others(registry)])


def unregister() -> None:
    """Have comfy-kitchen ask its own backends alone; without a `register` before, do nothing.

    Raises:
        ImportError: comfy-kitchen is not installed.
    """
    from comfy_kitchen.registry import registry

    registry.disable(NAME)
    registry.set_priority(_others(registry))


def _others(registry: Any) -> list[str]:
    # Nothing public tells the order; it is not the same with ROCm.
    return [name for name in registry._priority if name != NAME]
