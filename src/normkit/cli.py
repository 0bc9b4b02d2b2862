"""The commands `normkit info`, `check`, `convert` and `bench`, with the extra `cli`."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeAlias, TypeVar

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from rich.text import Text

import normkit
from normkit import _bench
from normkit._check import Checker, one_line, originals_of
from normkit._originals import NO_MODULE, NoOriginals, Originals
from normkit._spec import Kind
from normkit.checkpoint import weight_names
from normkit.checkpoint._files import Files, printable, read_config
from normkit.checkpoint._meaning import Given
from normkit.conversion import Entry, Report

app = typer.Typer(
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Transformer norms at the speed of memory: what runs here, is it right, how fast is it.",
)

Item = TypeVar("Item")
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else there.")]


class Dtype(str, Enum):
    """The dtypes of activations, by the names that the options take."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Fuse(str, Enum):
    """As `fuse` of normkit.convert."""

    none = "none"
    layer = "layer"


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"normkit {normkit.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show it and exit."),
    ] = False,
) -> None:
    pass


def _console() -> Console:
    # rich takes 80 columns where there is no terminal, and would cut layer names in logs and pipes
    return Console(width=None if sys.stdout.isatty() else 164)


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

MOST_NORMS = 10_000  # ten times what the largest models have; each takes some milliseconds


CheckReport: TypeAlias = dict[str, list[dict[str, Any]]]


