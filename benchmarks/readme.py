"""Write the tables of README.md and docs/benchmarks.md from what benchmarks/cpu.py has kept."""

from __future__ import annotations

import argparse
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- cpu-results:begin -->", "<!-- cpu-results:end -->"
OPS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
SOME_OPS = ("rms_norm", "add_rms_norm", "layer_norm")
DTYPES = ("bfloat16", "float16", "float32")
SHAPES = ("16x4096", "64x4096", "32768x128", "2048x4096", "8192x8192")
SOME_SHAPES = ("16x4096", "64x4096", "8192x8192")

Result = Mapping[str, Any]


def of_one_commit(results: Sequence[Result]) -> list[Result]:
    """Those of the commit that has most of them."""
    ((commit, _),) = Counter(r["commit"] for r in results).most_common(1)
    return [r for r in results if r["commit"] == commit]


def table(results: Sequence[Result], ops: Sequence[str], shapes: Sequence[str]) -> str:
    by_case = {(r["op"], r["dtype"], r["shape"]): r for r in results}
    rows = [["", "dtype", *shapes], ["---", "---", *["--:"] * len(shapes)]]
    for op, dtype in itertools.product(ops, DTYPES):
        row = [f"`{op}`", dtype]
        for cells in (by_case[op, dtype, shape]["candidates"] for shape in shapes):
            best = min(cells[k]["of_normkit"] for k in ("torch", "torch.compile") if k in cells)
            row.append(f"{cells['normkit']['copies']:.2f} ({best:.1f}x)")
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def block(kept: Mapping[str, Any], *, short: bool) -> str:
    """For README.md what one commit has; else everything."""
    machine = kept["machine"]
    results = of_one_commit(kept["results"]) if short else kept["results"]
    made = table(results, SOME_OPS, SOME_SHAPES) if short else table(results, OPS, SHAPES)
    commits = ", ".join(sorted({r["commit"] for r in results}))
    model = f" {machine['model']}" if machine.get("model") else ""
    head = f"""{BEGIN}
Time in copies, lower is better; in brackets how many times as fast as the faster of
torch and torch.compile. {machine["cpu"]}{model}, {machine["cores"]} cores \
({machine["isa"]}, {", ".join(machine["caches"])}),
torch {results[0]["torch"]}, 2 threads, commit {commits}; made by
`python benchmarks/cpu.py`, put here by `python benchmarks/readme.py RESULTS`.

{made}
"""
    return head + END if short else f"{head}\n{one_row(results)}\n{END}"


def one_row(results: Sequence[Result]) -> str:
    (one,) = (
        r
        for r in results
        if (r["op"], r["dtype"], r["shape"]) == ("rms_norm", "bfloat16", "1x4096")
    )
    us = {name: candidate["us"] for name, candidate in one["candidates"].items()}
    return f"""One row of 4096 in bfloat16: {one["kernel_us"]:.2f} us in the kernel, \
{us["normkit"]:.2f} us for the whole Python call with `out=`, \
{us["normkit, allocating"]:.2f} us allocating, \
{us["torch"]:.1f} us for `F.rms_norm`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="a JSON file of benchmarks/results")
    kept = json.loads(parser.parse_args().results.read_text())
    for path in (README, PAGE):
        before, rest = path.read_text().split(BEGIN)
        path.write_text(before + block(kept, short=path is README) + rest.split(END)[1])


if __name__ == "__main__":
    main()
