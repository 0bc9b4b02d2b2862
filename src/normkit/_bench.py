"""Measuring and reporting shared by ``normkit check``, ``normkit bench`` and ``benchmarks/cpu.py``.

A time is a `timeit.Timer`, so that what is measured is a statement as a user would write it, and
the statement goes into the report. Candidates are compared in pairs: every round runs each of them
once, a ratio is taken inside a round, and the median goes over the rounds. A slow spell of a shared
machine then hits both sides of a ratio.

rich and matplotlib are imported by the functions that draw with them; measuring needs neither.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import timeit
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F

import normkit

if TYPE_CHECKING:
    from rich.table import Table

# A sample shorter than this is dominated by the clock and by the interpreter's own jitter.
UNTIMED_CALLS = 4
MIN_SAMPLE_SECONDS = 3e-4
COPY = "copy"
NORMKIT = "normkit"
TORCH = "torch"

# glibc gives large blocks back to the system after every call by default, and the next call then
# pays about 2 us per page to get them again: the price of the allocator's mood, not of a kernel.
HEAP_SETTINGS = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_ARENA_MAX": "1",
}

# --------------------------------------------------------------------------------------- measuring


class Timer(Protocol):
    """What `paired` needs of a candidate; `timeit.Timer` has it."""

    def timeit(self, number: int) -> float: ...


@dataclass(frozen=True)
class Comparison:
    """Seconds per call of each candidate, one value a round."""

    samples: Mapping[str, Sequence[float]]

    def us(self, name: str) -> float:
        return statistics.median(self.samples[name]) * 1e6

    def ratios(self, name: str, to: str) -> list[float]:
        return [a / b for a, b in zip(self.samples[name], self.samples[to], strict=True)]

    def ratio(self, name: str, to: str) -> float:
        """Median over the rounds of the ratio inside a round."""
        return statistics.median(self.ratios(name, to))

    def quartiles(self, name: str, to: str) -> tuple[float, float]:
        ratios = self.ratios(name, to)
        if len(ratios) == 1:
            return ratios[0], ratios[0]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, high


def calls_per_sample(timer: Timer, seconds: float = MIN_SAMPLE_SECONDS) -> int:
    """How many calls one sample takes to last from `seconds` to twice that; 1 for longer calls."""
    timer.timeit(1)  # the first call compiles, allocates and faults pages in
    calls = 1
    while timer.timeit(calls) < seconds and calls < 1 << 20:
        calls *= 2
    return calls


def paired(
    timers: Mapping[str, Timer], rounds: int, seconds: float = MIN_SAMPLE_SECONDS
) -> Comparison:
    """Times all candidates in `rounds` rounds; each round starts with the next candidate.

    Before each sample the candidate runs untimed: it is measured on the caches that it leaves
    behind itself, not on those that its neighbour in the round left.  Once is too little for that:
    a copy that followed stores around the caches took up to 2.8 times its own time.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    names = list(timers)
    calls = {name: calls_per_sample(timers[name], seconds) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            timers[name].timeit(UNTIMED_CALLS)
            samples[name].append(timers[name].timeit(calls[name]) / calls[name])
    return Comparison(samples)


def pin_heap(threads: int) -> None:
    """Starts this process again with a heap that keeps its pages and with `threads` OpenMP threads.

    Both are read once, before Python starts, so setting them here would do nothing. Returns where
    they are set already, and on systems whose C library is not glibc.
    """
    wanted = HEAP_SETTINGS | {"OMP_NUM_THREADS": str(threads)}
    if platform.libc_ver()[0] != "glibc" or all(os.environ.get(k) == v for k, v in wanted.items()):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | wanted)


# -------------------------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Op:
    """One op as statements over the names that `operands` gives."""

    normkit: str
    allocating: str
    torch: str
    copy: str
    heads: bool = False


_ONE_COPY = "y.copy_(x)"
_TWO_COPIES = "y.copy_(x); residual_out.copy_(residual)"
_TORCH_SUM = "torch.add(x, residual, out=residual_out); "

