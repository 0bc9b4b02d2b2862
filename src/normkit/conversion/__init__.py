"""A model's own norms, computed by normkit: each is measured, and keeps its parameters and name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

import torch
from torch import nn

from normkit._spec import NormSpec
from normkit.conversion._classes import converted_class, is_converted, is_ours, set_class
from normkit.conversion._layers import fused_layers
from normkit.conversion._plan import NotConvertible, own_dtype, plan_of
from normkit.conversion._report import (
    CONVERTED_BEFORE,
    NOT_SELECTED,
    OWN,
    Entry,
    Layer,
    Report,
    revert_all,
)
from normkit.modules import HeadNorm, LayerNorm, RMSNorm
from normkit.recognition._identity import identity
from normkit.recognition._screen import refusal

__all__ = ["Entry", "Layer", "Report", "convert", "revert"]

# Paths of modules: patterns as of shells, or a function that is given path and module.
Selection: TypeAlias = str | Sequence[str] | Callable[[str, nn.Module], bool]


def convert(
    model: nn.Module,
    *,
    dry_run: bool = False,
    include: Selection | None = None,
    exclude: Selection | None = None,
    strict: bool = False,
    fuse: Literal["none", "layer"] = "none",
) -> Report:
    """Let normkit compute the norms of a model, in place.

    Each module is measured by `recognise`.  One that computes what normkit computes gets a class
    that is derived from its own and goes by the same name: parameters, state dict, hooks and
    isinstance checks stay as they are, and a copy of the model is converted as well.  Weights are
    read at each call, so that training, loading and `.to()` go on as before.

    A norm with a gate, `forward(x, gate)`, is a `gated_norm`, and without one, where the module
    takes None, the norm alone.

    What was not measured runs the module's own forward: float64, a dtype of which nothing is known,
    further arguments, autocast, tensor subclasses, torch.func, a device without kernels.  So does
    all that torch.compile, torch.export and torch.jit.trace see.

    Args:
        model: a module, on any device, meta too; one norm is a model as well.
        dry_run: measure and report, and change nothing.
        include: which modules, as patterns over their paths (`"*.q_norm"`) or as a function of
            path and module that returns whether; None for all.
        exclude: which of them not, likewise.
        strict: raise if a module that looks like a norm would be left as it is; what `exclude`
            names, or `include` does not, may be.
        fuse: "layer" computes a sum and the converted norm right behind it in one pass, the same
            bits: the forward of the layer is rewritten, from its source.  It is decided at each
            call whether that can be told apart (hooks of the norm, shapes that broadcast, autocast,
            ...); sums that one layer makes and the next one normalises stay as they are.

    Returns:
        A `Report`: `converted`, `left`, what was normkit's `already`, and `revert()`, which undoes
        this call exactly.

    Raises:
        TypeError: model is no module, or a selection is none.
        ValueError: include matches no module, fuse is none of these, or, with strict, a norm would
            be left; nothing has been changed then.

    Example:
        >>> import normkit, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.LayerNorm(64))
        >>> report = normkit.convert(model)
        >>> print(report)
        1 of 1 norms converted
        converted  1  LayerNorm  layer, eps 1e-05, bias  1
        >>> report.revert()
    """
    _check_model(model)
    if fuse not in ("none", "layer"):
        raise ValueError(f'fuse: expected "none" or "layer", got {fuse!r}')
    is_in = _selector("include", include, when_none=True)
    is_out = _selector("exclude", exclude, when_none=False)
    report = Report(dry_run=dry_run)
    selected = {m for path, m in model.named_modules() if is_in(path, m) and not is_out(path, m)}
    if not selected:
        raise ValueError(f"include: expected what matches a path of the model, got {include!r}")
    new = _converted(model, selected, report)
    if strict and report.refused:
        reasons = "; ".join(f"{e.path} ({e.cls}): {e.reason}" for e in report.refused)
        raise ValueError(f"strict: expected every norm to be converted, got {reasons}")
    if fuse == "layer":
        norms = {*new, *filter(is_converted, model.modules())}
        for module, (layer, its_class) in fused_layers(model, norms):
            report.layers.append(layer)
            if its_class is not None:
                new[module] = its_class
    if dry_run:
        return report
    report.modules = [(path, module) for path, module in model.named_modules() if module in new]
    for module, its_class in new.items():
        set_class(module, its_class)
    return report


# Modules and the classes that they get.
_Classes: TypeAlias = dict[nn.Module, type[nn.Module]]


def _converted(model: nn.Module, selected: Collection[nn.Module], report: Report) -> _Classes:
    """Measure the norms of a model, and report."""
    new: _Classes = {}
    outcomes: dict[Hashable, _Outcome] = {}
    for path, module in model.named_modules():  # one that has several paths has the first here
        reason = _already(module)
        if reason is not None:
            report.already.append(replace(_left(module, reason), path=path))
            continue
        if module in selected:
            found, its_class = _outcome(module, outcomes)
        else:
            found, its_class = _not_selected(module), None
        if found is None:
            continue
        (report.left if its_class is None else report.converted).append(replace(found, path=path))
        if its_class is not None:
            new[module] = its_class
    return new


def revert(model: nn.Module) -> None:
    """Give every converted module of a model its own class back, whichever call converted it.

    For a copy of a converted model, which no report knows of; `Report.revert` undoes one call.

    Raises:
        TypeError: model is no module.
        RuntimeError: the class of a module was replaced since, as by a parametrization; nothing is
            reverted then.

    Example:
        >>> import copy, normkit, torch
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(64))
        >>> _ = normkit.convert(model)
        >>> normkit.revert(copy.deepcopy(model))
    """
    _check_model(model)
    revert_all(model.named_modules())


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def _selector(
    name: str, selection: Selection | None, *, when_none: bool
) -> Callable[[str, nn.Module], bool]:
    if selection is None:
        return lambda path, module: when_none
    if callable(selection):
        return selection
    patterns = [selection] if isinstance(selection, str) else selection
    if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"{name}: expected patterns or a function, got {selection!r:.100}")
    return lambda path, module: any(fnmatchcase(path, pattern) for pattern in patterns)


# What a report says of a module, but for its path, and its class when it is converted.
_Outcome: TypeAlias = tuple[Entry | None, type[nn.Module] | None]


def _already(module: nn.Module) -> str | None:
    """Why there is nothing to convert in a norm that normkit computes."""
    if is_converted(module):
        return CONVERTED_BEFORE
    return OWN if isinstance(module, (RMSNorm, LayerNorm, HeadNorm)) else None


def _outcome(module: nn.Module, known: dict[Hashable, _Outcome]) -> _Outcome:
    """Measure a module, unless one like it is known."""
    if is_ours(module):  # a fused layer
        return None, None
    why = refusal(module)
    if why is not None:
        return (_left(module, why) if _is_named_norm(module) else None), None
    key = identity(module)
    if key is None:
        return _measured(module)
    key = (type(module), key)
    if key not in known:
        known[key] = _measured(module)
    return known[key]


def _measured(module: nn.Module) -> _Outcome:
    try:
        plan, found = plan_of(module)
        converted = converted_class(type(module), plan)
    except NotConvertible as why:
        if why.function is not None:
            return _left(module, str(why), why.function.spec), None
        return (_left(module, str(why)) if _is_named_norm(module) else None), None
    own = own_dtype(module) or torch.float32
    form = found.form
    dtypes = (d for d in found.specs if not form.gate or (d, d) in found.round_each)
    entry = Entry(
        path="",
        cls=type(module).__name__,
        spec=found.specs[own],
        equal_share=found.equal_shares[own],
        dtypes=tuple(dtypes),
        groups=form.groups,
        gate=form.gate,
        channels_first=form.channels_first,
    )
    return entry, converted


def _left(module: nn.Module, reason: str, spec: NormSpec | None = None) -> Entry:
    return Entry("", type(module).__name__, spec, reason)


def _not_selected(module: nn.Module) -> Entry | None:
    return _left(module, NOT_SELECTED) if _is_named_norm(module) else None


def _is_named_norm(module: nn.Module) -> bool:
    """Whether the name says so; of one with children these are asked, but for parametrizations."""
    is_leaf = not module._modules or list(module._modules) == ["parametrizations"]
    return is_leaf and "norm" in type(module).__name__.lower()
