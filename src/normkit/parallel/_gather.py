"""What the ranks of a process group tell each other about rows whose columns they share.

The statistics of the parts are gathered, not reduced: every rank combines them in the order of the
ranks, so that all get the same bits, whatever the size of the message.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Processors can look at a message, so it describes itself; and its length must not depend on what
# it says, since gloo ends the process that gets more bytes than it expects.  Up to 16 KiB take as
# long as a single byte.  Longer statistics take a second message for the rest.
_BYTES = 16384
_DESCRIBED = ("n", "rows", "planes", "bytes", "pass", "eps")

# Groups in which this rank gave up waiting for a message, and could take a later one for it.
_out_of_step: WeakSet[ProcessGroup] = WeakSet()


class Ranks(NamedTuple):
    """The processes that share rows, for which op, and how many seconds one waits for the others.

    A timeout of None is the group's own.
    """

    op: str
    group: ProcessGroup
    timeout: float | None


def gather(planes: Tensor, n: int, ranks: Ranks, *, backward: bool, eps: float = 0.0) -> Tensor:
    """Return the planes (planes, ...) of all ranks, (ranks, planes, ...) in their order.

    eps is only compared.

    Raises:
        ValueError: on CPUs: the ranks have parts of different sizes, other rows, or other calls.
        RuntimeError: a rank is gone, does not come, or has not come before; or on other devices,
            when they get there: the ranks have parts of different sizes.
    """
    world = ranks.group.size()
    made = planes.new_empty((world, *planes.shape))
    if world == 1:
        return made.copy_(planes)
    values = planes.reshape(-1)
    rows = made.view(world, values.numel())
    if planes.is_cpu:
        described = len(planes), planes.element_size(), int(backward), eps
        description = n, values.numel() // len(planes), *described
        _exchange(description, values, rows, ranks)
    else:
        _exchange_on_device(n, values, rows, ranks)
    return made


def _exchange(description: tuple[float, ...], values: Tensor, rows: Tensor, ranks: Ranks) -> None:
    """Gather descriptions and values, and look at the descriptions."""
    head = torch.tensor(description, dtype=torch.float64).view(values.dtype)
    size = _BYTES // values.element_size()
    done = min(size - len(head), len(values))
    begin, end = len(head), len(head) + done
    message = values.new_empty(size)
    torch.cat((head, values[:done]), out=message[:end])
    received = values.new_empty(len(rows) * size)
    _all_gather(received, message, ranks)
    received = received.view(len(rows), size)
    _compare(received[:, :begin].view(torch.float64).tolist(), ranks)
    rows[:, :done] = received[:, begin:end]
    if done < len(values):
        rest = values.new_empty(len(rows) * (len(values) - done))
        _all_gather(rest, values[done:], ranks)
        rows[:, done:] = rest.view(len(rows), -1)


def _exchange_on_device(n: int, values: Tensor, rows: Tensor, ranks: Ranks) -> None:
    """Gather n and values, and have the device compare the first: the host waits for nothing."""
    head = torch.full((1,), n, dtype=torch.int64, device=values.device).view(values.dtype)
    message = torch.cat((head, values))
    received = values.new_empty(len(rows) * len(message))
    _all_gather(received, message, ranks)
    received = received.view(len(rows), -1)
    told = received[:, : len(head)].contiguous().view(torch.int64)
    torch._assert_async(
        (told == n).all(), f"{ranks.op}: expected a part of the same size on every rank, got others"
    )
    rows.copy_(received[:, len(head) :])


def _compare(descriptions: Sequence[Sequence[float]], ranks: Ranks) -> None:
    for name, told in zip(_DESCRIBED, zip(*descriptions, strict=True), strict=True):
        if len(set(told)) == 1:
            continue
        if name == "eps":
            raise ValueError(f"eps: expected the same on every rank, got {_listed(told)}")
        expected = {"n": "a part of the same size", "rows": "the same number of rows"}.get(name)
        if expected is None:
            raise ValueError(
                f"{ranks.op}: expected the same call on every rank, got other {name} on some:"
                f" {_listed(told)}"
            )
        raise ValueError(f"x: expected {expected} on every rank, got {name} = {_listed(told)}")


def _listed(told: Sequence[float]) -> str:
    numbers = (int(number) if number.is_integer() else number for number in told)
    return f"{', '.join(map(str, numbers))} on ranks 0 to {len(told) - 1}"


def _all_gather(out: Tensor, given: Tensor, ranks: Ranks) -> None:
    # The second is the name before torch 2.13, where it warns.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    group, begin = ranks.group, time.monotonic()
    if group in _out_of_step:
        raise RuntimeError(
            f"{ranks.op}: expected a group whose ranks are in step, got {group.group_name!r}, which"
            " lost a message; make a new group"
        )
    try:
        _wait(all_gather(out, given, group=group, async_op=True), ranks)
    except RuntimeError as error:
        waited = time.monotonic() - begin
        raise RuntimeError(
            f"{ranks.op}: rank {group.rank()} of the {group.size()} of group"
            f" {group.group_name!r} did not hear from all others within {waited:.1f} s: {error}"
        ) from error


def _wait(work: dist.Work, ranks: Ranks) -> None:
    try:
        if ranks.timeout is None:
            work.wait()
        else:
            work.wait(timedelta(seconds=ranks.timeout))
    except BaseException:
        _out_of_step.add(ranks.group)
        raise
