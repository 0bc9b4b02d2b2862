"""Norms as checkpoints store them: found by name and shape, and read one by one."""

from __future__ import annotations

import difflib
import functools
import itertools
import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from normkit._serving.checks import check_eps, check_number
from normkit._spec import FLOATS, FLOATS_TEXT, Kind, NormSpec
from normkit.checkpoint._families import pattern_of
from normkit.checkpoint._files import Files, describe_slice, printable
from normkit.checkpoint._meaning import (
    NOTHING_GIVEN,
    Given,
    Meaning,
    Origin,
    assumed,
    is_known,
    meaning,
)
from normkit.checkpoint._names import (
    BIASES_OF,
    Layout,
    biases_of,
    has_gguf_names,
    is_norm,
    is_norm_weight,
    layout_of,
    natural,
    norm_shape,
    split,
    weights_of,
)


class AssumedWarning(UserWarning):
    """A norm is loaded with options that nobody stated."""


class NoRowError(ValueError):
    """What is stored belongs to a module that is no norm of rows."""


class HasGetTensor(Protocol):
    """Anything that hands out tensors by name, as an open safetensors file does."""

    def get_tensor(self, name: str, /) -> Tensor:
        """Give the tensor of that name, or raise KeyError."""


Source: TypeAlias = "str | os.PathLike[str] | Mapping[str, Tensor] | HasGetTensor"


@dataclass(frozen=True)
class NormEntry:
    """A norm of a checkpoint: what is stored of it, and with which options `load_norm` makes it.

    Attributes:
        key: its name in the checkpoint.
        spec: what it computes.
        shape: of the module's weight: (n,) or (heads, head_dim), also where (1, n) is stored.
        dtype: that of the stored weight.
        shard: the name of the file it is in; None where the source is no file.
        origins: for each option of spec, where its value came from.
        note: what the norm's module does beside, or in another way than normkit; "" for nothing.
    """

    key: str
    spec: NormSpec
    shape: tuple[int, ...]
    dtype: torch.dtype
    shard: str | None
    origins: Mapping[str, Origin] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class StoredNorm:
    """A norm read from a checkpoint: copies of its tensors, bit for bit, and what it computes.

    They have the shape (n,) or (heads, head_dim); other shapes are kept as they are stored.

    Attributes:
        key: its name in the checkpoint.
        weight: of any floating dtype that is stored.
        bias: None where there is none.
        spec: what it computes.
        origins: for each option of spec, where its value came from.
        source: the name of the source, for messages.
    """

    key: str
    weight: Tensor
    bias: Tensor | None
    spec: NormSpec
    origins: Mapping[str, Origin] = field(default_factory=dict)
    source: str = ""

    def warn_of_assumed(self, stacklevel: int) -> None:
        """Warn of options that nobody stated; Python shows one such warning for a source."""
        names = assumed(self.origins)
        if names:
            options = ", ".join(f"{name}={getattr(self.spec, name)!r}" for name in names)
            why = self.origins[names[0]].detail
            text = f"{self.source}: {why}, so {options} is assumed; pass what you know"
            warnings.warn(text, AssumedWarning, stacklevel=stacklevel + 1)


# ---------------------------------------------------------------------------------------- sources


class _Objects:
    """A dict of tensors, or an object with get_tensor, whose keys() are used if it has them."""

    def __init__(self, source: Any) -> None:
        self.name = f"this {type(source).__name__}"
        self._source = source
        is_mapping = isinstance(source, Mapping)
        self._read = source.__getitem__ if is_mapping else source.get_tensor
        self._names = set(source.keys()) if hasattr(source, "keys") else None
        self.config: Mapping[str, object] = {}
        self.config_name = self.name

    def names(self) -> Collection[str] | None:
        return self._names

    listed = names

    def layout(self, name: str) -> Layout:
        """As that of Files; of an object without keys only its metadata can tell."""
        return self._layout

    @functools.cached_property
    def _layout(self) -> Layout:
        read = getattr(self._source, "metadata", None)  # as an open safetensors file has it
        metadata = read() if callable(read) else None
        written_as = metadata.get("format") if isinstance(metadata, Mapping) else None
        return layout_of(has_gguf_names(self._names or ()), written_as)

    def get(self, name: str) -> Tensor | None:
        if self._names is not None and name not in self._names:
            return None
        try:
            tensor = self._read(name)
        except KeyError:
            if self._names is not None:
                raise
            return None
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        return tensor

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype | str]:
        if hasattr(self._source, "get_slice"):
            return describe_slice(self._source.get_slice(name))
        tensor = self._read(name)
        if not isinstance(tensor, Tensor):
            return (), type(tensor).__name__
        return tuple(tensor.shape), tensor.dtype

    def shard(self, name: str) -> str | None:
        return None


_Tensors: TypeAlias = Files | _Objects


