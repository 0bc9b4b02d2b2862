"""The calls that run under compute-sanitizer: each kind of plan once.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python sanitized_calls.py

With that variable allocations are not cached, so that a write past the end of a tensor leaves its
allocation.  Inputs come from the host: nothing but copies and the norms runs on the device.
"""

from __future__ import annotations

import torch
from gpu_support import EVERY, call, call_in_place, inputs_on

import normkit
from conformance.support import BARE
from normkit.testing import Inputs, make_inputs

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
# rows, n: part of a warp, a warp, a block, with tails, three to seven packs a lane, clusters of
# blocks, streamed
SHAPES = ((7, 64), (3, 100), (9, 128), (5, 1024), (300, 512), (2, 4096), (3, 4095), (2, 8200))
MANY_ROWS = ((600, 2880), (600, 5120), (600, 6144), (600, 7168))
LONG_SHAPES = ((1, 18432), (1, 20000), (2, 65536), (1, 131073), (1, 300000))


def _on_device(inputs: Inputs) -> Inputs:
    return Inputs(*(t.cuda() for t in inputs))


def calls() -> int:
    done = 0
    for dtype, (rows, n) in [(d, s) for d in (BF16, F32) for s in SHAPES + MANY_ROWS + LONG_SHAPES]:
        plain = _on_device(make_inputs((rows, n), dtype))
        normkit.rms_norm(plain.x, plain.weight)
        normkit.layer_norm(plain.x, plain.weight, plain.bias)
        normkit.add_rms_norm(plain.x, plain.residual, plain.weight)
        normkit.add_layer_norm_(plain.x, plain.residual, plain.weight, plain.bias)
        done += 4
    for dtype, head_dim in ((BF16, 64), (F16, 128), (BF16, 96), (F32, 80)):
        heads = _on_device(make_inputs((5, 6, head_dim), dtype, per_head=True))
        normkit.head_norm(heads.x, heads.weight)
        normkit.head_norm_(heads.x[:, 1:4], heads.weight[1:4], heads.bias[1:4], kind="layer")
        done += 2
    for n in (257, 4096, 65536):  # other dtypes for everything, and rows that lie apart
        mixed = make_inputs(
            (4, n), F16, weight_dtype=F32, bias_dtype=BF16, residual_dtype=F32, seed=n
        )
        mixed = _on_device(mixed)
        normkit.add_rms_norm(mixed.x, mixed.residual, mixed.weight, mixed.bias, out_dtype=BF16)
        normkit.rms_norm(mixed.x[::2], mixed.weight, clamp_inf=True, round_before_weight=True)
        normkit.rms_norm(mixed.x[:, 1:], mixed.weight[1:])
        done += 3
    for x, other in ((BF16, F32), (F32, BF16)):  # dtypes that are moved 16 bytes at a time together
        for rows, n in ((600, 128), (2, 4096), (600, 1536), (1, 65536)):
            mixed = make_inputs(
                (rows, n), x, weight_dtype=other, bias_dtype=other, residual_dtype=other, seed=n
            )
            mixed = _on_device(mixed)
            normkit.rms_norm(mixed.x, mixed.weight, out_dtype=other)
            normkit.add_layer_norm(mixed.x, mixed.residual, mixed.weight, mixed.bias)
            done += 2
    for op in (op for op in EVERY if op not in BARE):  # and all that stands around a norm
        for rows, n in ((7, 64), (3, 100), (5, 1024), (2, 4096), (2, 8200), (1, 65536)):
            call(op, inputs_on(op, rows, n))
            call_in_place(op, inputs_on(op, rows, n, F32))
            done += 2
    torch.cuda.synchronize()
    return done


if __name__ == "__main__":
    with torch.no_grad(), normkit.use_backend("cuda"):
        print(f"{calls()} calls")
