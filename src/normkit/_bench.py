"""Measure and report: shared by `normkit check`, `normkit bench` and the scripts of benchmarks/.

Statements as a user would write them are timed in pairs: every round takes a sample of each, a
ratio is taken inside a round, and the median goes over the rounds, so that a slow spell of a shared
machine hits both sides.  A sample during which the kernel took a core away is taken again.

torch.utils.benchmark (which loads setuptools), rich and matplotlib are imported where needed.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from normkit import functional
from normkit._spec import OPS as SPECS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table
    from torch.utils.benchmark import Measurement, Timer

COPY, NORMKIT, TORCH = "copy", "normkit", "torch"
ALLOCATING = "normkit, allocating"

# --------------------------------------------------------------------------------------- measuring

# A shorter sample is dominated by the clock and by the interpreter's own jitter, and a longer one
# is more often interrupted.
SAMPLE_SECONDS = 4e-4
# Before a sample, so that a candidate is measured on the caches that it leaves behind itself, not
# on its neighbour's: a copy after stores around the caches took up to 2.8 times its own time.
UNTIMED_CALLS = 4
# At most so many retakes of a sample, each after a pause in which the scheduler can spread the
# threads over the cores again: without it they stay together, and every retake is interrupted too.
RETAKES, PAUSE_SECONDS = 6, 0.02

# glibc gives large blocks back to the system after every call by default, and the next call then
# pays about 2 us per page to get them again: the price of the allocator's mood, not of a kernel.
HEAP_SETTINGS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}
HEAP_SETTINGS["MALLOC_ARENA_MAX"] = "1"


@dataclass(frozen=True)
class Comparison:
    """A measurement of each candidate; its sample i was taken in round i."""

    measurements: Mapping[str, Measurement]
    retaken: int = 0  # samples that were thrown away
    disturbed: int = 0  # samples that were kept, because the last retake was interrupted too

    def us(self, name: str) -> float:
        return float(self.measurements[name].median) * 1e6

    def ratio(self, name: str, to: str) -> float:
        """The median of the ratios inside the rounds."""
        return statistics.median(a / b for a, b in self._rounds(name, to))

    def over_us(self, name: str, to: str) -> float:
        """The median of what `name` takes longer than `to` inside a round, in microseconds."""
        return statistics.median(a - b for a, b in self._rounds(name, to)) * 1e6

    def quartiles(self, name: str, to: str) -> tuple[float, float]:
        """Half of the ratios lie between these two; a single one is both."""
        ratios = torch.tensor([a / b for a, b in self._rounds(name, to)], dtype=torch.float64)
        low, high = ratios.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
        return low, high

    def _rounds(self, name: str, to: str) -> Iterator[tuple[float, float]]:
        return zip(self.measurements[name].times, self.measurements[to].times, strict=True)


def timer(code: str, names: Names) -> Timer:
    """Return torch's timer of a statement, on as many threads as torch takes now."""
    from torch.utils.benchmark import Timer

    return Timer(code, globals=names, num_threads=torch.get_num_threads())


def paired(
    timers: Mapping[str, Timer],
    rounds: int,
    seconds: float = SAMPLE_SECONDS,
    patience: float = math.inf,
    settle: float = 0.0,
) -> Comparison:
    """Take a sample of each candidate in each round; a round starts with the next candidate.

    After `patience` seconds an interrupted sample is kept, and counted, and not taken again.
    `settle` is a pause in seconds after each sample, in which threads fall asleep that wait in a
    loop for more work: those of another library would take a core from the next candidate.
    """
    from torch.utils.benchmark import Measurement

    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    names = list(timers)
    quick_looks = {k: t.blocked_autorange(min_run_time=seconds) for k, t in timers.items()}
    calls = {name: max(1, round(seconds / min(look.times))) for name, look in quick_looks.items()}
    samples: dict[str, list[Measurement]] = {name: [] for name in names}
    retaken = disturbed = 0
    give_up = time.monotonic() + patience
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            for attempt in range(RETAKES + 1):
                timers[name].timeit(UNTIMED_CALLS)
                before = _interruptions()
                sample = timers[name].timeit(calls[name])
                if _interruptions() == before:
                    break
                if attempt == RETAKES or time.monotonic() >= give_up:
                    disturbed += 1
                    break
                retaken += 1
                time.sleep(PAUSE_SECONDS)
            samples[name].append(sample)
            time.sleep(settle)
    merged = {name: Measurement.merge(of_name)[0] for name, of_name in samples.items()}
    return Comparison(merged, retaken, disturbed)


