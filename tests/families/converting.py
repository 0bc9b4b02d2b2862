"""What `convert` makes of tiny models: how many norms, which not, and what the outputs become."""

from __future__ import annotations

import contextlib
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import normkit
from families.tiny import Tiny
from normkit.conversion import _plan

MOST_SECONDS = 90
# What the report says of other things than rms and layer norms.
NO_NORM = (
    "has a buffer",
    "its statistic is of",
    "parameters are not those of a norm",
    "it normalises nothing",
    "y is not of x's shape",
    "forward takes more than x: weight",  # torch's own weight_norm
)


@dataclass
class Outcome:
    """What became of one model in one dtype."""

    name: str
    kind: str
    dtype: str
    error: str = ""
    converted: int = 0
    gated: int = 0  # those of them with a gate
    called: int = 0  # converted modules that the model called
    idle: Counter[str] = field(default_factory=Counter)  # those that ran the original, by class
    left: Counter[tuple[str, str]] = field(default_factory=Counter)
    difference: float = 0.0  # of the outputs, relative to their largest
    fused: int = 0  # sums in the code of layers, and
    sums: int = 0  # how many were made with a norm when the model was called
    modulated: int = 0  # norms that took their scale and shift with them when it was called
    unread: Counter[tuple[str, str]] = field(default_factory=Counter)
    fused_alike: bool = True  # bit for bit as converted
    reverted: bool = True  # bit for bit


def outcomes(tiny: Tiny) -> list[Outcome]:
    """Convert a model in float32 and in bfloat16."""
    return [_outcome(tiny, dtype) for dtype in (torch.float32, torch.bfloat16)]


def _outcome(tiny: Tiny, dtype: torch.dtype) -> Outcome:
    result = Outcome(tiny.name, f"{tiny.library}, {tiny.kind}", str(dtype).removeprefix("torch."))
    signal.alarm(MOST_SECONDS)
    try:
        model, arguments = tiny.build()
        model.to(dtype)
        given = {k: _cast(v, dtype) for k, v in arguments.items()}
        with torch.no_grad():
            before = _outputs(model, given)
            if not _same(before, _outputs(model, given)):
                raise ValueError("two calls differ")
    except (Exception, SystemExit) as error:
        result.error = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        return result
    finally:
        signal.alarm(0)
    with torch.no_grad():
        _convert(model, given, before, result)
    return result


def _convert(
    model: nn.Module, given: dict[str, Any], before: list[Tensor], result: Outcome
) -> None:
    report = normkit.convert(model)
    result.converted = len(report.converted)
    result.gated = sum(bool(entry.gate) for entry in report.converted)
    result.left.update((e.cls, e.reason) for e in report.left)
    called: set[nn.Module] = set()
    hooks = [m.register_forward_pre_hook(lambda m, _: called.add(m)) for _, m in report.modules]
    with _running() as run:
        after = _outputs(model, given)
    for hook in hooks:
        hook.remove()
    result.called = len(called)
    result.idle.update(type(m).__name__ for m in called - run.modules)
    result.difference = max(map(_difference, after, before), default=0.0)
    fusing = normkit.convert(model, fuse="layer")
    result.fused = sum(len(layer.norms) for layer in fusing.layers)
    result.unread.update((r.cls, r.reason) for r in fusing.layers if r.reason)
    with _running() as run:
        result.fused_alike = _same(_outputs(model, given), after)
    result.sums, result.modulated = run.sums, run.modulated
    fusing.revert()
    report.revert()
    result.reverted = _same(_outputs(model, given), before)


class _Run:
    """The modules whose calls normkit ran, and calls with a sum, or a scale and shift, in them."""

    def __init__(self) -> None:
        self.modules: set[nn.Module] = set()
        self.sums = 0
        self.modulated = 0


