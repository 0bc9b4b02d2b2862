"""What the GPU benchmarks print and draw, from their JSON alone: no GPU is needed."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_cases import COMPILED, RIVALS

from normkit._bench import NORMKIT, TORCH

Result = Mapping[str, Any]
LARGE_BYTES = 256 << 20  # below this, what a launch costs shows even in a plain copy
COMPETITORS = (TORCH, COMPILED, *RIVALS)
# column of the latency part -> whether the second-level cache is hot, whether launches overlap
COLUMNS = {
    "hot, PDL": (True, True),
    "hot, no PDL": (True, False),
    "cold, PDL": (False, True),
    "cold, no PDL": (False, False),
}
BARE = "bare launch"

# What the project wants to reach.
AIM_RMS, AIM_ADD, AIM_HEADS = 0.95, 0.95, {64: 0.92, 128: 0.95}
AIM_HOT_US, AIM_COLD_US = 0.7, 1.2
AIM_CALL_US, AIM_ALLOCATING_US = 0.5, 1.3


def slug(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def of_part(results: Iterable[Result], part: str) -> list[Result]:
    return [r for r in results if r["part"] == part]


def key(result: Result) -> tuple[str, ...]:
    return tuple(result[name] for name in ("part", "op", "dtype", "shape", "layout"))


def merge(old: Iterable[Result], new: Result) -> list[Result]:
    """All results, `new` in place of an earlier one of the same case."""
    return [*(r for r in old if key(r) != key(new)), new]


def best_rival(result: Result) -> tuple[str, float] | None:
    """The fastest competitor, and its time over normkit's: above 1, normkit is the faster."""
    cells = result["candidates"]
    ratios = {name: cells[name]["of_normkit"] for name in COMPETITORS if name in cells}
    if not ratios:
        return None
    name = min(ratios, key=lambda n: ratios[n])
    return name, ratios[name]


# ------------------------------------------------------------------------------------------ tables


