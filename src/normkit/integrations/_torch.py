"""Torch's own norms on normkit's kernels, for every model of the process.

Torch gets other kernels for `native_layer_norm` and `_fused_rms_norm`, to which its functions and
modules come, and for their gradients.  Its autograd, autocast, dispatch modes and compiler stay in
front of them and keep their rules.  A call that normkit does not run goes to torch's own kernel.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.library import Library, get_kernel

from normkit._serving import dispatch
from normkit._serving.backends import wanted_backend
from normkit._serving.dispatch import Wanted
from normkit._serving.formula import Formula
from normkit._serving.refusal import Refusal
from normkit._spec import DEFAULT_OPTIONS, LAYER, NATIVE, Call, Saved

if TYPE_CHECKING:
    from typing_extensions import Self

Results = tuple[Tensor | None, ...]
# None: torch's own kernel is to run the call.
Serve = Callable[..., Results | None]


class TorchPatch:
    """What `patch_torch` returns: torch runs normkit until `revert`, or until the `with` ends."""

    def __init__(self) -> None:
        _hold(self)

    def revert(self) -> None:
        """Give torch its kernels back, unless it is patched twice; a second call does nothing."""
        _release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.revert()


def patch_torch() -> TorchPatch:
    """Have torch run its own rms and layer norms on normkit, on the CPU and CUDA, gradients too.

    This is for `torch.nn.RMSNorm`, `torch.nn.LayerNorm`, `torch.nn.functional.rms_norm` and
    `layer_norm` wherever they are called: in all models and threads of the process.

    Returns:
        A `TorchPatch`, whose `revert()` undoes it; it is a context manager, too.

    Semantics: those of torch; rounding as `normkit.rms_norm` and `normkit.layer_norm`.  Calls that
    torch refuses raise torch's errors.

    Example:
        >>> import torch
        >>> from normkit.integrations import patch_torch
        >>> with patch_torch():
        ...     y = torch.nn.functional.rms_norm(torch.ones(2, 4), (4,))
    """
    return TorchPatch()


_LOCK = threading.Lock()
_holders: list[TorchPatch] = []
_libraries: list[Library] = []


def _hold(patch: TorchPatch) -> None:
    with _LOCK:
        if not _holders:
            _complete_torch()
            _libraries.append(_overriding())
        _holders.append(patch)


def _release(patch: TorchPatch) -> None:
    with _LOCK:
        if patch not in _holders:
            return
        _holders.remove(patch)
        if not _holders:
            _libraries.pop()._destroy()  # type: ignore[no-untyped-call]


def _overriding() -> Library:
    library = _new_library()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"[\s\S]*verriding a previously registered kernel")
        for op, serve in _SERVED.items():
            for key in ("CPU", "CUDA"):
                if _has_kernel(op, key):
                    _override(library, op, key, serve)
    return library


def _new_library() -> Library:
    return Library("aten", "IMPL")  # type: ignore[no-untyped-call]


def _has_kernel(op: str, key: str) -> bool:
    """Whether torch runs an op there; one without CUDA has no gradients to override."""
    places = (key, "CompositeImplicitAutograd", "CompositeExplicitAutograd")
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return any(has_kernel(f"aten::{op}", place) for place in places)


def _override(library: Library, op: str, key: str, serve: Serve) -> None:
    """Register a kernel that asks `serve` first and runs the one of before where that is None."""
    own = get_kernel(f"aten::{op}", key)

    def kernel(keys: torch._C.DispatchKeySet, *values: object) -> object:
        # autograd is in front of this, and records what it needs; torch.no_grad() takes 2 us
        mode = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            made = serve(*values)
        finally:
            torch._C._set_grad_enabled(mode)
        return own.call_boxed(keys, *values) if made is None else made

    library.impl(op, kernel, key, with_keyset=True)  # type: ignore[no-untyped-call]


# ---------------------------------------------------------------- calls


# Those of a call that are not torch's: the options and the outputs.
_REST = tuple(getattr(Call, name) for name in NATIVE[NATIVE.index("eps") + 1 :])

Rows = tuple[Tensor, Tensor | None, Tensor | None]


def _rows(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None
) -> Rows | None:
    """X, weight and bias as rows; None for what torch refuses, and what has to be copied."""
    if not _takes_dtype(x, weight) or not _takes_dtype(x, bias):
        return None
    if len(shape) == 1:  # kernels refuse a weight and a bias that are no row of x
        return (x, weight, bias) if x.ndim and x.size(-1) == shape[0] else None
    whole = tuple(shape)
    given = [t for t in (weight, bias) if t is not None]
    if not shape or x.shape[-len(shape) :] != whole or any(t.shape != whole for t in given):
        return None
    n = math.prod(shape)
    if not n or not x.is_contiguous():
        return None
    weight, bias = (None if t is None else t.reshape(n) for t in (weight, bias))
    return x.view(-1, n), weight, bias


def _takes_dtype(x: Tensor, parameter: Tensor | None) -> bool:
    """Whether torch does: that of x, or on the CPU float32 beside 16 bits."""
    if parameter is None:
        return True
    dtype = parameter.dtype
    return dtype == x.dtype or (dtype == torch.float32 and x.is_cpu)


def _saved(kind: int, rows: Rows | None, eps: float | None) -> Saved | None:
    """What the kernels make of rows; None where there is none for them."""
    if rows is None:
        return None
    x, weight, bias = rows
    native = dispatch.native_for(x, wanted_backend()).norm_saving
    made = native(kind, x, None, weight, bias, eps, *_REST)
    return None if isinstance(made, Refusal) else made


def _layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Results | None:
    saved = _saved(LAYER, _rows(x, shape, weight, bias), eps)
    if saved is None:
        return None
    y, _, rstd, mean = saved
    assert mean is not None
    made = _as_torch(x, shape, y, mean, rstd)
    if x.dtype == torch.float32 or not x.is_cpu or _is_wide(weight) or _is_wide(bias):
        return made
    return made[0], made[1].to(x.dtype), made[2].to(x.dtype)  # as torch has it there


def _is_wide(t: Tensor | None) -> bool:
    return t is not None and t.dtype == torch.float32


def _rms_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, eps: float | None
) -> Results | None:
    if eps is None and not x.is_cpu:  # what torch's CUDA kernel takes then is nowhere promised
        return None
    saved = _saved(0, _rows(x, shape, weight, None), eps)
    return None if saved is None else _as_torch(x, shape, saved[0], saved[2])


def _as_torch(
    x: Tensor, shape: Sequence[int], y: Tensor, *statistics: Tensor
) -> tuple[Tensor, ...]:
    """Y and statistics in the shapes that torch returns."""
    if len(shape) == 1:
        return y, *(t.unsqueeze(-1) for t in statistics)
    like = [*x.shape[: x.ndim - len(shape)], *[1] * len(shape)]
    return y.view(x.shape), *(t.view(like) for t in statistics)


# ---------------------------------------------------------------- gradients


def _layer_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Sequence[bool],
) -> Results | None:
    rows = _rows(x, shape, weight, bias)
    exact: Tensor | None = mean
    if mean.dtype != torch.float32:  # 16 bits are enough of rstd, but not of a large mean
        again = _saved(LAYER, rows, 0.0)
        exact = None if again is None else again[3]
    if rows is None or exact is None:
        return None
    return _gradients(LAYER, rows, shape, grad_y, rstd, exact, mask)


def _rms_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    shape: Sequence[int],
    rstd: Tensor,
    weight: Tensor | None,
    mask: Sequence[bool],
) -> Results | None:
    rows = _rows(x, shape, weight, None)
    if rows is None:
        return None
    made = _gradients(0, rows, shape, grad_y, rstd, None, [*mask, False])
    return None if made is None else made[:2]


def _gradients(
    kind: int,
    rows: Rows,
    shape: Sequence[int],
    grad_y: Tensor,
    rstd: Tensor,
    mean: Tensor | None,
    mask: Sequence[bool],
) -> Results | None:
    """Gradients of x, weight and bias in torch's shapes, as far as the mask wants them."""
    x, weight, bias = rows
    outer = x.shape[:-1]
    made = dispatch.native_for(x, wanted_backend()).norm_backward(
        kind,
        grad_y.reshape(x.shape).contiguous(),
        None,
        x,
        None,
        weight,
        bias,
        rstd.float().view(outer),
        None if mean is None else mean.view(outer),
        DEFAULT_OPTIONS["weight_offset"],
        DEFAULT_OPTIONS["round_before_weight"],
        x.dtype if mask[0] else None,
        None,
        mask[1] + 2 * mask[2],
    )
    if isinstance(made, Refusal):
        return None
    of_x, _, of_weight, of_bias = made
    return _viewed(of_x, grad_y.shape), _viewed(of_weight, shape), _viewed(of_bias, shape)


