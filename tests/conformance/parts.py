"""Norms of rows whose columns are split into parts, put together as several processes would."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from conformance.gradients import Case, Gradients
from conformance.gradients import check as check_gradients
from conformance.support import LAYER, Inputs, Op, assert_same_bits
from devices import call_on
from normkit._serving import backends
from normkit._serving.backends import natives
from normkit._spec import DEFAULT_OPTIONS, OPTIONS
from normkit.reference import offset_weight
from normkit.testing import assert_accurate


class Native:
    """The extension's functions for parts; a refusal fails the test that does not look for it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def try_(self, function: str, *args: Any) -> Any:
        served_by = getattr(natives[self.name], function)
        return call_on("cuda", served_by, *args) if self.name == "cuda" else served_by(*args)

    def __call__(self, function: str, *args: Any) -> Any:
        result = self.try_(function, *args)
        assert not isinstance(result, str), result
        return result


def native_of(name: str) -> Native:
    if natives[name].part_apply is backends.Native._field_defaults["part_apply"]:
        pytest.skip(f"{name} has no kernels for parts")
    return Native(name)


class Made(NamedTuple):
    y: Tensor
    rstd: Tensor
    mean: Tensor | None


def kind_of(op: Op) -> int:
    return int(op.kind == "layer") + 2 * op.per_head


def chunks(t: Tensor | None, count: int) -> tuple[Tensor | None, ...]:
    return (None,) * count if t is None else t.chunk(count, -1)


def eps_of(op: Op, options: dict[str, Any]) -> float:
    return options.get("eps", 1e-5 if op is LAYER else 1e-6)


def statistics(native: Native, op: Op, x: Tensor, count: int, clamp_inf: bool = False) -> Tensor:
    """Those of every part, as a collective gathers them."""
    return torch.stack(
        [native("part_statistics", kind_of(op), part, clamp_inf) for part in chunks(x, count)]
    )


def run(native: Native, op: Op, inputs: Inputs, count: int, **options: Any) -> Made:
    """All parts of a norm, one after the other."""
    clamp_inf = options.get("clamp_inf", False)
    gathered = statistics(native, op, inputs.x, count, clamp_inf)
    made = [
        Made(
            *native(
                "part_apply",
                kind_of(op),
                x,
                weight,
                bias,
                eps_of(op, options),
                *(DEFAULT_OPTIONS | {k: v for k, v in options.items() if k in OPTIONS}).values(),
                options.get("out_dtype"),
                gathered,
            )
        )
        for x, weight, bias in zip(*(chunks(t, count) for t in used(inputs)), strict=True)
    ]
    for part in made:  # every process has the same statistics of whole rows
        assert_same_bits(part.rstd, made[0].rstd)
        assert_same_bits(part.mean, made[0].mean)
    return made[0]._replace(y=torch.cat([part.y for part in made], -1))


def used(inputs: Inputs) -> tuple[Tensor | None, ...]:
    return inputs.x, inputs.weight, inputs.bias


def run_and_check(native: Native, op: Op, inputs: Inputs, count: int, **options: Any) -> Made:
    made = run(native, op, inputs, count, **options)
    assert made.y.dtype == (options.pop("out_dtype", None) or inputs.x.dtype)
    options["eps"] = eps_of(op, options)
    assert_accurate(made.y, *used(inputs), kind=op.kind, **options)
    return made


def gradients(native: Native, case: Case, count: int, x_dtype: torch.dtype | None) -> Gradients:
    """All parts of a forward and a backward pass."""
    op, inputs, options = case.op, case.inputs, case.options
    made = run(native, op, inputs, count, **options)
    offset = options.get("weight_offset", 0.0)
    rounds = options.get("round_before_weight", False)
    saved = made.rstd, made.mean
    if options.get("round_weight") and inputs.weight is not None:
        # The backward pass takes a weight that has its offset, as `_split_rows` gives it.
        whole = offset_weight(inputs.weight, offset, torch.float32, round_weight=True)
        inputs, offset = inputs._replace(weight=whole.to(inputs.weight.dtype)), 0.0
    parts = list(zip(*(chunks(t, count) for t in (case.grad_y, *used(inputs))), strict=True))
    gathered = torch.stack(
        [
            native("part_backward_statistics", kind_of(op), grad_y, x, weight, *saved, offset)
            for grad_y, x, weight, _ in parts
        ]
    )
    of_parts = [
        native(
            "part_backward_apply", kind_of(op), *part, *saved, offset, rounds, x_dtype, 3, gathered
        )
        for part in parts
    ]
    x, weight, bias = (
        None if of[0] is None else torch.cat(of, -1) for of in zip(*of_parts, strict=True)
    )
    return Gradients(x, None, weight, bias)


def make_and_check(native: Native, case: Case, count: int) -> Gradients:
    made = gradients(native, case, count, case.inputs.x.dtype)
    check_gradients(case, made)
    return made
