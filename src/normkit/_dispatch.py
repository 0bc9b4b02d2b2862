"""Which backend serves a call, and why.

The quick path of `normkit.functional` asks the extension directly.  What the extension refuses
comes here: it is checked in full, and then served by the backend that was asked for by name, or by
the first that can.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normkit import reference
from normkit._checks import Call, check


def bind(extension: Any) -> None:
    """Hand over to the extension what it needs of torch."""
    extension.bind_torch(
        torch.Tensor,
        torch.nn.Parameter,
        torch.empty_like,
        torch.is_grad_enabled,
        torch._C._increment_version,
        torch.autograd.forward_ad.__dict__,
        torch.float32,
        torch.float16,
        torch.bfloat16,
    )


try:
    from normkit import _C

    bind(_C)
    _missing = ""
except (ImportError, AttributeError) as error:
    _missing = f"the extension could not be loaded: {error}"


Result = Tensor | tuple[Tensor, Tensor]


class _State(threading.local):
    backend = "auto"
    explaining = False


_state = _State()


QUICK, CHECKED, EXPLAIN = 0, 1, 2


def _refuse(*args: Any) -> str | None:
    return None if args[-1] == QUICK else _missing


# kind, x, residual, weight, bias, eps, weight_offset, round_before_weight, round_sum, clamp_inf,
# out_dtype, out, residual_out, mode -> the result, or None (QUICK) or a str that says why there is
# none
native: Callable[..., Any] = _refuse if _missing else _C.norm


def _use_reference(*_: Any) -> str:
    return 'use_backend("reference")'


# The names of use_backend(), and who is asked to serve; "auto" takes the kernels for x's device.
natives: dict[str, Callable[..., Any]] = {
    "auto": native,
    "cpu": native,
    "cuda": native,
    "reference": _use_reference,
}


@dataclass(frozen=True)
class Backend:
    """A backend, whether it works on this machine, and why, or why not."""

    name: str
    usable: bool
    reason: str


@dataclass(frozen=True)
class Explanation:
    """Who serves a call: the backend, what it does, and why this one."""

    backend: str
    plan: str
    reason: str


def backends() -> dict[str, Backend]:
    """Tell which backends work on this machine, and why the others do not.

    Returns:
        A `Backend` (name, usable, reason) for each of "cpu", "cuda" and "reference".

    Example:
        >>> import normkit
        >>> normkit.backends()["reference"].usable
        True
    """
    return {b.name: b for b in (_cpu(), _cuda(), Backend("reference", True, "plain torch"))}


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


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Have every call of this thread served by one backend.

    A call that the named backend cannot serve raises; only "auto" falls back.

    Args:
        name: "auto" (the default state: the first that can), "cpu", "cuda" or "reference".

    Raises:
        ValueError: name is none of these; or, from a call inside, the backend cannot serve it.

    Example:
        >>> import normkit, torch
        >>> with normkit.use_backend("reference"):
        ...     y = normkit.rms_norm(torch.ones(2, 4))
    """
    if name not in natives:
        raise ValueError(f"name: expected one of {', '.join(natives)}, got {name!r}")
    with _set_state(backend=name):
        yield


@contextmanager
def _set_state(backend: str | None = None, explaining: bool | None = None) -> Iterator[None]:
    before = _state.backend, _state.explaining
    _state.backend = before[0] if backend is None else backend
    _state.explaining = before[1] if explaining is None else explaining
    _mirror_state()
    try:
        yield
    finally:
        _state.backend, _state.explaining = before
        _mirror_state()


def _mirror_state() -> None:
    if not _missing:
        _C.set_quick_path(_state.backend == "auto" and not _state.explaining)


def explain(function: Callable[..., Any], *tensors: Any, **options: Any) -> Explanation:
    """Ask who would serve `function(*tensors, **options)`."""
    with _set_state(explaining=True):
        explanation: Explanation = function(*tensors, **options)
    return explanation


def serve(call: Call) -> Any:
    """Check a call that the quick path did not take, and have it served."""
    if not torch.compiler.is_compiling():
        check(call)
        wanted = _state.backend
        served = _serve_natively(call, wanted)
        if not isinstance(served, str):
            return served
        if wanted not in ("auto", "reference"):
            raise ValueError(f'use_backend("{wanted}") cannot serve this {call.op}: {served}')
        if _state.explaining:
            return Explanation("reference", "plain torch", served)
    else:
        check(call)
    return _serve_by_reference(call)


def _serve_natively(call: Call, wanted: str) -> Result | Explanation | str:
    if wanted in ("cpu", "cuda") and call.x.device.type != wanted:
        unusable = "" if (backend := backends()[wanted]).usable else f"; {backend.reason}"
        return f"x is on {call.x.device}{unusable}"
    given = {name: getattr(call, name) for name in ("x", "residual", "weight", "bias")}
    inputs = {name: t if t is None else _as_kernels_read_it(t) for name, t in given.items()}
    copied = [name for name, t in inputs.items() if t is not given[name]]
    result = natives[wanted](
        call.layer + 2 * call.per_head + 4 * (call.residual is not None),
        *inputs.values(),
        call.eps,
        call.weight_offset,
        call.round_before_weight,
        call.round_sum,
        call.clamp_inf,
        call.out_dtype,
        call.out,
        call.residual_out,
        EXPLAIN if _state.explaining else CHECKED,
    )
    if isinstance(result, str) or not _state.explaining:
        return result  # type: ignore[no-any-return]
    reason = "served natively"
    if copied:
        reason += f"; copied first, for a last stride of 1: {', '.join(copied)}"
    backend, plan = result
    return Explanation(backend, plan, reason)


def _as_kernels_read_it(t: Tensor) -> Tensor:
    """The tensor itself, or a copy with a last stride of 1 and its signs in its memory."""
    if t.shape[-1] > 1 and t.stride(-1) != 1:
        t = t.contiguous()
    return t.resolve_neg()


def _serve_by_reference(call: Call) -> Result:
    options: dict[str, Any] = {
        "kind": "layer" if call.layer else "rms",
        "weight_offset": call.weight_offset,
        "round_before_weight": call.round_before_weight,
        "clamp_inf": call.clamp_inf,
        "out_dtype": call.out_dtype if call.out is None else call.out.dtype,
    }
    affine = (call.weight, call.bias, call.eps)
    if call.residual is None:
        y = reference.norm(call.x, *affine, **options)
        return y if call.out is None else call.out.copy_(y)
    y, residual_out = reference.add_norm(
        call.x, call.residual, *affine, round_sum=call.round_sum, **options
    )
    if call.residual_out is not None:
        residual_out = call.residual_out.copy_(residual_out)
    return (y if call.out is None else call.out.copy_(y)), residual_out
