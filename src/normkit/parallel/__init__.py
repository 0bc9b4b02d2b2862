"""Norms on several devices of one process, and over several processes.

One process: `TPContext` names the devices, and `rms_norm_tp`, `layer_norm_tp` and `head_norm_tp`
launch on all of them from one call.  Several processes: `sharded_rms_norm` and `sharded_layer_norm`
normalise rows whose columns are split over ranks; `SequenceParallel` and `HiddenParallel` are
styles for `torch.distributed.tensor.parallel.parallelize_module`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from normkit.parallel.context import BroadcastType, TPContext, broadcast, replicate, tp_split
from normkit.parallel.devices import head_norm_tp, layer_norm_tp, rms_norm_tp
from normkit.parallel.shards import sharded_layer_norm, sharded_rms_norm

if TYPE_CHECKING:
    from normkit.parallel.styles import HiddenParallel, SequenceParallel

__all__ = [
    "BroadcastType",
    "HiddenParallel",
    "SequenceParallel",
    "TPContext",
    "broadcast",
    "head_norm_tp",
    "layer_norm_tp",
    "replicate",
    "rms_norm_tp",
    "sharded_layer_norm",
    "sharded_rms_norm",
    "tp_split",
]


def __getattr__(name: str) -> object:
    # DTensor, which the styles are made of, takes more than a second to import.
    if name in ("HiddenParallel", "SequenceParallel"):
        from normkit.parallel import styles

        return getattr(styles, name)
    raise AttributeError(f"module 'normkit.parallel' has no attribute {name!r}")
