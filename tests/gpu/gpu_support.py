"""What the GPU tests share: inputs on the device, a slow kernel, and calls that must be native."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import normkit
from conformance.support import EVERY, Inputs, Op, Result, inputs_for

# A row kept by one warp, by a block, by a cluster of blocks, streamed, and with an odd tail.
SIZES = (128, 4096, 65536, 400_000, 5001)
SLEEP_CYCLES = 100_000_000  # some 50 ms at the clocks of the day

__all__ = [
    "EVERY",
    "SIZES",
    "call",
    "call_in_place",
    "inputs_on",
    "overwrite",
    "sleep",
    "tensors_of",
    "warm_up",
]


def inputs_on(
    op: Op,
    rows: int,
    n: int,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    device: Any = "cuda",
) -> Inputs:
    """Inputs of an op, with all that is fused with it."""
    made = inputs_for(op, (rows, 4) if op.per_head else rows, n, dtype, seed=seed)
    return Inputs(*(None if t is None else t.to(device) for t in made))


def call(op: Op, inputs: Inputs, **options: Any) -> Result:
    """Call op on the CUDA kernels, or raise."""
    with normkit.use_backend("cuda"):
        made = getattr(normkit, op.name)(*op.tensors(inputs), **op.selected, **options)
    return Result(*made) if op.returns_both else Result(made, None)


def call_in_place(op: Op, inputs: Inputs) -> Result:
    """Call op's form in place on the CUDA kernels, or raise."""
    with normkit.use_backend("cuda"):
        made = getattr(normkit, f"{op.name}_")(*op.tensors(inputs), **op.selected)
    return Result(*made) if op.returns_both else Result(made, None)


def overwrite(inputs: Inputs, new: Inputs, **how: Any) -> None:
    """Have inputs hold what others do."""
    for to, source in zip(inputs, new, strict=True):
        if to is not None:
            to.copy_(source, **how)


def warm_up(op: Op, inputs: Inputs, stream: torch.cuda.Stream | None = None) -> None:
    """Load the kernels and have memory at hand: doing so may wait for the device."""
    with torch.cuda.stream(stream or torch.cuda.current_stream()):
        torch.cuda._sleep(1)
        overwrite(inputs, Inputs(*(None if t is None else t.clone() for t in inputs)))
        call(op, inputs)
    torch.cuda.synchronize()


def sleep() -> None:
    """Keep the current stream busy."""
    torch.cuda._sleep(SLEEP_CYCLES)


def tensors_of(result: Result) -> list[Tensor]:
    return [t for t in result if t is not None]