def _viewed(t: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    return None if t is None else t.view(shape)


def _plain_rms_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    shape: Sequence[int],
    rstd: Tensor,
    weight: Tensor | None,
    mask: Sequence[bool],
) -> Results:
    """The gradients of `_fused_rms_norm`, for which torch has no kernel on the CPU."""
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating dtype, got {x.dtype}")
    outer = x.shape[: x.ndim - len(shape)]
    rows, flat = x.reshape(*outer, -1), None if weight is None else weight.reshape(-1)
    call = Call(0, rows, weight=flat)
    of_x, _, of_weight, _ = dispatch.backward_by_reference(
        Formula.of(call),
        Wanted(x.dtype if mask[0] else None, None, mask[1], False),
        grad_y.reshape(rows.shape),
        None,
        rows,
        None,
        flat,
        None,
        rstd.reshape(outer),
    )
    return _viewed(of_x, x.shape), _viewed(of_weight, shape)


def _complete_torch() -> None:
    """Give torch that kernel, for good: what ran while torch was patched may need it after."""
    op, key = "_fused_rms_norm_backward", "CPU"
    if not _has_kernel(op, key):
        _COMPLETED.append(_new_library())
        _COMPLETED[0].impl(op, _plain_rms_norm_backward, key)  # type: ignore[no-untyped-call]


_COMPLETED: list[Library] = []

_SERVED: dict[str, Serve] = {
    "native_layer_norm": _layer_norm,
    "native_layer_norm_backward": _layer_norm_backward,
    "_fused_rms_norm": _rms_norm,
    "_fused_rms_norm_backward": _rms_norm_backward,
}
