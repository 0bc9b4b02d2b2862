"""One process, several devices: the same norm on each of them from one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from normkit._serving import backends
from normkit._serving.checks import check, check_apart
from normkit._serving.dispatch import check_backend
from normkit._serving.serve import serve
from normkit._spec import LAYER, Call, Kind, Options, PlainOptions, all_options, heads
from normkit.parallel.context import TPContext

if TYPE_CHECKING:
    from typing_extensions import Unpack

Tensors = Sequence[Tensor]
Affine = Sequence[Tensor | None] | None


def rms_norm_tp(
    xs: Tensors,
    weights: Affine = None,
    biases: Affine = None,
    eps: float | None = 1e-6,
    *,
    outs: Tensors | None = None,
    context: TPContext,
    out_dtype: torch.dtype | None = None,
    **options: Unpack[PlainOptions],
) -> list[Tensor]:
    """Normalise a tensor on each of several devices by its root mean square, from one call.

        y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset) + bias

    Args:
        xs: tensors (..., n) as `normkit.rms_norm` takes them, each on a device of the context;
            shapes and dtypes may differ.
        weights: for each of xs its weight (n,), on its device, or None; None for no weights.
        biases: likewise.
        eps: as in `normkit.rms_norm`, like all that follow.
        outs: for each of xs where its result goes: of its shape; xs themselves, to normalise
            in place; None for new tensors.
        context: the devices and their streams.
        out_dtype: dtype of the results; None for outs', or xs'.
        **options: the other options of `normkit.rms_norm`, such as weight_offset.

    Returns:
        The results, in the order of xs.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, stride, device, option or memory overlap is wrong, a list is too short
            or too long, or a device is not the context's.
        RuntimeError: outs are given where a gradient is needed; a launch fails.

    All is checked before anything runs.  The kernels are launched with the interpreter's lock
    released, each in its device's stream of the context, ordered with the device's current stream
    as `TPContext` says; the current device stays what it was.  Rounds where `normkit.rms_norm`
    does.  Gradients, and calls that no kernel takes, go device by device, in the current streams.

    Example:
        >>> import torch
        >>> from normkit.parallel import TPContext, broadcast, rms_norm_tp
        >>> context = TPContext(["cpu", "cpu"])
        >>> xs = broadcast(torch.ones(2, 4), context)
        >>> [y.shape for y in rms_norm_tp(xs, [torch.ones(4)] * 2, context=context)]
        [torch.Size([2, 4]), torch.Size([2, 4])]
    """
    given = all_options("rms_norm_tp", options)
    return _norm_tp(0, xs, weights, biases, eps, given, out_dtype, outs, context)


def layer_norm_tp(
    xs: Tensors,
    weights: Affine = None,
    biases: Affine = None,
    eps: float | None = 1e-5,
    *,
    outs: Tensors | None = None,
    context: TPContext,
    out_dtype: torch.dtype | None = None,
    **options: Unpack[PlainOptions],
) -> list[Tensor]:
    """Normalise a tensor on each of several devices to mean 0 and variance 1, from one call.

        y = (x - mean(x)) / sqrt(var(x) + eps) * (weight + weight_offset) + bias

    Args:
        xs: as in `rms_norm_tp`, like all that follow.
        weights: (n,) for each of xs.
        biases: (n,) for each of xs.
        eps: added to the variance; as in `normkit.layer_norm`.
        outs: where the results go.
        context: the devices and their streams.
        out_dtype: dtype of the results.
        **options: the other options.

    Returns:
        The results, in the order of xs.

    Raises:
        TypeError: as `rms_norm_tp`.
        ValueError: as `rms_norm_tp`.
        RuntimeError: as `rms_norm_tp`.

    How it runs: `rms_norm_tp`; where it rounds: `normkit.layer_norm`.

    Example:
        >>> import torch
        >>> from normkit.parallel import TPContext, layer_norm_tp
        >>> xs = [torch.tensor([[1.0, 3.0]]), torch.tensor([[5.0, 1.0]])]
        >>> layer_norm_tp(xs, eps=0.0, context=TPContext(["cpu"]))
        [tensor([[-1.,  1.]]), tensor([[ 1., -1.]])]
    """
    given = all_options("layer_norm_tp", options)
    return _norm_tp(LAYER, xs, weights, biases, eps, given, out_dtype, outs, context)


def head_norm_tp(
    xs: Tensors,
    weights: Affine = None,
    biases: Affine = None,
    eps: float | None = 1e-6,
    *,
    kind: Kind = "rms",
    outs: Tensors | None = None,
    context: TPContext,
    out_dtype: torch.dtype | None = None,
    **options: Unpack[PlainOptions],
) -> list[Tensor]:
    """Normalise the heads that each of several devices has, from one call.

        y = xhat * (weight + weight_offset) + bias,  xhat by `kind` as in `normkit.head_norm`

    Args:
        xs: tensors (..., heads, head_dim), with the heads of each device; as in `rms_norm_tp`, like
            all that follow.
        weights: for each of xs (heads, head_dim), or (head_dim,) for all its heads.
        biases: likewise.
        eps: added to the mean of squares or the variance.
        kind: "rms" or "layer".
        outs: where the results go.
        context: the devices and their streams.
        out_dtype: dtype of the results.
        **options: the other options.

    Returns:
        The results, in the order of xs.

    Raises:
        TypeError: as `rms_norm_tp`.
        ValueError: as `rms_norm_tp`, or kind is neither "rms" nor "layer".
        RuntimeError: as `rms_norm_tp`.

    How it runs: `rms_norm_tp`; where it rounds: `normkit.head_norm`.

    Example:
        >>> import torch
        >>> from normkit.parallel import TPContext, head_norm_tp
        >>> q = torch.randn(2, 7, 8, 16).chunk(2, dim=2)
        >>> [y.shape for y in head_norm_tp(q, context=TPContext(["cpu"]))]
        [torch.Size([2, 7, 4, 16]), torch.Size([2, 7, 4, 16])]
    """
    given = all_options("head_norm_tp", options)
    return _norm_tp(heads(kind), xs, weights, biases, eps, given, out_dtype, outs, context)


def _norm_tp(
    kind: int,
    xs: Tensors,
    weights: Affine,
    biases: Affine,
    eps: float | None,
    options: Options,
    out_dtype: torch.dtype | None,
    outs: Tensors | None,
    context: TPContext,
) -> list[Tensor]:
    if not isinstance(context, TPContext):
        raise TypeError(f"context: expected a TPContext, got {type(context).__name__}")
    if not is_dynamo_compiling():
        made = backends.quick_tp(
            kind, xs, weights, biases, eps, *options.values(), out_dtype, outs, context._handles
        )
        if made is not None:
            return made
    lists = {"weights": weights, "biases": biases, "outs": outs}
    given = {"xs": _listed("xs", xs, None)}
    given |= {name: _listed(name, of, len(given["xs"])) for name, of in lists.items()}
    calls = [
        Call(kind, x, None, weight, bias, eps, **options, out_dtype=out_dtype, out=out)
        for x, weight, bias, out in zip(*given.values(), strict=True)
    ]
    calls = _checked(calls, context)
    # Each in its device's current stream, which is ordered as well: what autograd and the allocator
    # know of a tensor's stream stays true.
    return [cast(Tensor, serve(call)) for call in calls]


def _listed(
    name: str, of: Sequence[Tensor | None] | None, count: int | None
) -> Sequence[Tensor | None]:
    if of is None and count is not None:
        return [None] * count
    if isinstance(of, Tensor) or not isinstance(of, Sequence):
        raise TypeError(f"{name}: expected a list of tensors, got {type(of).__name__}")
    if count is not None and len(of) != count:
        raise ValueError(f"{name}: expected {count}, one for each of xs, got {len(of)}")
    return of


_PLURALS = {"x": "xs", "weight": "weights", "bias": "biases", "out": "outs"}


def _checked(given: list[Call], context: TPContext) -> list[Call]:
    calls = []
    for i, one in enumerate(given):
        try:
            call = check(one)
        except (TypeError, ValueError, RuntimeError) as error:
            name, colon, rest = str(error).partition(":")
            listed = f"{_PLURALS[name]}[{i}]" if name in _PLURALS else name
            raise type(error)(f"{listed}{colon}{rest}") from error
        check_backend(call)
        calls.append(call)
        if call.x.device not in context._stream_of:
            expected = ", ".join(map(str, context._stream_of))
            raise ValueError(
                f"xs[{i}]: expected a device of the context ({expected}), got {call.x.device}"
            )
    for i, call in enumerate(calls):
        for j, other in enumerate(calls):
            if call.out is None or i == j:
                continue
            for name, t in other.tensors():
                check_apart(f"outs[{i}]", call.out, f"{_PLURALS[name]}[{j}]", t)
    return calls
