"""Write the table of README.md from the results that benchmarks/cpu.py has kept."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- cpu-results:begin -->", "<!-- cpu-results:end -->"
OPS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
DTYPES = ("bfloat16", "float16", "float32")
SHAPES = ("16x4096", "64x4096", "32768x128", "2048x4096", "8192x8192")


def block(kept: Mapping[str, Any]) -> str:
    machine, results = kept["machine"], kept["results"]
    by_case = {(r["op"], r["dtype"], r["shape"]): r for r in results}
    commits = ", ".join(sorted({r["commit"] for r in results}))
    model = f" {machine['model']}" if machine.get("model") else ""
    rows = [["", "dtype", *SHAPES], ["---", "---", *["--:"] * len(SHAPES)]]
    for op, dtype in itertools.product(OPS, DTYPES):
        row = [f"`{op}`", dtype]
        for cells in (by_case[op, dtype, shape]["candidates"] for shape in SHAPES):
            best = min(cells[k]["of_normkit"] for k in ("torch", "torch.compile") if k in cells)
            row.append(f"{cells['normkit']['copies']:.2f} ({best:.1f}x)")
        rows.append(row)
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    one = by_case["rms_norm", "bfloat16", "1x4096"]
    us = {name: candidate["us"] for name, candidate in one["candidates"].items()}
    return f"""{BEGIN}
Time in copies, lower is better; in brackets how many times as fast as the faster of
torch and torch.compile. {machine["cpu"]}{model}, {machine["cores"]} cores \
({machine["isa"]}, {", ".join(machine["caches"])}), torch {results[0]["torch"]},
2 threads, commit {commits}; made by `python benchmarks/cpu.py`, put here by
`python benchmarks/readme.py RESULTS`.

{table}

One row of 4096 in bfloat16: {one["kernel_us"]:.2f} us in the kernel, {us["normkit"]:.2f} us \
for the whole Python call with `out=`, {us["normkit, allocating"]:.2f} us allocating, \
{us["torch"]:.1f} us for `F.rms_norm`.
Why: [what limits the kernels](docs/benchmarks.md#what-limits-the-kernels).
{END}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="a JSON file of benchmarks/results")
    kept = json.loads(parser.parse_args().results.read_text())
    before, rest = README.read_text().split(BEGIN)
    README.write_text(before + block(kept) + rest.split(END)[1])


if __name__ == "__main__":
    main()
