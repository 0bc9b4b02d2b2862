"""The devices of one process that share its work, and what is copied to them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from enum import IntEnum
from typing import TypeVar

import torch
from torch import Tensor

Module = TypeVar("Module", bound=torch.nn.Module)
Device = torch.device | str | int


class BroadcastType(IntEnum):
    """What a tensor is split by, in the numbers of ExLlamaV2's tensor parallelism."""

    KV = 0
    """Heads of keys and values."""
    ID = 1
    """Columns inside of the MLP."""
    VC = 2
    """The vocabulary."""
    RS = 3
    """Columns of the residual stream."""
    Q = 4
    """Heads of queries."""


class TPContext:
    """The devices of one process that share its work, with a stream for each.

    A call on these devices is put into their streams: after what the device's current stream holds
    then, and before what it gets later.  Inside of `with context.use_streams():`, where the
    context's streams are the current ones, that takes no event; elsewhere two a device.

    Args:
        devices: of the process: `torch.device`, "cuda:1", or the index of a CUDA device, -1 for the
            CPU.  One may be named several times, and has one stream.
        streams: one for each device, or None for torch's current one, which the CPU always has.
            None: a new one for each CUDA device.
        splits: for each `BroadcastType` how much of it each device has, such as {BroadcastType.KV:
            [4, 4, 0]}: a device with nothing takes no part in what is split that way.  None, or a
            type that is not in it: every device takes part.

    Raises:
        TypeError: streams has something else than torch.cuda.Stream or None.
        ValueError: there is no device, or one is not usable; streams or splits do not fit them.

    Attributes:
        devices: a tuple of torch.device.
        streams: a tuple as long, of torch.cuda.Stream or None.

    Example:
        >>> from normkit.parallel import TPContext
        >>> TPContext(["cpu", "cpu"]).devices
        (device(type='cpu'), device(type='cpu'))
    """

    def __init__(
        self,
        devices: Sequence[Device],
        streams: Sequence[torch.cuda.Stream | None] | None = None,
        splits: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        self.devices = tuple(map(_device, devices))
        if not self.devices:
            raise ValueError("devices: expected one or more, got none")
        if streams is None:
            made = {d: _new_stream(d) for d in dict.fromkeys(self.devices)}
            streams = [made[d] for d in self.devices]
        self.streams = tuple(streams)
        self._stream_of = _by_device(self.devices, self.streams)
        self._splits = {BroadcastType(t): tuple(sizes) for t, sizes in (splits or {}).items()}
        for broadcast_type, sizes in self._splits.items():
            whole = all(isinstance(size, int) and size >= 0 for size in sizes)
            if len(sizes) != len(self.devices) or not whole or not any(sizes):
                raise ValueError(
                    f"splits[{broadcast_type.name}]: expected a whole size for each of the"
                    f" {len(self.devices)} devices, not all 0, got {list(sizes)}"
                )
        self._handles = _handles(self._stream_of)

    def __repr__(self) -> str:
        return f"TPContext([{', '.join(map(str, self.devices))}])"

    @property
    def num_devices(self) -> int:
        """How many devices there are."""
        return len(self.devices)

    def get_split(self, broadcast_type: int) -> list[tuple[int, int, int]]:
        """Return the part of a split that each device has.

        Args:
            broadcast_type: a `BroadcastType`, or its number.

        Returns:
            (position in `devices`, begin, end) for every device with a part.  Of a type without
            sizes every device has one unit.

        Raises:
            ValueError: there is no such type.

        Example:
            >>> from normkit.parallel import BroadcastType, TPContext
            >>> TPContext(["cpu"] * 3, splits={BroadcastType.KV: [4, 0, 2]}).get_split(0)
            [(0, 0, 4), (2, 4, 6)]
        """
        sizes = self._splits.get(BroadcastType(broadcast_type), (1,) * len(self.devices))
        split, begin = [], 0
        for position, size in enumerate(sizes):
            if size:
                split.append((position, begin, begin + size))
            begin += size
        return split

    def devices_of(self, broadcast_type: int | None) -> list[torch.device]:
        """The devices with a part of what is split; None for all of them."""
        if broadcast_type is None:
            return list(self.devices)
        return [self.devices[position] for position, _, _ in self.get_split(broadcast_type)]

    @contextmanager
    def use_streams(self) -> Iterator[None]:
        """Make the context's streams the current ones of their devices, in this thread.

        What comes inside follows what the streams that were current have, and is followed by what
        they get afterwards.  Calls inside are ordered by their streams alone, without events.
        """
        with ExitStack() as stack:
            for device in self._stream_of:
                stack.enter_context(self._ordered(device))
            yield

    @contextmanager
    def _ordered(self, device: torch.device) -> Iterator[None]:
        """Make the device's stream the current one, after and before what the current one has."""
        stream = self._stream_of[device]
        if stream is None or stream == torch.cuda.current_stream(device):
            yield
            return
        before = torch.cuda.current_stream(device)
        index = torch.cuda.current_device()
        stream.wait_stream(before)
        try:
            with torch.cuda.stream(stream), torch.cuda.device(index):
                yield
        finally:
            before.wait_stream(stream)


def _device(given: Device) -> torch.device:
    if isinstance(given, int) and not isinstance(given, bool):
        given = f"cuda:{given}" if given >= 0 else "cpu"
    try:
        device = torch.device(given)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"devices: expected devices of this machine, got {given!r}") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise ValueError(f"devices: expected the CPU or CUDA devices, got {device}")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise ValueError(f"devices: expected one of {count} CUDA devices, got {device}")
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device


