"""How a module takes rows: for heads, in groups, with a gate, channels first."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn

from normkit.recognition._probe import BIG_GATE, Probe, Unknown, normal
from normkit.recognition._result import Form
from normkit.recognition._screen import gate_of, parameters_of, row_shape


def measured_form(module: nn.Module, n: int) -> Form:
    """Find how the module takes rows, by which elements of y follow one of x."""
    if n < 4:
        raise Unknown("its rows are too narrow to tell")
    shapes = {row_shape(p) for p in parameters_of(module).values()}
    heads = next((s[0] for s in shapes if len(s) == 2), 0)
    form = _taken(module, n, heads)
    if gate_of(module) is not None:
        form = replace(form, gate=_measured_gate(module, n, form))
    return replace(form, groups=_measured_groups(Probe(module, n, form, torch.float32)))


def _taken(module: nn.Module, n: int, heads: int) -> Form:
    first: Unknown | None = None
    for channels_first in (False, True):
        form = Form(heads=heads, channels_first=channels_first)
        probe = Probe(module, n, form, torch.float32)
        try:
            probe.run(probe.rows(torch.float32, 1e-6))
            return form
        except Unknown as why:
            first = first or why
    assert first is not None
    raise first


def _sigmoid(gate: float) -> float:
    return 1 / (1 + math.exp(-gate))


# What y is multiplied with; of a gate before the norm only the sign is left.
_GATES: Mapping[str, Callable[[float], float]] = {
    "before-silu": lambda gate: math.copysign(1.0, gate),
    "after-silu": lambda gate: gate * _sigmoid(gate),
    "after-sigmoid": _sigmoid,
}


def _measured_gate(module: nn.Module, n: int, form: Form) -> str:
    probe = Probe(module, n, form, torch.float32)
    # so large that eps is nothing beside it, also where the gate comes first
    x = probe.arranged(normal(torch.Generator().manual_seed(5), 22, n) * 1e3)
    by_big = probe.run(x, BIG_GATE)
    for kind, factor in _GATES.items():
        gates = (1.0, -1.0, 0.3)
        expected = (by_big * factor(gate) / factor(BIG_GATE) for gate in gates)
        given = (probe.run(x, gate) for gate in gates)
        if all(torch.allclose(y, e, 2e-3, 1e-5) for y, e in zip(given, expected, strict=True)):
            return kind
    raise Unknown("a gate that is neither silu nor sigmoid")


def _measured_groups(probe: Probe) -> int:
    """How many parts of a row have a statistic of their own."""
    x = probe.arranged(normal(torch.Generator().manual_seed(6), 22, probe.n))
    other = x.clone()
    other.view(-1)[0] += 50.0
    changed = (probe.run(x) != probe.run(other)).reshape(-1, probe.n)
    if changed[1:].any():
        raise Unknown("its statistic is of more than a row, as of a group or instance norm")
    width = int(changed[0].sum())
    if width == 1:
        raise Unknown("it normalises nothing: an element of y follows that of x alone")
    if probe.n % width or not changed[0, :width].all():
        raise Unknown("its statistic is of a part of a row")
    return probe.n // width
