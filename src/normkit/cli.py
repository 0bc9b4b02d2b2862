"""The commands `normkit info`, `normkit check` and `normkit bench`. Needs the extra `cli` (typer, rich)."""

from __future__ import annotations

import json
import math
import statistics
import sys
import timeit
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors import SafetensorError

import normkit
from normkit import _bench, testing
from normkit.checkpoint import NormEntry, find_norms, load_norm

app = typer.Typer(
    add_completion=False,
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


def _console() -> Console:
    # rich takes 80 columns where there is no terminal, and would cut layer names in logs and pipes
    return Console(width=None if sys.stdout.isatty() else 150)


def _progress(items: Iterable[Item], count: int, description: str) -> Iterable[Item]:
    stderr = Console(stderr=True)
    return track(
        items, description, count, console=stderr, transient=True, disable=not stderr.is_terminal
    )


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=1))


def _fail(message: str) -> NoReturn:
    typer.echo(f"normkit: {message}", err=True)
    raise typer.Exit(2)


# --------------------------------------------------------------------------------------------------------------- info


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


# -------------------------------------------------------------------------------------------------------------- check


def activations(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Values as they occur inside transformers: heavy tails, a few channels far above the rest, a mean that is not 0."""
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator)

    rows, n = shape[0], math.prod(shape[1:])
    degrees = 5  # Student's t: what is left of the tails after a layer of averaging, and still far from normal
    tails = normal(rows, n) / normal(degrees, rows, n).square().mean(0).sqrt()
    channel = torch.exp(0.5 * normal(n))
    channel[torch.randperm(n, generator=generator)[: max(1, n // 256)]] *= 30
    scale = torch.exp(0.3 * normal(rows, 1))
    return ((tails + 0.3 * normal(n)) * channel * scale + 0.5).reshape(shape).to(dtype)


def _torch_norm(module: torch.nn.Module, entry: NormEntry, dtype: torch.dtype) -> dict[str, Any]:
    """The names for `_TORCH_CODE`: torch's function on operands that it accepts, which are those of x's dtype."""
    offset = module.weight_offset
    return {
        "F": F,
        "shape": entry.shape[-1:],
        "weight": (module.weight + offset).to(dtype),
        "bias": None if module.bias is None else module.bias.to(dtype),
        "eps": module.eps,
    }


_TORCH_CODE = {
    ("rms", 1): "F.rms_norm(x, shape, weight, eps)",
    ("layer", 1): "F.layer_norm(x, shape, weight, bias, eps)",
    ("rms", 2): "F.rms_norm(x, shape, None, eps) * weight",
    ("layer", 2): "F.layer_norm(x, shape, None, None, eps) * weight",
}
