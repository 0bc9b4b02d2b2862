"""Draw the figures of the documentation from the results that are kept.

    python benchmarks/figures.py                    # all of them
    python benchmarks/figures.py speed gradients    # some

Nothing is measured: each figure is drawn from one file of results/ and carries its digest, so that
a test sees a figure that is older than its results.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from machine import RESULTS
from readme import of_one_commit

from normkit._bench import TORCH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
COLOURS = {"normkit": "#0060c0", "torch": "#d95f02", "torch.compile": "#7a7a7a"}
OTHER = "#7a7a7a"


def speed(figure: Figure, kept: Mapping[str, Any]) -> None:
    """Times of two ops in copies: bars of normkit and of torch."""
    results = of_one_commit(kept["results"])
    shapes = [
        s for s in ("16x4096", "64x4096", "2048x4096") if any(r["case"] == s for r in results)
    ]
    axes = figure.subplots(1, 2, sharey=True)
    for axis, op in zip(axes, ("rms_norm", "layer_norm"), strict=True):
        cases = {r["case"]: r["candidates"] for r in results if by(r, op, "bfloat16")}
        for i, (name, colour) in enumerate(COLOURS.items()):
            values = [cases[shape][name]["copies"] for shape in shapes]
            bars_of(axis, i, values, fontsize=8, color=colour, label=name)
        axis.axhline(1, color="#2ca02c", linewidth=1, linestyle="--", label="one copy")
        axis.set_title(f"{op}, bfloat16", fontsize=10)
        axis.set_xticks(range(len(shapes)), shapes, fontsize=9)
    axes[0].set_ylabel("time in copies of the same bytes")
    one_legend(figure, axes[0])


def bars_of(axis: Axes, i: int, values: Sequence[float], fontsize: int, **options: str) -> None:
    """The bars of one of three things that stand side by side, with their values."""
    at = [place + 0.27 * (i - 1) for place in range(len(values))]
    bars = axis.bar(at, values, 0.25, **options)
    axis.bar_label(bars, fmt="%.1f", fontsize=fontsize)


def by(result: Mapping[str, Any], op: str, dtype: str) -> bool:
    return (result["op"], result["dtype"]) == (op, dtype)


def gradients(figure: Figure, kept: Mapping[str, Any]) -> None:
    """How many times as fast as torch the backward pass is."""
    results = kept["results"]
    shapes = list(dict.fromkeys(r["shape"] for r in results))
    axes = figure.subplots(1, 2)
    for axis, op in zip(axes, ("rms_norm", "layer_norm"), strict=True):
        for i, dtype in enumerate(("bfloat16", "float16", "float32")):
            cells = {r["shape"]: r["candidates"][TORCH] for r in results if by(r, op, dtype)}
            gains = [cells[shape]["of_normkit"] for shape in shapes]
            bars_of(axis, i, gains, fontsize=7, label=dtype)
        axis.axhline(1, color="black", linewidth=1, linestyle="--", label="torch")
        axis.set_title(f"backward of {op}", fontsize=10)
        axis.set_xticks(range(len(shapes)), shapes, fontsize=8)
    axes[0].set_ylabel("times as fast as torch")
    one_legend(figure, axes[0])


def host(figure: Figure, kept: Mapping[str, Any]) -> None:
    """What calls of next to no elements cost."""
    axis = figure.subplots()
    shown = {k: v["ns"] for k, v in kept["lines"].items() if k[0] != "4" and k != "operator"}
    names = {"rms_norm": COLOURS["normkit"], "F.rms_norm": COLOURS["torch"], "nn.RMSNorm": OTHER}
    for i, (name, colour) in enumerate(names.items()):
        cells = {at: ns[name] for at, ns in enumerate(shown.values()) if name in ns}
        at = [place + 0.27 * (i - 1) for place in cells]
        bars = axis.barh(at, [ns / 1e3 for ns in cells.values()], 0.25, color=colour, label=name)
        axis.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    axis.set_yticks(range(len(shown)), list(shown))
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlim(0.5, 400)
    axis.minorticks_off()
    axis.set_xlabel("microseconds of a call on 4x64 float32, one thread")
    axis.legend(fontsize=8)


def errors(figure: Figure, kept: Mapping[str, Any]) -> None:
    """Errors against float64 in four panels."""
    (length, mean), (bits, rows) = figure.subplots(2, 2)
    lines(length, kept["length"])
    length.axhline(1, color="black", linewidth=1, linestyle="--", label="the bound")
    length.set(title="float32: largest error over the bound", xlabel="columns", ylim=(0, 1.1))
    lines(mean, kept["mean"])
    mean.set(title="layer_norm of rows far from 0", xlabel="mean over deviation", yscale="log")
    mean.minorticks_off()
    mean.set_ylabel("error over the largest y")
    lines(rows, kept["rows"])
    rows.set(title="gradient of a weight, float32", xlabel="rows", ylim=(0, None))
    rows.set_ylabel("error over the largest gradient")
    shares = {name: 100 * found["beyond a half"] for name, found in kept["bfloat16"].items()}
    bars = bits.barh(
        list(shares), list(shares.values()), color=[COLOURS.get(n, OTHER) for n in shares]
    )
    labels = [
        f"{s:.1f} %, at most {f['largest']:.2f} steps"
        for s, f in zip(shares.values(), kept["bfloat16"].values(), strict=True)
    ]
    bits.bar_label(bars, labels, fontsize=8, padding=3)
    bits.set(title="bfloat16 rms_norm: not the nearest", xlim=(0, 2.2 * max(*shares.values(), 1)))
    bits.set_xlabel("% further than half a step from float64")
    bits.invert_yaxis()
    for axis in (length, mean, rows):
        axis.legend(fontsize=8)


def lines(axis: Axes, points: Mapping[str, Mapping[str, float]]) -> None:
    for name in next(iter(points.values())):
        who = name.rpartition(", ")[2]
        style = "--" if name.startswith("layer") else "-"
        values = [errors[name] for errors in points.values()]
        axis.plot(
            [int(p) for p in points],
            values,
            style,
            marker="o",
            markersize=4,
            label=name,
            color=COLOURS.get(who, OTHER),
        )
    axis.set_xscale("log")
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def one_legend(figure: Figure, axis: Axes) -> None:
    figure.legend(
        *axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9
    )


# What is drawn: by which function, from which results, in inches.
FIGURES: dict[str, tuple[Callable[[Figure, Mapping[str, Any]], None], str, tuple[float, float]]] = {
    "speed": (speed, "cpu", (8, 3.4)),
    "gradients": (gradients, "backward", (8, 3.4)),
    "host": (host, "host", (8, 3.6)),
    "errors": (errors, "errors", (9, 6.4)),
}


def kept_results(question: str, folder: Path = RESULTS) -> Path:
    """Of several machines, that of which most is kept."""
    return max(sorted(folder.glob(f"{question}-*.json")), key=lambda path: path.stat().st_size)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def draw(name: str, results: Path, folder: Path) -> Path:
    import matplotlib
    from matplotlib.figure import Figure

    function, _, size = FIGURES[name]
    # Text stays text, and the same results make the same file.
    style = {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        function(figure, json.loads(results.read_text()))
        about = {"Date": None, "Creator": None, "Description": f"{results.name} {digest(results)}"}
        path = folder / f"{name}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata=about)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", choices=[[], *FIGURES], metavar="NAME")
    parser.add_argument("--out", type=Path, default=IMAGES)
    args = parser.parse_args()
    for name in args.names or FIGURES:
        print(draw(name, kept_results(FIGURES[name][1]), args.out))


if __name__ == "__main__":
    main()
