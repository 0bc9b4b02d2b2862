"""Norms on several devices of one process, and over several processes.

One process: `TPContext` names the devices, and `rms_norm_tp`, `layer_norm_tp` and `head_norm_tp`
launch on all of them from one call.
"""

from __future__ import annotations

from normkit.parallel.devices import (
    BroadcastType,
    TPContext,
    broadcast,
    head_norm_tp,
    layer_norm_tp,
    replicate,
    rms_norm_tp,
    tp_split,
)

__all__ = [
    "BroadcastType",
    "TPContext",
    "broadcast",
    "head_norm_tp",
    "layer_norm_tp",
    "replicate",
    "rms_norm_tp",
    "tp_split",
]
