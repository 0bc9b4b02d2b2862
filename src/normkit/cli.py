"""The commands `normkit info`, `check` and `bench`; needs the extra `cli` (typer, rich)."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

import normkit
from normkit import HeadNorm, LayerNorm, RMSNorm, _bench, reference, testing
from normkit._spec import FLOATS, FLOATS_TEXT
from normkit.checkpoint import NormEntry, describe_norm, weight_names
from normkit.checkpoint._files import Files, printable
from normkit.loading import load_norm

if TYPE_CHECKING:
    from torch.utils.benchmark import Timer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Transformer norms at the speed of memory: what runs here, is it right, how fast is it.",
)

Item = TypeVar("Item")
Norm: TypeAlias = RMSNorm | LayerNorm | HeadNorm
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else there.")]


class Dtype(str, Enum):
    """The dtypes of activations, by the names that the options take."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def _console() -> Console:
    # rich takes 80 columns where there is no terminal, and would cut layer names in logs and pipes
    return Console(width=None if sys.stdout.isatty() else 150)


def _progress(items: Iterable[Item], count: int, description: str) -> Iterable[Item]:
    stderr = Console(stderr=True)
    return track(
        items, description, count, console=stderr, transient=True, disable=not stderr.is_terminal
    )


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(_without_infinities(data), indent=1, allow_nan=False))