def _opened(source: Source) -> _Tensors:
    if isinstance(source, Files):
        return source
    if isinstance(source, (str, os.PathLike)):
        return Files(Path(source))
    if not isinstance(source, Mapping) and not callable(getattr(source, "get_tensor", None)):
        raise TypeError(
            "source: expected a path, a dict of tensors or an object with get_tensor,"
            f" got {type(source).__name__}"
        )
    return _Objects(source)


# ------------------------------------------------------------------------------- finding by name

_LONG, _MANY = 200, 10_000  # what is searched for a key like one that is not there


def find_norms(source: Source) -> list[NormEntry]:
    """Find every norm of a checkpoint by names and shapes, without reading a tensor.

    A norm is a floating weight (n,), n > 0, of a module called norm, layernorm, LayerNorm, ln_1,
    q_norm and the like, or (heads, head_dim) of one called q_norm, k_norm or v_norm; dimensions of
    size 1 do not count.  The weight may be called weight, scale or gamma, and the bias bias or
    beta.  Of a family that is known (docs/models.md), norms under other names are found, and what
    is no norm of rows is left out; of others, batch, group and instance norms where their name or a
    running mean tells.  Of a norm that PEFT trains, the copy that is trained and the one it
    replaces are listed, each under the key that it is stored with.  Weights in float8 are listed
    with their dtype, and refused by `load_norm`.

    Args:
        source: as in `load_norm`; an object needs keys().  Only of an object without get_slice,
            tensors are read: those that have the name of a norm.

    Returns:
        One entry for each norm, sorted by key, with the numbers in keys in numerical order.

    Raises:
        TypeError: source is none of these, or an object without keys().
        ValueError: a file is malformed.
        OSError: a file is missing or cannot be read.

    Example:
        >>> import torch
        >>> from normkit.checkpoint import find_norms
        >>> entries = find_norms({"a.norm.weight": torch.ones(4), "b.weight": torch.ones(4)})
        >>> [entry.key for entry in entries]
        ['a.norm']
    """
    tensors = _opened(source)
    names = weight_names(tensors, only_rows=True)
    # in the order of shards, so that each is opened once, however many there are
    by_shard = sorted(names, key=lambda name: tensors.shard(name) or "")
    found = {name: _find(tensors, name) for name in by_shard}
    norms = (found[name] for name in names)
    return [_entry(tensors, norm) for norm in norms if norm is not None and norm.is_listed()]


