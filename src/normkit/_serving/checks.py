"""What a call must satisfy, and the errors that say where it does not.

The extension refuses a call without saying why in words for users; every message is made here, for
every backend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from normkit import reference
from normkit._spec import FIELDS, FLOATS, FLOATS_TEXT, FUSED_TENSORS, MODULATORS, NEXT, Call

_FLAGS = tuple(name for name, field in FIELDS.items() if field.type == "bool")


def check(call: Call) -> Call:
    """Return a call with its numbers as floats, or raise what is wrong with it.

    Raises:
        TypeError: an argument is of the wrong Python type or dtype.
        ValueError: a shape, stride, device, value or memory overlap is wrong.
        RuntimeError: a tensor would be overwritten that a gradient needs.
    """
    _check_types(call)
    call = _check_options(call)
    _check_shapes(call)
    _check_places(call)
    _check_gradients(call)
    if not reference.is_compiled():
        _check_memory(call)
    return call


def _check_types(call: Call) -> None:
    names = ("x", "residual", "weight", "bias", "out", "residual_out")
    for name in names + FUSED_TENSORS * call.fused:
        value = getattr(call, name)
        needed = (
            name == "x"
            or (name == "residual" and call.takes_residual)
            or (name == "z" and call.gated)
            or (name in ("cos", "sin") and call.rotated)
        )
        if value is None and not needed:
            continue
        _check_not_nested(name, value)
        allowed = (*FLOATS, torch.float64) if call.x.dtype == torch.float64 else FLOATS
        if name != "x" and value.dtype not in allowed:
            extra = ", since x is float64: or float64" if len(allowed) > len(FLOATS) else ""
            raise TypeError(f"{name}: expected {FLOATS_TEXT}{extra}, got {value.dtype}")
        if name == "x" and value.dtype not in (*FLOATS, torch.float64):
            raise TypeError(f"x: expected {FLOATS_TEXT}, or float64, got {value.dtype}")
        is_sum = name == "residual_out" or (name == "out" and call.post and not call.adds)
        if is_sum and call.residual is not None and value.dtype != call.residual.dtype:
            expected = call.residual.dtype
            raise TypeError(f"{name}: expected residual's dtype {expected}, got {value.dtype}")
    if call.rotated:
        _check_types_of_rotation(call)
    _check_indices("positions", call.positions)
    if call.cache is not None:
        _check_types_of_cache(call)


def _check_not_nested(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {_type_name(value)}")
    if value.is_nested:
        kind = "jagged" if value.layout == torch.jagged else "strided"
        raise ValueError(f"{name}: expected a dense tensor, got a {kind} nested one")


def _check_types_of_rotation(call: Call) -> None:
    cos, sin = call.table()
    if sin.dtype != cos.dtype:
        raise TypeError(f"sin: expected cos's dtype {cos.dtype}, got {sin.dtype}")


def _check_types_of_cache(call: Call) -> None:
    cache: object = call.cache
    if not isinstance(cache, Tensor):
        raise TypeError(f"cache: expected a torch.Tensor, got {_type_name(cache)}")
    expected = call.out_dtype or (call.x if call.out is None else call.out).dtype
    if cache.dtype != expected:
        raise TypeError(f"cache: expected y's dtype {expected}, got {cache.dtype}")
    if call.slots is None:
        raise TypeError("slots: expected a torch.Tensor, got NoneType")
    _check_indices("slots", call.slots)


def _check_indices(name: str, indices: object) -> None:
    if indices is None:
        return
    if not isinstance(indices, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {_type_name(indices)}")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {indices.dtype}")


def _type_name(value: object) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _check_options(call: Call) -> Call:
    if not reference.is_compiled():  # there, a number may be a symbol, which has no value yet
        call = _check_numbers(call)
    for name in _FLAGS:
        value = getattr(call, name)
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {_type_name(value)}")
    if call.out_dtype is not None:
        allowed = (*FLOATS, torch.float64) if call.x.dtype == torch.float64 else FLOATS
        if not isinstance(call.out_dtype, torch.dtype) or call.out_dtype not in allowed:
            raise TypeError(f"out_dtype: expected torch.{FLOATS_TEXT}, got {call.out_dtype!r}")
        if call.out is not None and call.out.dtype != call.out_dtype:
            raise TypeError(f"out: expected out_dtype {call.out_dtype}, got {call.out.dtype}")
    return call


def _check_numbers(call: Call) -> Call:
    dtype = torch.float64 if call.x.dtype == torch.float64 else torch.float32
    offset = check_number("weight_offset", call.weight_offset, dtype=dtype)
    call = replace(call, eps=check_eps(call.eps, dtype=dtype), weight_offset=offset)
    if not call.post:
        return call
    return replace(
        call,
        next_eps=check_eps(call.next_eps, name="next_eps", dtype=dtype),
        alpha=check_number("alpha", call.alpha, dtype=dtype),
        beta=check_number("beta", call.beta, dtype=dtype),
    )


def check_number(
    name: str,
    value: object,
    *,
    least: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> float:
    """The value as a float, which the computing dtype can hold.

    Raises:
        TypeError: it is no number.
        ValueError: it is NaN, infinite, beyond the largest number of dtype, or below least.
    """
    if isinstance(value, (bool, str, bytes, Tensor)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: expected a number, got {_type_name(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError) as error:  # an array of several
        raise TypeError(f"{name}: expected a number, got {_type_name(value)}") from error
    if not abs(number) <= torch.finfo(dtype).max:
        raise ValueError(f"{name}: expected a finite number, got {_brief(value)}")
    if least is not None and number < least:
        raise ValueError(f"{name}: expected a number >= {least}, got {number}")
    return number


def check_eps(
    value: object, *, name: str = "eps", dtype: torch.dtype = torch.float32
) -> float | None:
    """The eps as a float >= 0 that the computing dtype can hold, or None; as `check_number`."""
    return None if value is None else check_number(name, value, least=0, dtype=dtype)


def check_size(name: str, value: object) -> None:
    """Raise unless the value is the size of a dimension: an int (or a symbol of one) >= 1."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {_type_name(value)}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def in_groups(group_size: object, *, x: Tensor, **tensors: Tensor | None) -> dict[str, Any]:
    """The tensors of a call with each group of columns as a row of its own.

    Raises:
        TypeError: group_size is no int, or an argument is no tensor.
        ValueError: it does not divide the last dimension of x, another has other columns, or a
            weight has heads, which are no groups.
    """
    check_size("group_size", group_size)
    given = {"x": x, **tensors}
    for name, t in given.items():
        if t is not None or name in ("x", "z"):
            _check_not_nested(name, t)
            _check_strided(name, cast(Tensor, t))
    if x.ndim < 1 or x.shape[-1] % cast(int, group_size) != 0:
        raise ValueError(
            f"group_size: expected a divisor of x's last dimension, got {group_size}"
            f" for x of {tuple(x.shape)}"
        )
    for name, t in given.items():
        if t is not None and tuple(t.shape[-1:]) != tuple(x.shape[-1:]):
            raise ValueError(
                f"{name}: expected x's last dimension {x.shape[-1]}, got {tuple(t.shape)}"
            )
        if t is not None and name in ("weight", "bias") and t.ndim != 1:
            raise ValueError(
                f"{name}: expected shape ({x.shape[-1]},) with group_size, got {tuple(t.shape)}"
            )
    size = cast(int, group_size)
    groups = (x.shape[-1] // size, size)
    return {
        name: None if t is None else t.view(*t.shape[:-1], *groups) for name, t in given.items()
    }


def sizes_of(shape: int | Sequence[int]) -> tuple[int, ...]:
    """The sizes that a normalized_shape means, or an error."""
    try:
        sizes = tuple(cast(Sequence[int], shape))
    except TypeError:  # one size
        sizes = (cast(int, shape),)
    if not sizes:
        raise ValueError("normalized_shape: expected at least one dimension, got ()")
    for size in sizes:
        check_size("normalized_shape", size)
    return sizes


def check_ending(name: str, t: object, ending: tuple[int, ...]) -> None:
    """Raise if it is no dense or jagged tensor, or its last dimensions are others than these."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    if t.is_nested and t.layout == torch.strided:  # has no shape
        raise ValueError(f"{name}: expected a dense or a jagged tensor, got a strided nested one")
    if t.layout not in (torch.strided, torch.jagged):
        raise ValueError(f"{name}: expected a dense (strided) tensor, got {t.layout}")
    if tuple(t.shape[-len(ending) :]) != tuple(ending):
        raise ValueError(
            f"{name}: expected a shape that ends in {tuple(ending)}, got {tuple(t.shape)}"
        )


def _brief(value: object) -> str:
    try:
        text = str(value)
    except ValueError:  # an int of more digits than Python writes
        return "one of thousands of digits"
    return text if len(text) <= 40 else f"{text[:20]}... of {len(text)} characters"


def _check_shapes(call: Call) -> None:
    shape = tuple(call.x.shape)
    least = 2 if call.per_head and not call.gated else 1  # rows of a gated norm may be heads
    if len(shape) < least:
        form = "(..., heads, head_dim)" if call.per_head else "(..., n)"
        raise ValueError(f"x: expected shape {form}, got {shape}")
    n = shape[-1]
    if n == 0:
        raise ValueError(f"x: expected at least one element in the last dimension, got {shape}")
    for name in ("residual", "out", "residual_out", "z"):
        t = getattr(call, name)
        if t is not None and tuple(t.shape) != shape:
            raise ValueError(f"{name}: expected x's shape {shape}, got {tuple(t.shape)}")
    for name in ("weight", "bias", *NEXT):
        t = getattr(call, name)
        if t is None or tuple(t.shape) == (n,):
            continue
        if not call.per_head:
            raise ValueError(f"{name}: expected shape ({n},), got {tuple(t.shape)}")
        if tuple(t.shape) != shape[-2:] or len(shape) < 2:
            fitting = f"{shape[-2:]} or ({n},)" if len(shape) > 1 else f"({n},)"
            raise ValueError(f"{name}: expected shape {fitting}, got {tuple(t.shape)}")
    if call.rotated:
        _check_shapes_of_rotation(call)
    if call.cache is not None and call.slots is not None:
        _check_shapes_of_cache(call, call.cache, call.slots)
    for name in MODULATORS:
        t = getattr(call, name)
        if t is not None and not is_per_row(t.shape, shape):
            raise ValueError(
                f"{name}: expected x's first dimensions, or ones in their place, and its last,"
                f" {shape}, got {tuple(t.shape)}"
            )


def _check_shapes_of_rotation(call: Call) -> None:
    shape, cos, sin = (tuple(t.shape) for t in (call.x, *call.table()))
    if sin != cos:
        raise ValueError(f"sin: expected cos's shape {cos}, got {sin}")
    tokens = shape[:-2]
    if len(cos) < 1 or 2 * cos[-1] > shape[-1]:
        raise ValueError(
            f"cos: expected at most {shape[-1] // 2} columns, half of x's {shape[-1]}, got {cos}"
        )
    if call.positions is None:
        if not is_per_token(cos[:-1], tokens):
            raise ValueError(f"cos: expected rows for x's tokens {tokens}, got shape {cos}")
        return
    if len(cos) != 2:
        raise ValueError(f"cos: expected a table (positions, columns), got shape {cos}")
    if not is_per_token(call.positions.shape, tokens):
        given = tuple(call.positions.shape)
        raise ValueError(f"positions: expected x's tokens {tokens}, got shape {given}")


def _check_shapes_of_cache(call: Call, cache: Tensor, slots: Tensor) -> None:
    shape, of_slots = tuple(call.x.shape), tuple(slots.shape)
    if cache.ndim != 4 or tuple(cache.shape[2:]) != shape[-2:]:
        heads = ", ".join(map(str, shape[-2:]))
        raise ValueError(
            f"cache: expected shape (pages, page_size, {heads}), got {tuple(cache.shape)}"
        )
    if of_slots != shape[:-2]:
        raise ValueError(f"slots: expected x's tokens {shape[:-2]}, got shape {of_slots}")


def is_per_token(of: Sequence[int], tokens: Sequence[int]) -> bool:
    """Whether a tensor of this shape can be expanded to x's dimensions ahead of the heads."""
    pairs = zip(reversed(of), reversed(tokens), strict=False)
    return len(of) <= len(tokens) and all(size in (1, wanted) for size, wanted in pairs)


def is_per_row(of: Sequence[int], x: Sequence[int]) -> bool:
    """Whether a gate, scale or shift of this shape has rows for an x of that one."""
    if not 1 <= len(of) <= len(x) or of[-1] != x[-1]:
        return False
    return all(size in (1, wanted) for size, wanted in zip(of[:-1], x, strict=False))


def _check_places(call: Call) -> None:
    for name, t in call.tensors() + call.indices():
        _check_strided(name, t)
        if t.device != call.x.device:
            raise ValueError(f"{name}: expected x's device {call.x.device}, got {t.device}")
    for name, t in call.written():
        if not reference.is_compiled():
            _check_writable(name, t)
        if not call.takes_strides and t.shape[-1] > 1 and t.stride(-1) != 1:
            raise ValueError(
                f"{name}: expected a last stride of 1 in what is written, got {t.stride(-1)}"
            )


def _check_strided(name: str, t: Tensor) -> None:
    if t.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense (strided) tensor, got {t.layout}")


def _check_writable(name: str, t: Tensor) -> None:
    if t.is_neg():
        raise ValueError(f"{name}: expected a tensor without the negative bit in what is written")
    if t.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{name}: expected a normal tensor to write to outside of inference mode,"
            " got an inference tensor; a clone of it is a normal one"
        )


