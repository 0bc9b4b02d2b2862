"""The backends: what each can do here, and which of them this thread's calls are for."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from normkit._serving import triton
from normkit._serving.refusal import Refusal
from normkit._spec import Gradients, PartGradients, PartSaved, Result, Saved

try:
    from normkit import _C
except ImportError as error:
    _missing = f"the extension could not be loaded: {error}"
else:
    _missing = ""
    _C.bind_torch(torch, Refusal)

# The profiler of torch does not see the eager calls that go straight into the extension.
ALWAYS_DISPATCH = os.environ.get("NORMKIT_ALWAYS_DISPATCH", "0") not in ("", "0")


def _refuse_part(*_: object) -> Refusal:
    return Refusal("it", "has no kernels for rows that are split over ranks", "backend")


def _refuse_several(*_: object) -> Refusal:
    return Refusal("it", "has no launch of several norms", "backend")


class Native(NamedTuple):
    """The entries of a backend, with the names, arguments and results of `_C`'s."""

    norm: Callable[..., Result | Refusal]
    norm_saving: Callable[..., Saved | Refusal]
    plan: Callable[..., tuple[str, str] | Refusal]
    norm_backward: Callable[..., Gradients | Refusal]
    norms: Callable[..., list[Tensor | None] | Refusal] = _refuse_several
    part_statistics: Callable[..., Tensor | Refusal] = _refuse_part
    part_apply: Callable[..., PartSaved | Refusal] = _refuse_part
    part_backward_statistics: Callable[..., Tensor | Refusal] = _refuse_part
    part_backward_apply: Callable[..., PartGradients | Refusal] = _refuse_part

    @classmethod
    def of(cls, extension: ModuleType) -> Native:
        """The entries of `_C`, or of another build of it."""
        return cls(*(getattr(extension, name) for name in cls._fields))

    @classmethod
    def refusing(cls, argument: str, problem: str = "") -> Native:
        """Entries of a backend that has no kernels."""

        def refuse(*_: object) -> Refusal:
            return Refusal(argument, problem, "backend")

        return cls(*[refuse] * len(cls._fields))


_extension = Native.refusing(_missing) if _missing else Native.of(_C)

# By the names of use_backend(); "auto" takes the kernels for x's device.
natives: dict[str, Native] = {
    "auto": _extension,
    "cpu": _extension,
    "cuda": _extension,
    "triton": Native(triton.norm, triton.norm_saving, triton.plan_of, triton.norm_backward),
    "reference": Native.refusing('use_backend("reference")'),
}


def _refuse_quickly(*_: object) -> None:
    return None


# The first try of an eager call; None where it has to be looked at.
quick: Callable[..., Result | None]
# Likewise of several calls, one on each of several devices.
quick_tp: Callable[..., list[Tensor] | None]
# Likewise of several calls, in one launch.
quick_norms: Callable[..., list[Tensor | None] | None]
if _missing or ALWAYS_DISPATCH:
    quick = quick_tp = quick_norms = _refuse_quickly
else:
    quick, quick_tp, quick_norms = _C.try_norm, _C.norm_tp, _C.try_norms


def differentiate_quickly(apply: Callable[..., Result]) -> None:
    """Say what makes a node of autograd for `quick`, of what `_C.set_differentiate` describes."""
    if not _missing:
        _C.set_differentiate(apply)


@dataclass(frozen=True)
class Backend:
    """A backend, whether it works on this machine, and why, or why not."""

    name: str
    usable: bool
    reason: str


def backends() -> dict[str, Backend]:
    """Tell which backends work on this machine, and why the others do not.

    Returns:
        A `Backend` (name, usable, reason) for each of "cpu", "cuda", "triton" and "reference".

    Example:
        >>> import normkit
        >>> normkit.backends()["reference"].usable
        True
    """
    listed = (_cpu(), _cuda(), _triton_backend(), Backend("reference", True, "plain torch"))
    return {backend.name: backend for backend in listed}


def _cpu() -> Backend:
    if _missing:
        return Backend("cpu", False, _missing)
    used = _C.cpu_instruction_set()
    if used is None:
        return Backend("cpu", False, "the processor has none of AVX2, AVX-512 and NEON")
    others = [name for name in _C.cpu_instruction_sets() if name != used]
    return Backend("cpu", True, f"{used}" + (f" (also {', '.join(others)})" if others else ""))


def _cuda() -> Backend:
    if _missing:
        return Backend("cuda", False, _missing)
    devices, message = _C.cuda_devices()
    if not devices:
        return Backend("cuda", False, message)
    usable = [name for name, unusable in devices if not unusable]
    others = [unusable for _, unusable in devices if unusable]
    return Backend("cuda", bool(usable), "; ".join([*usable, *others]))


def _triton_backend() -> Backend:
    kinds = ("xpu", "cuda") if torch.version.hip else ("xpu",)
    devices = [f"{kind}:{i}" for kind in kinds for i in range(getattr(torch, kind).device_count())]
    reasons = [triton.why_not(torch.device(device)) for device in devices]
    if "" in reasons:
        return Backend("triton", True, ", ".join(devices))
    return Backend("triton", False, reasons[0] if reasons else "no ROCm or XPU device")


class _State(threading.local):
    def __init__(self) -> None:
        self.backend = "auto"  # of the instance: Dynamo does not guard that of a thread's class


_state = _State()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every call of this thread on one backend.

    A call that the named backend cannot run raises; only "auto" falls back.

    Args:
        name: "auto" (the default state: the first that can), "cpu", "cuda", "triton" or
            "reference".

    Raises:
        ValueError: name is none of these; or, from a call inside, the backend cannot run it.

    Example:
        >>> import normkit, torch
        >>> with normkit.use_backend("reference"):
        ...     y = normkit.rms_norm(torch.ones(2, 4))
    """
    if name not in natives:
        raise ValueError(f"name: expected one of {', '.join(natives)}, got {name!r}")
    before = _state.backend
    _set_backend(name)
    try:
        yield
    finally:
        _set_backend(before)


def _set_backend(name: str) -> None:
    _state.backend = name
    if not _missing:
        _C.set_quick_path(name == "auto")


def wanted_backend() -> str:
    """The name that this thread's `use_backend` gave."""
    return _state.backend


def falls_back(backend: str) -> bool:
    """Whether plain torch runs what has no kernel; a backend asked for by name raises."""
    return backend in ("auto", "reference")
