"""Contexts of several devices, as ExLlamaV2's extension makes them, and copies between devices.

`normkit.compat.exllamav2_ext` has these functions too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from normkit.parallel import TPContext

__all__ = ["free_tp_context", "make_tp_context", "tp_broadcast"]


class _Context(NamedTuple):
    """What `make_tp_context` was told: splits by broadcast type, streams by device index."""

    splits: tuple[Sequence[tuple[int, int, int]], ...]
    streams: Sequence[int]


_contexts: dict[int, _Context] = {}
_freed: set[int] = set()
_handles = count(1)


def make_tp_context(
    kv_split: Sequence[tuple[int, int, int]],
    id_split: Sequence[tuple[int, int, int]],
    vc_split: Sequence[tuple[int, int, int]],
    rs_split: Sequence[tuple[int, int, int]],
    q_split: Sequence[tuple[int, int, int]],
    pinned_temp: Sequence[Tensor],
    streams: Sequence[int],
) -> int:
    """Note down the devices of a model that is split over several.

    Args:
        kv_split: (device, begin, end) for each part of what has broadcast type 0; device is an
            index, or -1 for the CPU.
        id_split: likewise for broadcast type 1.
        vc_split: likewise for broadcast type 2.
        rs_split: likewise for broadcast type 3.
        q_split: likewise for broadcast type 4.
        pinned_temp: not used: torch brings tensors from device to device.
        streams: the CUDA stream handle of each device index; 0 for torch's current stream, or
            where the device is not used.

    Returns:
        A handle for `rms_norm_tp`, `tp_broadcast` and `free_tp_context`.

    Raises:
        ValueError: a part is not (device, begin, end), or its device has no entry in streams.

    Example:
        >>> from normkit.compat import exllamav2_ext as ext_c
        >>> whole = [(-1, 0, 8)]
        >>> handle = ext_c.make_tp_context(whole, whole, whole, whole, whole, [], [])
        >>> ext_c.free_tp_context(handle)
    """
    splits = (kv_split, id_split, vc_split, rs_split, q_split)
    names = ("kv_split", "id_split", "vc_split", "rs_split", "q_split")
    for name, split in zip(names, splits, strict=True):
        for part in split:
            if len(part) != 3 or not -1 <= part[0] < len(streams):
                raise ValueError(
                    f"{name}: expected (device, begin, end) with a device from -1 to"
                    f" {len(streams) - 1}, the last of streams, got {part!r}"
                )
    handle = next(_handles)
    _contexts[handle] = _Context(tuple(map(tuple, splits)), tuple(streams))
    return handle


def free_tp_context(tp_context: int) -> None:
    """Forget a context, whose handle is then invalid.

    Args:
        tp_context: what `make_tp_context` returned.

    Raises:
        ValueError: it is no such handle, or was freed before.

    Example:
        >>> from normkit.compat import exllamav2_ext as ext_c
        >>> ext_c.free_tp_context(ext_c.make_tp_context([], [], [], [], [], [], []))
    """
    _check_not_freed(tp_context)
    if tp_context not in _contexts:
        raise ValueError(f"tp_context: expected a handle of make_tp_context, got {tp_context!r}")
    del _contexts[tp_context]
    _freed.add(tp_context)


def tp_broadcast(
    tp_context: int,
    buffer: int,
    source: Tensor,
    broadcast_type: int,
    targets: Sequence[Tensor],
    dim: int,
    t_device: int = -1,
) -> None:
    """Copy a tensor to every device of a split.

    Args:
        tp_context: a handle, as in `rms_norm_tp`.
        buffer: not used: torch brings tensors from device to device.
        source: on any device, of any dtype.
        broadcast_type: which split of the context, 0 to 4 in the order of `make_tp_context`.
        targets: of source's shape and dtype, one on each device of the split; written.
        dim: not used: the targets have the whole shape.
        t_device: index of the only device to copy to; -1 for all.

    Raises:
        TypeError: an argument is no tensor, or a target of another dtype.
        ValueError: the handle or the broadcast type is unknown, or a target does not fit.

    Each copy runs in the stream that the context has for the target's device.  Nothing is rounded.
    Semantics: ExLlamaV2's `tp_broadcast`, for any dtype.

    Example:
        >>> import torch
        >>> from normkit.compat import exllamav2_ext as ext_c
        >>> whole = [(-1, 0, 2)]
        >>> handle = ext_c.make_tp_context(whole, whole, whole, whole, whole, [], [])
        >>> target = torch.zeros(2)
        >>> ext_c.tp_broadcast(handle, 0, torch.ones(2), 3, [target], 1)
        >>> target
        tensor([1., 1.])
    """
    for name, t in (("source", source), *((f"targets[{i}]", t) for i, t in enumerate(targets))):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    devices = [target.device for target in targets]
    streams = streams_of(tp_context, devices)
    if broadcast_type not in range(5):
        raise ValueError(f"broadcast_type: expected 0 to 4, got {broadcast_type!r}")
    if tp_context in _contexts:
        split = _contexts[tp_context].splits[broadcast_type]
        expected = [_index(device) for device in devices]
        if expected != [device for device, _, _ in split]:
            places = ", ".join(str(device) for device, _, _ in split)
            raise ValueError(f"targets: expected one on each of {places}, got {devices}")
    for i, target in enumerate(targets):
        if target.dtype != source.dtype:
            raise TypeError(f"targets[{i}]: expected {source.dtype}, as source, got {target.dtype}")
        if target.shape != source.shape:
            shapes = f"{tuple(source.shape)}, got {tuple(target.shape)}"
            raise ValueError(f"targets[{i}]: expected source's shape {shapes}")
    for target, stream in zip(targets, streams, strict=True):
        if t_device in (-1, _index(target.device)):
            _copy(source, target, stream)


def _copy(source: Tensor, target: Tensor, stream: torch.cuda.Stream | None) -> None:
    with torch.no_grad(), torch.cuda.stream(stream):  # which does nothing for None
        if stream is not None and source.device == target.device:  # else torch waits and holds
            stream.wait_stream(torch.cuda.current_stream(source.device))
            source.record_stream(stream)
        # The host may read or overwrite its own memory as soon as this returns.
        target.copy_(source, non_blocking=source.is_cuda and target.is_cuda)


def _index(device: torch.device) -> int | None:
    return -1 if device.type == "cpu" else device.index


def _check_not_freed(tp_context: int) -> None:
    if tp_context in _freed:
        raise ValueError(f"tp_context: expected a handle in use, got {tp_context}, which was freed")


def streams_of(tp_context: int, devices: Sequence[torch.device]) -> list[torch.cuda.Stream | None]:
    """The streams that a handle means for these devices; None for torch's current one."""
    _check_not_freed(tp_context)
    if tp_context not in _contexts:
        if not _global_streams():
            raise ValueError(
                "tp_context: expected a handle of make_tp_context, or one of ExLlamaV2's with"
                f" exllamav2.device loaded, got {tp_context!r}"
            )
        return exllamav2_streams(devices)
    raw = _contexts[tp_context].streams
    streams: list[torch.cuda.Stream | None] = []
    for device in devices:
        if device.type != "cuda":
            streams.append(None)
        elif device.index >= len(raw):
            raise ValueError(f"tp_context: expected one with a stream for {device}, got {raw}")
        else:
            handle = raw[device.index]
            streams.append(_external(handle, device) if handle else None)
    return streams


def context_of(tp_context: int, devices: tuple[torch.device, ...]) -> TPContext:
    """The devices and streams that a handle means, for calls on these devices."""
    streams = streams_of(tp_context, devices)
    return _made(devices, tuple(streams))


# Built once: it takes longer than the norm that wants it.
@lru_cache(maxsize=64)
def _made(
    devices: tuple[torch.device, ...], streams: tuple[torch.cuda.Stream | None, ...]
) -> TPContext:
    return TPContext(devices, streams)


def _external(handle: int, device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.ExternalStream(handle, device)  # type: ignore[no-untyped-call]


def _global_streams() -> dict[int, torch.cuda.Stream]:
    """ExLlamaV2's own streams by device index, where it is loaded."""
    return getattr(sys.modules.get("exllamav2.device"), "global_streams", {})


def exllamav2_streams(devices: Sequence[torch.device]) -> list[torch.cuda.Stream | None]:
    """The streams in which ExLlamaV2 works on these devices; None for torch's current one."""
    known = _global_streams()
    return [known.get(d.index) if d.type == "cuda" else None for d in devices]