def _check_gradients(call: Call) -> None:
    name = call.needs_gradient()
    if name is None or not call.written():
        return
    instead = call.op.rstrip("_") if call.in_place else "it without out= and residual_out="
    raise RuntimeError(
        f"{name}: a gradient is needed, and {call.op} would write over what autograd keeps;"
        f" use {instead}"
    )


# ---------------------------------------------------------------- memory


def _bytes(t: Tensor) -> tuple[int, int]:
    """The addresses from the first byte of a tensor to behind its last."""
    if t.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


class _Layout(NamedTuple):
    """Where the runs of a tensor's memory lie: its rows, or its elements if columns are apart."""

    dims: list[tuple[int, int]]  # (stride in bytes, size) of those longer than 1, the widest first
    run: int  # bytes of each


def _layout(t: Tensor) -> _Layout:
    item, n = t.element_size(), t.shape[-1]
    is_dense = n == 1 or t.stride(-1) == 1
    dims = zip(t.stride(), t.shape[:-1] if is_dense else t.shape, strict=False)
    apart = sorted(((stride * item, size) for stride, size in dims if size > 1), reverse=True)
    return _Layout(apart, n * item if is_dense else item)


def _covers_itself(t: Tensor) -> bool:
    dims, inside = _layout(t)
    for stride, size in reversed(dims):
        if stride < inside:
            return True
        inside += (size - 1) * stride
    return False