@app.command()
def check(
    source: Annotated[Path, typer.Argument(help="A .safetensors file or a model folder.")],
    rows: Annotated[int, typer.Option(min=1, help="Rows of activations per norm.")] = 64,
    dtype: Annotated[
        list[Dtype] | None,
        typer.Option(help="Dtype of x; may be repeated. float32 and bfloat16 if not given."),
    ] = None,
    kind: Annotated[Kind | None, typer.Option(help="Kind of every norm.")] = None,
    eps: Annotated[float | None, typer.Option(min=0, help="eps of every norm.")] = None,
    weight_offset: Annotated[
        float | None, typer.Option(help="What is added to every stored weight.")
    ] = None,
    round_before_weight: Annotated[
        bool | None,
        typer.Option(
            "--round-before-weight/--round-once",
            help="Whether 16-bit values are also rounded before the weight.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run every norm of a checkpoint: is it the model's, is it computed right, how fast is it.

    What a norm computes is taken from config.json and from what was measured of its family, unless
    options say it.  With transformers (or diffusers) installed, each norm is run beside the
    model's own module, with the stored tensors.  Each is compared with float64 of the same norm,
    and timed against torch.  A norm that cannot be run is listed with the reason, and hides no
    other.

    Exit status 0: nothing is wrong, and nothing is assumed that the model's own module does not
    confirm.
    1: a norm is another than the model's own, or a bound is broken.
    2: a file or a norm is missing or malformed, or nothing could be run.
    3: an option is assumed, and there was no module of the model to confirm it; or the model that
    config.json describes has none of the norms.
    """
    given = Given(kind, eps, weight_offset, round_before_weight)
    try:
        files = Files(source)
        names = weight_names(files)
    except (OSError, ValueError) as error:
        reason = one_line(error)
        _fail(reason if str(source) in reason else f"{source}: {reason}")
    if len(names) > MOST_NORMS:
        _fail(f"{source}: expected at most {MOST_NORMS} norms, got {len(names)}")
    dtypes = [d.value for d in dtype or (Dtype.float32, Dtype.bfloat16)]
    checker = Checker(files, given, rows, dtypes, originals_of(files))
    report: CheckReport = {"norms": [], "not_run": [], "unreadable": []}
    for name in _progress(names, len(names), "checking"):
        found = checker.check(name)
        if found is not None:
            report[found[0]].append(found[1])
    if not any(report.values()):
        _fail(f"{source}: no norms found")
    summary = _summary(report) | {"own_modules": str(checker.originals)}
    if as_json:
        head = {"source": str(source), "rows": rows, "machine": _bench.machine()}
        _print_json(head | _bench.run_stamp() | report | {"summary": summary})
    else:
        _print_check(report, summary, rows)
    raise typer.Exit(_status(report, summary))


def _status(report: CheckReport, summary: Mapping[str, Any]) -> int:
    if summary["broken"] or summary["wrong"]:
        return 1
    if report["unreadable"] or not report["norms"]:
        return 2
    return 3 if summary["assumed"] or summary["of_another_model"] else 0


def _summary(report: CheckReport) -> dict[str, Any]:
    lines = report["norms"]
    summary: dict[str, Any] = {name: len(part) for name, part in report.items()}
    own = [(line["layer"], line["own_module"]["same"], line["assumed"]) for line in lines]
    summary["broken"] = [line["layer"] for line in lines if not line["within_bound"]]
    summary["wrong"] = [layer for layer, same, _ in own if same is False]
    reasons = (line["own_module"] for line in lines)
    why = Counter(own["reason"] for own in reasons if own["same"] is None)
    summary["not_compared"] = dict(why.most_common())
    summary["of_another_model"] = bool(lines) and why[NO_MODULE] == len(lines)
    summary["confirmed"] = sum(same is True for _, same, _ in own)
    summary["assumed"] = [layer for layer, same, assumed in own if assumed and not same]
    if lines:
        gains = (line["torch_over_normkit"] for line in lines)
        summary["worst"] = max(line["worst"]["error_of_bound"] for line in lines)
        summary["native"] = sum(line["backend"] != "reference" for line in lines)
        summary["torch_over_normkit"] = statistics.geometric_mean(gains)
    return summary


def _print_check(report: CheckReport, summary: Mapping[str, Any], rows: int) -> None:
    console = _console()
    lines = report["norms"]
    if lines:
        console.print(_check_table(lines, rows))
    for line in lines:
        for remark in _remarks(line):
            _print_plain(console, f"{printable(line['layer'])}: {remark}")
    for line in (*report["not_run"], *report["unreadable"]):
        _print_plain(console, f"{printable(line['layer'])}: not run: {line['reason']}")
    for text in _conclusions(summary):
        console.print(text, highlight=False, soft_wrap=True)


def _remarks(line: Mapping[str, Any]) -> Iterator[str]:
    own = line["own_module"]
    if own["same"] is False:
        yield f"the model's own module computes something else: {own['reason']}"
    if line["note"]:
        yield line["note"]
    elif own["same"] and own["reason"]:
        yield own["reason"]
    if line["not_finite"]:
        yield f"holds inf or NaN, {line['not_finite']} of them"


def _conclusions(summary: Mapping[str, Any]) -> Iterator[str]:
    count, wrong = summary["norms"], len(summary["wrong"])
    not_run = summary["not_run"] + summary["unreadable"]
    words = [f"{count} norms"] + [f"[yellow]{not_run} not run[/]"] * bool(not_run)
    if count:
        broken = len(summary["broken"])
        within = f"[bold red]{broken} break the bound[/]" if broken else "all within the bound"
        words += [
            f"{within} of their own arithmetic (worst error {summary['worst']:.3f} of it)",
            f"{summary['native']} run by a native backend",
            f"{summary['torch_over_normkit']:.1f} times as fast as torch (geometric mean)",
        ]
    yield ", ".join(words)
    if wrong:
        yield f"[bold red]{wrong} are other norms than the model's own[/]"
    if summary["confirmed"]:
        yield f"{summary['confirmed']} compute what the model's own modules compute"
    if count > wrong + summary["confirmed"]:
        left, why = count - wrong - summary["confirmed"], "; ".join(summary["not_compared"])
        yield f"[yellow]{left} not compared with the model's own modules[/]: {escape(why)}"
    if summary["of_another_model"]:
        yield "[yellow]the model that config.json describes has none of them[/]"
    if summary["assumed"]:
        yield (
            f"[yellow]{len(summary['assumed'])} with options that nobody stated[/]: say them with"
            " --kind, --eps, --weight-offset, --round-before-weight or --round-once"
        )


def _print_plain(console: Console, text: str) -> None:
    """A line with text of a file, where brackets are no markup."""
    console.print(Text(text), soft_wrap=True)


def _check_table(lines: Sequence[Mapping[str, Any]], rows: int) -> Table:
    table = Table(
        caption="w +: what is added to the weight; from: where the options came from; own: whether"
        " the model's own module computes the same\n"
        f"error: the worst of {rows} rows of each dtype, as a fraction of the promised bound of"
        " this norm; time: of one call on them"
    )
    table.add_column("layer", overflow="fold")
    for header in ("kind", "n", "dtype", "eps", "w +", "rounds"):
        table.add_column(header, no_wrap=True)
    table.add_column("from", overflow="fold")
    for header in ("own", "error"):
        table.add_column(header, no_wrap=True)
    for header in ("us", "torch us", "gain"):
        table.add_column(header, justify="right", no_wrap=True)
    for line in lines:
        worst, gain = line["worst"], line["torch_over_normkit"]
        own = {True: "[green]same[/]", False: "[bold red]other[/]", None: "-"}
        table.add_row(
            Text(printable(line["layer"])),
            line["kind"],
            "x".join(map(str, line["shape"])),
            line["dtype"],
            f"{line['eps']:.4g}",
            f"{line['weight_offset']:g}",
            "before w" if line["round_before_weight"] else "once",
            Text(_origins(line["origins"]), "yellow" if line["assumed"] else ""),
            own[line["own_module"]["same"]],
            _coloured(f"{worst['error_of_bound']:.3f}", line["within_bound"], "bold red"),
            f"{line['us']:.2f}",
            f"{line['torch_us']:.2f}",
            _coloured(f"{gain:.1f}x", gain >= 1, "red"),
        )
    return table


def _origins(origins: Mapping[str, str]) -> str:
    """Where options came from, each origin once, with the options that are not the most."""
    short = {k: v.removeprefix("family: ").removeprefix("config: ") for k, v in origins.items()}
    usual = Counter(short.values()).most_common(1)[0][0]
    others = [f"{option} {origin}" for option, origin in short.items() if origin != usual]
    return printable("; ".join([usual, *others]))


def _coloured(text: str, good: bool, otherwise: str) -> str:
    return f"[{'green' if good else otherwise}]{text}[/]"


# ------------------------------------------------------------------------------------------ bench

# ---------------------------------------------------------------------------------------- convert


@app.command()
def convert(
    folder: Annotated[Path, typer.Argument(help="A model folder, or its config.json.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be converted; the only choice.")
    ] = False,
    include: Annotated[
        list[str] | None, typer.Option(help="Pattern of paths to convert; may be repeated.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Pattern of paths to leave; may be repeated.")
    ] = None,
    fuse: Annotated[
        Fuse, typer.Option(help="Say also which sums would be fused with the norms behind them.")
    ] = Fuse.none,
    as_json: Json = False,
) -> None:
    """Say which norms of a model normkit.convert would take, what they compute, and why not others.

    The model that config.json describes is built by transformers or diffusers, without weights, and
    each of its norms is measured.

    Exit status 0: every norm would be converted, but for those that are not selected.
    1: some would be left as they are.
    2: there is no such file, or no such model.
    """
    if not dry_run:
        _fail("convert: expected --dry-run; a model is converted where it runs: normkit.convert")
    try:
        config = read_config(folder)
        originals = Originals(config)
        originals.model.to(_dtype_of(config))
        report = normkit.convert(
            originals.model,
            dry_run=True,
            include=include or None,
            exclude=exclude or None,
            fuse=fuse.value,
        )
    except (NoOriginals, OSError, ValueError) as error:
        reason = one_line(error)
        _fail(reason if str(folder) in reason else f"{folder}: {reason}")
    if as_json:
        typer.echo(report.to_json())
    else:
        _print_conversion(report, str(originals))
    raise typer.Exit(1 if report.refused else 0)


def _dtype_of(config: Mapping[str, object]) -> torch.dtype:
    """That of the weights, as transformers writes it; float32 where nothing is said."""
    sections = (config, config.get("text_config"))
    names = (s.get(k) for s in sections if isinstance(s, dict) for k in ("dtype", "torch_dtype"))
    known = {dtype.value: getattr(torch, dtype.value) for dtype in Dtype}
    found: torch.dtype = next(
        (known[n] for n in names if isinstance(n, str) and n in known), torch.float32
    )
    return found


def _print_conversion(report: Report, model: str) -> None:
    table = Table("", "norms", "class", "computes, or why not", "bits", "first")
    colours = {"converted": "green", "fused": "green"}
    for name, summary, entries in report.groups():
        shares = [e.equal_share for e in entries if isinstance(e, Entry) and e.equal_share]
        table.add_row(
            Text(name, colours.get(name, "yellow")),
            str(len(entries)),
            escape(entries[0].cls),
            escape(summary),
            f"{min(shares):.1%}" if shares else "",
            escape(entries[0].path),
        )
    console = _console()
    console.print(table)
    _print_plain(console, f"{model}: {report.headline()}")
    _print_plain(
        console, "bits: the share of y that has the model's own; in float32 the last may differ"
    )


BENCH_SHAPES = ((16, 4096), (64, 4096), (2048, 4096), (32768, 128))
QUICK_OPS, QUICK_SHAPES = ("rms_norm", "layer_norm"), ((16, 4096), (2048, 4096))
QUICK_PATIENCE = 0.5  # seconds of a case: on a busy machine the whole took minutes without


@app.command()
def bench(
    out: Annotated[Path, typer.Option(help="Folder for bench.json and bench.png.")] = Path(
        "normkit-bench"
    ),
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads; as many as torch takes by default.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A look in seconds, also on a busy machine.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Time the norms against torch and a plain copy; writes bench.json and a plot, bench.png."""
    threads = threads or torch.get_num_threads()
    _bench.pin_heap(threads)
    torch.set_num_threads(threads)
    ops = QUICK_OPS if quick else tuple(_bench.OPS)
    dtypes = ("float32", "bfloat16") if quick else tuple(_bench.DTYPES)
    cases = list(itertools.product(ops, dtypes, QUICK_SHAPES if quick else BENCH_SHAPES))
    rounds, patience = (7, QUICK_PATIENCE) if quick else (21, math.inf)
    results = [
        _bench.measure(op, rows, n, dtype, rounds, patience=patience)
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
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        typer.echo("no plot without matplotlib: pip install 'normkit[bench]'", err=True)
        return
    typer.echo(f"written: {out / 'bench.png'}", err=True)