def _interruptions() -> int:
    """How often the kernel took a core away from a thread of this process; 0 on Windows."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def pin_heap(threads: int) -> None:
    """Start this process again with a heap that keeps its pages and with `threads` OpenMP threads.

    Both are read once, before Python starts, so setting them here would do nothing. Returns where
    they are set already, and on systems whose C library is not glibc.
    """
    wanted = HEAP_SETTINGS | {"OMP_NUM_THREADS": str(threads)}
    if platform.libc_ver()[0] != "glibc" or all(os.environ.get(k) == v for k, v in wanted.items()):
        return
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | wanted)


# -------------------------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Op:
    """One op as statements over the names that `operands` gives."""

    function: str
    layer: bool
    adds: bool
    heads: bool  # weights per head

    @property
    def tensors(self) -> tuple[str, ...]:
        return ("x", *["residual"] * self.adds, "weight", *["bias"] * self.layer)

    @property
    def allocating(self) -> str:
        kind = ", 1e-5, kind='layer'" * (self.heads and self.layer)
        return f"{self.function}({', '.join(self.tensors)}{kind})"

    @property
    def normkit(self) -> str:
        return f"{self.allocating[:-1]}, out=y{', residual_out=residual_out' * self.adds})"

    @property
    def torch_allocating(self) -> str:
        """One expression, whose value is what `allocating` returns but for the order of two."""
        x = "residual_out" if self.adds else "x"
        norm = {
            (False, False): f"F.rms_norm({x}, shape, weight, 1e-6)",
            (False, True): f"F.layer_norm({x}, shape, weight, bias)",
            (True, False): f"F.rms_norm({x}, shape, None, 1e-6) * weight",
            (True, True): f"F.layer_norm({x}, shape) * weight + bias",
        }[self.heads, self.layer]
        return f"(residual_out := x + residual, {norm})" if self.adds else norm

    @property
    def torch(self) -> str:
        """Into given outputs as far as torch can."""
        x = "residual_out" if self.adds else "x"
        norm = {
            (False, False): f"F.rms_norm({x}, shape, weight, 1e-6)",
            (False, True): f"F.layer_norm({x}, shape, weight, bias)",
            (True, False): f"torch.mul(F.rms_norm({x}, shape, None, 1e-6), weight, out=y)",
            (True, True): f"torch.addcmul(bias, F.layer_norm({x}, shape), weight, out=y)",
        }[self.heads, self.layer]
        return "torch.add(x, residual, out=residual_out); " * self.adds + norm

    @property
    def copy(self) -> str:
        return "y.copy_(x)" + "; residual_out.copy_(residual)" * self.adds


# A head norm has both statistics, by an argument; benchmarks/fusions.py is about fused ones.
OPS = {
    op.name + "_layer" * (op.layer is None and layer): Op(op.name, layer, op.adds, op.per_head)
    for op in SPECS.values()
    if op.is_plain
    for layer in ((False, True) if op.layer is None else (op.layer,))
}
HEAD_DIM = 128
Names = dict[str, object]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def shape_for(op: Op, rows: int, n: int) -> tuple[int, ...]:
    """(rows, n), or for a head norm as many elements as (tokens, heads, head_dim)."""
    if not op.heads:
        return rows, n
    head_dim = min(n, HEAD_DIM)
    if n % head_dim:
        raise ValueError(f"n: expected a multiple of {HEAD_DIM} for a head norm, got {n}")
    heads = n // head_dim if n > head_dim else math.gcd(rows, 32)
    return rows * n // (heads * head_dim), heads, head_dim


def operands(op: Op, shape: Sequence[int], dtype: torch.dtype, device: str = "cpu") -> Names:
    """The names that the statements of `op` use: the functions, and tensors of the given shape."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, dtype=dtype, device=device)

    x = normal(*shape)
    affine = shape[1:] if op.heads else shape[-1:]
    names: Names = {"torch": torch, "F": F, "shape": shape[-1:]}
    names |= {"x": x, "y": torch.empty_like(x)}
    names |= {name: torch.nn.Parameter(normal(*affine)) for name in ("weight", "bias")}
    if op.adds:
        names |= {"residual": normal(*shape), "residual_out": torch.empty_like(x)}
    return names | {op.function: getattr(functional, op.function)}


