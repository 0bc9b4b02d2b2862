"""Write the table of README.md from the results that benchmarks/cpu.py has kept."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- cpu-results:begin -->", "<!-- cpu-results:end -->"
OPS = ("rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm")
DTYPES = ("bfloat16", "float16", "float32")
SHAPES = ("16x4096", "64x4096", "32768x128", "2048x4096", "8192x8192")


def cell(result: Mapping[str, Any]) -> str:
    candidates = result["candidates"]
    best_rival = min(
        candidates[name]["of_normkit"] for name in ("torch", "torch.compile") if name in candidates
    )
    return f"{candidates['normkit']['copies']:.2f} ({best_rival:.1f}x)"


def table(results: Iterable[Mapping[str, Any]]) -> str:
    by_key = {(r["op"], r["dtype"], r["shape"]): r for r in results}
    lines = ["| | dtype | " + " | ".join(SHAPES) + " |", "|---|---|" + "--:|" * len(SHAPES)]
    for op in OPS:
        for dtype in DTYPES:
            cells = (cell(by_key[op, dtype, shape]) for shape in SHAPES)
            lines.append(f"| `{op}` | {dtype} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def one_row(results: Iterable[Mapping[str, Any]]) -> str:
    result = next(
        r
        for r in results
        if (r["op"], r["dtype"], r["shape"]) == ("rms_norm", "bfloat16", "1x4096")
    )
    us = {name: candidate["us"] for name, candidate in result["candidates"].items()}
    return (
        f"One row of 4096 in bfloat16: {result['kernel_us']:.2f} us in the kernel,"
        f" {us['normkit']:.2f} us for the whole Python call with `out=`,"
        f" {us['normkit, allocating']:.2f} us allocating, {us['torch']:.1f} us for `F.rms_norm`."
    )


def block(kept: Mapping[str, Any]) -> str:
    machine, results = kept["machine"], kept["results"]
    commits = ", ".join(sorted({r["commit"] for r in results}))
    return "\n".join(
        (
            BEGIN,
            "Time in copies, lower is better; in brackets how many times as fast as the faster of",
            f"torch and torch.compile. {machine['cpu']}, {machine['cores']} cores"
            f" ({machine['isa']}, {', '.join(machine['caches'])}), torch {results[0]['torch']},",
            f"2 threads, commit {commits}; made by `python benchmarks/cpu.py`, put here by",
            "`python benchmarks/readme.py RESULTS`.",
            "",
            table(results),
            "",
            one_row(results),
            "Why: [what limits the kernels](docs/benchmarks.md#what-limits-the-kernels).",
            END,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="a JSON file of benchmarks/results")
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    kept = json.loads(parser.parse_args().results.read_text())
    readme.write_text(before + block(kept) + after)


if __name__ == "__main__":
    main()
