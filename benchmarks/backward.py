"""How fast are the gradients, against those of torch?

    python benchmarks/backward.py                                # five minutes on 2 cores
    python benchmarks/backward.py --shapes 2048x4096 --dtypes bfloat16
    python benchmarks/backward.py --device cuda                  # not run yet

Times the backward pass alone: `torch.autograd.grad` of x, weight and, for a layer norm, bias.
Prints a Markdown table and keeps it in results/backward-<machine>.json.  On a GPU calls are timed
by events in the stream, and shapes are far larger than its caches.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cpu import machine_slug

import normkit
from normkit import _bench

SHAPES = {
    "cpu": ("64x4096", "2048x4096", "8192x8192", "32768x128"),
    "cuda": ("32768x1024", "32768x4096", "16384x8192", "8192x32768", "1048576x128"),
}
# What the project wants to reach at 2048x4096 in bfloat16.
AIMS = {"rms_norm": ("F.rms_norm", 4.0), "layer_norm": ("F.layer_norm", 1.5)}


class StreamTimer:
    """Seconds that calls take in the current CUDA stream."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call

    def timeit(self, number: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(number):
            self.call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def run_case(shape: str, dtype: str, device: str, rounds: int) -> dict[str, Any]:
    rows, n = map(int, shape.split("x"))
    place: dict[str, Any] = {"device": device, "dtype": _bench.DTYPES[dtype]}
    x = torch.randn(rows, n, **place).requires_grad_()
    weight, bias = (torch.rand(n, **place).requires_grad_() for _ in range(2))
    grad_y = torch.randn(rows, n, **place)
    with normkit.use_backend(device):
        normkit.explain("rms_norm", x, weight)  # raises where no kernel serves it
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

    timer = StreamTimer if device == "cuda" else timeit.Timer
    timers = {name: timer(backward(name)) for name in made}
    timers["copy"] = timer(lambda: other.copy_(grad_y))
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
    parser.add_argument("--device", choices=tuple(SHAPES), default="cpu")
    parser.add_argument("--shapes", nargs="+", metavar="ROWSxN")
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes, metavar="DTYPE")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    _bench.pin_heap(args.threads)
    torch.set_num_threads(args.threads)
    results = []
    for dtype, shape in itertools.product(args.dtypes, args.shapes or SHAPES[args.device]):
        print(dtype, shape, file=sys.stderr)
        results.append(run_case(shape, dtype, args.device, args.rounds))
    machine = _bench.machine()
    if args.device == "cuda":
        machine["cpu"] = torch.cuda.get_device_name()
    path = args.out / f"backward-{machine_slug(machine)}.json"
    kept = {"machine": machine, "threads": args.threads, "run": _bench.run_stamp()}
    _bench.write_json(path, {**kept, "results": results})
    print(markdown(results))
    for mine, (theirs, aim) in AIMS.items():
        print(f"\n{mine}: aim at 2048x4096 in bfloat16 is {aim} times {theirs}")
    print(f"\n{path}", file=sys.stderr)


if __name__ == "__main__":
    main()
