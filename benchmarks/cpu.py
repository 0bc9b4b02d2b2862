"""How fast are the norms on this CPU, against torch and against a plain copy of the same bytes?

    python benchmarks/cpu.py                         # everything, about 20 minutes on 2 cores
    python benchmarks/cpu.py --only rms_norm --dtypes bfloat16 --shapes 16x4096 --no-compile

Prints a Markdown table in units of copies, and keeps the results of all runs on a machine in
results/cpu-<machine>.json and .png. README.md in this folder says how to read them.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import re
import statistics
import sys
import timeit
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from normkit import _bench
from normkit._bench import COPY, NORMKIT, TORCH, Op

COMPILED = "torch.compile"
ALLOCATING = "normkit, allocating"
SHAPES = ("1x4096", "16x4096", "64x4096", "2048x4096", "8192x8192", "32768x128")

Limits = dict[str, float]


def _limits(rms: float, layer: float, add: float) -> Limits:
    return {"rms_norm": rms, "layer_norm": layer, "add_rms_norm": add}


# What the project wants to reach, in copies. Small shapes differ by the width of the elements.
SMALL_16_BIT, SMALL_32_BIT = _limits(1.2, 2.0, 1.5), _limits(1.2, 1.6, 1.3)
LARGE = {
    "2048x4096": _limits(1.25, 1.5, 1.15),
    "32768x128": _limits(1.3, 1.6, 1.25),
    "8192x8192": _limits(1.0, 1.05, 1.05),
}
# One row of 4096, in microseconds.
ONE_ROW = {"kernel": 0.4, NORMKIT: 0.5, ALLOCATING: 1.3}


def limit(op: str, dtype: str, shape: str) -> float | None:
    if shape in ("16x4096", "64x4096"):
        return (SMALL_32_BIT if dtype == "float32" else SMALL_16_BIT).get(op)
    return LARGE.get(shape, {}).get(op)


# ----------------------------------------------------------------------------------- torch.compile


def _add_rms_norm(x: Any, residual: Any, weight: Any) -> Any:
    total = x + residual
    return F.rms_norm(total, total.shape[-1:], weight, 1e-6), total


def _add_layer_norm(x: Any, residual: Any, weight: Any, bias: Any) -> Any:
    total = x + residual
    return F.layer_norm(total, total.shape[-1:], weight, bias), total


# op -> the function to compile, and the call of the compiled one
TO_COMPILE: dict[str, tuple[Callable[..., Any], str]] = {
    "rms_norm": (lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, 1e-6), "(x, weight)"),
    "layer_norm": (
        lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias),
        "(x, weight, bias)",
    ),
    "add_rms_norm": (_add_rms_norm, "(x, residual, weight)"),
    "add_layer_norm": (_add_layer_norm, "(x, residual, weight, bias)"),
    "head_norm": (
        lambda x, weight: F.rms_norm(x, x.shape[-1:], None, 1e-6) * weight,
        "(x, weight)",
    ),
    "head_norm_layer": (
        lambda x, weight, bias: F.layer_norm(x, x.shape[-1:]) * weight + bias,
        "(x, weight, bias)",
    ),
}


class Compiler:
    """Adds torch.compile's version of an op; keeps the reason once it turns out not to work."""

    def __init__(self, enabled: bool) -> None:
        self.missing = None if enabled else "not asked for (--no-compile)"

    def candidate(self, name: str, names: dict[str, Any]) -> dict[str, str]:
        if self.missing:
            return {}
        function, arguments = TO_COMPILE[name]
        torch.compiler.reset()  # one static version per shape and dtype, never a dynamic one
        names["compiled"] = torch.compile(function, dynamic=False, fullgraph=True)
        statement = "compiled" + arguments
        try:
            eval(statement, names)
        except RuntimeError as error:  # of which torch's compiler errors are subclasses
            lines = [line for line in str(error).splitlines() if line.strip()]
            self.missing = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
            print(f"torch.compile is left out: {self.missing}", file=sys.stderr)
            return {}
        return {COMPILED: statement}


# --------------------------------------------------------------------------------------- measuring