def _without_infinities(data: Any) -> Any:
    """JSON has no infinity: an error beyond any bound becomes null."""
    if isinstance(data, dict):
        return {key: _without_infinities(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_without_infinities(value) for value in data]
    return None if isinstance(data, float) and math.isinf(data) else data


def _fail(message: str) -> NoReturn:
    typer.echo(f"normkit: {message}", err=True)
    raise typer.Exit(2)


# -------------------------------------------------------------------------------------------- info


@app.command()
def info(as_json: Json = False) -> None:
    """Show versions, the CPU, and which backends are usable here, or why not."""
    backends = {
        name: {"usable": backend.usable, "reason": backend.reason}
        for name, backend in normkit.backends().items()
    }
    versions = _bench.versions() | {"commit": _bench.commit()}
    machine = _bench.machine() | {"threads": torch.get_num_threads()}
    if as_json:
        _print_json({"versions": versions, "machine": machine, "backends": backends})
        return
    facts = Table(show_header=False, box=None)
    for name, value in (versions | machine).items():
        if value is not None:
            facts.add_row(name, ", ".join(value) if isinstance(value, list) else str(value))
    table = Table("backend", "usable", "why")
    for name, backend in backends.items():
        table.add_row(
            name, "[green]yes[/]" if backend["usable"] else "[red]no[/]", str(backend["reason"])
        )
    console = _console()
    console.print(facts)
    console.print(table)


# ------------------------------------------------------------------------------------------ check

CHECK_ROUNDS = 15
# Several times the widest norm of any model; a run takes some 3 KB for each of its elements.
WIDEST = 1 << 16
MOST_NORMS = 10_000  # ten times what the largest models have; each takes some milliseconds


def activations(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Make values as transformers have them: heavy tails, outlier channels, a mean not 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator)

    rows, n = shape[0], math.prod(shape[1:])
    student_t = normal(rows, n) / normal(5, rows, n).square().mean(0).sqrt()
    channel = torch.exp(0.5 * normal(n))
    channel[torch.randperm(n, generator=generator)[: max(1, n // 256)]] *= 30
    scale = torch.exp(0.3 * normal(rows, 1))
    return ((student_t + 0.3 * normal(n)) * channel * scale + 0.5).reshape(shape).to(dtype)


def _torch_timer(module: Norm, kind: str, x: torch.Tensor) -> Timer:
    """Time torch's function, on weights as it wants them: of x's dtype, the offset added."""
    weight = (module.weight + module.weight_offset).to(x.dtype)
    bias = None if module.bias is None else module.bias.to(x.dtype)
    names = {"F": F, "x": x, "shape": x.shape[-1:], "weight": weight, "bias": bias}
    names["eps"] = module.eps
    if kind == "layer" and weight.ndim == 1:
        return _bench.timer("F.layer_norm(x, shape, weight, bias, eps)", names)
    # torch has neither a bias in rms_norm nor weights per head
    if weight.ndim == 1:
        code = "F.rms_norm(x, shape, weight, eps)"
    else:
        code = f"F.{kind}_norm(x, shape, eps=eps) * weight"
    return _bench.timer(code + (" + bias" if bias is not None else ""), names)


def _options(module: Norm) -> dict[str, Any]:
    return {
        "eps": module.eps,
        "weight_offset": module.weight_offset,
        "round_before_weight": module.round_before_weight,
    }


def _backend(module: Norm, kind: str, x: torch.Tensor) -> str:
    """The name of the backend that serves the module."""
    op, options = f"{kind}_norm", _options(module)
    if isinstance(module, HeadNorm):
        op, options = "head_norm", options | {"kind": kind}
    return normkit.explain(op, x, module.weight, module.bias, **options).backend


def _eps_as_computed(eps: float | None) -> float:
    float32 = torch.finfo(torch.float32).eps if eps is None else eps
    return torch.tensor(float32, dtype=torch.float32).item()


def _worst_error(module: Norm, kind: str, x: torch.Tensor) -> float:
    """The largest error of the module on x, as a fraction of the bound; inf where it is NaN."""
    options = _options(module) | {"eps": _eps_as_computed(module.eps), "kind": kind}
    double: dict[str, Any] = {"out_dtype": torch.float64, "compute_dtype": torch.float64}
    exact = reference.norm(x, module.weight, module.bias, **double, **options)
    bound = testing.error_bound(x, module.weight, module.bias, out_dtype=x.dtype, **options)
    # what lies beyond the largest number rounds to infinity, which counts as the number after it
    infinity = math.ldexp(1.0, math.frexp(torch.finfo(x.dtype).max)[1])
    y = module(x).double()
    # an inf or NaN of the weights makes the exact result one, which has no bound: the same is right
    same = (y == exact) | (y.isnan() & exact.isnan())
    y, exact = (t.clamp(-infinity, infinity) for t in (y, exact))
    fraction = ((y - exact).abs() / bound).masked_fill(same, 0.0).max().item()
    return math.inf if math.isnan(fraction) else fraction


def _not_finite(module: Norm) -> int:
    """How many stored values are infinite or NaN."""
    stored = [t for t in (module.weight, module.bias) if t is not None]
    return sum(int((~t.isfinite()).sum()) for t in stored)


def check_norm(module: Norm, entry: NormEntry, rows: int, dtypes: Sequence[str]) -> dict[str, Any]:
    """Run one norm of a checkpoint on activations of each dtype; returns its line of the report."""
    seed = zlib.crc32(entry.key.encode())  # the same in every run, and another for every layer
    inputs = {d: activations((rows, *entry.shape), _bench.DTYPES[d], seed) for d in dtypes}
    stored = str(entry.dtype).removeprefix("torch.")
    timed = stored if stored in inputs else dtypes[0]
    with torch.no_grad():
        errors = {d: _worst_error(module, entry.spec.kind, x) for d, x in inputs.items()}
        x = inputs[timed]
        timers = {"ours": _bench.timer("module(x)", {"module": module, "x": x})}
        timers["torch"] = _torch_timer(module, entry.spec.kind, x)
        compared = _bench.paired(timers, CHECK_ROUNDS)
        backend = _backend(module, entry.spec.kind, x)
    worst = max(errors, key=errors.__getitem__)
    return {
        "layer": entry.key,
        "kind": entry.spec.kind,
        "shape": list(entry.shape),
        "dtype": stored,
        "eps": module.eps,
        "weight_offset": module.weight_offset,
        "not_finite": _not_finite(module),
        "error_of_bound": errors,
        "worst": {"dtype": worst, "error_of_bound": errors[worst]},
        "within_bound": errors[worst] <= 1,
        "backend": backend,
        "timed_dtype": timed,
        "us": compared.us("ours"),
        "torch_us": compared.us("torch"),
        "torch_over_normkit": compared.ratio("torch", "ours"),
    }


class _NotRun(Exception):
    """A norm is as it should be, and still not one to run here."""


def _loaded(files: Files, name: str) -> tuple[Norm, NormEntry] | None:
    """The module of a stored norm; None for what has only the name of one."""
    entry = describe_norm(files, name)
    if entry is None:
        return None
    n = math.prod(entry.shape)
    if n > WIDEST:
        raise _NotRun(f"{name}: expected at most {WIDEST} elements, got {n}")
    module = load_norm(files, entry.key)
    for part, stored in module.named_parameters():
        if stored.dtype not in FLOATS:
            only = ", which only a float64 x takes" if stored.dtype == torch.float64 else ""
            raise _NotRun(f"{part}: expected {FLOATS_TEXT}, got {stored.dtype}{only}")
    return module, entry


def _check_stored(
    files: Files, name: str, rows: int, dtypes: Sequence[str]
) -> tuple[str, dict[str, Any]] | None:
    """The list of the report that a stored norm belongs in, and its line; None for no norm."""
    key = name.rpartition(".")[0]
    try:
        loaded = _loaded(files, name)
    except (_NotRun, TypeError) as error:  # the latter of integers
        return "not_run", {"layer": key, "reason": _one_line(error)}
    except (OSError, ValueError) as error:
        return "unreadable", {"layer": key, "reason": _one_line(error)}
    return loaded and ("norms", check_norm(*loaded, rows, dtypes))


@app.command()
def check(
    source: Annotated[Path, typer.Argument(help="A .safetensors file or a model folder.")],
    rows: Annotated[int, typer.Option(min=1, help="Rows of activations per norm.")] = 64,
    dtype: Annotated[
        list[Dtype] | None,
        typer.Option(help="Dtype of x; may be repeated. float32 and bfloat16 if not given."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run every norm of a checkpoint, compare it with float64, and time it against torch.

    A norm that cannot be run is listed with the reason, and hides no other.

    Exit status 0: every norm that the kernels take is within its bound.
    1: a bound is broken.
    2: a file or a norm is missing or malformed, or nothing could be run.
    """
    dtypes = [d.value for d in dtype or (Dtype.float32, Dtype.bfloat16)]
    try:
        files = Files(source)
        names = weight_names(files)
    except (OSError, ValueError) as error:
        reason = _one_line(error)
        _fail(reason if str(source) in reason else f"{source}: {reason}")
    if len(names) > MOST_NORMS:
        _fail(f"{source}: expected at most {MOST_NORMS} norms, got {len(names)}")
    report: dict[str, list[dict[str, Any]]] = {"norms": [], "not_run": [], "unreadable": []}
    for name in _progress(names, len(names), "checking"):
        found = _check_stored(files, name, rows, dtypes)
        if found is not None:
            report[found[0]].append(found[1])
    if not any(report.values()):
        _fail(f"{source}: no norms found")
    summary = _summary(report)
    if as_json:
        head = {"source": str(source), "rows": rows, "machine": _bench.machine()}
        _print_json(head | _bench.run_stamp() | report | {"summary": summary})
    else:
        _print_check(report, summary, rows)
    if summary["broken"]:
        raise typer.Exit(1)
    if report["unreadable"] or not report["norms"]:
        raise typer.Exit(2)


def _one_line(error: Exception) -> str:
    return printable(" ".join(str(error).split()), most=1000) or type(error).__name__


def _summary(report: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    lines = report["norms"]
    counts = {name: len(part) for name, part in report.items()}
    broken = [line["layer"] for line in lines if not line["within_bound"]]
    if not lines:
        return counts | {"broken": broken}
    return counts | {
        "broken": broken,
        "worst": max(line["worst"]["error_of_bound"] for line in lines),
        "native": sum(line["backend"] != "reference" for line in lines),
        "torch_over_normkit": statistics.geometric_mean(
            line["torch_over_normkit"] for line in lines
        ),
    }


def _print_check(
    report: Mapping[str, Sequence[Mapping[str, Any]]], summary: Mapping[str, Any], rows: int
) -> None:
    console = _console()
    if report["norms"]:
        console.print(_check_table(report["norms"], rows))
    for line in report["norms"]:
        if line["not_finite"]:
            stored = f"holds inf or NaN, {line['not_finite']} of them"
            _print_plain(console, f"{printable(line['layer'])}: {stored}")
    for line in (*report["not_run"], *report["unreadable"]):
        _print_plain(console, f"{printable(line['layer'])}: not run: {line['reason']}")
    words = [f"{summary['norms']} norms"]
    if report["norms"]:
        broken = len(summary["broken"])
        verdict = f"[bold red]{broken} break the bound[/]" if broken else "all within the bound"
        words += [
            f"{verdict} (worst error {summary['worst']:.3f} of it)",
            f"{summary['native']} served natively",
            f"{summary['torch_over_normkit']:.1f} times as fast as torch (geometric mean)",
        ]
    not_run = summary["not_run"] + summary["unreadable"]
    words += [f"[yellow]{not_run} not run[/]"] if not_run else []
    console.print(", ".join(words), highlight=False, soft_wrap=True)


def _print_plain(console: Console, text: str) -> None:
    """A line with text of a file, where brackets are no markup."""
    console.print(Text(text), soft_wrap=True)


def _check_table(lines: Sequence[Mapping[str, Any]], rows: int) -> Table:
    table = Table(
        caption=f"error: the worst of {rows} rows, as a fraction of the promised bound; "
        "time: of one call on them"
    )
    table.add_column("layer", overflow="fold")
    for header in ("kind", "n", "dtype", "backend", "error", "with x in"):
        table.add_column(header, no_wrap=True)
    for header in ("us", "torch us", "gain"):
        table.add_column(header, justify="right", no_wrap=True)
    for line in lines:
        worst, gain = line["worst"], line["torch_over_normkit"]
        table.add_row(
            Text(printable(line["layer"])),
            line["kind"],
            "x".join(map(str, line["shape"])),
            line["dtype"],
            _coloured(line["backend"], line["backend"] != "reference", "yellow"),
            _coloured(f"{worst['error_of_bound']:.3f}", line["within_bound"], "bold red"),
            worst["dtype"],
            f"{line['us']:.2f}",
            f"{line['torch_us']:.2f}",
            _coloured(f"{gain:.1f}x", gain >= 1, "red"),
        )
    return table


def _coloured(text: str, good: bool, otherwise: str) -> str:
    return f"[{'green' if good else otherwise}]{text}[/]"


# ------------------------------------------------------------------------------------------ bench

BENCH_SHAPES = ((16, 4096), (64, 4096), (2048, 4096), (32768, 128))
QUICK_OPS, QUICK_SHAPES = ("rms_norm", "layer_norm"), ((16, 4096), (2048, 4096))


@app.command()
def bench(
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.png.")] = Path(
        "normkit-bench"
    ),
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads; as many as torch takes by default.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few seconds' look.")] = False,
    as_json: Json = False,
) -> None:
    """Time the norms against torch and a plain copy; writes bench.json and a plot, bench.png."""
    threads = threads or torch.get_num_threads()
    _bench.pin_heap(threads)
    torch.set_num_threads(threads)
    ops = QUICK_OPS if quick else tuple(_bench.OPS)
    dtypes = ("float32", "bfloat16") if quick else tuple(_bench.DTYPES)
    cases = list(itertools.product(ops, dtypes, QUICK_SHAPES if quick else BENCH_SHAPES))
    results = [
        _bench.measure(op, rows, n, dtype, rounds=7 if quick else 21)
        for op, dtype, (rows, n) in _progress(cases, len(cases), "timing")
    ]
    machine = _bench.machine()
    report = {"machine": machine, **_bench.run_stamp(), "results": results}
    _bench.write_json(out / "bench.json", report)
    if as_json:
        _print_json(report)
    else:
        _console().print(_bench.bench_table(results))
    typer.echo(f"written: {out / 'bench.json'}", err=True)
    title = (
        f"normkit {normkit.__version__} on {machine['cpu']}, {machine['isa']}, threads: {threads}"
    )
    try:
        _bench.plot(results, title, out / "bench.png")
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        typer.echo("no plot without matplotlib: pip install normkit[bench]", err=True)
        return
    typer.echo(f"written: {out / 'bench.png'}", err=True)