OPS = {
    "rms_norm": Op(
        "rms_norm(x, weight, out=y)",
        "rms_norm(x, weight)",
        "F.rms_norm(x, shape, weight, 1e-6)",
        _ONE_COPY,
    ),
    "layer_norm": Op(
        "layer_norm(x, weight, bias, out=y)",
        "layer_norm(x, weight, bias)",
        "F.layer_norm(x, shape, weight, bias)",
        _ONE_COPY,
    ),
    "add_rms_norm": Op(
        "add_rms_norm(x, residual, weight, out=y, residual_out=residual_out)",
        "add_rms_norm(x, residual, weight)",
        _TORCH_SUM + "F.rms_norm(residual_out, shape, weight, 1e-6)",
        _TWO_COPIES,
    ),
    "add_layer_norm": Op(
        "add_layer_norm(x, residual, weight, bias, out=y, residual_out=residual_out)",
        "add_layer_norm(x, residual, weight, bias)",
        _TORCH_SUM + "F.layer_norm(residual_out, shape, weight, bias)",
        _TWO_COPIES,
    ),
    "head_norm": Op(
        "head_norm(x, weight, out=y)",
        "head_norm(x, weight)",
        "torch.mul(F.rms_norm(x, shape, None, 1e-6), weight, out=y)",
        _ONE_COPY,
        heads=True,
    ),
    "head_norm_layer": Op(
        "head_norm(x, weight, bias, 1e-5, kind='layer', out=y)",
        "head_norm(x, weight, bias, 1e-5, kind='layer')",
        "torch.addcmul(bias, F.layer_norm(x, shape), weight, out=y)",
        _ONE_COPY,
        heads=True,
    ),
}

HEAD_DIM = 128
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def shape_for(op: Op, rows: int, n: int) -> tuple[int, ...]:
    """The shape of x: (rows, n); for a head norm as many elements, (tokens, heads, head_dim)."""
    if not op.heads:
        return rows, n
    head_dim = min(n, HEAD_DIM)
    if n % head_dim:
        raise ValueError(f"a head norm needs n to be a multiple of {HEAD_DIM}, got {n}")
    heads = n // head_dim if n > head_dim else math.gcd(rows, 32)
    return rows * n // (heads * head_dim), heads, head_dim