@contextlib.contextmanager
def _running() -> Iterator[_Run]:
    seen = _Run()
    run = _plan.Plan.run

    def watched(
        self: _plan.Plan,
        module: nn.Module,
        x: Tensor,
        residual: Tensor | None = None,
        modulation: Sequence[Tensor] = (),
        z: Any = None,
    ) -> Any:
        made = run(self, module, x, residual, modulation, z)
        if made is not None:
            seen.modules.add(module)
            seen.sums += residual is not None
            seen.modulated += bool(modulation)
        return made

    _plan.Plan.run = watched  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        _plan.Plan.run = run  # type: ignore[method-assign]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _outputs(model: nn.Module, arguments: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)
    return list(_tensors(model(**arguments)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _tensors(inner)


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def _difference(y: Tensor, expected: Tensor) -> float:
    scale = expected.double().abs().nan_to_num().max().clamp_min(1e-30) if y.numel() else 1.0
    return float((y.double() - expected.double()).nan_to_num().abs().max() / scale)


# ---------------------------------------------------------------------------------------- the table


def summary(results: list[Outcome]) -> str:
    """Counts for each kind of model, what was left and why, and the largest differences."""
    lines = []
    for kind in dict.fromkeys(r.kind for r in results):
        for dtype in ("float32", "bfloat16"):
            part = [r for r in results if (r.kind, r.dtype) == (kind, dtype)]
            lines.append(f"{kind}, {dtype}: {_counts(part)}")
    left: Counter[tuple[str, str]] = sum((r.left for r in results), Counter())
    lines.append("left:")
    lines += [f"  {n:5d} {cls}: {reason}" for (cls, reason), n in left.most_common()]
    idle: Counter[str] = sum((r.idle for r in results), Counter())
    lines.append("converted, and ran their own forward:")
    lines += [f"  {n:5d} {cls}" for cls, n in idle.most_common()]
    unread: Counter[tuple[str, str]] = sum((r.unread for r in results), Counter())
    lines.append("layers that are not fused:")
    lines += [f"  {n:5d} {cls}: {reason}" for (cls, reason), n in unread.most_common()]
    other = [f"{r.name} {r.dtype}" for r in results if not r.fused_alike]
    lines.append(f"fused, and other bits: {', '.join(other) or 'none'}")
    built = sorted((r for r in results if not r.error), key=lambda r: -r.difference)
    lines.append("largest differences:")
    lines += [f"  {r.difference:.2e} {r.name} {r.dtype}" for r in built[:20]]
    lines.append("not built or not run:")
    lines += [f"  {r.name} {r.dtype}: {r.error}" for r in results if r.error]
    return "\n".join(lines)


def _counts(part: list[Outcome]) -> str:
    built = [r for r in part if not r.error]
    converted = sum(r.converted for r in built)
    kept = [(reason, n) for r in built for (_, reason), n in r.left.items()]
    norms = converted + sum(n for reason, n in kept if not reason.startswith(NO_NORM))
    called, idle = sum(r.called for r in built), sum(r.idle.total() for r in built)
    words = [
        f"{len(built)} of {len(part)} models run",
        f"{converted} of {norms} rms and layer norms converted",
        f"{sum(r.gated for r in built)} of them with a gate, in"
        f" {sum(r.gated > 0 for r in built)} models",
        f"{called - idle} of the {called} that were called ran normkit",
        f"outputs bit-equal in {sum(r.difference == 0 for r in built)} models",
        f"{max((r.difference for r in built), default=0):.1e} apart at most",
        f"{sum(r.fused for r in built)} sums fused in the code of {sum(r.fused > 0 for r in built)}"
        f" models, {sum(r.sums for r in built)} when these ran, with the bits of before in"
        f" {sum(r.fused_alike and r.fused > 0 for r in built)}",
        f"{sum(r.modulated for r in built)} norms modulated when these ran, with the bits of before"
        f" in {sum(r.fused_alike and r.modulated > 0 for r in built)} models",
        f"reverted exactly in {sum(r.reverted for r in built)}",
    ]
    return "; ".join(words)
