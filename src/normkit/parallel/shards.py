"""Norms of rows whose columns are split over the ranks of a process group (tensor parallelism).

Each rank gives its columns and its part of weight and bias, and gets its columns of y.  One small
message per pass goes round: a float32 number per row and rank, or two for a layer norm.  The ranks
combine them in the order of their numbers, so that all get the same statistics, bit for bit, and a
row's bits do not depend on the number of rows.

On the CPU that message describes itself, so that ranks which differ in n, rows, eps or what they
call raise together; beyond some 4000 rows (2000 of a layer norm) it takes two.  On other devices it
has n, which the device compares.  Under torch.compile a pass is one
operator, `sharded_norm` or `sharded_norm_backward` in `torch.ops.normkit`, with the bits of an
eager call.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from normkit._serving.checks import check
from normkit._serving.operators import is_sharded
from normkit._serving.serve import autocasts
from normkit._spec import LAYER, PER_HEAD, Call, PlainOptions, all_options
from normkit.parallel import _split_rows
from normkit.parallel._gather import Ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack


def sharded_rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    group: ProcessGroup | None = None,
    out_dtype: torch.dtype | None = None,
    timeout: float | timedelta | None = None,
    **options: Unpack[PlainOptions],
) -> Tensor:
    """Normalise rows by their root mean square, of which every rank of a group has some columns.

        y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset) + bias

    with the mean over the columns of all ranks.  All ranks of the group call it together, with the
    same rows and options.  If a gradient is wanted, all of them have to run the backward pass, in
    which they meet once more.

    Args:
        x: (..., n), the columns of this rank, in float32, float16 or bfloat16 (float64 takes the
            reference path); the same n on every rank.  An x whose last stride is not 1 is copied
            once.  With a weight or bias of two dimensions (..., heads, head_dim), the heads of
            this rank: a row is then all heads of all ranks, as the q and k norms of OLMo 2 and
            MiniMax have it.
        weight: (n,) or (heads, head_dim), the part of this rank, in any of the three dtypes; None
            for no weight.
        bias: likewise; None for no bias.
        eps: added to the mean of squares; None for the machine epsilon of the computing dtype.
        group: the ranks that share the rows, part by part in their order; None for the default
            group.
        out_dtype: dtype of the result; None for x's.
        timeout: seconds, or a timedelta, to wait for the other ranks, from 0.001 to 1e9; on CUDA
            the host then waits with the device.  None: the group's own, and on CUDA no wait of the
            host.  A group whose message did not come in time is not used again: the next calls
            raise, and a new group is needed.
        **options: the other options of `normkit.rms_norm`, such as weight_offset.

    Returns:
        The columns of y that belong to those of x, of x's shape, in out_dtype.

    Raises:
        TypeError: an argument is no tensor, a DTensor (`normkit.rms_norm` takes those), or of the
            wrong dtype.
        ValueError: an argument is wrong on this rank, before anything is sent: the others, whose
            arguments are right, wait for it until their timeout.  Or, on the CPU, on every rank and
            naming what each has: the ranks differ in n, the number of rows, eps or what they call.
        RuntimeError: there is no process group; a rank is gone, or did not come in time, or has
            not come before; the gradient is to be differentiated again; or torch.func or
            forward-mode AD, which cannot cross ranks, is on.  On other devices than the CPU also
            if n differs between ranks, when the device gets there; that the ranks have the same
            rows and options is up to the caller there.

    y is rounded to out_dtype, and xhat where round_before_weight says so.  A norm of each head
    needs nothing from other ranks, however the heads are split: that is `normkit.head_norm`.
    Semantics: `normkit.rms_norm` of the whole rows.

    Example:
        >>> import normkit.parallel, torch, torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> normkit.parallel.sharded_rms_norm(torch.tensor([3.0, 4.0, 0.0, 0.0]), eps=0.0)
        tensor([1.2000, 1.6000, 0.0000, 0.0000])
        >>> dist.destroy_process_group()
    """
    given = all_options("sharded_rms_norm", options)
    kind = _heads(weight, bias)
    call = Call(kind, x, None, weight, bias, eps, **given, out_dtype=out_dtype)
    return _run("sharded_rms_norm", call, group, timeout)


def sharded_layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | None = 1e-5,
    *,
    group: ProcessGroup | None = None,
    out_dtype: torch.dtype | None = None,
    timeout: float | timedelta | None = None,
    **options: Unpack[PlainOptions],
) -> Tensor:
    """Normalise rows to mean 0 and variance 1, of which every rank of a group has some columns.

        y = (x - mean) / sqrt(mean((x - mean)^2) + eps) * (weight + weight_offset) + bias

    with means over the columns of all ranks, which come of the means and the centred squares of
    the parts, never of E[x^2] - E[x]^2.  All ranks of the group call it together, with the same
    rows and options.  If a gradient is wanted, all of them have to run the backward pass, in which
    they meet once more.

    Args:
        x: (..., n), the columns of this rank, in float32, float16 or bfloat16 (float64 takes the
            reference path); the same n on every rank.  An x whose last stride is not 1 is copied
            once.  With a weight or bias of two dimensions (..., heads, head_dim), the heads of
            this rank: a row is then all heads of all ranks.
        weight: (n,) or (heads, head_dim), the part of this rank, in any of the three dtypes; None
            for no weight.
        bias: likewise; None for no bias.
        eps: added to the variance; None for the machine epsilon of the computing dtype.
        group: the ranks that share the rows, part by part in their order; None for the default
            group.
        out_dtype: dtype of the result; None for x's.
        timeout: seconds, or a timedelta, to wait for the other ranks, from 0.001 to 1e9; on CUDA
            the host then waits with the device.  None: the group's own, and on CUDA no wait of the
            host.  A group whose message did not come in time is not used again: the next calls
            raise, and a new group is needed.
        **options: the other options of `normkit.layer_norm`, such as weight_offset.

    Returns:
        The columns of y that belong to those of x, of x's shape, in out_dtype.

    Raises:
        TypeError: an argument is no tensor, a DTensor (`normkit.layer_norm` takes those), or of
            the wrong dtype.
        ValueError: an argument is wrong on this rank, before anything is sent: the others, whose
            arguments are right, wait for it until their timeout.  Or, on the CPU, on every rank and
            naming what each has: the ranks differ in n, the number of rows, eps or what they call.
        RuntimeError: there is no process group; a rank is gone, or did not come in time, or has
            not come before; the gradient is to be differentiated again; or torch.func or
            forward-mode AD, which cannot cross ranks, is on.  On other devices than the CPU also
            if n differs between ranks, when the device gets there; that the ranks have the same
            rows and options is up to the caller there.

    y is rounded to out_dtype, and xhat where round_before_weight says so.  Semantics:
    `normkit.layer_norm` of the whole rows.

    Example:
        >>> import normkit.parallel, torch, torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> normkit.parallel.sharded_layer_norm(torch.tensor([1.0, 3.0]), eps=0.0)
        tensor([-1.,  1.])
        >>> dist.destroy_process_group()
    """
    given = all_options("sharded_layer_norm", options)
    kind = LAYER | _heads(weight, bias)
    call = Call(kind, x, None, weight, bias, eps, **given, out_dtype=out_dtype)
    return _run("sharded_layer_norm", call, group, timeout)


def _heads(*affine: Tensor | None) -> int:
    return PER_HEAD if any(isinstance(t, Tensor) and t.ndim == 2 for t in affine) else 0


def _run(
    op: str, call: Call, group: ProcessGroup | None, timeout: float | timedelta | None
) -> Tensor:
    call = check(call)
    for name, t in call.tensors():
        if is_sharded(t):
            function = op.removeprefix("sharded_")
            raise TypeError(
                f"{name}: expected the plain tensor of this rank, got a DTensor,"
                f" which normkit.{function} takes"
            )
    ranks = Ranks(op, _group(op, group), _seconds(timeout))
    if autocasts(call):
        call = replace(call, out_dtype=torch.float32)
    if not call.per_head:
        return _split_rows.run(call, ranks)
    shape = call.x.shape

    def flat(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.expand(shape[-2:]).flatten()

    rows = replace(
        call,
        kind=call.kind & ~PER_HEAD,
        x=call.x.flatten(-2),
        weight=flat(call.weight),
        bias=flat(call.bias),
    )
    return _split_rows.run(rows, ranks).view(shape)


def _group(op: str, group: ProcessGroup | None) -> ProcessGroup:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{op}: expected a process group, got none;"
            " torch.distributed.init_process_group() makes the default one"
        )
    if group is None:
        return dist.group.WORLD  # type: ignore[return-value]
    if not isinstance(group, dist.ProcessGroup):
        # Also where this rank is not in the group: new_group() gave it a number then.
        raise ValueError(f"group: expected a process group with this rank in it, got {group!r}")
    return group


def _seconds(timeout: float | timedelta | None) -> float | None:
    if timeout is None:
        return None
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"timeout: expected seconds or a timedelta, got {type(timeout).__name__}")
    # Groups count in whole milliseconds, of which 0 are no limit, and clocks in 64-bit nanoseconds.
    if not 1e-3 <= seconds <= 1e9:
        raise ValueError(f"timeout: expected 0.001 to 1e9 seconds, got {timeout}")
    return float(seconds)
