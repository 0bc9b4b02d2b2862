"""What does `normkit.integrations.patch_torch` cost, and what does it gain?

    python benchmarks/patched.py                       # two minutes on 2 cores
    python benchmarks/patched.py --shapes 512x4096 --dtypes bfloat16

Times torch's own rms_norm and layer_norm as they are and patched, in pairs, alone and with their
backward pass; prints the table of docs/integrations.md.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

import torch
from torch.utils.benchmark import Timer

from normkit import _bench
from normkit._bench import NORMKIT, TORCH
from normkit.integrations import patch_torch

SHAPES = ("1x1024", "128x1024", "512x4096")
DTYPES = ("float32", "bfloat16")
OPS = ("rms_norm", "layer_norm")


class Switch:
    """Patches torch, and puts it back."""

    def __init__(self) -> None:
        self.patch: Any = None

    def set(self, patched: bool) -> None:
        if self.patch is not None:
            self.patch.revert()
        self.patch = patch_torch() if patched else None


def compare(name: str, shape: str, dtype: str, backward: bool, rounds: int) -> _bench.Comparison:
    op, (rows, n) = _bench.OPS[name], map(int, shape.split("x"))
    names = _bench.operands(op, (rows, n), _bench.DTYPES[dtype])
    wanted = [names[tensor] for tensor in op.tensors]
    for tensor in wanted:
        tensor.requires_grad_(backward)
    switch = Switch()
    code = op.torch
    if backward:
        code = f"torch.autograd.grad({code}, wanted, g)"
    names |= {"wanted": wanted, "g": torch.ones_like(names["x"]), "switch": switch}
    timers = {
        who: Timer(code, f"switch.set({who == NORMKIT})", globals=names) for who in (TORCH, NORMKIT)
    }
    try:
        return _bench.paired(timers, rounds)
    finally:
        switch.set(patched=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", metavar="ROWSxN", default=SHAPES)
    parser.add_argument("--dtypes", nargs="+", choices=tuple(_bench.DTYPES), default=DTYPES)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    _bench.pin_heap(args.threads)
    torch.set_num_threads(args.threads)
    print("| | `rms_norm` | and backward | `layer_norm` | and backward |\n|---|--:|--:|--:|--:|")
    for shape, dtype in itertools.product(args.shapes, args.dtypes):
        cells = []
        for name, backward in itertools.product(OPS, (False, True)):
            c = compare(name, shape, dtype, backward, args.rounds)
            times = f"{c.us(TORCH):.0f}, {c.us(NORMKIT):.0f}"
            cells.append(f"{times} ({c.ratio(TORCH, NORMKIT):.2f})")
        print(f"| {shape.replace('x', ' x ')} {dtype} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
