"""Which backend serves a call, and why.

The quick path of `normkit.functional` asks the extension directly.  What the extension refuses
comes here: it is checked in full, and then served by the backend that was asked for by name, or by
the first that can.
"""

from __future__ import annotations

import operator
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normkit import _triton, reference
from normkit._checks import Call, check

try:
    from normkit import _C
except ImportError as error:
    _missing = f"the extension could not be loaded: {error}"
else:
    _missing = ""
    _C.bind_torch(torch)


Result = Tensor | tuple[Tensor, Tensor]


class _State(threading.local):
    backend = "auto"
    explaining = False


_state = _State()


QUICK, CHECKED, EXPLAIN, SAVING = range(4)


def _refuse_quickly(*_: Any) -> None:
    return None


def _use_reference(*_: Any) -> str:
    return 'use_backend("reference")'


class Native(NamedTuple):
    """A forward and a backward pass with the arguments of `_C`'s; a str says why there is none.

    `parts` has `_C`'s functions for rows that are split over processes; None where there are none.
    """

    norm: Callable[..., Any]
    norm_backward: Callable[..., Any]
    parts: Any = None


_extension = (
    Native(lambda *_: _missing, lambda *_: _missing)
    if _missing
    else Native(_C.norm, _C.norm_backward, _C)
)

# The names of use_backend(), and who is asked to serve; "auto" takes the kernels for x's device.
natives: dict[str, Native] = {
    "auto": _extension,
    "cpu": _extension,
    "cuda": _extension,
    "triton": Native(_triton.norm, _triton.norm_backward),
    "reference": Native(_use_reference, _use_reference),
}

# The profiler of torch does not see the eager calls that go straight into the extension.
ALWAYS_DISPATCH = os.environ.get("NORMKIT_ALWAYS_DISPATCH", "0") not in ("", "0")

# The first try of an eager call, in mode QUICK; None where it has to be looked at.
quick: Callable[..., Any] = _refuse_quickly if _missing or ALWAYS_DISPATCH else _extension.norm
# Likewise of several calls, one on each of several devices.
quick_tp: Callable[..., Any] = _refuse_quickly if _missing or ALWAYS_DISPATCH else _C.norm_tp


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
    reasons = [_triton.serves(torch.device(device)) for device in devices]
    if "" in reasons:
        return Backend("triton", True, ", ".join(devices))
    return Backend("triton", False, reasons[0] if reasons else "no ROCm or XPU device")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Have every call of this thread served by one backend.

    A call that the named backend cannot serve raises; only "auto" falls back.

    Args:
        name: "auto" (the default state: the first that can), "cpu", "cuda", "triton" or
            "reference".

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


# What a forward pass made, and took of each row: y, residual_out, rstd, and mean, None for rms.
Saved = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


def is_explaining() -> bool:
    """Whether this thread's calls are to be explained instead of served."""
    return _state.explaining


def wanted_backend() -> str:
    """The name that this thread's `use_backend` gave."""
    return _state.backend


def serve(call: Call) -> Any:
    """Serve a call that has been checked and wants no gradient."""
    served = _serve_natively(call, CHECKED)
    return serve_by_reference(call) if isinstance(served, str) else served


def save(call: Call) -> Saved:
    """Check and serve a call without outputs of its own, and keep what its gradients need.

    The extension checks quickly; what it refuses is checked in full, and asked again.
    """
    served = _ask_native(call, _state.backend, SAVING, as_given=True)
    if type(served) is not tuple:
        check(call)
        served = _serve_natively(call, SAVING)
    if type(served) is tuple:
        return served
    made = serve_by_reference(call)
    y, residual_out = made if isinstance(made, tuple) else (made, None)
    rstd, mean = reference.statistics(
        call.x,
        call.residual,
        call.eps,
        kind=call.kind,
        round_sum=call.round_sum,
        clamp_inf=call.clamp_inf,
    )
    return y, residual_out, rstd, mean


class Formula(NamedTuple):
    """What is differentiated: a norm of x or, with a residual, of x + residual in float32."""

    layer: bool
    per_head: bool
    from_output: bool  # x is the output, of which xhat is made again
    eps: float | None
    weight_offset: float
    round_before_weight: bool
    clamp_inf: bool
    round_sum: bool

    @property
    def kind(self) -> str:
        """The norm in words."""
        return "layer" if self.layer else "rms"


