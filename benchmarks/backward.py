"""How fast are the gradients, against those of torch?

    python benchmarks/backward.py                                # five minutes on 2 cores
    python benchmarks/backward.py --shapes 2048x4096 --dtypes bfloat16
    python benchmarks/backward.py --device cuda                  # has not run yet

Times the backward pass alone: `torch.autograd.grad` of x, weight and, for a layer norm, bias.
Aims at 2048x4096 in bfloat16: 4 times as fast as F.rms_norm, 1.5 times as F.layer_norm.  Keeps the
results in results/backward-<machine>.json.  On a GPU shapes are far larger than its caches.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import graphs
import torch
from cases import evaluated
from machine import RESULTS, gpu, results_path
from report import written

import normkit
from normkit import _bench
from normkit._bench import COPY, NORMKIT, TORCH

SHAPES = {
    "cpu": ("64x4096", "2048x4096", "8192x8192", "32768x128"),
    "cuda": ("32768x1024", "32768x4096", "16384x8192", "8192x32768", "1048576x128"),
}


def run_case(name: str, shape: str, dtype: str, device: str, rounds: int) -> dict[str, Any]:
    op, (rows, n) = _bench.OPS[name], map(int, shape.split("x"))
    where = graphs.DEVICE if device == "cuda" else device
    names = _bench.operands(op, (rows, n), _bench.DTYPES[dtype], where)
    names["x"].requires_grad_()
    g, wanted = torch.ones_like(names["y"]), [names[tensor] for tensor in op.tensors]
    with normkit.use_backend(device):
        normkit.explain(op.function, *wanted)  # raises where no kernel runs it
    timers = {COPY: _bench.timer("y.copy_(g)", {"y": names["y"], "g": g})}
    for who, statement in ((NORMKIT, op.allocating), (TORCH, op.torch)):
        y = evaluated(statement)(names)
        code = "torch.autograd.grad(y, wanted, g, retain_graph=True)"
        timers[who] = _bench.timer(code, {"y": y, "wanted": wanted, "g": g})
    compared = _bench.paired(timers, rounds)
    told = {"op": name, "shape": shape, "dtype": dtype, **_bench.retakes(compared)}
    return told | {"candidates": _bench.cells_of(compared, COPY)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ops, dtypes = ("rms_norm", "layer_norm"), list(_bench.DTYPES)
    parser.add_argument("--device", choices=tuple(SHAPES), default="cpu")
    parser.add_argument("--shapes", nargs="+", metavar="ROWSxN")
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes, metavar="DTYPE")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    _bench.pin_heap(args.threads)
    torch.set_num_threads(args.threads)
    results = []
    for case in itertools.product(ops, args.shapes or SHAPES[args.device], args.dtypes):
        print(*case, file=sys.stderr)
        results.append(run_case(*case, args.device, args.rounds))
    machine = gpu() if args.device == "cuda" else _bench.machine()
    path = results_path("backward", machine, args.out)
    kept = {"machine": machine, "threads": args.threads, "run": _bench.run_stamp()}
    _bench.write_json(path, {**kept, "results": results})
    print(f"{written(results, results, lambda result: [])}\n\n{path}")


if __name__ == "__main__":
    main()