def measure(
    name: str,
    rows: int,
    n: int,
    dtype: str,
    rounds: int,
    *,
    names: Names | None = None,
    allocating: Mapping[str, str] | None = None,
    given: Mapping[str, str] | None = None,
    floor: str = COPY,
    patience: float = math.inf,
    settle: float = 0.0,
) -> dict[str, Any]:
    """Time op `name` against torch and a plain copy; returns one entry of the report.

    Further candidates are statements over `names`: `allocating` ones make their outputs and `given`
    ones write into outputs that exist; `floor` is the one that all are held against.  After
    `patience` seconds interrupted samples are kept; `settle` is `paired`'s.
    """
    op = OPS[name]
    shape = shape_for(op, rows, n)
    into = {COPY: op.copy, NORMKIT: op.normkit, **(given or {})}
    made = {ALLOCATING: op.allocating, TORCH: op.torch_allocating, **(allocating or {})}
    code, every = into | made, names or operands(op, shape, DTYPES[dtype])
    with torch.no_grad():
        timers = {k: timer(v, every) for k, v in code.items()}
        compared = paired(timers, rounds, patience=patience, settle=settle)
    cells = cells_of(compared, floor, made)
    case = {"op": name, "dtype": dtype, "shape": "x".join(map(str, shape)), "elements": rows * n}
    case |= {"rounds": rounds, "threads": torch.get_num_threads(), **retakes(compared)}
    case |= {"floor": floor}
    return case | {"candidates": {k: cell | {"code": code[k]} for k, cell in cells.items()}}


def cells_of(
    compared: Comparison, floor: str, allocating: Container[str] = ()
) -> dict[str, dict[str, object]]:
    """What a report says of each candidate; `floor` is what they are held against.

    Gains pair like with like: those that are `allocating` are compared with normkit allocating.
    """
    against = {k: ALLOCATING if k in allocating else NORMKIT for k in compared.measurements}
    return {
        name: {
            "us": compared.us(name),
            "copies": compared.ratio(name, floor),
            "copies_quartiles": compared.quartiles(name, floor),
            "over_us": compared.over_us(name, floor),
            "of_normkit": compared.ratio(name, against[name]),
            "against": against[name],
        }
        for name in compared.measurements
    }


def retakes(compared: Comparison) -> dict[str, int]:
    """What a report says of interruptions."""
    samples = sum(len(m.raw_times) for m in compared.measurements.values())
    return {"samples": samples, "retaken": compared.retaken, "disturbed": compared.disturbed}


# ------------------------------------------------------------------------------------- description

# What tells one CPU from another, as Linux names it on x86 and on Arm.
_IDENTITY = ["vendor_id", "cpu family", "model", "stepping"]
_IDENTITY += ["CPU implementer", "CPU part", "CPU variant", "CPU revision"]


def machine() -> dict[str, object]:
    """The hardware and system, as far as they decide how fast a norm is."""
    facts = _cpuinfo()
    bf16 = "+BF16" if "avx512_bf16" in facts.get("flags", "").split() else ""
    return {
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "model": "-".join(facts[name] for name in _IDENTITY if name in facts) or None,
        "cores": os.cpu_count(),
        "isa": torch.backends.cpu.get_cpu_capability() + bf16,
        "caches": _caches(),
        "os": platform.platform(),
    }


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor."""
    path = Path("/proc/cpuinfo")
    first = path.read_text().partition("\n\n")[0] if path.exists() else ""
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _caches() -> list[str]:
    indices = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    caches = [[(i / f).read_text().strip() for f in ("type", "level", "size")] for i in indices]
    return [f"L{level} {size}" for kind, level, size in caches if kind != "Instruction"]


def versions() -> dict[str, str]:
    return {n: version(n) for n in ("normkit", "torch")} | {"python": platform.python_version()}


def run_stamp() -> dict[str, str | None]:
    """What differs from one run on a machine to the next."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {**versions(), "commit": commit(), "time": now}


def commit() -> str | None:
    """The commit of the sources that run: NORMKIT_COMMIT, or of their git checkout; else None."""
    if told := os.environ.get("NORMKIT_COMMIT"):  # of a wheel that was built elsewhere
        return told
    root = Path(__file__).resolve().parents[2]
    # An environment inside some other repository must not name its commit.
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        return "" if done.returncode else done.stdout.strip()

    head = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--", "src", "cpp", "cuda", "CMakeLists.txt")
    return head + "-dirty" * bool(changed) if head else None


# --------------------------------------------------------------------------------------- reporting


