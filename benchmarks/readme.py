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
SOME_SHAPES = ("16x4096", "64x4096", "2048x4096")

Result = Mapping[str, Any]


def by_commit(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Those on two threads by commit, the one that has most of them first."""
    two = [r for r in results if r["threads"] == 2]
    counted = Counter(r["commit"] for r in two).most_common()
    return {commit: [r for r in two if r["commit"] == commit] for commit, _ in counted}


def of_one_commit(results: Sequence[Result]) -> list[Result]:
    return next(iter(by_commit(results).values()))


def table(results: Sequence[Result], ops: Sequence[str], shapes: Sequence[str]) -> str:
    """Of the shapes that were measured; empty where a case was not."""
    by_case = {(r["op"], r["dtype"], r["shape"]): r for r in results}
    shapes = [shape for shape in shapes if any(shape == case[2] for case in by_case)]
    if not shapes:
        return ""
    rows = [["", "dtype", *shapes], ["---", "---", *["--:"] * len(shapes)]]
    for op, dtype in itertools.product(ops, DTYPES):
        row = [f"`{op}`", dtype]
        row += [cell(by_case.get((op, dtype, shape))) for shape in shapes]
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cell(result: Result | None) -> str:
    """Copies, and the gain where torch.compile was timed."""
    if result is None:
        return ""
    candidates = result["candidates"]
    copies = f"{candidates['normkit']['copies']:.2f}"
    if "torch.compile" in result.get("without", {}):
        return copies
    gain = min(candidates[k]["of_normkit"] for k in ("torch", "torch.compile") if k in candidates)
    return f"{copies} ({gain:.1f}x)"


def yardstick(results: Sequence[Result]) -> str:
    """What a copy is in these results, and what a gain compares, which older ones do not say."""
    kinds = {
        (r.get("floor", "copy"), r["candidates"]["torch"].get("against", "normkit"))
        for r in results
    }
    if len(kinds) > 1:
        raise ValueError(f"results: expected one kind of copies and gains, got {sorted(kinds)}")
    ((floor, ours),) = kinds
    copies = {"copy": "calls of torch's `copy_`", "C copy": "copies in C of the same bytes"}[floor]
    pairs = {
        "normkit": "that call is as the faster of torch and torch.compile, which allocate.",
        "normkit, allocating": "an allocating call is as the faster of torch and torch.compile.",
    }[ours]
    return f"""Time with `out=` in {copies}, lower is better; in brackets
how many times as fast {pairs}"""


def block(kept: Mapping[str, Any], source: str, *, short: bool) -> str:
    """What was kept in the file `source`, each commit apart; for README.md some of one commit."""
    machine, commits = kept["machine"], by_commit(kept["results"])
    if short:
        commits = dict([next(iter(commits.items()))])
    parts, ops, shapes = [], SOME_OPS if short else OPS, SOME_SHAPES if short else SHAPES
    for commit, results in commits.items():
        tables = [table(results, ops, shapes), "" if short else one_row(results)]
        parts += [f"Commit {commit}, torch {results[0]['torch']}:", *filter(None, tables)]
    model = f" {machine['model']}" if machine.get("model") else ""
    made = "\n\n".join(parts)
    return f"""{BEGIN}
{yardstick([r for results in commits.values() for r in results])}
{machine["cpu"]}{model}, {machine["cores"]} cores \
({machine["isa"]}, {", ".join(machine["caches"])}), 2 threads; made by
`python benchmarks/cpu.py`, put here by `python benchmarks/readme.py RESULTS` from
`benchmarks/results/{source}`.

{made}
{END}"""


def one_row(results: Sequence[Result]) -> str:
    """A line on a single row, if it was measured."""
    for r in results:
        if (r["op"], r["dtype"], r["shape"]) == ("rms_norm", "bfloat16", "1x4096"):
            us = {name: candidate["us"] for name, candidate in r["candidates"].items()}
            return f"""One row of 4096 in bfloat16: {r["kernel_us"]:.2f} us in the kernel, \
{us["normkit"]:.2f} us for the whole Python call with `out=`, \
{us["normkit, allocating"]:.2f} us allocating, {us["torch"]:.1f} us for `F.rms_norm`."""
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="a JSON file of benchmarks/results")
    source = parser.parse_args().results
    kept = json.loads(source.read_text())
    for path in (README, PAGE):
        before, rest = path.read_text().split(BEGIN)
        path.write_text(
            before + block(kept, source.name, short=path is README) + rest.split(END)[1]
        )


if __name__ == "__main__":
    main()
