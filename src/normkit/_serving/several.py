"""Several calls at once: in one launch where a backend can, else one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from normkit._serving import backends
from normkit._serving.backends import falls_back, wanted_backend
from normkit._serving.checks import check
from normkit._serving.dispatch import hides_signs, native_for
from normkit._serving.refusal import Refusal
from normkit._serving.serve import serve
from normkit._spec import NATIVE, Call


def run_several(calls: Sequence[tuple[Any, ...]]) -> list[Tensor]:
    """The results of calls, of which each is what `call_of` takes."""
    made = None if is_dynamo_compiling() else backends.quick_norms(tuple(calls))
    if made is None:
        checked = [call_of(call) for call in calls]
        if not is_dynamo_compiling():
            checked = [check(call) for call in checked]
            made = _by_name(checked)
        if made is None:
            return [_alone(call) for call in checked]
    return [call[1] if y is None else y for call, y in zip(calls, made, strict=True)]


def call_of(native: tuple[Any, ...]) -> Call:
    """The call of which the extension's arguments are these, FUSED ones among them.

    A `Call` takes longer to make than such a call to run, where there are few rows.
    """
    values: Any = (*native[: len(NATIVE)], False, *native[len(NATIVE) :])
    return Call(*values)


def _by_name(calls: Sequence[Call]) -> list[Tensor | None] | None:
    """By a backend that was asked for by name; None where it leaves them to be run alone."""
    backend = wanted_backend()
    alone = any(call.needs_gradient() or hides_signs(call) for call in calls)
    if falls_back(backend) or not calls or alone:
        return None
    made = native_for(calls[0].x, backend).norms(tuple(call.fused_native() for call in calls))
    return None if isinstance(made, Refusal) else made


def _alone(call: Call) -> Tensor:
    norm = replace(call, cache=None, slots=None)
    y = call.x if call.as_is else cast(Tensor, serve(norm))
    if call.cache is not None and call.slots is not None:
        _write_cache(y, call.cache, call.slots)
    return y


def _write_cache(y: Tensor, cache: Tensor, slots: Tensor) -> None:
    page_size = cache.shape[1]
    inside = (slots >= 0) & (slots < cache.shape[0] * page_size)
    at = slots[inside].long()
    with torch.no_grad():
        cache[at // page_size, at % page_size] = y[inside]