def write_json(path: Path, data: object) -> None:
    """Write in one step, so that an interrupted run never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    partial.replace(path)


def rivals(result: Mapping[str, Any]) -> list[str]:
    """The candidates that are neither normkit nor a copy."""
    no_rivals = (result.get("floor", COPY), COPY, NORMKIT, ALLOCATING)
    return [name for name in result["candidates"] if name not in no_rivals]


def bench_table(results: Sequence[Mapping[str, Any]]) -> Table:
    """The results as a rich table; gains are a competitor's time over normkit's."""
    from rich.table import Table

    floor = results[0].get("floor", COPY)
    timed = dict.fromkeys(name for r in results for name in r["candidates"])
    shown = [name for name in (floor, COPY, NORMKIT, ALLOCATING) if name in timed]
    shown, gains = list(dict.fromkeys(shown)), dict[str, str]()
    for r in results:
        gains |= {name: r["candidates"][name].get("against", NORMKIT) for name in rivals(r)}
    told = {"samples": "samples", "retaken": "retaken", "disturbed": "kept though interrupted"}
    counts = [f"{sum(r.get(key, 0) for r in results)} {text}" for key, text in told.items()]
    heads = {NORMKIT: "out=", ALLOCATING: "allocating"}
    columns = ["op", "dtype", "case", *(f"{heads.get(name, name)} us" for name in shown)]
    columns += [f"out= / {floor}", "quartiles", "us above"]
    columns += [f"{name} / {heads[to]}" for name, to in gains.items()]
    table = Table(*columns, caption=", ".join(counts))
    for i, column in enumerate(table.columns):
        column.no_wrap, column.justify = True, "right" if i > 2 else "left"
    for r in results:
        ours, cells = r["candidates"][NORMKIT], r["candidates"]
        row = [r["op"], r["dtype"], r.get("label", r["shape"])]
        row += [f"{cells[name]['us']:.2f}" if name in cells else "" for name in shown]
        row += [f"{ours['copies']:.2f}", "{:.2f}-{:.2f}".format(*ours["copies_quartiles"])]
        row.append(f"{ours['over_us']:.2f}")
        times = [cells[name]["of_normkit"] if name in cells else None for name in gains]
        row += [f"[{'green' if g >= 1 else 'red'}]{g:.1f}x[/]" if g else "" for g in times]
        table.add_row(*row)
    return table


def plot(results: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw a panel per op and dtype: copies over shapes; a result's "limit" becomes a bar."""
    from matplotlib.figure import Figure

    ops = list(dict.fromkeys(r["op"] for r in results))
    dtypes = [d for d in DTYPES if any(r["dtype"] == d for r in results)]
    size = max(8.0, 1.2 + 3.9 * len(dtypes)), 1.6 + 2.5 * len(ops)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(ops), len(dtypes), squeeze=False, sharey=True)
    for axis, (op, dtype) in zip(axes.flat, itertools.product(ops, dtypes), strict=True):
        panel = [r for r in results if (r["op"], r["dtype"]) == (op, dtype)]
        _draw_panel(axis, sorted(panel, key=lambda r: r["elements"]))
        axis.set_title(f"{op}, {dtype}", fontsize=10)
    legends = [axis.get_legend_handles_labels() for axis in axes.flat]
    entries = {label: handle for legend in legends for handle, label in zip(*legend, strict=True)}
    figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=5)
    figure.suptitle(f"{title}\ntime in units of a plain copy of the same bytes; lower is better")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw_panel(axis: Axes, results: Sequence[Mapping[str, Any]]) -> None:
    floors = {r.get("floor", COPY) for r in results}
    candidates = dict.fromkeys(k for r in results for k in r["candidates"] if k not in floors)
    for name, marker in zip(candidates, "os^vDPX*", strict=False):
        cells = {i: r["candidates"][name] for i, r in enumerate(results) if name in r["candidates"]}
        middle = [cell["copies"] for cell in cells.values()]
        ends = [[abs(q - c["copies"]) for q in c["copies_quartiles"]] for c in cells.values()]
        spread = list(zip(*ends, strict=True))
        axis.errorbar(list(cells), middle, yerr=spread, label=name, marker=marker, linewidth=1.2)
    for at, result in enumerate(results):
        if result.get("limit"):
            axis.hlines(result["limit"], at - 0.3, at + 0.3, color="black", label="aim", zorder=3)
    axis.axhline(1, color="#2ca02c", linewidth=1, linestyle="--", label="one copy", zorder=0)
    axis.set_yscale("log")
    ticks = ["0.5", "1", "2", "5", "10", "20", "50", "100"]
    axis.set_yticks(list(map(float, ticks)), ticks)
    axis.minorticks_off()
    axis.grid(axis="y", alpha=0.3)
    axis.set_xticks(range(len(results)), [r["shape"] for r in results], rotation=25, ha="right")
    axis.tick_params(axis="x", labelsize=8)
