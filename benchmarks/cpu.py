"""How fast are the norms on this CPU, against torch and against a plain copy of the same bytes?

    python benchmarks/cpu.py                         # everything, about 40 minutes on 2 idle cores
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

import c_copy
import peers
import report
import torch
from c_copy import C_COPY
from cases import COMPILED, compiled, evaluated, first_line
from machine import RESULTS, results_path

from normkit import _bench
from normkit._bench import ALLOCATING, COPY, NORMKIT, Names, Op

SHAPES = ("1x4096", "16x4096", "64x4096", "2048x4096", "8192x8192", "32768x128")
# What the project wants to reach, in C copies, by shape and threads.
AIMED = (
    *(("rms_norm", dtype) for dtype in ("bfloat16", "float16", "float32")),
    *(("layer_norm", dtype) for dtype in ("bfloat16", "float16", "float32")),
)
AIMS = {  # in the order of AIMED, and of a fused add
    ("32x4096", 1): (2.0, 2.3, 1.4, 2.9, 3.2, 1.7, 1.6),
    ("32768x128", 2): (1.6, 1.9, 1.2, 2.2, 2.5, 1.4, 1.3),
    ("2048x4096", 2): (1.3, 1.4, 1.0, 1.7, 1.9, 1.05, 1.1),
    ("8192x8192", 2): (1.0, 1.0, 1.0, 1.0, 1.05, 1.0, 1.0),
}
ONE_ROW_US = {NORMKIT: 0.5, ALLOCATING: 1.3}


def limit(op: str, dtype: str, shape: str, threads: int) -> float | None:
    """The aim in copies, which the plot draws as a bar."""
    aims = AIMS.get((shape, threads))
    if aims is None or _bench.OPS[op].heads:
        return None
    return aims[-1] if _bench.OPS[op].adds else aims[AIMED.index((op, dtype))]


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


def torch_compile(
    op: Op, names: Names, without: dict[str, str], *, wanted: bool
) -> tuple[dict[str, str], Names]:
    """torch.compile's candidate, compiled; none where that fails, and why."""
    try:
        if not wanted:
            raise RuntimeError("not asked for (--no-compile)")
        function, statement = compiled(op)
        with torch.no_grad():
            evaluated(statement, compiled=function)(names)
    except RuntimeError as error:  # of which torch's compiler errors are subclasses
        without[COMPILED] = first_line(error)
        return {}, {}
    return {COMPILED: statement}, {"compiled": function}


def run_case(name: str, dtype: str, shape: str, args: argparse.Namespace) -> dict[str, Any]:
    op, (rows, n) = _bench.OPS[name], map(int, shape.split("x"))
    names = _bench.operands(op, _bench.shape_for(op, rows, n), _bench.DTYPES[dtype])
    without: dict[str, str] = {}
    given, used = peers.candidates(op, names, dtype, without)
    settle = peers.SETTLE_SECONDS if given else 0
    if args.no_c_copy:
        without[C_COPY] = args.no_c_copy
    else:
        form, of_copy = c_copy.fastest(op, names)
        given, used = {C_COPY: f"{c_copy.STATEMENT}  # {form}"} | given, used | of_copy
    made, of_made = torch_compile(op, names, without, wanted=not args.no_compile)
    result = _bench.measure(
        name,
        rows,
        n,
        dtype,
        args.rounds,
        names=names | used | of_made,
        allocating=made,
        given=given,
        floor=C_COPY if C_COPY in given else COPY,
        settle=settle,
    )
    if rows == 1 and not op.heads:
        result["kernel_us"] = row_kernel_us(op, n, dtype, args.rounds)
    gc.collect()  # the next case wants the heap as this one found it
    aim = None if args.no_c_copy else limit(name, dtype, shape, args.threads)
    result |= {"limit": aim, "case": shape, "without": without, "peers": peers.installed()}
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
    args.no_c_copy = c_copy.missing(args.threads)
    left_out = [f"{k} comes with {peers.EXTRA}" for k in peers.PEERS if k not in peers.installed()]
    left_out += [f"{C_COPY}, {COPY} in its place: {why}" for why in [args.no_c_copy] if why]
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
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
    like_these = report.comparable(kept, measured[-1])
    shown = [r for r in like_these if r["threads"] == args.threads]
    _bench.plot(shown, title, path.with_suffix(".png"))
    print(f"{report.written(measured, like_these, aims)}\n\n{path}")


if __name__ == "__main__":
    main()
