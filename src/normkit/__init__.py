"""Every transformer norm, as fast as the memory allows, with any PyTorch from 2.10 on."""

import sys as _sys
import typing as _typing
from importlib import import_module as _import_module

from normkit._serving.backends import Backend, backends, use_backend
from normkit._serving.dispatch import Explanation
from normkit._serving.inline import compile_mode
from normkit._version import VERSION as _VERSION
from normkit.functional import (
    add_head_norm,
    add_head_norm_,
    add_layer_norm,
    add_layer_norm_,
    add_rms_norm,
    add_rms_norm_,
    explain,
    head_norm,
    head_norm_,
    layer_norm,
    layer_norm_,
    rms_norm,
    rms_norm_,
)
from normkit.fused_modules import GatedRMSNorm, ModulatedNorm
from normkit.fusions import (
    add_modulated_norm,
    add_modulated_norm_,
    gated_norm,
    gated_norm_,
    modulated_norm,
    modulated_norm_,
)
from normkit.lengths import l2_norm, l2_norm_
from normkit.modules import HeadNorm, LayerNorm, RMSNorm
from normkit.post_norm import norm_add, norm_add_, norm_add_norm, norm_add_norm_
from normkit.rotary import norm_rope, norm_rope_
from normkit.several import norms, qk_norm_rope

if _typing.TYPE_CHECKING:
    from normkit.conversion import convert, revert
    from normkit.loading import load_norm
    from normkit.recognition import Recognition, recognise

__version__ = _VERSION

__all__ = [
    "Backend",
    "Explanation",
    "GatedRMSNorm",
    "HeadNorm",
    "LayerNorm",
    "ModulatedNorm",
    "RMSNorm",
    "Recognition",
    "add_head_norm",
    "add_head_norm_",
    "add_layer_norm",
    "add_layer_norm_",
    "add_modulated_norm",
    "add_modulated_norm_",
    "add_rms_norm",
    "add_rms_norm_",
    "backends",
    "compile_mode",
    "convert",
    "explain",
    "gated_norm",
    "gated_norm_",
    "head_norm",
    "head_norm_",
    "l2_norm",
    "l2_norm_",
    "layer_norm",
    "layer_norm_",
    "load_norm",
    "modulated_norm",
    "modulated_norm_",
    "norm_add",
    "norm_add_",
    "norm_add_norm",
    "norm_add_norm_",
    "norm_rope",
    "norm_rope_",
    "norms",
    "qk_norm_rope",
    "recognise",
    "revert",
    "rms_norm",
    "rms_norm_",
    "use_backend",
]


_LATER = {
    "Recognition": "normkit.recognition",
    "convert": "normkit.conversion",
    "load_norm": "normkit.loading",
    "recognise": "normkit.recognition",
    "revert": "normkit.conversion",
}


def __getattr__(name: str) -> object:
    # Loaded when they are asked for: importing normkit takes little more than importing torch.
    if name == "parallel":
        return _import_module("normkit.parallel")
    if name in _LATER:
        return getattr(_import_module(_LATER[name]), name)
    raise AttributeError(f"module 'normkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "torch.distributed.tensor" in _sys.modules:  # else the first call of a DTensor does it
    _import_module("normkit.parallel._dtensor").register_once()
