"""What the ranks of a process group tell each other about rows whose columns they share.

The statistics of the parts are gathered, not reduced: every rank combines them in the order of the
ranks, so that all get the same bits, whatever the size of the message.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Processors can look at a message, so it describes itself; and its length must not depend on what
# it says, since gloo ends the process that gets more bytes than it expects.  Up to 16 KiB take as
# long as a single byte.  Longer statistics take a second message for the rest.
_BYTES = 16384
_DESCRIBED = ("n", "rows", "planes", "bytes", "pass")

# Which sizes of parts the ranks of a group have told each other where messages are not looked at.
_agreed: WeakKeyDictionary[ProcessGroup, set[int]] = WeakKeyDictionary()


class Ranks(NamedTuple):
    """The processes that share rows, for which op, and how many seconds one waits for the others.

    A timeout of None is the group's own.
    """

    op: str
    group: ProcessGroup
    timeout: float | None


def gather(planes: Tensor, n: int, ranks: Ranks, *, backward: bool) -> Tensor:
    """Return the planes (planes, ...) of all ranks, (ranks, planes, ...) in their order.

    Raises:
        ValueError: the ranks have parts of different sizes; on CPUs also different rows, or calls.
        RuntimeError: a rank is gone or does not come.
    """
    world = ranks.group.size()
    made = planes.new_empty((world, *planes.shape))
    if world == 1:
        return made.copy_(planes)
    values = planes.reshape(-1)
    rows = made.view(world, values.numel())
    if planes.is_cpu:
        description = (
            n, values.numel() // len(planes), len(planes), planes.element_size(), int(backward)
        )  # fmt: skip
        done = _exchange(description, values, rows, ranks)
    else:
        _agree(n, planes.device, ranks)
        done = 0
    if done < values.numel():
        rest = values.new_empty(world * (values.numel() - done))
        _all_gather(rest, values[done:], ranks)
        rows[:, done:] = rest.view(world, -1)
    return made


def _exchange(description: tuple[int, ...], values: Tensor, rows: Tensor, ranks: Ranks) -> int:
    """Gather descriptions and the first of the values into rows; return how many those are."""
    head = torch.tensor(description).view(values.dtype)
    size = _BYTES // values.element_size()
    done = min(size - len(head), len(values))
    begin, end = len(head), len(head) + done
    message = values.new_empty(size)
    torch.cat((head, values[:done]), out=message[:end])
    received = values.new_empty(len(rows) * size)
    _all_gather(received, message, ranks)
    received = received.view(len(rows), size)
    _compare(received[:, :begin].view(torch.int64).tolist(), ranks)
    rows[:, :done] = received[:, begin:end]
    return done


def _compare(descriptions: Sequence[Sequence[int]], ranks: Ranks) -> None:
    for name, told in zip(_DESCRIBED, zip(*descriptions, strict=True), strict=True):
        if len(set(told)) == 1:
            continue
        expected = {"n": "a part of the same size", "rows": "the same number of rows"}.get(name)
        if expected is None:
            raise ValueError(
                f"{ranks.op}: expected the same call on every rank, got other {name} on some:"
                f" {_listed(told)}"
            )
        raise ValueError(f"x: expected {expected} on every rank, got {name} = {_listed(told)}")


def _listed(told: Sequence[int]) -> str:
    return f"{', '.join(map(str, told))} on ranks 0 to {len(told) - 1}"


def _agree(n: int, device: torch.device, ranks: Ranks) -> None:
    """Compare n with the other ranks', once: this waits for the device."""
    known = _agreed.setdefault(ranks.group, set())
    if n in known:
        return
    told = torch.empty(ranks.group.size(), dtype=torch.int64, device=device)
    _all_gather(told, torch.tensor([n], device=device), ranks)
    sizes = told.tolist()
    if len(set(sizes)) > 1:
        raise ValueError(
            f"x: expected a part of the same size on every rank, got n = {_listed(sizes)}"
        )
    known.add(n)


def _all_gather(out: Tensor, given: Tensor, ranks: Ranks) -> None:
    # The second is the name before torch 2.13, where it warns.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    begin = time.monotonic()
    try:
        work = all_gather(out, given, group=ranks.group, async_op=True)
        if ranks.timeout is None:
            work.wait()
        else:
            work.wait(timedelta(seconds=ranks.timeout))
    except RuntimeError as error:
        group, waited = ranks.group, time.monotonic() - begin
        raise RuntimeError(
            f"{ranks.op}: rank {group.rank()} of the {group.size()} of group"
            f" {group.group_name!r} did not hear from all others within {waited:.1f} s: {error}"
        ) from error