def row_kernel_us(name: str, n: int, dtype: str, rounds: int) -> float:
    """Microseconds of one more row: a call on two rows less a call on one, so without the call."""
    with torch.no_grad():
        one = _bench.operands(_bench.OPS[name], (1, n), _bench.DTYPES[dtype])
        two = _bench.operands(_bench.OPS[name], (2, n), _bench.DTYPES[dtype])
        statement = _bench.OPS[name].normkit
        timers = {k: timeit.Timer(statement, globals=v) for k, v in (("1", one), ("2", two))}
        samples = _bench.paired(timers, rounds).samples
    return statistics.median(b - a for a, b in zip(samples["1"], samples["2"], strict=True)) * 1e6


def run_case(name: str, shape: str, dtype: str, rounds: int, compiler: Compiler) -> dict[str, Any]:
    rows, n = map(int, shape.split("x"))

    def more(op: Op, names: dict[str, Any]) -> Mapping[str, str]:
        allocating = {ALLOCATING: op.allocating} if rows == 1 else {}
        return allocating | compiler.candidate(name, names)

    result = _bench.measure(name, rows, n, dtype, rounds, more)
    if rows == 1 and not _bench.OPS[name].heads:
        result["kernel_us"] = row_kernel_us(name, n, dtype, rounds)
    result["limit"] = limit(name, dtype, shape)
    result["case"] = shape
    if compiler.missing:
        result["without"] = {COMPILED: compiler.missing}
    gc.collect()  # the next case wants the heap as this one found it
    return result | _bench.run_stamp()


