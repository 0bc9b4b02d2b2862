"""Several norms at once: q and k with their position, and slices of different widths.

On CUDA they are one launch where none reads what another one writes.  The options are those of
`normkit.rms_norm`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from normkit._serving.several import run_several
from normkit._spec import (
    AS_IS,
    BEFORE_CACHE,
    BEFORE_ROTATION,
    BEHIND_ROTATION,
    BEHIND_X,
    LAYER,
    NOTHING,
    PER_HEAD,
    Kind,
    PlainOptions,
    all_options,
    heads,
    is_layer,
    rotated,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["norms", "qk_norm_rope"]

Affine = Sequence[Tensor | None] | None


def norms(
    xs: Sequence[Tensor],
    weights: Affine = None,
    biases: Affine = None,
    eps: float | None = 1e-6,
    *,
    kind: Kind = "rms",
    out_dtype: torch.dtype | None = None,
    outs: Sequence[Tensor] | None = None,
    **options: Unpack[PlainOptions],
) -> list[Tensor]:
    """Normalise several tensors over their last dimensions, from one call.

    Args:
        xs: tensors (..., n) as `rms_norm` or, with a weight per head, `head_norm` takes them; n,
            shapes and dtypes may differ.  Slices of one tensor are read where they are.
        weights: for each of xs its weight, (n,) or (heads, n), or None; None for no weights.
        biases: likewise.
        kind: "rms" or "layer".
        outs: for each of xs where its result goes; xs themselves, to normalise in place; None for
            new tensors, packed.
        **options: the other options of `rms_norm`, such as weight_offset.

    The other arguments, and where they round, are those of `rms_norm`.  All is checked before
    anything runs.  Where gradients are needed, in torch.compile, and for what no kernel takes, each
    is a call of its own.

    Returns:
        The results, in the order of xs.

    Raises:
        TypeError: an argument is of the wrong type or dtype, or xs is a tensor.
        ValueError: a shape, stride, option or overlap is wrong, or a list is too short or too long.

    Semantics: q_a_layernorm and kv_a_layernorm of DeepSeek-V3 in Hugging Face transformers, of what
    engines compute as two slices of one projection.

    Example:
        >>> import normkit, torch
        >>> q_a, kv_a, rope = torch.randn(4, 24 + 16 + 8).split((24, 16, 8), -1)
        >>> q, kv = normkit.norms([q_a, kv_a], [torch.ones(24), torch.ones(16)])
        >>> torch.equal(q, normkit.rms_norm(q_a, torch.ones(24)))
        True
    """
    given = all_options("norms", options).values()
    lists = {"weights": weights, "biases": biases, "outs": outs}
    of_each = zip(xs, *(_as_long_as(xs, name, of) for name, of in lists.items()), strict=True)
    calls = []
    for x, weight, bias, out in of_each:
        per_head = any(isinstance(t, Tensor) and t.ndim > 1 for t in (weight, bias))
        bits = heads(kind) if per_head else is_layer(kind) * LAYER
        calls.append(
            (bits, x, None, weight, bias, eps, *given, out_dtype, out, None, False, *NOTHING)
        )
    return run_several(calls)


def _as_long_as(xs: Sequence[Tensor], name: str, of: Affine) -> Sequence[Tensor | None]:
    if isinstance(xs, Tensor) or not isinstance(xs, Sequence):
        raise TypeError(f"xs: expected a list of tensors, got {type(xs).__name__}")
    if of is None:
        return [None] * len(xs)
    if isinstance(of, Tensor) or not isinstance(of, Sequence):
        raise TypeError(f"{name}: expected a list of tensors, got {type(of).__name__}")
    if len(of) != len(xs):
        raise ValueError(f"{name}: expected as many as xs, {len(xs)}, got {len(of)}")
    return of


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    eps: float | None = 1e-6,
    *,
    kind: Kind = "rms",
    positions: Tensor | None = None,
    interleaved: bool = False,
    round_norm: bool = False,
    round_each: bool = False,
    v: Tensor | None = None,
    v_weight: Tensor | None = None,
    norm_v: bool = False,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    slots: Tensor | None = None,
    outs: Sequence[Tensor] | None = None,
    **options: Unpack[PlainOptions],
) -> tuple[Tensor, ...]:
    """Normalise and rotate q and k, and write k and v to a cache of pages.

        q = norm_rope(q, cos, sin, q_weight, q_bias);  k likewise
        k_cache[slot // page_size, slot % page_size] = k, and v_cache likewise, for each token

    Args:
        q: (..., heads, head_dim), as in `norm_rope`: a slice of a packed projection, for one.
        k: likewise; it may have other heads.
        cos: as in `norm_rope`; None where nothing is rotated.
        sin: likewise.
        q_weight: (heads, head_dim) or (head_dim,); None for no weight.
        k_weight: likewise.
        q_bias: likewise.
        k_bias: likewise.
        v: likewise; None where there is none to write or to normalise.
        v_weight: of v's norm.
        norm_v: normalise v too (Gemma 4), which nothing rotates.  False: v stays as it is.
        k_cache: (pages, page_size, heads, head_dim) of k's dtype, at any strides but the last: a
            cache (pages, heads, page_size, head_dim) is given as `cache.transpose(1, 2)`.  None:
            k is not written to one.
        v_cache: likewise.
        slots: int32 or int64, of the dimensions ahead of the heads: the slot of each token.  What
            has a slot outside of the cache, such as -1, is not written.
        outs: where q, k and, if it is normalised, v go: these themselves, to write in place; None
            for new tensors, packed.
        **options: the other options of `rms_norm`.

    The other arguments are those of `norm_rope`.  All is checked before anything runs.  Where
    gradients are needed, in torch.compile, and for what no kernel takes, each is a call of its own.

    Returns:
        (q, k), or (q, k, v) where v is given.

    Raises:
        TypeError: an argument is of the wrong type or dtype, or cos, sin or slots is missing.
        ValueError: a shape, stride, option or overlap is wrong.
        RuntimeError: a gradient is needed of what goes to a cache.

    Semantics: the attention of Qwen3, Gemma 3 and GLM-4.5 in front of its scores, with the paged
    cache of vLLM, whose slot_mapping has -1 for what is not kept.

    Example:
        >>> import normkit, torch
        >>> q, k, v = torch.randn(3, 4, 8).split((2, 1, 1), 1)
        >>> cos, sin = torch.ones(3, 4), torch.zeros(3, 4)
        >>> k_cache, v_cache = torch.zeros(2, 5, 2, 1, 8)
        >>> slots = torch.tensor([4, 5, -1])
        >>> q, k, v = normkit.qk_norm_rope(
        ...     q, k, cos, sin, v=v, k_cache=k_cache, v_cache=v_cache, slots=slots
        ... )
        >>> torch.equal(k_cache[2, 1], k[1]), torch.equal(v_cache[2, 0], v[0])
        (True, True)
    """
    if v is None and (norm_v or v_cache is not None):
        raise TypeError("v: expected a torch.Tensor for norm_v and v_cache, got NoneType")
    if slots is not None and k_cache is None and v_cache is None:
        raise ValueError("slots: expected None without k_cache and v_cache, got a tensor")
    alone, rotates = heads(kind), cos is not None or sin is not None
    bits = rotated(kind, interleaved) if rotates else alone
    to_q, to_k, to_v = _outputs(("q", "k", "v") if norm_v else ("q", "k"), outs)
    given = (eps, *all_options("qk_norm_rope", options).values(), None)
    turn = (None, None, None, round_each, *BEFORE_ROTATION, round_norm, cos, sin, positions)
    kept_k = (None, None) if k_cache is None else (k_cache, slots)
    kept_v = (None, None) if v_cache is None else (v_cache, slots)
    calls = [
        (bits, q, None, q_weight, q_bias, *given, to_q, None, False, *turn, *BEHIND_ROTATION),
        (bits, k, None, k_weight, k_bias, *given, to_k, None, False, *turn, *kept_k),
    ]
    if norm_v:
        of_v = (alone, v, None, v_weight, None, *given, to_v, None, False)
        calls.append((*of_v, *BEFORE_CACHE, *kept_v))
    elif v_cache is not None:
        calls.append((AS_IS | PER_HEAD, v, *BEHIND_X, *BEFORE_CACHE, *kept_v))
    made = run_several(calls)
    return tuple(made) if v is None or len(made) > 2 else (*made, v)


def _outputs(names: tuple[str, ...], outs: Affine) -> Sequence[Tensor | None]:
    if outs is None:
        return None, None, None
    if isinstance(outs, Tensor) or not isinstance(outs, Sequence):
        raise TypeError(f"outs: expected a list of tensors, got {type(outs).__name__}")
    if len(outs) != len(names):
        raise ValueError(f"outs: expected {len(names)}, for {', '.join(names)}, got {len(outs)}")
    return (*outs, None)[:3]
