"""Norms of SGLang, through its registry of hooks.

SGLang has several processes, and each of them asks the plug-ins that are installed.  normkit is one
of them, and does nothing unless the environment says `NORMKIT_SGLANG=1`:

    NORMKIT_SGLANG=1 python -m sglang.launch_server --model-path MODEL
"""

from __future__ import annotations

import os

__all__ = ["plugin", "register"]

SWITCH = "NORMKIT_SGLANG"


def plugin() -> None:
    """Hook in where `NORMKIT_SGLANG` says so: what SGLang calls, before it applies all hooks."""
    if os.environ.get(SWITCH, "0") not in ("", "0"):
        _hook()


def register() -> None:
    """Have SGLang make normkit's layers for its norms, from now on and in this process.

    A layer that has been made already stays.  A second call does nothing.

    Raises:
        ImportError: SGLang is not installed.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    _hook()
    HookRegistry.apply_hooks()


def _hook() -> None:
    from sglang.srt.layers import layernorm
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from normkit.integrations._sglang_layers import LAYERS

    for layer in LAYERS:
        if getattr(layernorm, layer.__name__) is not layer:
            HookRegistry.register(f"{layernorm.__name__}.{layer.__name__}", layer, HookType.REPLACE)
