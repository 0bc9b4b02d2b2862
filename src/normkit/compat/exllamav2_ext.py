"""The norm functions of `exllamav2_ext`, ExLlamaV2's C++ extension.

Names, arguments and their order are ExLlamaV2's; everything is written to y and None is returned.
Where ExLlamaV2 is installed, its norms are replaced by these functions one by one, since the rest
of that extension stays as it is:

    import exllamav2.ext
    from normkit.compat import exllamav2_ext

    for name in ("rms_norm", "rms_norm_", "rms_norm_tp", "layer_norm", "layer_norm_", "head_norm",
                 "head_norm_", "tp_broadcast"):
        setattr(exllamav2.ext.exllamav2_ext, name, getattr(exllamav2_ext, name))

Its modules look the functions up when they call them, so this may be done at any time.  The fused
paths of its attention and MLP call their own kernels in C++ and are not reached.  Where there is no
ExLlamaV2 to be compiled, this module can stand for the whole extension of its norm modules:
``exllamav2.ext.exllamav2_ext`` is this module, ``exllamav2.ext.none_tensor`` is `none_tensor`.

What is the same: statistics in float32, infinities of a float16 x count as +-65504.  What differs:
x, w, b and y may each be float32, float16 or bfloat16; the result is rounded once, also with a
bias; NaN stays NaN; any number of rows, heads and columns, odd ones too; strided tensors and CPU
tensors are served; what does not fit is an error before anything is written.  These are inference
ops: no gradient is ever recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from normkit import functional, parallel
from normkit._serving.backends import quick
from normkit._spec import LAYER, PER_HEAD
from normkit.compat._errors import raise_renamed
from normkit.compat.exllamav2_tp import (
    context_of,
    free_tp_context,
    make_tp_context,
    tp_broadcast,
)

__all__ = [
    "free_tp_context",
    "head_norm",
    "head_norm_",
    "layer_norm",
    "layer_norm_",
    "make_tp_context",
    "none_tensor",
    "rms_norm",
    "rms_norm_",
    "rms_norm_tp",
    "tp_broadcast",
]

none_tensor = torch.empty((1, 1), device="meta")
"""Stands for a tensor that is not there, as in `exllamav2.ext`."""


# No weight_offset, round_before_weight False, round_sum True, clamp_inf True, the others False.
_PLAIN = (0.0, False, True, True, False, False)


def rms_norm(x: Tensor, w: Tensor, y: Tensor, epsilon: float) -> None:
    """Write the RMSNorm of x over its last dimension to y.

        y = x / sqrt(mean(x^2) + epsilon) * w

    Args:
        x: (rows, dim), or with more dimensions before dim, in float32, float16 or bfloat16.
            Infinities in float16 count as +-65504.
        w: (dim,) in any of the three dtypes.
        y: of x's shape in any of the three dtypes, at any strides; may be x itself.
        epsilon: added to the mean of squares.

    Raises:
        TypeError: an argument is no tensor or number, or w or y is of another dtype; an x in
            float64 is served by plain torch.
        ValueError: a shape, stride, device or memory overlap is wrong.

    y is rounded once, to its dtype.  Semantics: ExLlamaV2's `rms_norm`.

    Example:
        >>> import torch
        >>> from normkit.compat import exllamav2_ext as ext_c
        >>> x, w = torch.randn(4, 64).half(), torch.ones(64).half()
        >>> y = torch.empty_like(x)
        >>> ext_c.rms_norm(x, w, y, 1e-6)
    """
    if (
        w is None
        or y is None
        or epsilon is None
        or is_dynamo_compiling()
        or quick(0, x, None, w, None, epsilon, *_PLAIN, None, y, None, False) is None
    ):
        _serve(functional.rms_norm, x, w, None, y, epsilon)


def rms_norm_(x: Tensor, w: Tensor, epsilon: float) -> None:
    """Replace x by its RMSNorm: `rms_norm` with x as y.

    Args:
        x: (..., dim); overwritten.
        w: (dim,).
        epsilon: added to the mean of squares.

    Example:
        >>> import torch
        >>> from normkit.compat import exllamav2_ext as ext_c
        >>> x = torch.tensor([[3.0, 3.0]])
        >>> ext_c.rms_norm_(x, torch.ones(2), 0.0)
        >>> x
        tensor([[1., 1.]])
    """
    rms_norm(x, w, x, epsilon)


def layer_norm(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, epsilon: float) -> None:
    """Write the LayerNorm of x over its last dimension to y.

        y = (x - mean(x)) / sqrt(var(x) + epsilon) * w + b

    Args:
        x: as in `rms_norm`.
        w: (dim,) in float32, float16 or bfloat16.
        b: likewise; a meta tensor, such as `none_tensor`, or None for no bias.
        y: as in `rms_norm`.
        epsilon: added to the variance.

    Raises:
        TypeError: an argument is no tensor or number, or a tensor of another dtype.
        ValueError: a shape, stride, device or memory overlap is wrong.

    y is rounded once, to its dtype; ExLlamaV2 rounds before it adds the bias, and again after.
    Semantics: ExLlamaV2's `layer_norm`.

    Example:
        >>> import torch
        >>> from normkit.compat import exllamav2_ext as ext_c
        >>> x = torch.tensor([[1.0, 3.0]])
        >>> y = torch.empty_like(x)
        >>> ext_c.layer_norm(x, torch.ones(2), ext_c.none_tensor, y, 0.0)
        >>> y
        tensor([[-1.,  1.]])
    """
    if b is none_tensor or getattr(b, "is_meta", False):
        b = None
    if (
        w is None
        or y is None
        or epsilon is None
        or is_dynamo_compiling()
        or quick(LAYER, x, None, w, b, epsilon, *_PLAIN, None, y, None, False) is None
    ):
        _serve(functional.layer_norm, x, w, b, y, epsilon)


def layer_norm_(x: Tensor, w: Tensor, b: Tensor | None, epsilon: float) -> None:
    """Replace x by its LayerNorm: `layer_norm` with x as y.

    Args:
        x: (..., dim); overwritten.
        w: (dim,).
        b: (dim,); a meta tensor or None for no bias.
        epsilon: added to the variance.

    Example:
        >>> import torch
        >>> from normkit.compat import exllamav2_ext as ext_c
        >>> x = torch.tensor([[1.0, 3.0]])
        >>> ext_c.layer_norm_(x, torch.ones(2), torch.ones(2), 0.0)
        >>> x
        tensor([[0., 2.]])
    """
    layer_norm(x, w, b, x, epsilon)


def head_norm(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, epsilon: float, rms: bool) -> None:
    """Write the norm of each head of x to y.

        y = xhat * w + b,  xhat by `rms` as in `rms_norm` or `layer_norm`

    Args:
        x: (..., num_heads, head_dim) in float32, float16 or bfloat16.  Infinities in float16 count
            as +-65504.
        w: (num_heads, head_dim), or (head_dim,) for all heads, in any of the three dtypes.
        b: likewise; a meta tensor, such as `none_tensor`, or None for no bias.
        y: as in `rms_norm`.
        epsilon: added to the mean of squares or the variance.
        rms: True for RMSNorm, False for LayerNorm.

    Raises:
        TypeError: an argument is no tensor, number or bool, or a tensor of another dtype.
        ValueError: a shape, stride, device or memory overlap is wrong.

    y is rounded once, to its dtype.  Semantics: ExLlamaV2's `head_norm`.

    Example:
        >>> import torch
        >>> from normkit.compat import exllamav2_ext as ext_c
        >>> x, w = torch.randn(4, 3, 8).half(), torch.ones(3, 8).half()
        >>> y = torch.empty_like(x)
        >>> ext_c.head_norm(x, w, torch.empty(0, device="meta"), y, 1e-6, True)
    """
    if b is none_tensor or getattr(b, "is_meta", False):
        b = None
    if rms is not True and rms is not False:
        raise TypeError(f"rms: expected True or False, got {rms!r}")
    kind = PER_HEAD if rms else PER_HEAD | LAYER
    if (
        w is None
        or y is None
        or epsilon is None
        or is_dynamo_compiling()
        or quick(kind, x, None, w, b, epsilon, *_PLAIN, None, y, None, False) is None
    ):
        _serve(functional.head_norm, x, w, b, y, epsilon, kind="rms" if rms else "layer")


def head_norm_(x: Tensor, w: Tensor, b: Tensor | None, epsilon: float, rms: bool) -> None:
    """Replace each head of x by its norm: `head_norm` with x as y.

    Args:
        x: (..., num_heads, head_dim); overwritten.
        w: (num_heads, head_dim) or (head_dim,).
        b: likewise; a meta tensor or None for no bias.
        epsilon: added to the mean of squares or the variance.
        rms: True for RMSNorm, False for LayerNorm.

    Example:
        >>> import torch
        >>> from normkit.compat import exllamav2_ext as ext_c
        >>> x = torch.full((1, 1, 2), 3.0)
        >>> ext_c.head_norm_(x, torch.ones(1, 2), None, 0.0, True)
        >>> x
        tensor([[[1., 1.]]])
    """
    head_norm(x, w, b, x, epsilon, rms)


def rms_norm_tp(
    x: Sequence[Tensor],
    w: Sequence[Tensor],
    y: Sequence[Tensor],
    epsilon: float,
    tp_context: parallel.TPContext | int,
) -> None:
    """Write the RMSNorm of one tensor on each device: `rms_norm` for every x, w and y of the lists.

    Args:
        x: one tensor per device, each as in `rms_norm`.
        w: as many, on the same devices.
        y: likewise.
        epsilon: added to the mean of squares.
        tp_context: a `normkit.parallel.TPContext`; a handle of `make_tp_context`; or the handle of
            ExLlamaV2's own extension, whose streams are those of `exllamav2.device`.

    Raises:
        TypeError: an argument is no list of tensors, no number or no context.
        ValueError: lists differ in length, a tensor does not fit, or the handle is unknown or was
            freed.

    Each device's norm runs in the stream that the context has for it.  Semantics: ExLlamaV2's
    `rms_norm_tp`, for any dtypes.
    """
    for name, tensors in (("x", x), ("w", w), ("y", y)):
        if not isinstance(tensors, (list, tuple)):
            raise TypeError(f"{name}: expected a list of tensors, got {type(tensors).__name__}")
        for i, t in enumerate(tensors):
            if not isinstance(t, Tensor):
                raise TypeError(f"{name}[{i}]: expected a torch.Tensor, got {type(t).__name__}")
        if len(tensors) != len(x):
            raise ValueError(f"{name}: expected {len(x)} tensors, as in x, got {len(tensors)}")
    if epsilon is None:
        raise TypeError("epsilon: expected a number, got NoneType")
    if isinstance(tp_context, int):
        context = context_of(tp_context, tuple(t.device for t in x))
    elif isinstance(tp_context, parallel.TPContext):
        context = tp_context
    else:
        raise TypeError(
            f"tp_context: expected a TPContext or a handle, got {type(tp_context).__name__}"
        )
    names = {"outs": "y", "out": "y", "weights": "w", "weight": "w", "xs": "x", "eps": "epsilon"}
    try:
        with torch.no_grad():
            parallel.rms_norm_tp(x, w, None, epsilon, outs=y, context=context, clamp_inf=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise_renamed(error, names)


def _serve(
    function: Callable[..., Tensor],
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    y: Tensor,
    epsilon: float,
    **options: str,
) -> None:
    """Serve what the quick path did not take, or say what is wrong in the caller's words."""
    for name, value in (("w", w), ("y", y)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if epsilon is None:
        raise TypeError("epsilon: expected a number, got NoneType")
    names = {"out": "x" if y is x else "y", "weight": "w", "bias": "b", "eps": "epsilon"}
    try:
        with torch.no_grad():
            function(x, w, b, epsilon, clamp_inf=True, out=y, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise_renamed(error, names)