# Of x, residual, weight and bias; None where it is not wanted.  The first two may be one tensor.
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Wanted(NamedTuple):
    """The dtypes of the gradients of x and residual, None for none, and which others there are."""

    x: torch.dtype | None
    residual: torch.dtype | None
    weight: bool
    bias: bool


def backward_refusal(served_by: str, clamp_inf: bool) -> str:
    """Why no kernel makes these gradients; an empty str when one does."""
    if served_by == "triton":
        return str(_triton.norm_backward())
    return "clamp_inf=True" if clamp_inf else ""


def backward(
    formula: Formula,
    wanted: Wanted,
    backend: str,
    grad_y: Tensor,
    grad_residual_out: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor,
    mean: Tensor | None,
) -> Gradients:
    """Make the gradients of a norm; backend is what `use_backend` named for the forward pass."""
    if not backward_refusal(backend, formula.clamp_inf):
        native = natives[backend].norm_backward
        kind = formula.layer + 2 * formula.per_head + 8 * formula.from_output
        options = (
            rstd,
            mean,
            formula.weight_offset,
            formula.round_before_weight,
            wanted.x,
            wanted.residual,
            wanted.weight + 2 * wanted.bias,
        )
        tensors = (grad_y, grad_residual_out, x, residual, weight, bias)
        made = _with_copies(native, kind, tensors, options)
        if not isinstance(made, str):
            return made  # type: ignore[no-any-return]
        if backend not in ("auto", "reference"):
            raise ValueError(f'use_backend("{backend}") cannot make these gradients: {made}')
    return backward_by_reference(
        formula, wanted, grad_y, grad_residual_out, x, residual, weight, bias, rstd
    )


def backward_by_reference(
    formula: Formula,
    wanted: Wanted,
    grad_y: Tensor,
    grad_residual_out: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor,
    *,
    differentiable: bool = False,
) -> Gradients:
    """Make the gradients of a norm in plain torch; differentiable ones take rstd from x again."""
    # What was kept of a float64 x may be narrower: a rounded sum, or the output.
    compute = torch.float64 if rstd.dtype == torch.float64 else None
    of_sum, of_weight, of_bias = reference.norm_backward(
        grad_y,
        x,
        residual,
        weight,
        bias,
        formula.eps,
        kind=formula.kind,
        rstd=None if differentiable else rstd,
        from_output=formula.from_output,
        round_sum=formula.round_sum,
        weight_offset=formula.weight_offset,
        round_before_weight=formula.round_before_weight,
        clamp_inf=formula.clamp_inf,
        compute_dtype=compute,
    )
    if grad_residual_out is not None:
        of_sum = of_sum + grad_residual_out
    of_x = of_sum
    if formula.clamp_inf and x.dtype == torch.float16:  # what was clamped is a constant
        of_x = torch.where(x.isinf(), 0.0, of_sum)
    return (
        None if wanted.x is None else packed(of_x.to(wanted.x)),
        None if wanted.residual is None else packed(of_sum.to(wanted.residual)),
        _as_wanted(of_weight, weight, wanted.weight),
        _as_wanted(of_bias, bias, wanted.bias),
    )


def _as_wanted(gradient: Tensor | None, like: Tensor | None, wanted: bool) -> Tensor | None:
    if gradient is None or like is None or not wanted:
        return None
    return packed(gradient.to(like.dtype))


def explain_call(call: Call) -> Explanation:
    """Tell who would serve a call that has been checked."""
    gradient = call.needs_gradient()
    with torch.no_grad():
        served = _serve_natively(call, EXPLAIN)
    if isinstance(served, str):
        return Explanation("reference", "plain torch", served)
    reason = "served natively"
    if gradient:
        why_not = backward_refusal(served[0], call.clamp_inf)
        reason += f"; the gradients by plain torch: {why_not}" if why_not else ", gradients too"
    copied = [name for name, t in call.inputs() if as_kernels_read_it(t) is not t]
    if copied:
        reason += f"; copied first, for a last stride of 1: {', '.join(copied)}"
    backend, plan = served
    return Explanation(backend, plan, reason)