def _new_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]


def _by_device(
    devices: Sequence[torch.device], streams: Sequence[torch.cuda.Stream | None]
) -> dict[torch.device, torch.cuda.Stream | None]:
    if len(streams) != len(devices):
        raise ValueError(f"streams: expected {len(devices)}, one a device, got {len(streams)}")
    found: dict[torch.device, torch.cuda.Stream | None] = {}
    for device, stream in zip(devices, streams, strict=True):
        if stream is not None and not isinstance(stream, torch.cuda.Stream):
            raise TypeError(f"streams: expected torch.cuda.Stream or None, got {type(stream)}")
        if stream is not None and stream.device != device:
            raise ValueError(f"streams: expected one of {device}, got {stream}")
        if found.setdefault(device, stream) != stream:
            raise ValueError(f"streams: expected one stream for {device}, got several")
    return found


def _handles(
    stream_of: Mapping[torch.device, torch.cuda.Stream | None],
) -> tuple[int | None, ...]:
    """What `_C.norm_tp` takes: the CPU's first, then those of CUDA devices; -1: the current one."""
    handles: list[int | None] = [None] * (2 + max((d.index or 0) for d in stream_of))
    for device, stream in stream_of.items():
        at = 0 if device.type == "cpu" else 1 + device.index
        handles[at] = -1 if stream is None else stream.cuda_stream
    return tuple(handles)


# ---------------------------------------------------------------- copies


def broadcast(x: Tensor, context: TPContext, broadcast_type: int | None = None) -> list[Tensor]:
    """Copy a tensor to the devices of a context.

    Args:
        x: of any shape and dtype, on any device.
        context: its devices get x.
        broadcast_type: only those with a part of it; None: all.

    Returns:
        A tensor for each device, in the order of the context.  On x's own device it is x itself,
        and a device that is named several times has one copy.

    Raises:
        TypeError: x is no tensor.

    The copies are in their devices' current streams when this returns: what is put there later
    comes after them, as it does after every copy of torch.

    Example:
        >>> import torch
        >>> from normkit.parallel import TPContext, broadcast
        >>> [t.shape for t in broadcast(torch.ones(2, 4), TPContext(["cpu", "cpu"]))]
        [torch.Size([2, 4]), torch.Size([2, 4])]
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a torch.Tensor, got {type(x).__name__}")
    devices = context.devices_of(broadcast_type)
    # The host is not ordered with copies that do not block.
    copies = {
        d: x.to(d, non_blocking=x.is_cuda and d.type == "cuda") for d in dict.fromkeys(devices)
    }
    return [copies[d] for d in devices]


def replicate(module: Module, devices: TPContext | Sequence[Device]) -> list[Module]:
    """Copy a module to several devices.

    Args:
        module: with all its parameters and buffers; it stays as it is.
        devices: where to; those of a context, or a list as `TPContext` takes it.

    Returns:
        A module of its own for each device, with the same options and the same bits.

    Raises:
        ValueError: a device is not usable.

    Example:
        >>> import normkit
        >>> from normkit.parallel import replicate
        >>> [norm.weight.device.type for norm in replicate(normkit.RMSNorm(4), ["cpu", "cpu"])]
        ['cpu', 'cpu']
    """
    listed = devices.devices if isinstance(devices, TPContext) else map(_device, devices)
    return [copy.deepcopy(module).to(device) for device in listed]


def tp_split(module: Module, context: TPContext, broadcast_type: int) -> list[Module]:
    """Copy a norm to those devices that have a part of what it normalises.

    Args:
        module: a norm; every device gets the whole of it, since each normalises whole rows.
        context: the devices, and how they split the work.
        broadcast_type: a `BroadcastType`, or its number.

    Returns:
        A module for each device with a part, in the order of `context.get_split(broadcast_type)`.

    Raises:
        ValueError: there is no such type.

    Semantics: `tp_split` of ExLlamaV2's norms.

    Example:
        >>> import normkit
        >>> from normkit.parallel import BroadcastType, TPContext, tp_split
        >>> context = TPContext(["cpu"] * 3, splits={BroadcastType.KV: [4, 0, 2]})
        >>> len(tp_split(normkit.RMSNorm(4), context, BroadcastType.KV))
        2
    """
    return replicate(module, context.devices_of(broadcast_type))