def throughput_table(results: Iterable[Result]) -> str:
    lines = [
        "| op | dtype | shape | MB | us | TB/s | of copy | spread | torch | compile | liger "
        "| quack | flashinfer | vllm |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    order = sorted(results, key=lambda r: (r["op"], r["dtype"], r["layout"], r["bytes"]))
    for r in order:
        ours = r["candidates"][NORMKIT]
        layout = "" if r["layout"] == "contiguous" else f" {r['layout']}"
        low, high = ours["of_copy_quartiles"]
        row = [r["op"], r["dtype"], r["shape"] + layout, f"{r['bytes'] / 1e6:.1f}"]
        row += [f"{ours['us']:.2f}", f"{ours['tb_s']:.2f}", f"{ours['of_copy']:.3f}"]
        row.append(f"{high - low:.3f}")
        for name in COMPETITORS:
            cell = r["candidates"].get(name)
            row.append(f"{cell['of_normkit']:.2f}" if cell else "-")
        lines.append(f"| {' | '.join(row)} |")
    note = "A competitor's column is its time over normkit's: above 1, normkit is the faster."
    return "\n".join([*lines, "", note])


def latency_table(results: Iterable[Result]) -> str:
    lines = [
        "| op | shape | " + " | ".join(COLUMNS) + " | empty us | torch us |",
        "|---|---|" + "--:|" * (len(COLUMNS) + 2),
    ]
    for r in results:
        cells = []
        for column in COLUMNS:
            cell = r["columns"].get(column)
            if cell is None:
                cells.append("-")
                continue
            low, high = cell["over_empty_range"]
            cells.append(f"{cell['over_empty']:.2f} ({low:.2f}-{high:.2f})")
        first: Result = next(iter(r["columns"].values()), {})
        cells += [f"{first[k]:.2f}" if k in first else "-" for k in ("empty_us", "torch_us")]
        lines.append(f"| {r['op']} | {r['shape']} | {' | '.join(cells)} |")
    note = "Microseconds of a call in a graph above an empty kernel launched alike; in brackets"
    return "\n".join([*lines, "", f"{note} the range over processes."])


def eager_table(results: Sequence[Result]) -> str:
    names = list(dict.fromkeys(name for r in results for name in r["candidates"]))
    lines = [
        "| us a call | shape | " + " | ".join(names) + " |",
        "|---|---|" + "--:|" * len(names),
    ]
    for r in results:
        cells = [f"{r['candidates'][n]['us']:.2f}" if n in r["candidates"] else "-" for n in names]
        lines.append(f"| {r['op']} | {r['shape']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def markdown(kept: Mapping[str, Any]) -> str:
    results = kept["results"]
    parts = [headline_table(results)]
    for part, table in (
        ("latency", latency_table),
        ("eager", eager_table),
        ("throughput", throughput_table),
    ):
        chosen = of_part(results, part)
        if chosen:
            parts.append(f"### {part}\n\n{table(chosen)}")
    failed = [f"- {where}: {why}" for where, why in kept.get("failed", {}).items()]
    if failed:
        parts.append("\n".join(["### failed", "", *failed]))
    absent = sorted({f"- {n}: {why}" for r in results for n, why in r.get("without", {}).items()})
    if absent:
        parts.append("\n".join(["### left out", "", *absent]))
    return "\n\n".join(parts)


# --------------------------------------------------------------------------------------- headlines


def _fractions(results: Iterable[Result], op: str) -> list[float]:
    return [
        r["candidates"][NORMKIT]["of_copy"]
        for r in of_part(results, "throughput")
        if (r["op"], r["dtype"], r["layout"]) == (op, "bfloat16", "contiguous")
        and r["bytes"] >= LARGE_BYTES
        and int(r["shape"].split("x")[-1]) % 8 == 0  # the others are in the table
    ]


def _head_fractions(results: Iterable[Result], head_dim: int) -> list[float]:
    return [
        r["candidates"][NORMKIT]["of_copy"]
        for r in of_part(results, "throughput")
        if (r["op"], r["dtype"], r["layout"]) == ("head_norm", "bfloat16", "contiguous")
        and r["bytes"] >= LARGE_BYTES
        and r["shape"].endswith(f"x{head_dim}")
    ]


def _over_empty(results: Iterable[Result], hot: bool) -> list[float]:
    """The better of with and without overlapping launches, of 1 to 64 rows of 4096 to 8192."""
    found = []
    for r in of_part(results, "latency"):
        sizes = [int(size) for size in r["shape"].split("x")]
        if r["op"] not in ("rms_norm", "add_rms_norm") or len(sizes) != 2:
            continue
        if not (sizes[0] <= 64 and 4096 <= sizes[1] <= 8192):
            continue
        cells = [r["columns"][c]["over_empty"] for c, (h, _) in COLUMNS.items()
                 if h == hot and c in r["columns"]]  # fmt: skip
        if cells:
            found.append(min(cells))
    return found


def _above_launch(results: Iterable[Result], name: str) -> list[float]:
    return [
        r["candidates"][name]["over_launch"]
        for r in of_part(results, "eager")
        if r["op"] == "rms_norm" and name in r["candidates"]
    ]


def headlines(results: Sequence[Result]) -> list[tuple[str, str, str, bool | None]]:
    """(what, measured, aim, whether it is met or None where there is no aim)."""
    found: list[tuple[str, str, str, bool | None]] = []

    def at_least(what: str, values: Sequence[float], aim: float) -> None:
        if values:
            low, middle = min(values), statistics.median(values)
            text = f"{low:.3f} at worst, {middle:.3f} median of {len(values)}"
            found.append((what, text, f">= {aim}", low >= aim))

    def at_most(what: str, values: Sequence[float], aim: float) -> None:
        if values:
            high, middle = max(values), statistics.median(values)
            text = f"{high:.2f} us at worst, {middle:.2f} median of {len(values)}"
            found.append((what, text, f"<= {aim} us", high <= aim))

    at_least("rms_norm bf16 from 256 MB, of copy", _fractions(results, "rms_norm"), AIM_RMS)
    at_least("add_rms_norm bf16 from 256 MB, of copy", _fractions(results, "add_rms_norm"), AIM_ADD)
    for head_dim, aim in AIM_HEADS.items():
        what = f"head_dim {head_dim} bf16 from 256 MB, of copy"
        at_least(what, _head_fractions(results, head_dim), aim)
    few = "1 to 64 rows of 4096 to 8192, above empty"
    at_most(f"{few}, hot L2", _over_empty(results, hot=True), AIM_HOT_US)
    at_most(f"{few}, cold L2", _over_empty(results, hot=False), AIM_COLD_US)
    at_most("eager with out=, above a bare launch", _above_launch(results, NORMKIT), AIM_CALL_US)
    allocating = _above_launch(results, f"{NORMKIT}, allocating")
    at_most("eager allocating, above a bare launch", allocating, AIM_ALLOCATING_US)
    rivals = [
        (rival[1], rival[0], f"{r['op']} {r['dtype']} {r['shape']}")
        for r in of_part(results, "throughput")
        if (rival := best_rival(r)) is not None
    ]
    if rivals:
        worst = min(rivals)
        text = f"{worst[0]:.2f} ({worst[1]}, {worst[2]})"
        found.append(("best competitor over normkit, at worst", text, ">= 1", worst[0] >= 1))
        mean = statistics.geometric_mean(ratio for ratio, _, _ in rivals)
        found.append((f"the same, geometric mean of {len(rivals)}", f"{mean:.2f}", "", None))
    return found


def headline_table(results: Sequence[Result]) -> str:
    lines = ["| figure | measured | aim | met |", "|---|---|---|---|"]
    for what, measured, aim, met in headlines(results):
        verdict = "" if met is None else "yes" if met else "**no**"
        lines.append(f"| {what} | {measured} | {aim} | {verdict} |")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------- drawing

_STYLES = {
    "rms_norm": {"marker": "o", "color": "#0060c0"},
    "add_rms_norm": {"marker": "s", "color": "#d95f02"},
    "layer_norm": {"marker": "^", "color": "#1b9e77"},
    "add_layer_norm": {"marker": "v", "color": "#66a61e"},
    "head_norm": {"marker": "d", "color": "#7570b3"},
}


def plot(kept: Mapping[str, Any], path: Path) -> None:
    """Fractions of a copy and ratios to the best competitor, over bytes; us above empty."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    results = kept["results"]
    figure, axes = plt.subplots(3, 1, figsize=(11, 14), layout="constrained")
    moved = of_part(results, "throughput")
    for op, style in _STYLES.items():
        of_op = [r for r in moved if r["op"] == op]
        if not of_op:
            continue
        at = [r["bytes"] / 1e6 for r in of_op]
        fractions = [r["candidates"][NORMKIT]["of_copy"] for r in of_op]
        marks = {"linestyle": "none", "markersize": 4, "alpha": 0.7, "label": op, **style}
        axes[0].plot(at, fractions, **marks)
        ratios = [(a, rival[1]) for a, r in zip(at, of_op, strict=True) if (rival := best_rival(r))]
        axes[1].plot([a for a, _ in ratios], [ratio for _, ratio in ratios], **marks)
    axes[0].set_ylabel("time of a copy / time of the norm")
    axes[1].set_ylabel("time of the best competitor / time of the norm")
    axes[1].set_yscale("log")
    for axis in axes[:2]:
        axis.set_xscale("log")
        axis.set_xlabel("MB read and written")
        axis.axhline(1, color="#2ca02c", linewidth=1, linestyle="--", zorder=0)
        axis.grid(alpha=0.3)
        if moved:
            axis.legend(frameon=False)
    axes[0].axvline(LARGE_BYTES / 1e6, color="black", linewidth=0.8, linestyle=":")
    _draw_latency(axes[2], of_part(results, "latency"))
    machine = kept["machine"]
    versions = sorted({f"torch {r['torch']}, commit {r['commit']}" for r in results})
    figure.suptitle(f"normkit on {machine['gpu']}; {'; '.join(versions)}; higher is better in 1, 2")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_latency(axis: Any, results: Sequence[Result]) -> None:
    width = 0.8 / len(COLUMNS)
    for i, column in enumerate(COLUMNS):
        cells = {at: r["columns"][column] for at, r in enumerate(results) if column in r["columns"]}
        if not cells:
            continue
        heights = [cell["over_empty"] for cell in cells.values()]
        low, high = zip(*(cell["over_empty_range"] for cell in cells.values()), strict=True)
        spread = [
            [max(h - b, 0) for h, b in zip(heights, low, strict=True)],
            [max(b - h, 0) for h, b in zip(heights, high, strict=True)],
        ]
        at = [x + (i - 1.5) * width for x in cells]
        axis.bar(at, heights, width, yerr=spread, label=column, error_kw={"linewidth": 0.8})
    axis.axhline(AIM_HOT_US, color="black", linewidth=0.8, linestyle=":")
    axis.axhline(AIM_COLD_US, color="black", linewidth=0.8, linestyle=":")
    labels = [f"{r['op']}\n{r['shape']}" for r in results]
    axis.set_xticks(range(len(results)), labels, rotation=35, ha="right", fontsize=8)
    axis.set_ylabel("us above an empty kernel")
    axis.grid(axis="y", alpha=0.3)
    if results:
        axis.legend(frameon=False)