def operands(op: Op, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """The names that the statements of `op` use: the functions, and tensors of the given shape."""
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    x = normal(*shape)
    affine = shape[1:] if op.heads else shape[-1:]
    names: dict[str, Any] = {
        "torch": torch,
        "F": F,
        "shape": shape[-1:],
        "x": x,
        "y": torch.empty_like(x),
        "weight": torch.nn.Parameter(normal(*affine)),
        "bias": torch.nn.Parameter(normal(*affine)),
    }
    if "residual" in op.normkit:
        names |= {"residual": normal(*shape), "residual_out": torch.empty_like(x)}
    functions = ("rms_norm", "layer_norm", "head_norm", "add_rms_norm", "add_layer_norm")
    return names | {name: getattr(normkit, name) for name in functions}


def measure(
    name: str,
    rows: int,
    n: int,
    dtype: str,
    rounds: int,
    more: Callable[[Op, dict[str, Any]], Mapping[str, str]] = lambda op, names: {},
) -> dict[str, Any]:
    """Times op `name` with out= against torch and a plain copy; returns one entry of the report.

    `more` adds candidates: it gets the op and the names, may add names, and returns statements.
    """
    op = OPS[name]
    shape = shape_for(op, rows, n)
    with torch.no_grad():
        names = operands(op, shape, DTYPES[dtype])
        code = {COPY: op.copy, NORMKIT: op.normkit, TORCH: op.torch, **more(op, names)}
        compared = paired({k: timeit.Timer(v, globals=names) for k, v in code.items()}, rounds)
    return {
        "op": name,
        "dtype": dtype,
        "shape": "x".join(map(str, shape)),
        "elements": rows * n,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "candidates": {
            k: {
                "us": compared.us(k),
                "copies": compared.ratio(k, COPY),
                "copies_quartiles": compared.quartiles(k, COPY),
                "of_normkit": compared.ratio(k, NORMKIT),
                "code": statement,
            }
            for k, statement in code.items()
        },
    }


# ------------------------------------------------------------------------------------- description


def machine() -> dict[str, Any]:
    """The hardware and system, as far as they decide how fast a norm is."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "caches": _caches(),
        "os": platform.platform(),
    }


def versions() -> dict[str, str]:
    return {
        "normkit": normkit.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def run_stamp() -> dict[str, Any]:
    """What differs from one run on a machine to the next."""
    return {
        **versions(),
        "commit": commit(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def commit() -> str | None:
    """The commit of the sources that run, or None when they are not a git checkout of normkit."""
    root = Path(__file__).resolve().parents[2]
    if not (
        root / ".git"
    ).exists():  # an environment inside some other repository must not name its commit
        return None
    sources = ("src", "cpp", "cuda", "CMakeLists.txt")
    head = _git(root, "rev-parse", "--short=12", "HEAD")
    return head and head + ("-dirty" if _git(root, "status", "--porcelain", "--", *sources) else "")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _caches() -> list[str]:
    caches = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / f).read_text().strip() for f in ("level", "type", "size"))
        if kind != "Instruction":
            caches.append(f"L{level} {size}")
    return caches


# --------------------------------------------------------------------------------------- reporting


def write_json(path: Path, data: Any) -> None:
    """Writes in one step, so that an interrupted run never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    partial.replace(path)


def bench_table(results: Iterable[Mapping[str, Any]]) -> Table:
    """The results as a rich table, in microseconds and in units of a copy of the same bytes."""
    from rich.table import Table

    table = Table(caption="x copy: time in units of a plain copy of the same bytes")
    for header in ("op", "dtype", "shape"):
        table.add_column(header, no_wrap=True)
    for header in ("copy us", "torch us", "normkit us", "torch x copy", "normkit x copy", "gain"):
        table.add_column(header, justify="right")
    for result in results:
        ours, theirs, copy = (result["candidates"][k] for k in (NORMKIT, TORCH, COPY))
        gain = theirs["of_normkit"]
        table.add_row(
            *(result[key] for key in ("op", "dtype", "shape")),
            *(f"{c['us']:.2f}" for c in (copy, theirs, ours)),
            *(f"{c['copies']:.2f}" for c in (theirs, ours)),
            f"[{'green' if gain >= 1 else 'red'}]{gain:.1f}x[/]",
        )
    return table


_MARKS = {
    NORMKIT: {"marker": "o", "color": "#0060c0"},
    TORCH: {"marker": "s", "color": "#d95f02"},
    "torch.compile": {"marker": "^", "color": "#7a7a7a"},
}


def plot(results: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draws a panel per op and dtype: copies over shapes; a result's "limit" becomes a bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ops = list(dict.fromkeys(r["op"] for r in results))
    dtypes = [d for d in DTYPES if any(r["dtype"] == d for r in results)]
    figure, axes = plt.subplots(
        len(ops),
        len(dtypes),
        figsize=(max(8.0, 1.2 + 3.9 * len(dtypes)), 1.6 + 2.5 * len(ops)),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for i, op in enumerate(ops):
        for j, dtype in enumerate(dtypes):
            panel = [r for r in results if (r["op"], r["dtype"]) == (op, dtype)]
            if not panel:
                axes[i][j].set_visible(False)
                continue
            _draw_panel(axes[i][j], sorted(panel, key=lambda r: r["elements"]))
            axes[i][j].set_title(f"{op}, {dtype}", fontsize=10)
        axes[i][0].set_ylabel("time in copies")
    entries: dict[str, Any] = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=5, frameon=False
    )
    figure.suptitle(f"{title}\ntime in units of a plain copy of the same bytes; lower is better")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_panel(axis: Any, results: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    for name, style in _MARKS.items():
        cells = {
            at: result["candidates"][name]
            for at, result in enumerate(results)
            if name in result["candidates"]
        }
        if not cells:
            continue
        middle = [cell["copies"] for cell in cells.values()]
        quartiles = zip(*(cell["copies_quartiles"] for cell in cells.values()), strict=True)
        spread = [[abs(q - m) for q, m in zip(side, middle, strict=True)] for side in quartiles]
        axis.errorbar(list(cells), middle, yerr=spread, label=name, linewidth=1.2, **style)
    for at, result in enumerate(results):
        if result.get("limit"):
            low, high = at - 0.3, at + 0.3
            axis.hlines(result["limit"], low, high, color="black", label="aim", zorder=3)
    axis.axhline(1, color="#2ca02c", linewidth=1, linestyle="--", label="one copy", zorder=0)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(FixedLocator([0.5, 1, 2, 5, 10, 20, 50, 100]))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(axis="y", alpha=0.3)
    axis.set_xticks(range(len(results)), [r["shape"] for r in results], rotation=25, ha="right")
    axis.tick_params(axis="x", labelsize=8)
    axis.set_xlim(-0.5, len(results) - 0.5)
