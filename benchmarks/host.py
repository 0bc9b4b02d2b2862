"""What does a call cost on the host, before any kernel matters?

    python benchmarks/host.py               # tensors of 4x64, two minutes
    python benchmarks/host.py --rows 1 --n 4096

Prints a Markdown table of nanoseconds per call, and keeps it in results/host-<machine>.json.  An
empty loop is taken off.  One thread; every candidate of a line is timed in turn, round by round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cpu import machine_slug

import normkit
from normkit import _bench, parallel

NAMES = ("rms_norm", "layer_norm", "F.rms_norm", "F.layer_norm", "nn.RMSNorm")
# What the project wants to reach: nanoseconds, or a share of another line.
AIMS = {
    "out=": "rms_norm at most 500 ns",
    "allocating": "rms_norm at most 1300 ns",
    "module call": "rms_norm at most 1000 ns above Identity",
    "forward and backward": "rms_norm at most half of F.rms_norm",
    "4 devices, out=": "rms_norm_tp at most 1200 ns above four of rms_norm",
}


def cases(rows: int, n: int) -> dict[str, dict[str, str]]:
    """Line -> candidate -> statement."""
    clear = "; x.grad = None; w.grad = None"
    rms, layer = "rms_norm(x, w)", "layer_norm(x, w)"
    f_rms, f_layer = f"F.rms_norm(x, ({n},), w, 1e-6)", f"F.layer_norm(x, ({n},), w)"
    eager = dict(zip(NAMES, (rms, layer, f_rms, f_layer, "torch_module(x)"), strict=True))
    back = {name: f"{code}.backward(g){clear}" for name, code in eager.items()}
    return {
        "out=": {
            "rms_norm": "rms_norm(x, w, out=out)",
            "layer_norm": "layer_norm(x, w, out=out)",
        },
        "allocating": eager,
        "module call": {
            "rms_norm": "module(x)",
            "layer_norm": "layer_module(x)",
            "F.layer_norm": "torch_layer_module(x)",
            "nn.RMSNorm": "torch_module(x)",
            "Identity": "identity(x)",
        },
        "forward that wants gradients": eager,
        "forward and backward": back,
        "4 devices, out=": {
            "rms_norm": "; ".join(["rms_norm(x, w, out=out)"] * 4),
            "rms_norm_tp": "rms_norm_tp(xs, ws, outs=outs, context=context)",
        },
        "4 devices, allocating": {
            "rms_norm": "; ".join(["rms_norm(x, w)"] * 4),
            "rms_norm_tp": "rms_norm_tp(xs, ws, context=context)",
        },
        "compiled call": {
            "rms_norm": "compiled(x, w)",
            "F.rms_norm": "compiled_torch(x, w)",
        },
    }


def operands(rows: int, n: int) -> dict[str, Any]:
    """The names that the statements use."""
    x = torch.randn(rows, n)
    return {
        "F": F,
        "rms_norm": normkit.rms_norm,
        "layer_norm": normkit.layer_norm,
        "rms_norm_tp": parallel.rms_norm_tp,
        "context": parallel.TPContext(["cpu"] * 4),
        "xs": [x] * 4,
        "ws": [torch.ones(n)] * 4,
        "outs": [torch.empty_like(x) for _ in range(4)],
        "x": x,
        "out": torch.empty_like(x),
        "g": torch.randn(rows, n),
        "w": torch.nn.Parameter(torch.ones(n)),
        "module": normkit.RMSNorm(n),
        "layer_module": normkit.LayerNorm(n, bias=False),
        "torch_module": torch.nn.RMSNorm(n, eps=1e-6),
        "torch_layer_module": torch.nn.LayerNorm(n, bias=False),
        "identity": torch.nn.Identity(),
        "compiled": torch.compile(lambda x, w: normkit.rms_norm(x, w), fullgraph=True),
        "compiled_torch": torch.compile(lambda x, w: F.rms_norm(x, (n,), w, 1e-6), fullgraph=True),
    }


def measure(codes: dict[str, str], names: dict[str, Any], rounds: int) -> dict[str, float]:
    """Nanoseconds per call, the median over the rounds, without the empty loop."""
    timers = {name: timeit.Timer(code, globals=names) for name, code in codes.items()}
    timers["empty"] = timeit.Timer("pass", globals=names)
    compared = _bench.paired(timers, rounds, seconds=2e-3)
    empty = min(compared.samples["empty"])
    return {name: (statistics.median(compared.samples[name]) - empty) * 1e9 for name in codes}


def run(rows: int, n: int, rounds: int) -> dict[str, dict[str, float]]:
    found = {}
    for line, codes in cases(rows, n).items():
        print(line, file=sys.stderr)
        names = operands(rows, n)
        wants = "gradients" in line or "backward" in line
        names["x"].requires_grad_(wants)
        mode: Callable[[], Any] = torch.enable_grad if wants else torch.no_grad
        with mode():
            found[line] = measure(codes, names, rounds)
    return found


def markdown(found: dict[str, dict[str, float]]) -> str:
    columns = [*NAMES, "Identity", "rms_norm_tp"]
    lines = [f"| ns per call | {' | '.join(columns)} | aim |", "|---" * (len(columns) + 2) + "|"]
    for line, values in found.items():
        cells = [f"{values[name]:.0f}" if name in values else "" for name in columns]
        lines.append(f"| {line} | {' | '.join(cells)} | {AIMS.get(line, '')} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    _bench.pin_heap(1)
    torch.set_num_threads(1)
    found = run(args.rows, args.n, args.rounds)
    machine = _bench.machine()
    path = args.out / f"host-{machine_slug(machine)}.json"
    shape = f"{args.rows}x{args.n}"
    stamp = _bench.run_stamp()
    _bench.write_json(path, {"machine": machine, "shape": shape, "run": stamp, "ns": found})
    print(markdown(found))
    print(f"\n{path}", file=sys.stderr)


if __name__ == "__main__":
    main()
