"""How the operators of normkit act on sharded tensors (DTensor).

Rows may be split along any dimension but the last: no rank needs what another has.  A weight or
bias with a row per head is split with the heads; one that all rows share is whole on every rank,
and its gradient is a sum over the ranks.  Rows that are split along their last dimension stay where
they are, too: the ranks tell each other the statistics of their parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, cast

import torch

from normkit import reference
from normkit._serving.operators import SHARDED, is_sharded
from normkit._spec import ADD, Call, Result
from normkit.parallel import _split_rows
from normkit.parallel._gather import Ranks

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement

    Lists = list[Placement | None]


def run(call: Call) -> Result | None:
    """Run a checked call of DTensors; None where it is one for an operator."""
    register_once()
    dim = split_columns(call)
    return None if dim is None else norm_split_columns(call, dim)


@cache
def register_once() -> None:
    """Tell torch's DTensor of the operators."""
    from torch.distributed.tensor.experimental import register_sharding

    for name, arguments, outputs in SHARDED:
        operator = getattr(torch.ops.normkit, name).default
        register_sharding(operator)(_strategy(arguments, outputs))


def _strategy(
    arguments: tuple[str, ...], outputs: tuple[str, ...]
) -> Callable[..., list[tuple[Lists, Lists]]]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    def strategy(*values: object) -> list[tuple[Lists, Lists]]:
        named = dict(zip(arguments, values, strict=False))
        # What torch gives for tensors only describes them.
        dims_of = {name: value.ndim for name, value in named.items() if hasattr(value, "ndim")}
        empty = _empty_outputs({**dict.fromkeys({"kind"} & {*arguments}, "rms"), **named})
        dims = dims_of["x"]

        def given(name: str, dim: int) -> Placement:
            """Where an argument is if x is split along dim."""
            if name not in ("weight", "bias"):
                return Shard(dim)
            per_head = dims_of[name] == 2 and dim == dims - 2
            return Shard(0) if per_head else Replicate()

        def made(name: str, dim: int) -> Placement:
            if name in empty:
                return Replicate()
            if name not in ("grad_weight", "grad_bias"):
                return Shard(dim)
            of = given(name.removeprefix("grad_"), dim)
            return of if of.is_shard() else Partial()

        def split(dim: int) -> tuple[Lists, Lists]:
            placed = [given(name, dim) if name in dims_of else None for name in named]
            return [made(name, dim) for name in outputs], placed

        whole: tuple[Lists, Lists] = (
            [Replicate() for _ in outputs],
            [Replicate() if name in dims_of else None for name in named],
        )
        return [whole, *map(split, range(dims - 1))]

    return strategy


def _empty_outputs(named: Mapping[str, object]) -> set[str]:
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


# ---------------------------------------------------------------- rows split in columns


def split_columns(call: Call) -> int | None:
    """The mesh dimension over which the last dimension of x is split; None for redistribution.

    A part of this rank has to be a tensor whose memory kernels can read, as large as every other
    rank's, and the arguments have to be where they can be used as they are.
    """
    if not is_sharded(call.x) or call.per_head or call.fused or call.of_sum or call.written():
        return None
    x = cast("DTensor", call.x)
    from torch.distributed.tensor import Replicate, Shard

    split = [dim for dim, p in enumerate(x.placements) if p.is_shard(x.ndim - 1)]
    plain = all(type(p) in (Shard, Replicate) for p in x.placements)
    if len(split) != 1 or not plain or x.shape[-1] % x.device_mesh.size(split[0]):
        return None
    for name, t in call.inputs():
        if not is_sharded(t):
            return None
        given = cast("DTensor", t)
        affine = name in ("weight", "bias")
        if given.device_mesh != x.device_mesh or (
            affine and not _is_usable(given.placements, split[0])
        ):
            return None
    # What is added in float32 and not rounded has no dtype left to round anything else to.
    if call.residual is not None and call.rounds_within and not call.round_sum:
        return None
    part = x._local_tensor
    has_memory = type(part) is torch.Tensor or _split_rows.is_on_its_way(part)
    return split[0] if has_memory and not part.is_meta else None


def _is_usable(placements: Sequence[Placement], split: int) -> bool:
    """Whether a weight is whole on every rank, or split as the columns are."""
    from torch.distributed.tensor import Replicate, Shard

    allowed = (Replicate(), Shard(0))
    return all(p in allowed[: 1 + (dim == split)] for dim, p in enumerate(placements))


def norm_split_columns(call: Call, dim: int) -> Result:
    """Run a call whose x is split in columns over a mesh dimension: nothing of it is moved."""
    from torch.distributed.tensor import DTensor

    x = cast(DTensor, call.x)
    mesh, placements = x.device_mesh, x.placements

    def whole(part: torch.Tensor) -> DTensor:
        strides = torch.empty(x.shape, device="meta").stride()
        return DTensor.from_local(
            part.contiguous(), mesh, placements, run_check=False, shape=x.shape, stride=strides
        )

    part, residual_out = _part_of_rank(call, dim)
    y = whole(_split_rows.run(part, Ranks(call.op, mesh.get_group(dim), None)))
    return y if residual_out is None else (y, whole(residual_out))


def part_of_rank(call: Call) -> Call | None:
    """The norm of this rank's columns that `run` makes of a call; None where it makes none."""
    dim = split_columns(call)
    return None if dim is None else _part_of_rank(call, dim)[0]


def _part_of_rank(call: Call, dim: int) -> tuple[Call, torch.Tensor | None]:
    """The norm of this rank's columns, and the sum that it normalises if call adds one."""
    x = cast("DTensor", call.x)
    part, residual_out = x.to_local(), None
    if call.residual is not None:
        given = cast("DTensor", call.residual)
        residual = given.redistribute(x.device_mesh, x.placements).to_local()
        total = reference.added(part, residual, clamp_inf=call.clamp_inf)
        residual_out = total.to(residual.dtype)
        part = residual_out if call.round_sum else total
    norm = replace(
        call,
        kind=call.kind & ~ADD,
        x=part,
        residual=None,
        weight=_columns_of_rank(call.weight, x, dim),
        bias=_columns_of_rank(call.bias, x, dim),
        out_dtype=call.out_dtype or x.dtype,
        memory_efficient=False,
    )
    return norm, residual_out


def _columns_of_rank(t: torch.Tensor | None, x: DTensor, dim: int) -> torch.Tensor | None:
    """What of a weight belongs to the columns of x on this rank; its gradient returns as t is."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    if t is None:
        return None
    whole = cast("DTensor", t)
    given: list[Placement] = [Replicate()] * x.device_mesh.ndim
    returned = list(whole.placements)
    for other, placement in enumerate(x.placements):
        returned[other] = Partial() if placement.is_shard() else Replicate()
    given[dim] = returned[dim] = Shard(0)
    return whole.redistribute(x.device_mesh, given).to_local(grad_placements=returned)
