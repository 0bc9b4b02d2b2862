"""How fast are the gradients on this CPU, against those of torch?

    python benchmarks/backward.py                                # five minutes on 2 cores
    python benchmarks/backward.py --shapes 2048x4096 --dtypes bfloat16

Times the backward pass alone: `torch.autograd.grad` of x, weight and, for a layer norm, bias.
Prints a Markdown table and keeps it in results/backward-<machine>.json.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import timeit
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cpu import machine_slug

import normkit
from normkit import _bench

SHAPES = ("64x4096", "2048x4096", "8192x8192", "32768x128")
# What the project wants to reach at 2048x4096 in bfloat16.
AIMS = {"rms_norm": ("F.rms_norm", 4.0), "layer_norm": ("F.layer_norm", 1.5)}


def run_case(shape: str, dtype: str, rounds: int) -> dict[str, Any]:
    rows, n = map(int, shape.split("x"))
    kind = _bench.DTYPES[dtype]
    x = torch.randn(rows, n).to(kind).requires_grad_()
    weight, bias = (torch.rand(n).to(kind).requires_grad_() for _ in range(2))
    grad_y = torch.randn(rows, n).to(kind)
    made = {
        "rms_norm": (normkit.rms_norm(x, weight), (x, weight)),
        "F.rms_norm": (F.rms_norm(x, (n,), weight, 1e-6), (x, weight)),
        "layer_norm": (normkit.layer_norm(x, weight, bias), (x, weight, bias)),
        "F.layer_norm": (F.layer_norm(x, (n,), weight, bias), (x, weight, bias)),
    }
    other = torch.empty_like(grad_y)

    def backward(name: str) -> Any:
        y, wanted = made[name]
        return lambda: torch.autograd.grad(y, wanted, grad_y, retain_graph=True)

    timers = {name: timeit.Timer(backward(name)) for name in made}
    timers["copy"] = timeit.Timer(lambda: other.copy_(grad_y))
    compared = _bench.paired(timers, rounds)
    result: dict[str, Any] = {"shape": shape, "dtype": dtype, "rounds": rounds}
    result["us"] = {name: compared.us(name) for name in timers}
    for mine, (theirs, _) in AIMS.items():
        result[f"{mine} is faster"] = compared.ratio(theirs, mine)
        result[f"{mine} in copies"] = compared.ratio(mine, "copy")
    return result


def markdown(results: list[dict[str, Any]]) -> str:
    header = ("shape", "dtype", *(f"{t} / {m}" for m, (t, _) in AIMS.items()), "us", "in copies")
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for r in results:
        ratios = [f"{r[f'{m} is faster']:.1f}" for m in AIMS]
        us = ", ".join(f"{r['us'][m]:.0f}" for m in AIMS)
        copies = ", ".join(f"{r[f'{m} in copies']:.1f}" for m in AIMS)
        lines.append(f"| {' | '.join([r['shape'], r['dtype'], *ratios, us, copies])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    dtypes = list(_bench.DTYPES)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="ROWSxN")
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes, metavar="DTYPE")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    _bench.pin_heap(args.threads)
    torch.set_num_threads(args.threads)
    results = []
    for dtype, shape in itertools.product(args.dtypes, args.shapes):
        print(dtype, shape, file=sys.stderr)
        results.append(run_case(shape, dtype, args.rounds))
    machine = _bench.machine()
    path = args.out / f"backward-{machine_slug(machine)}.json"
    kept = {"machine": machine, "threads": args.threads, "run": _bench.run_stamp()}
    _bench.write_json(path, {**kept, "results": results})
    print(markdown(results))
    for mine, (theirs, aim) in AIMS.items():
        print(f"\n{mine}: aim at 2048x4096 in bfloat16 is {aim} times {theirs}")
    print(f"\n{path}", file=sys.stderr)


if __name__ == "__main__":
    main()
