"""What does a call cost on the host, before any kernel matters?

    python benchmarks/host.py               # tensors of 4x64, two minutes
    python benchmarks/host.py --rows 1 --n 4096 --device cuda      # has not run yet

Prints the time of a call, on one thread, and keeps it in results/host-<machine>.json, in
nanoseconds.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import graphs
import torch
import torch.nn.functional as F
from graphs import Baselines, Launch
from machine import RESULTS, gpu, results_path
from torch import Tensor
from torch.utils.benchmark import Compare, Measurement, Timer

import normkit
from normkit import _bench, parallel

FUNCTIONS = {
    "rms_norm": "rms_norm(x, w)",
    "layer_norm": "layer_norm(x, w)",
    "F.rms_norm": "F.rms_norm(x, shape, w, 1e-6)",
    "F.layer_norm": "F.layer_norm(x, shape, w)",
    "nn.RMSNorm": "torch_rms(x)",
}
MODULES = {"rms_norm": "rms(x)", "layer_norm": "layer(x)", "F.layer_norm": "torch_layer(x)"}
BACKWARD = ".backward(g); x.grad = None; w.grad = None"


class Nothing(torch.autograd.Function):
    """A node that computes nothing, and saves what that of an rms norm does."""

    @staticmethod
    def forward(ctx: Any, kept: tuple[Tensor, ...], x: Tensor, w: Tensor) -> Tensor:
        y, rstd, ctx.grad_w = kept
        ctx.save_for_backward(x, w, rstd)
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, grads[0], ctx.grad_w if ctx.saved_tensors else None


TP, NEW = (f"rms_norm_tp(xs, ws, {outs}context=context)" for outs in ("outs=outs, ", ""))
BARE, LAUNCHES = "bare launch", 64  # so many in one statement, from a loop in C
COMPILED = "compiled call"
COMPILED_CALLS = {"rms_norm": "compiled(x, w)", "F.rms_norm": "compiled_torch(x, w)"}
# Line -> candidate -> statement.  Aims: rms_norm 500 ns with out=, 1300 allocating, 1000 as module
# above Identity, with its backward half of F.rms_norm, compiled 1.1 of it; rms_norm_tp 1200 above
# four of rms_norm.
CALLS = {
    "out=": {"rms_norm": "rms_norm(x, w, out=y)", "layer_norm": "layer_norm(x, w, out=y)"},
    "allocating": FUNCTIONS,
    "module call": MODULES | {"nn.RMSNorm": "torch_rms(x)", "Identity": "identity(x)"},
    "forward that requires grad": FUNCTIONS,
    "forward and backward": {name: code + BACKWARD for name, code in FUNCTIONS.items()}
    | {"an empty node": "nothing(kept, x, w)" + BACKWARD},
    "4 devices, out=": {"rms_norm": "; ".join(["rms_norm(x, w, out=y)"] * 4), "rms_norm_tp": TP},
    "4 devices, allocating": {"rms_norm": "; ".join(["rms_norm(x, w)"] * 4), "rms_norm_tp": NEW},
    "operator": {
        "rms_norm": "operator(x, w)",
        "rms_norm_kernel": "kernel(x, w, None, 1e-6, 0.0, False, False, False, False, None, False)",
        "rms_norm_": "writing_operator(y, w)",
    },
    COMPILED: COMPILED_CALLS,
    f"{COMPILED}, as an operator": COMPILED_CALLS,
}


def operands(rows: int, n: int, grad: bool, device: str) -> dict[str, Any]:
    """The names that the statements use, made on the default device."""
    x, y, w = torch.randn(rows, n), torch.empty(rows, n), torch.ones(n)
    names: dict[str, Any] = {"x": x.requires_grad_(grad), "y": y, "g": torch.randn(rows, n)}
    names |= {"w": torch.nn.Parameter(w.clone()), "shape": (n,), "F": F}
    names |= {"rms_norm": normkit.rms_norm, "layer_norm": normkit.layer_norm}
    names |= {"operator": torch.ops.normkit.rms_norm.default}
    names |= {"kernel": torch.ops.normkit.rms_norm_kernel.default}  # what compiled graphs call
    names |= {"writing_operator": torch.ops.normkit.rms_norm_.default}
    names |= {"nothing": Nothing.apply, "kept": (y, torch.ones(rows), torch.ones(n))}
    names |= {"rms": normkit.RMSNorm(n), "layer": normkit.LayerNorm(n, bias=False)}
    names |= {"torch_rms": torch.nn.RMSNorm(n, eps=1e-6), "identity": torch.nn.Identity()}
    names |= {"torch_layer": torch.nn.LayerNorm(n, bias=False)}
    names |= {"xs": [x] * 4, "ws": [w] * 4, "outs": [torch.empty_like(y) for _ in range(4)]}
    names |= {"rms_norm_tp": parallel.rms_norm_tp, "context": parallel.TPContext([device] * 4)}
    functions = {"compiled": normkit.rms_norm}
    functions["compiled_torch"] = lambda x, w: F.rms_norm(x, (n,), w, 1e-6)
    return names | {k: torch.compile(f, fullgraph=True) for k, f in functions.items()}


def measure(line: str, rows: int, n: int, rounds: int, on_gpu: bool) -> _bench.Comparison:
    """The calls of a line, an empty loop, and on a GPU the launch of an empty kernel."""
    grad = "grad" in line or "backward" in line
    device = graphs.DEVICE if on_gpu else "cpu"
    with torch.device(device):
        names = operands(rows, n, grad, device)
    code = CALLS[line] | {"empty loop": "pass"}
    if on_gpu:
        code |= {BARE: "launch()"}
        names["launch"] = partial(Baselines().launch, Launch(rows, 128, 1, True), LAUNCHES)
    shown = partial(Timer, num_threads=torch.get_num_threads(), label="a call on the host")
    timers = {k: shown(v, globals=names, sub_label=line, description=k) for k, v in code.items()}
    mode = "op" if "operator" in line else "auto"
    with torch.set_grad_enabled(grad), normkit.compile_mode(mode):
        compared = _bench.paired(timers, rounds, seconds=2e-3)
    if BARE in code:
        compared.measurements[BARE].number_per_run *= LAUNCHES
    return compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--n", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    _bench.pin_heap(1)
    torch.set_num_threads(1)
    found, measured = {}, list[Measurement]()
    for line in [line for line in CALLS if not (args.no_compile and "compiled" in line)]:
        print(line, file=sys.stderr)
        compared = measure(line, args.rows, args.n, args.rounds, args.device == "cuda")
        measured += compared.measurements.values()
        times = {name: compared.us(name) * 1e3 for name in compared.measurements}
        found[line] = {"ns": times, **_bench.retakes(compared)}
    machine = _bench.machine() if args.device == "cpu" else gpu()
    path = results_path("host", machine, args.out)
    kept = {"machine": machine, "shape": f"{args.rows}x{args.n}", "run": _bench.run_stamp()}
    _bench.write_json(path, {**kept, "lines": found})
    print(f"{Compare(measured)}\n{path}")


if __name__ == "__main__":
    main()