def check_backend(call: Call) -> None:
    """Raise if a backend that was asked for by name cannot serve a call, before anything runs."""
    if _state.backend not in ("auto", "reference"):
        with torch.no_grad():
            _serve_natively(call, EXPLAIN)


def _serve_natively(call: Call, mode: int) -> Any:
    wanted = _state.backend
    served = _ask_native(call, wanted, mode)
    if isinstance(served, str) and wanted not in ("auto", "reference"):
        raise ValueError(f'use_backend("{wanted}") cannot serve this {call.op}: {served}')
    return served


def _ask_native(call: Call, wanted: str, mode: int, *, as_given: bool = False) -> Any:
    if wanted in ("cpu", "cuda") and call.x.device.type != wanted:
        unusable = "" if (backend := backends()[wanted]).usable else f"; {backend.reason}"
        return f"x is on {call.x.device}{unusable}"
    if wanted == "auto" and not call.x.is_cpu and not _triton.serves(call.x.device):
        wanted = "triton"
    native = natives[wanted].norm
    kind = call.layer + 2 * call.per_head + 4 * (call.residual is not None)
    options = (
        call.eps,
        call.weight_offset,
        call.round_before_weight,
        call.round_sum,
        call.clamp_inf,
        call.out_dtype,
        call.out,
        call.residual_out,
        mode,
    )
    tensors = (call.x, call.residual, call.weight, call.bias)
    if not as_given:
        return _with_copies(native, kind, tensors, options)
    return "" if _hides_signs(call.x) else native(kind, *tensors, *options)


def _hides_signs(x: Tensor | None) -> bool:
    """Whether the extension cannot tell from strides that rows are lazily negated."""
    return x is not None and x.shape[-1:] == (1,)


def _with_copies(
    native: Callable[..., Any],
    kind: int,
    tensors: tuple[Tensor | None, ...],
    options: tuple[Any, ...],
) -> Any:
    """Ask for these tensors, and where they are refused for copies that kernels can read."""
    made = ""
    if not _hides_signs(tensors[0]):
        made = native(kind, *tensors, *options)
        if type(made) is not str:
            return made
    copies = tuple(t if t is None else as_kernels_read_it(t) for t in tensors)
    unchanged = made and all(map(operator.is_, copies, tensors))
    return made if unchanged else native(kind, *copies, *options)


def as_kernels_read_it(t: Tensor) -> Tensor:
    """The tensor itself, or a copy with a last stride of 1 and its signs in its memory."""
    if t.ndim > 0 and t.shape[-1] > 1 and t.stride(-1) != 1:
        # contiguous() would return an empty tensor as it is.
        t = t.clone(memory_format=torch.contiguous_format)
    return t.resolve_neg()


def serve_by_reference(call: Call) -> Result:
    """Serve a call that has been checked in plain torch; what it makes is packed."""
    options: dict[str, Any] = {
        "kind": call.kind,
        "weight_offset": call.weight_offset,
        "round_before_weight": call.round_before_weight,
        "clamp_inf": call.clamp_inf,
        "out_dtype": call.out_dtype if call.out is None else call.out.dtype,
    }
    affine = (call.weight, call.bias, call.eps)
    if call.residual is None:
        y = reference.norm(call.x, *affine, **options)
        return packed(y) if call.out is None else call.out.copy_(y)
    y, residual_out = reference.add_norm(
        call.x, call.residual, *affine, round_sum=call.round_sum, **options
    )
    if call.residual_out is not None:
        residual_out = call.residual_out.copy_(residual_out)
    else:
        residual_out = packed(residual_out)
    return (packed(y) if call.out is None else call.out.copy_(y)), residual_out


def packed(t: Tensor) -> Tensor:
    """The tensor itself, or a copy with the strides of a new one, also of dimensions of size 1."""
    if torch.compiler.is_compiling():  # where strides may be symbols, which a comparison would fix
        return t.contiguous()
    expected = 1
    for size, stride in zip(reversed(t.shape), reversed(t.stride()), strict=True):
        if stride != expected:
            return t.clone(memory_format=torch.contiguous_format)
        expected *= max(size, 1)
    return t