@dataclass(frozen=True)
class _Found:
    """A stored tensor that has the name and the dimensions of a norm's weight, and that norm's."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str

    def is_listed(self) -> bool:
        """Whether it is one of `find_norms`: in float8 it is, though no call takes that."""
        is_floating = isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point
        return 0 not in self.shape and is_floating


def weight_names(tensors: _Tensors, *, only_rows: bool = False) -> list[str]:
    """The names of all tensors that are called as a norm's weight is, in the order of `find_norms`.

    What may be wrong with one of them is not looked at.

    Args:
        tensors: where they are.
        only_rows: leave out what the model's own code says is no norm of rows.
    """
    listed, names = tensors.listed(), tensors.names()
    if listed is None or names is None:
        raise TypeError(f"source: expected an object with keys(), got {tensors.name}")

    # a model has 90,000 names and some 100 patterns
    by_pattern = functools.cache(functools.partial(is_known, config=tensors.config))

    def known(module: str) -> bool | None:
        is_row = by_pattern(pattern_of(module))
        return None if is_row is False and not only_rows else is_row

    found = (name for name in listed if is_norm_weight(name, names, known))
    return sorted(found, key=natural)


def describe_norm(tensors: _Tensors, name: str, given: Given) -> NormEntry | None:
    """The norm of one of `weight_names`; None where the shape is not that of a norm.

    Args:
        tensors: where it is.
        name: its name.
        given: what the caller states of it.

    Raises:
        NoRowError: the model's own code computes no norm of rows there.
        TypeError: it is stored in a dtype that no call takes.
        ValueError: it has no elements, or a file is malformed.
        OSError: a file is missing or cannot be read.
    """
    norm = _find(tensors, name)
    if norm is None:
        return None
    _check_weight(norm.name, norm.shape, norm.dtype)
    return _entry(tensors, norm, given)


def _check_weight(name: str, shape: tuple[int, ...], dtype: torch.dtype | str) -> None:
    if dtype not in (*FLOATS, torch.float64):
        expected = f"{FLOATS_TEXT}, or float64"
        raise TypeError(f"{printable(name)}: expected {expected}, got {dtype}")
    if not shape or 0 in shape:
        raise ValueError(f"{printable(name)}: expected the shape of a norm's tensor, got {shape}")


def _find(tensors: _Tensors, name: str) -> _Found | None:
    stored, dtype = tensors.describe(name)
    shape = norm_shape(split(name)[0], stored)
    return None if shape is None else _Found(name, shape, dtype)


def _entry(tensors: _Tensors, norm: _Found, given: Given = NOTHING_GIVEN) -> NormEntry:
    prefix, _ = split(norm.name)
    names = tensors.names() or ()
    has_bias = any(bias in names for bias in biases_of(norm.name))
    assert isinstance(norm.dtype, torch.dtype)  # it was looked at
    meant = _meaning(tensors, norm.name, has_bias, given)
    return NormEntry(
        prefix,
        meant.spec,
        norm.shape,
        norm.dtype,
        tensors.shard(norm.name),
        meant.origins,
        meant.note,
    )


def _meaning(tensors: _Tensors, name: str, has_bias: bool, given: Given) -> Meaning:
    """What the norm with the weight of that name computes.

    Raises:
        NoRowError: it is no norm of rows.
    """
    prefix, _ = split(name)
    meant = meaning(
        prefix,
        tensors.config,
        tensors.config_name,
        has_bias=has_bias,
        layout=tensors.layout(name),
        given=given,
    )
    if meant.no_row:
        raise NoRowError(f"{printable(prefix)}: no norm of rows: {meant.no_row}")
    return meant


# ---------------------------------------------------------------------------------------- loading


def read_norm(
    source: Source,
    key: str,
    *,
    kind: Kind | None = None,
    eps: float | None = None,
    weight_offset: float | None = None,
    round_before_weight: bool | None = None,
    device: torch.device | str | None = None,
) -> StoredNorm:
    """Read the tensors and options of one norm; arguments and errors are those of `load_norm`."""
    if not isinstance(key, str):
        raise TypeError(f"key: expected a str, got {type(key).__name__}")
    if kind not in (None, "rms", "layer"):
        raise ValueError(f'kind: expected "rms", "layer" or None, got {kind!r}')
    eps = check_eps(eps)
    if weight_offset is not None:
        weight_offset = check_number("weight_offset", weight_offset)
    if not isinstance(round_before_weight, (bool, type(None))):
        got = type(round_before_weight).__name__
        raise TypeError(f"round_before_weight: expected True, False or None, got {got}")
    tensors = _opened(source)
    name, weight, bias = _read(tensors, key)
    given = Given(kind, eps, weight_offset, round_before_weight)
    meant = _meaning(tensors, name, bias is not None, given)
    copied = None if bias is None else _copied(bias, device)
    weight = _copied(weight, device)
    return StoredNorm(split(name)[0], weight, copied, meant.spec, meant.origins, tensors.name)


def _read(tensors: _Tensors, key: str) -> tuple[str, Tensor, Tensor | None]:
    name, weight = _read_weight(tensors, key)
    prefix, _ = split(name)
    weight = _as_row(name, prefix, weight)
    biases = ((part, tensors.get(part)) for part in biases_of(name))
    bias = next((_as_row(part, prefix, b) for part, b in biases if b is not None), None)
    if bias is not None and bias.shape != weight.shape:
        raise ValueError(
            f"{printable(prefix)}: expected a weight and a bias of one shape,"
            f" got {tuple(weight.shape)} and {tuple(bias.shape)}"
        )
    return name, weight, bias


def _as_row(name: str, prefix: str, stored: Tensor) -> Tensor:
    """A tensor that can be a norm's, in the shape of the norm."""
    shape = tuple(stored.shape)
    _check_weight(name, shape, stored.dtype)
    return stored.reshape(norm_shape(prefix, shape) or shape)


def _read_weight(tensors: _Tensors, key: str) -> tuple[str, Tensor]:
    """The weight of that name, or of the module of that name, and what it is called."""
    prefix, given = split(key)
    for ending in [given] if given else BIASES_OF:
        weight = tensors.get(prefix + ending)
        if weight is not None:
            return prefix + ending, weight
    wrapped = weights_of(prefix, tensors.names() or ())
    if len(wrapped) == 1:
        return _read_weight(tensors, wrapped[0])
    missing = f"no norm {key!r:.200} in {tensors.name}"
    if wrapped:
        keys = (split(name)[0] for name in sorted(wrapped, key=natural))
        raise KeyError(f"{missing}; name one of several: {', '.join(map(printable, keys))}")
    raise KeyError(f"{missing}{_nearest(tensors, prefix)}")


def _nearest(tensors: _Tensors, prefix: str) -> str:
    # difflib takes time as the product of the lengths, for each name
    prefixes = {start for start, ending in map(split, tensors.names() or ()) if ending}
    norms = {start for start in prefixes if is_norm(start)}
    short = (start for start in norms or prefixes if len(start) <= _LONG)
    among = list(itertools.islice(short, _MANY)) if len(prefix) <= _LONG else []
    near = difflib.get_close_matches(prefix, among, n=3, cutoff=0.3)
    return f"; the nearest keys are {', '.join(map(printable, near))}" if near else ""


def _copied(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    # A copy, since what a file gives is a window on the whole of it: torch.save would store it all.
    return tensor.detach().to(device=device).clone(memory_format=torch.contiguous_format)