def _hits(distance: int, layout: _Layout) -> bool:
    """Whether two runs of one layout, its copies `distance` bytes apart, share a byte."""
    dims, run = layout
    if not dims:
        return abs(distance) < run
    (stride, size), inner = dims[0], _Layout(dims[1:], run)
    nearest = distance // stride
    return any(
        abs(k) < size and _hits(distance - k * stride, inner) for k in (nearest, nearest + 1)
    )


def _is_same(t: Tensor, other: Tensor) -> bool:
    """Whether every element of one is that element of the other."""
    strides = zip(t.shape, t.stride(), other.stride(), strict=False)
    return (
        t.data_ptr() == other.data_ptr()
        and t.dtype == other.dtype
        and t.shape == other.shape
        and all(size == 1 or stride == its for size, stride, its in strides)
    )


def _collide(written: Tensor, other: Tensor) -> bool:
    begin, end = _bytes(written)
    other_begin, other_end = _bytes(other)
    if end <= other_begin or other_end <= begin:
        return False
    layout = _layout(written)
    if written.dtype != other.dtype or layout != _layout(other):
        return True
    return _hits(other_begin - begin, layout)


def _check_memory(call: Call) -> None:
    shown = [_shows_memory(name, t) for name, t in call.tensors()]
    if not all(shown):
        return
    written = call.written()
    for name, t in written:
        if _covers_itself(t):
            raise ValueError(f"{name}: expected rows of their own, got rows that share memory")
        for other_name, other in call.inputs():
            # The sum is written before weight and bias are read, and rows of x share the others.
            of_norm = other_name in ("weight", "bias", *NEXT)
            early = of_norm and (t is call.residual_out or call.post)
            if early or t is call.cache or other_name in (*MODULATORS, "cos", "sin"):
                check_apart(name, t, other_name, other)
            elif not _is_same(t, other) and _collide(t, other):
                raise ValueError(
                    f"{name}: expected {other_name}'s memory or none of it, got a partial overlap"
                )
        for other_name, other in call.indices():
            check_apart(name, t, other_name, other)
    for (name, t), (other_name, other) in combinations(written, 2):
        check_apart(name, t, other_name, other)


def check_apart(name: str, written: Tensor, other_name: str, other: Tensor) -> None:
    """Raise if a tensor that is written shares memory with another."""
    if not (_shows_memory(name, written) and _shows_memory(other_name, other)):
        return
    if written.device == other.device and _collide(written, other):
        raise ValueError(f"{name}: expected memory apart from {other_name}'s, got an overlap")


def _shows_memory(name: str, t: Tensor) -> bool:
    """Whether a tensor's address says where its elements are."""
    plain = type(t) in (Tensor, torch.nn.Parameter)
    if t.is_meta or (not plain and hasattr(t, "fake_mode")):
        return False
    try:
        address = t.data_ptr()
    except RuntimeError:  # a wrapper of torch.func has no memory of its own
        return False
    if address == 0 and t.numel() > 0 and plain:
        raise ValueError(f"{name}: expected a tensor with memory, got one whose storage is freed")
    return address != 0 or t.numel() == 0
