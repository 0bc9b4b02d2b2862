"""What the GPU tests share: inputs on the device, a slow kernel, and calls that must be native."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import normkit
from conformance.support import OPS, Inputs, Op, Result
from normkit.testing import make_inputs

# A row kept by one warp, by a block, by a cluster of blocks, streamed, and with an odd tail.
SIZES = (128, 4096, 65536, 400_000, 5001)
SLEEP_CYCLES = 100_000_000  # some 50 ms at the clocks of the day

__all__ = ["OPS", "SIZES", "call", "inputs_on", "sleep", "tensors_of", "warm_up"]


def inputs_on(
    op: Op,
    rows: int,
    n: int,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    device: Any = "cuda",
) -> Inputs:
    shape = (rows, 4, n) if op.per_head else (rows, n)
    return make_inputs(shape, dtype, per_head=op.per_head, seed=seed, device=device)


def call(op: Op, inputs: Inputs, **options: Any) -> Result:
    """Call op on the CUDA kernels, or raise."""
    with normkit.use_backend("cuda"):
        made = getattr(normkit, op.name)(*op.tensors(inputs), **op.selected, **options)
    return Result(*made) if op.adds else Result(made, None)


def warm_up(op: Op, inputs: Inputs, stream: torch.cuda.Stream | None = None) -> None:
    """Load the kernels and have memory at hand: doing so may wait for the device."""
    with torch.cuda.stream(stream or torch.cuda.current_stream()):
        torch.cuda._sleep(1)
        for t in inputs:
            t.copy_(t.clone())
        call(op, inputs)
    torch.cuda.synchronize()


def sleep() -> None:
    """Keep the current stream busy."""
    torch.cuda._sleep(SLEEP_CYCLES)


def tensors_of(result: Result) -> list[Tensor]:
    return [t for t in result if t is not None]
