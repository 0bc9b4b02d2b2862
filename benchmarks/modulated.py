"""What does a modulated norm take, beside torch's operations and what torch.compile makes of them?

    python benchmarks/modulated.py                       # five minutes on 2 cores
    python benchmarks/modulated.py --shapes 1x32x4096 --dtypes bfloat16 --threads 1

Times in copies of x, in pairs within a round; all of it allocates but what has `out=`.  A modulated
norm moves as much as one copy, one with a sum as two.  Writes a JSON file to benchmarks/results and
prints the table of docs/fusions.md.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import machine
import torch
from torch.utils.benchmark import Timer

import normkit
from normkit import _bench

# Batch x tokens x n: in the second cache, of a small image in Flux, and of a large one.
SHAPES = ("1x32x4096", "2x1024x3072", "1x4096x3072")
COPY, EAGER, COMPILED = "copy", "torch", "torch.compile"
# The norm, and the same behind a sum with a gate.
UNFUSED = {
    "modulated": "F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift",
    "with a sum": "unfused_sum(x, residual, gate, scale, shift)",
}
FUSED = {
    "modulated": "modulated_norm(x, scale, shift{})",
    "with a sum": "add_modulated_norm(x, residual, gate, scale, shift{})",
}
OUTPUTS = {"modulated": ", out=y", "with a sum": ", out=y, residual_out=h"}


def unfused(x: Any, scale: Any, shift: Any) -> Any:
    n = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
    return n * (1 + scale) + shift


def unfused_sum(x: Any, residual: Any, gate: Any, scale: Any, shift: Any) -> Any:
    h = residual + gate * x
    return unfused(h, scale, shift), h


def names_for(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    torch._dynamo.reset()  # a graph for each shape, and not one for all
    generator = torch.Generator().manual_seed(0)
    batch, _, n = shape

    def made(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    names: dict[str, Any] = {"x": made(*shape), "residual": made(*shape)}
    names |= {name: made(batch, 1, n) for name in ("gate", "scale", "shift")}
    names |= {"y": torch.empty_like(names["x"]), "h": torch.empty_like(names["x"])}
    names |= {"F": torch.nn.functional, "unfused_sum": unfused_sum}
    names |= {name: getattr(normkit, name) for name in ("modulated_norm", "add_modulated_norm")}
    return names | {
        "compiled": torch.compile(unfused, dynamic=False),
        "compiled_sum": torch.compile(unfused_sum, dynamic=False),
    }


def candidates(what: str) -> dict[str, str]:
    call = FUSED[what]
    compiled = "compiled(x, scale, shift)"
    if what != "modulated":
        compiled = "compiled_sum(x, residual, gate, scale, shift)"
    return {
        COPY: "y.copy_(x)",
        "one rounding, out=": call.format(OUTPUTS[what]),
        "round_each, out=": call.format(", round_each=True" + OUTPUTS[what]),
        "one rounding": call.format(""),
        "round_each": call.format(", round_each=True"),
        COMPILED: compiled,
        EAGER: UNFUSED[what],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--shapes", nargs="+", metavar="BATCHxTOKENSxN", default=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=("bfloat16", "float16", "float32"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="the JSON file; by default one of this machine")
    args = parser.parse_args()
    _bench.pin_heap(args.threads)
    torch.set_num_threads(args.threads)
    results = []
    heads: list[str] = []
    with torch.no_grad():
        for what, shape, dtype in itertools.product(UNFUSED, args.shapes, args.dtypes):
            sizes = tuple(int(size) for size in shape.split("x"))
            names = names_for(sizes, _bench.DTYPES[dtype])
            codes = candidates(what)
            timers = {who: Timer(code, globals=names) for who, code in codes.items()}
            for timer in timers.values():
                timer.timeit(4)
            compared = _bench.paired(timers, args.rounds)
            if not heads:
                heads = [who for who in codes if who != COPY]
                print(f"| | | | {' | '.join(heads)} |\n|---|---|---|{'--:|' * len(heads)}")
            in_copies = {who: compared.ratio(who, COPY) for who in heads}
            cells = " | ".join(f"{value:.2f}" for value in in_copies.values())
            print(f"| {what} | {shape} | {dtype} | {cells} |", flush=True)
            results.append(
                {"what": what, "shape": shape, "dtype": dtype, "in_copies": in_copies}
                | {"copy_us": compared.us(COPY), "retakes": _bench.retakes(compared)}
            )
    here = _bench.machine()
    data: dict[str, Any] = {"machine": here, **_bench.run_stamp()}
    data |= {"threads": args.threads, "rounds": args.rounds, "results": results}
    path = args.out or machine.results_path("modulated", here, machine.RESULTS)
    _bench.write_json(path, data)


if __name__ == "__main__":
    main()
