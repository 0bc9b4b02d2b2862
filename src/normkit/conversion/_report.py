"""What `convert` did to each norm of a model, and why not to others."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from normkit._spec import NormSpec
from normkit.conversion._classes import is_ours, original_of, set_class

NOT_SELECTED = "not selected by include or exclude"
CONVERTED_BEFORE = "is converted already"
OWN = "is a module of normkit"


@dataclass(frozen=True)
class Entry:
    """A norm of a model.

    Attributes:
        path: its name in the model, the first of them where it has several.
        cls: the name of its class.
        spec: what it computes in the dtype of its parameters (float32 where it has none); None
            where that is not known.
        reason: why it was left as it is; "" for one that was converted.
        equal_share: of y in that dtype, the share of elements with the bits of the original's, on
            rows that are hard to round alike.
        dtypes: those of x for which normkit runs, with parameters of their present dtype; x of
            another dtype takes the original forward.
        groups: parts of a row, each with a statistic of its own.
        gate: where a gate multiplies and through what, "before-silu", "after-silu" or
            "after-sigmoid"; "" for none.
        channels_first: whether x is an image (batch, n, height, width).
    """

    path: str
    cls: str
    spec: NormSpec | None = None
    reason: str = ""
    equal_share: float | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    groups: int = 1
    gate: str = ""
    channels_first: bool = False

    def summary(self) -> str:
        """What it computes, or why it was left, in words."""
        if self.reason or self.spec is None:
            return self.reason
        words = [described(self.spec)]
        words += [f"in {self.groups} groups"] if self.groups > 1 else []
        words += ["channels first"] * self.channels_first
        if self.gate:
            place, _, activation = self.gate.partition("-")
            words.append(f"{activation} of a gate {place} it")
        return ", ".join(words)

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        spec = None if self.spec is None else asdict(self.spec)
        if spec is not None:
            spec["out_dtype"] = spec["out_dtype"] and short(spec["out_dtype"])
        return {
            "path": self.path,
            "cls": self.cls,
            "spec": spec,
            "reason": self.reason,
            "equal_share": self.equal_share,
            "dtypes": [short(dtype) for dtype in self.dtypes],
            "groups": self.groups,
            "gate": self.gate,
            "channels_first": self.channels_first,
        }


@dataclass(frozen=True)
class Layer:
    """A module with norms in it, of which sums may be fused with these.

    Attributes:
        path: its name in the model, the first of them where it has several.
        cls: the name of its class.
        norms: those that are computed together with the sum before them, one for each place.
        reason: why none is; "" also where no norm follows a sum directly.
        modulated: those that are computed together with the scale and shift behind them.
    """

    path: str
    cls: str
    norms: tuple[str, ...] = ()
    reason: str = ""
    modulated: tuple[str, ...] = ()

    def summary(self) -> str:
        """What is fused, or why nothing is, in words."""
        fused = [f"sums before {', '.join(self.norms)}"] if self.norms else []
        fused += [f"scale and shift of {', '.join(self.modulated)}"] if self.modulated else []
        return self.reason or "; ".join(fused)


def short(dtype: torch.dtype) -> str:
    """The name of a dtype without torch's."""
    return str(dtype).removeprefix("torch.")


def described(spec: NormSpec) -> str:
    """A norm in words."""
    words = [spec.kind, f"eps {spec.eps:g}"]
    words += [f"weight + {spec.weight_offset:g}"] * bool(spec.weight_offset)
    words += ["bias"] * spec.has_bias
    words += ["rounded before the weight"] * spec.round_before_weight
    words += ["rstd rounded"] * spec.round_rstd
    words += ["offset weight rounded"] * spec.round_weight
    words += [f"y {short(spec.out_dtype)}"] if spec.out_dtype else []
    return ", ".join(words)


@dataclass
class Report:
    """What `convert` did.

    Attributes:
        converted: the norms that normkit computes now, or would, in a dry run.
        left: the modules that look like a norm and run as before, each with the reason.
        already: the norms that normkit computed before this call, which leaves them alone: those
            that another call converted, and modules of normkit.
        layers: with `fuse="layer"`, the layers in which sums are fused with norms, and those whose
            forward could not be read, each with the reason.
        dry_run: whether nothing was changed.
        modules: those that got another class, with their paths.
    """

    converted: list[Entry] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)
    already: list[Entry] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    dry_run: bool = False
    modules: list[tuple[str, nn.Module]] = field(default_factory=list, repr=False)

    @property
    def refused(self) -> list[Entry]:
        """Those of `left` that strict=True does not accept."""
        return [entry for entry in self.left if entry.reason != NOT_SELECTED]

    def revert(self) -> None:
        """Give the modules and layers that this call changed their own classes back.

        What has been reverted already stays as it is.

        Raises:
            RuntimeError: the class of a module was replaced since, as by a parametrization; nothing
                is reverted then.
        """
        revert_all(self.modules)
        self.modules = []

    def to_json(self) -> str:
        """All of it, as JSON."""
        lists = {name: [entry.as_dict() for entry in getattr(self, name)] for name in _NORMS}
        lists["layers"] = [asdict(layer) for layer in self.layers]
        return json.dumps({"dry_run": self.dry_run, **lists}, indent=1)

    def groups(self) -> Iterator[tuple[str, str, list[Entry] | list[Layer]]]:
        """Which list, what they compute or why they were left, and the entries alike in both."""
        for name in _NORMS:
            for summary, alike in _alike(getattr(self, name)):
                yield name, summary, alike
        for summary, layers in _alike(self.layers):
            yield "not fused" if layers[0].reason else "fused", summary, layers

    def headline(self) -> str:
        """The counts in a sentence."""
        count, before = len(self.converted), len(self.already)
        would = " would be" if self.dry_run else ""
        already = f", {before} {'is' if before == 1 else 'are'} normkit's already" if before else ""
        sums = sum(len(layer.norms) for layer in self.layers)
        modulated = sum(len(layer.modulated) for layer in self.layers)
        fused = f", {sums} of them fused with the sum before" if sums else ""
        fused += f", {modulated} with scale and shift" if modulated else ""
        norms = count + len(self.left) + before
        return f"{count} of {norms} norms{would} converted{already}{fused}"

    def __str__(self) -> str:
        rows = [
            (name, str(len(entries)), entries[0].cls, summary, entries[0].path or "(the model)")
            for name, summary, entries in self.groups()
        ]
        return "\n".join([self.headline(), *in_columns(rows)])


_NORMS = ("converted", "left", "already")  # the lists of entries
_Item = TypeVar("_Item", Entry, Layer)


def _alike(items: Iterable[_Item]) -> Iterator[tuple[str, list[_Item]]]:
    alike: dict[tuple[str, str], list[_Item]] = {}
    for item in items:
        alike.setdefault((item.cls, item.summary()), []).append(item)
    for (_, summary), group in alike.items():
        yield summary, group


def in_columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows of words, each column as wide as its widest."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()


def revert_all(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Revert those of the modules that are converted, all of them or none."""
    changed = [(path, m, original_of(m)) for path, m in modules if is_ours(m)]
    for path, module, original in changed:
        if original is None:
            raise RuntimeError(
                f"{path}: expected the class that convert gave it, got {type(module).__name__}, "
                "which was derived from it since: undo that first"
            )
    for _, module, original in changed:
        if original is not None:
            set_class(module, original)
