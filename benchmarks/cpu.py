"""How fast are the norms on this CPU, against torch and against a plain copy of the same bytes?

    python benchmarks/cpu.py                         # everything, about 20 minutes on 2 cores
    python benchmarks/cpu.py --only rms_norm --dtypes bfloat16 --shapes 16x4096 --no-compile

Prints Markdown tables in units of copies, and keeps the results of all runs on a machine in
results/cpu-<machine>.json and .png.  docs/measuring.md says how to read them.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import report
import torch
from cases import ALLOCATING, COMPILED, compiled, first_line
from machine import RESULTS, results_path

from normkit import _bench
from normkit._bench import NORMKIT, Op

SHAPES = ("1x4096", "16x4096", "64x4096", "2048x4096", "8192x8192", "32768x128")
# What the project wants to reach, in copies: rms_norm, layer_norm, add_rms_norm.
AIMED_OPS = ("rms_norm", "layer_norm", "add_rms_norm")
AIMS = {
    "16x4096": (1.2, 2.0, 1.5),
    "64x4096": (1.2, 2.0, 1.5),
    "2048x4096": (1.25, 1.5, 1.15),
    "32768x128": (1.3, 1.6, 1.25),
    "8192x8192": (1.0, 1.05, 1.05),
}
SMALL_FLOAT32 = (1.2, 1.6, 1.3)  # of 16x4096 and 64x4096
ONE_ROW_US = {NORMKIT: 0.5, ALLOCATING: 1.3}


def limit(op: str, dtype: str, shape: str) -> float | None:
    """The aim in copies, which the plot draws as a bar."""
    small = dtype == "float32" and shape in ("16x4096", "64x4096")
    aims = SMALL_FLOAT32 if small else AIMS.get(shape, ())
    return dict(zip(AIMED_OPS, aims, strict=False)).get(op)


def aims(result: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    if result["op"] == "rms_norm" and result["case"] == "1x4096":
        return [(name, "us", most) for name, most in ONE_ROW_US.items()]
    return [] if result["limit"] is None else [(NORMKIT, "copies", result["limit"])]


def row_kernel_us(op: Op, n: int, dtype: str, rounds: int) -> float:
    """Microseconds of one more row: a call on two rows less a call on one, so without the call."""
    with torch.no_grad():
        rows = {k: _bench.operands(op, (int(k), n), _bench.DTYPES[dtype]) for k in ("1", "2")}
        timers = {k: _bench.timer(op.normkit, names) for k, names in rows.items()}
        return _bench.paired(timers, rounds).over_us("2", "1")


def run_case(name: str, dtype: str, shape: str, args: argparse.Namespace) -> dict[str, Any]:
    op, (rows, n) = _bench.OPS[name], map(int, shape.split("x"))
    measure = (name, rows, n, dtype, args.rounds)
    code, without = {ALLOCATING: op.allocating} if rows == 1 else {}, {}
    try:
        if args.no_compile:
            raise RuntimeError("not asked for (--no-compile)")
        function, statement = compiled(op)
        result = _bench.measure(*measure, code | {COMPILED: statement}, {"compiled": function})
    except RuntimeError as error:  # of which torch's compiler errors are subclasses
        without[COMPILED] = first_line(error)
        result = _bench.measure(*measure, code)
    if rows == 1 and not op.heads:
        result["kernel_us"] = row_kernel_us(op, n, dtype, args.rounds)
    gc.collect()  # the next case wants the heap as this one found it
    result |= {"limit": limit(name, dtype, shape), "case": shape, "without": without}
    return result | _bench.run_stamp()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ops, dtypes = list(_bench.OPS), list(_bench.DTYPES)
    parser.add_argument("--only", nargs="+", choices=ops, default=ops, metavar="OP")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="ROWSxN")
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes, metavar="DTYPE")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    _bench.pin_heap(args.threads)
    torch.set_num_threads(args.threads)
    machine = _bench.machine()
    path = results_path("cpu", machine, args.out)
    kept = json.loads(path.read_text())["results"] if path.exists() else []
    measured = []
    for case in itertools.product(args.only, args.dtypes, args.shapes):
        print(*case, file=sys.stderr)
        measured.append(run_case(*case, args))
        kept = report.merge(kept, measured[-1])
        _bench.write_json(path, {"machine": machine, "results": kept})
    title = f"normkit on {machine['cpu']} {machine['model']}, {machine['isa']}, "
    title += f"torch {torch.__version__}, threads: {args.threads}"
    _bench.plot([r for r in kept if r["threads"] == args.threads], title, path.with_suffix(".png"))
    print(f"{report.written(measured, kept, aims)}\n\n{path}")


if __name__ == "__main__":
    main()