def merge(old: Iterable[Mapping[str, Any]], new: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All results, `new` in place of an earlier one of the same case, in the tables' order."""

    def key(result: Mapping[str, Any]) -> tuple[int, int, int, str]:
        return (
            list(_bench.OPS).index(result["op"]),
            list(_bench.DTYPES).index(result["dtype"]),
            result["threads"],
            result["case"],
        )

    kept = [result for result in old if key(result) != key(new)]
    return sorted([*kept, new], key=lambda r: (*key(r)[:3], r["elements"], r["case"]))


# --------------------------------------------------------------------------------------- reporting


def markdown(results: Iterable[Mapping[str, Any]]) -> str:
    lines = [
        "| op | dtype | shape | copy us | normkit | aim | met | torch | compile "
        "| torch / normkit | compile / normkit |",
        "|---|---|---|--:|--:|--:|---|--:|--:|--:|--:|",
    ]
    for result in results:
        ours, theirs = result["candidates"][NORMKIT], result["candidates"][TORCH]
        compiled, aim = result["candidates"].get(COMPILED), result["limit"]
        row = [result["op"], result["dtype"], result["shape"]]
        row += [f"{result['candidates'][COPY]['us']:.2f}", f"{ours['copies']:.2f}"]
        row += ["", ""] if aim is None else [f"{aim}", "yes" if ours["copies"] <= aim else "**no**"]
        row += [f"{theirs['copies']:.2f}", f"{compiled['copies']:.2f}" if compiled else "-"]
        row += [f"{theirs['of_normkit']:.2f}", f"{compiled['of_normkit']:.2f}" if compiled else "-"]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def one_row_figures(result: Mapping[str, Any]) -> dict[str, float]:
    """Microseconds of the ways to call one op on one row, the kernel alone first."""
    kernel = {"kernel": result["kernel_us"]} if "kernel_us" in result else {}
    return kernel | {name: cell["us"] for name, cell in result["candidates"].items()}


def one_row_markdown(results: Iterable[Mapping[str, Any]]) -> str:
    columns = ("kernel", NORMKIT, ALLOCATING, TORCH, COMPILED, COPY)
    lines = [
        "| one row, us | dtype | kernel | with out= | allocating | torch | compile | copy |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for result in results:
        us = one_row_figures(result)
        cells = [f"{us[name]:.2f}" if name in us else "-" for name in columns]
        lines.append(f"| {result['op']} | {result['dtype']} | {' | '.join(cells)} |")
    aims = f"Aims for rms_norm: kernel {ONE_ROW['kernel']} (bfloat16), "
    aims += f"with out= {ONE_ROW[NORMKIT]}, allocating {ONE_ROW[ALLOCATING]}."
    return "\n".join([*lines, "", aims])


def shortfalls(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """What the results miss: aims in copies or microseconds, and any competitor that is faster."""
    found = []
    for r in results:
        where = f"{r['op']} {r['dtype']} {r['shape']} (threads: {r['threads']})"
        cells = r["candidates"]
        if r["limit"] is not None and cells[NORMKIT]["copies"] > r["limit"]:
            found.append(f"{where}: {cells[NORMKIT]['copies']:.2f} copies, aim {r['limit']}")
        for rival in (TORCH, COMPILED):
            if rival in cells and cells[rival]["of_normkit"] < 1:
                slower = 1 / cells[rival]["of_normkit"]
                found.append(f"{where}: takes {slower:.2f} times as long as {rival}")
        if r["op"] == "rms_norm" and r["case"] == "1x4096":
            us = one_row_figures(r)
            for name, aim in ONE_ROW.items():
                if us[name] > aim and (name != "kernel" or r["dtype"] == "bfloat16"):
                    found.append(f"{where}, {name}: {us[name]:.2f} us, aim {aim}")
    return found


def gains(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """The geometric mean of a competitor's time over normkit's, per op and competitor."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for result in results:
        for rival in (TORCH, COMPILED):
            if rival in result["candidates"]:
                ratio = result["candidates"][rival]["of_normkit"]
                ratios.setdefault((result["op"], rival), []).append(ratio)
    return [
        f"{op}: {statistics.geometric_mean(values):.2f} times as fast as {rival} "
        f"(geometric mean of {len(values)})"
        for (op, rival), values in ratios.items()
    ]


def machine_slug(machine: Mapping[str, Any]) -> str:
    name = re.sub(r"\((r|tm)\)|\bcpu\b|@.*", " ", machine["cpu"].lower())
    return re.sub(r"[^a-z0-9]+", "-", f"{name} {machine['cores']} cores").strip("-")


def report(measured: list[Mapping[str, Any]], everything: list[Mapping[str, Any]]) -> str:
    parts = [markdown(r for r in measured if r["case"] != "1x4096")]
    one_row = [r for r in measured if r["case"] == "1x4096"]
    if one_row:
        parts.append(one_row_markdown(one_row))
    missed = shortfalls(everything)
    count = f"{len(missed)} shortfalls in the {len(everything)} results kept for this machine"
    parts.append("\n".join([count + (":" if missed else "."), *(f"- {line}" for line in missed)]))
    parts.append("\n".join(f"- {line}" for line in gains(everything)))
    return "\n\n".join(parts)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ops, dtypes = list(_bench.OPS), list(_bench.DTYPES)
    parser.add_argument("--only", nargs="+", choices=ops, default=ops, metavar="OP")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, type=_shape, metavar="ROWSxN")
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes, metavar="DTYPE")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def _shape(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"expected ROWSxN, such as 16x4096, got {text!r}")
    return text


def main() -> None:
    args = arguments()
    _bench.pin_heap(args.threads)
    torch.set_num_threads(args.threads)
    machine = _bench.machine()
    path = args.out / f"cpu-{machine_slug(machine)}.json"
    kept = json.loads(path.read_text())["results"] if path.exists() else []
    compiler = Compiler(enabled=not args.no_compile)
    measured: list[Mapping[str, Any]] = []
    cases = list(itertools.product(args.only, args.dtypes, args.shapes))
    for number, (op, dtype, shape) in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}] {op} {dtype} {shape}", file=sys.stderr)
        result = run_case(op, shape, dtype, args.rounds, compiler)
        measured, kept = merge(measured, result), merge(kept, result)
        _bench.write_json(path, {"machine": machine, "results": kept})
    title = f"normkit on {machine['cpu']}, {machine['cores']} cores, {machine['isa']}, "
    title += f"torch {torch.__version__}, threads: {args.threads}"
    _bench.plot([r for r in kept if r["threads"] == args.threads], title, path.with_suffix(".png"))
    print(report(measured, kept))
    print(f"\n{path}\n{path.with_suffix('.png')}", file=sys.stderr)


if __name__ == "__main__":
    main()
