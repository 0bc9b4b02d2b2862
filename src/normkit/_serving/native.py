"""Operators that torch's dispatcher runs without a Python frame.

The extension has kernels for them on the CPU and on CUDA, which make of an operator's arguments
those of one of its functions: `Kernel` says how.  Other devices, calls that the function refuses,
and a torch without the C functions that this takes, have the operator's Python implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from normkit._serving import backends
from normkit._spec import (
    FROM_OUTPUT,
    FUSED,
    LAYER,
    NATIVE,
    OF_SUM,
    PER_HEAD,
    Call,
    Fields,
    Op,
)


class Kernel(NamedTuple):
    """How a function of the extension runs an operator; `_C.implement` says what the fields are."""

    function: str
    sources: Sequence[object]
    outputs: Sequence[int] = ()
    unless: Sequence[int] = ()
    x: int = 0
    empty_dtype: torch.dtype | None = None


# The names of the operators that have one.
NATIVE_OPERATORS: set[str] = set()


def give_kernel(
    name: str, arguments: Fields, kernel: Kernel, implementation: Callable[..., Any]
) -> None:
    """Have the dispatcher run an operator by the extension, where it can."""
    if backends._missing:
        return
    from normkit import _C

    types = [argument.type for argument in arguments.values()]
    function, sources, outputs, unless, x, empty_dtype = kernel
    described = types, sources, unless, outputs, x, empty_dtype
    entry = getattr(_C, function)
    if _C.implement(torch, name, *described, entry, implementation):
        NATIVE_OPERATORS.add(name)


def kernel_of(op: Op, arguments: Fields, outputs: Sequence[str] = ()) -> Kernel:
    """That of an operator which makes these outputs, or else writes those among its arguments."""
    places = {name: place for place, name in enumerate(arguments)}
    flags = tuple((places[name], bit) for name, bit in op.flags.items())
    written = op.written if "out" not in arguments else {}
    sources: list[object] = [(op.bits, flags)]
    for name in NATIVE[1:] + FUSED * op.fused:
        if not outputs:
            name = written.get(name, name)
        sources.append(places.get(name, getattr(Call, name, None)))
    if not outputs:
        return Kernel("try_norm", sources)
    made = [("y", "residual_out", "rstd", "mean").index(name) for name in outputs]
    return Kernel("norm_saving", sources, made, x=places["x"], empty_dtype=torch.float32)


def backward_kernel(arguments: Fields) -> Kernel:
    """That of the operator of all gradients."""
    places = {name: place for place, name in enumerate(arguments)}
    flags = {"layer": LAYER, "per_head": PER_HEAD, "from_output": FROM_OUTPUT, "of_sum": OF_SUM}
    kind = 0, tuple((places[name], bit) for name, bit in flags.items())
    wanted = 0, ((places["weight_wanted"], 1), (places["bias_wanted"], 2))
    given = (
        "grad_y", "grad_residual_out", "x", "residual", "weight", "bias", "rstd", "mean",
        "weight_offset", "round_before_weight", "x_dtype", "residual_dtype",
    )  # fmt: skip
    sources = [kind, *(places[name] for name in given), wanted]
    return Kernel(
        "norm_backward",
        sources,
        range(4),
        [places["clamp_inf"], places["eps_outside"], places["round_weight"]],
        places["x"],
    )
