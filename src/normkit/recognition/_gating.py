"""What a gate does to the bits of a norm: measured with gates that differ in every element."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from normkit._spec import FLOATS, NormSpec
from normkit.fusions import gated_norm
from normkit.recognition._probe import (
    Probe,
    Unknown,
    agreement,
    arguments_of,
    exact,
    in_groups,
    many_rows,
    normal,
    share_of_equals,
)
from normkit.recognition._result import Dtypes, Function


@dataclass
class Gating:
    """What was measured, as in `Recognition`; shares and reasons by the dtypes of x and gate."""

    round_each: dict[Dtypes, bool] = field(default_factory=dict)
    shares: dict[Dtypes, float] = field(default_factory=dict)
    reasons: dict[Dtypes, str] = field(default_factory=dict)
    gateless: set[torch.dtype] = field(default_factory=set)


def measured_gating(
    probe: Probe, function: Function, specs: Mapping[torch.dtype, NormSpec]
) -> Gating:
    """For each dtype of x that is known: of which gates it is a gated norm, and without one."""
    found = Gating()
    for dtype, spec in specs.items():
        one = replace(function, spec=spec)
        for pair in ((dtype, of_gate) for of_gate in FLOATS):
            try:
                found.round_each[pair], found.shares[pair] = _rounding(probe, one, pair)
            except Unknown as why:
                found.reasons[pair] = str(why)
        if _is_the_norm_alone(probe, one, dtype):
            found.gateless.add(dtype)
    return found


def _rounding(probe: Probe, function: Function, dtypes: Dtypes) -> tuple[bool, float]:
    """Whether the norm is rounded to x's dtype before the gate, and the share of equal elements."""
    of_x, of_gate = dtypes
    x = many_rows(probe, of_x, function.spec.eps or 0.0)
    z = _telling_gates(x, of_gate)
    given, before = probe.in_x(x), probe.in_x(z)
    kept = before.clone()
    probe.call(given, before)
    if not torch.equal(before.nan_to_num(), kept.nan_to_num()):
        raise Unknown("writes into its gate")
    y = probe.run(x, z)
    if y.dtype != (function.spec.out_dtype or of_x):
        raise Unknown(f"y is {y.dtype} for a gate of {of_gate}")
    terms = _terms(x, z, probe, function)
    rounded = [of_x] * function.spec.round_before_weight
    tried = []
    # in float32 there is nothing to round, and behind a gate only the norm rounds
    both = of_x != torch.float32 and probe.form.norm_before_gate
    for each in (False, True) if both else (False,):
        ours = _ours(x, z, probe, function, each, y.dtype)
        tried.append((share_of_equals(y, ours, terms, rounded + [of_x] * each), each))
    (share, near), each = max(tried, key=lambda pair: pair[0][0])
    if not near:
        raise Unknown(f"rounds elsewhere, with a gate: at best {share:.4f} of y are equal")
    return each, share


def _telling_gates(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A gate for rows: of either sign, some saturated, one infinite and one not a number."""
    z = normal(torch.Generator().manual_seed(11), *x.shape) * 2
    by_row = z.view(-1, x.shape[-1])
    by_row[::5] *= 12
    by_row[1:3, 0] = torch.tensor([math.inf, math.nan], dtype=torch.float32)
    return z.to(dtype)


def _terms(x: Tensor, z: Tensor, probe: Probe, function: Function) -> Tensor:
    """What the rounding errors of y scale with, as in `exact`."""
    z = z.double()
    factor = torch.sigmoid(z) if probe.form.activation == "sigmoid" else z * torch.sigmoid(z)
    if not probe.form.norm_before_gate:
        return exact(x.double() * factor, probe, function)[1]
    return exact(x, probe, function)[1] * factor.abs()


def _ours(
    x: Tensor, z: Tensor, probe: Probe, function: Function, each: bool, out_dtype: torch.dtype
) -> Tensor:
    spec, form = function.spec, probe.form
    rows = in_groups(x, form)
    y = gated_norm(
        rows,
        in_groups(z, form),
        *arguments_of(function, probe, rows.shape[-1]),
        kind=spec.kind,
        activation=form.activation,
        norm_before_gate=form.norm_before_gate,
        round_each=each,
        weight_offset=spec.weight_offset,
        round_before_weight=spec.round_before_weight,
        round_rstd=spec.round_rstd,
        round_weight=spec.round_weight,
        out_dtype=out_dtype,
    )
    return y.reshape(x.shape)


def _is_the_norm_alone(probe: Probe, function: Function, dtype: torch.dtype) -> bool:
    """Whether a call without a gate gives what the norm does, and does not fail."""
    spec = function.spec
    try:
        y = probe.run(probe.rows(dtype, spec.eps or 0.0), None)
        is_near = agreement(probe, function, spec, dtype, None)[1]
    except Unknown:
        return False
    return is_near and y.dtype == (spec.out_dtype or dtype)
