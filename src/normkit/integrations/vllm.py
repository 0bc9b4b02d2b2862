"""Norms of vLLM, through its plug-in point for layers.

vLLM has an engine and workers in several processes, and each of them asks the plug-ins that are
installed.  normkit is one of them, and does nothing unless the environment says `NORMKIT_VLLM=1`:

    NORMKIT_VLLM=1 vllm serve MODEL -cc '{"custom_ops": ["+rms_norm", "+gemma_rms_norm"]}'

The second half is for models that vLLM compiles: there it uses no layer's kernel unless it is told
to.
"""

from __future__ import annotations

import os

__all__ = ["plugin", "register"]

SWITCH = "NORMKIT_VLLM"


def plugin() -> None:
    """Register where `NORMKIT_VLLM` says so: what vLLM calls in each of its processes."""
    if os.environ.get(SWITCH, "0") not in ("", "0"):
        register()


def register() -> None:
    """Have vLLM make normkit's layers for RMSNorm, GemmaRMSNorm and LayerNorm from now on.

    In this process; a layer that has been made already stays.  A second call does nothing.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: another plug-in has registered one of them.
    """
    from vllm.model_executor.custom_op import CustomOp, op_registry_oot

    from normkit.integrations._vllm_layers import LAYERS

    for layer in LAYERS:
        name = layer.__bases__[0].__name__
        there = op_registry_oot.get(name)
        if there is not None and there is not layer:
            raise ValueError(f"{name}: expected no other plug-in's layer, got {there!r}")
    for layer in LAYERS:
        original = layer.__bases__[0]
        if original.__name__ not in op_registry_oot:
            CustomOp.register_oot(layer, name=original.__name__)
            # the name in `custom_ops`, which registering has replaced by the class's
            layer.name = original.name
