"""How the operators of normkit act on sharded tensors (DTensor).

Rows may be split along any dimension but the last: no rank needs what another has.  A weight or
bias with a row per head is split with the heads; one that all rows share is whole on every rank,
and its gradient is a sum over the ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch


def register_once(operators: Iterable[tuple[str, Sequence[str], Sequence[str]]]) -> None:
    """Tell torch's DTensor of operators (name, arguments, outputs), once somebody has loaded it."""
    if "torch.distributed.tensor" in sys.modules:
        _register(tuple((name, tuple(given), tuple(made)) for name, given, made in operators))


def is_sharded(t: torch.Tensor) -> bool:
    """Whether it is a DTensor, which only torch's own operators may write in place."""
    return type(t).__name__ == "DTensor"


@cache
def _register(operators: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...]) -> None:
    from torch.distributed.tensor.experimental import register_sharding

    for name, arguments, outputs in operators:
        operator = getattr(torch.ops.normkit, name).default
        register_sharding(operator)(_strategy(arguments, outputs))


def _strategy(arguments: tuple[str, ...], outputs: tuple[str, ...]) -> Any:
    from torch.distributed.tensor import Partial, Replicate, Shard

    def strategy(*values: Any) -> list[tuple[list[Any], list[Any]]]:
        named = dict(zip(arguments, values, strict=False))
        tensors = {name: value for name, value in named.items() if hasattr(value, "ndim")}
        empty = _empty_outputs({**dict.fromkeys({"kind"} & {*arguments}, "rms"), **named})
        dims = tensors["x"].ndim

        def given(name: str, dim: int) -> Any:
            """Where an argument is if x is split along dim."""
            if name not in ("weight", "bias"):
                return Shard(dim)
            per_head = tensors[name].ndim == 2 and dim == dims - 2
            return Shard(0) if per_head else Replicate()

        def made(name: str, dim: int) -> Any:
            if name in empty:
                return Replicate()
            if name not in ("grad_weight", "grad_bias"):
                return Shard(dim)
            of = given(name.removeprefix("grad_"), dim)
            return of if of.is_shard() else Partial()

        whole = (
            [Replicate() for _ in outputs],
            [Replicate() if name in tensors else None for name in named],
        )
        split = (
            (
                [made(name, dim) for name in outputs],
                [given(name, dim) if name in tensors else None for name in named],
            )
            for dim in range(dims - 1)
        )
        return [whole, *split]

    return strategy


def _empty_outputs(named: dict[str, Any]) -> set[str]:
    """Outputs without elements, because there is nothing to say in them."""
    if "grad_y" not in named:
        return {"mean"} if named.get("kind") == "rms" else set()
    x, residual = named["x_dtype"], named["residual_dtype"]
    empty = {
        "grad_x": x is None,
        "grad_residual": residual is None or residual == x,
        "grad_weight": not named["weight_wanted"] or named["weight"] is None,
        "grad_bias": not named["bias_wanted"] or named["bias"] is None,
    }
    return {name for name, is_empty in empty.items() if is_empty}
