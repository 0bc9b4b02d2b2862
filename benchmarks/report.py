"""Tables and verdicts from kept results alone, of a CPU and of a GPU alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.box import MARKDOWN
from rich.console import Console

from normkit import _bench

Result = Mapping[str, Any]
# A candidate, one of its figures, and the most that the project wants it to be.
Aims = Callable[[Result], list[tuple[str, str, float]]]
UNITS = {"copies": "copies", "us": "us", "over_us": "us above an empty kernel"}


def merge(old: Sequence[Result], new: Result) -> list[Result]:
    """All results, `new` in place of an earlier one of the same case."""

    def case(result: Result) -> tuple[Any, ...]:
        return tuple(map(result.get, ("part", "op", "dtype", "shape", "label", "case", "threads")))

    return list(({case(result): result for result in old} | {case(new): new}).values())


def comparable(results: Iterable[Result], to: Result) -> list[Result]:
    """Those of the same commit that are held against the same copy."""
    return [r for r in results if all(r.get(k) == to.get(k) for k in ("commit", "floor"))]


def rivals(result: Result) -> Iterator[tuple[str, float]]:
    """The other candidates, and their time over that of normkit's call of the same kind."""
    for name in _bench.rivals(result):
        yield name, result["candidates"][name]["of_normkit"]


def shortfalls(results: Iterable[Result], aims: Aims) -> list[str]:
    """Every aim that is missed, and every rival that is faster."""
    found = []
    for r in results:
        where = f"{r['op']} {r['dtype']} {r.get('label', r['shape'])}"
        where += f" (threads: {r['threads']})" if "threads" in r else ""
        for name, figure, most in aims(r):
            value = r["candidates"][name][figure]
            if value > most:
                found.append(f"{where}, {name}: {value:.3g} {UNITS[figure]}, aim {most:.3g}")
        faster = ((name, ratio) for name, ratio in rivals(r) if ratio < 1)
        found += [f"{where}: {1 / ratio:.3f} times the time of {name}" for name, ratio in faster]
    return found


def gains(results: Iterable[Result]) -> list[str]:
    """The geometric mean of a rival's time over normkit's, per op and rival."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for r in results:
        for name, ratio in rivals(r):
            ratios.setdefault((r["op"], name), []).append(ratio)
    means = {key: statistics.geometric_mean(values) for key, values in ratios.items()}
    return [f"{op}: {mean:.3f} times as fast as {name}" for (op, name), mean in means.items()]


def bullets(title: str, lines: Iterable[str]) -> str:
    return "\n".join([f"{title}\n", *(f"- {line}" for line in lines)])


def written(measured: Sequence[Result], kept: Sequence[Result], aims: Aims) -> str:
    """Tables of what was measured, and the verdict over all that is kept of the machine."""
    console, parts = Console(width=250), []
    for part in dict.fromkeys(r.get("part") for r in measured):
        table = _bench.bench_table([r for r in measured if r.get("part") == part])
        table.box = MARKDOWN
        with console.capture() as captured:
            console.print(table)
        parts.append("\n".join(line.strip() for line in captured.get().splitlines()))
    missed = shortfalls(kept, aims)
    parts.append(bullets(f"{len(missed)} shortfalls in the {len(kept)} results kept:", missed))
    parts.append(bullets("Gains (geometric means):", gains(kept)))
    return "\n\n".join(parts)
