"""Norms as checkpoints store them: found by name and shape, and read one by one."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from normkit._families import Config, config_of
from normkit.inplace import Kind

if TYPE_CHECKING:
    from normkit.modules import HeadNorm, LayerNorm, RMSNorm

INDEX = "model.safetensors.index.json"


class HasGetTensor(Protocol):
    """Anything that hands out tensors by name, as an open safetensors file does."""

    def get_tensor(self, name: str, /) -> Tensor:
        """Give the tensor of that name, or raise KeyError."""


Source: TypeAlias = "str | os.PathLike[str] | Mapping[str, Tensor] | HasGetTensor"


@dataclass(frozen=True)
class NormEntry:
    """A norm of a checkpoint: what is stored of it, and with which options `load_norm` makes it."""

    key: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: torch.dtype
    has_bias: bool
    eps: float
    weight_offset: float
    shard: str | None
    """The name of the file it is in; None where the source is no file."""


@dataclass(frozen=True)
class StoredNorm:
    """A norm read from a checkpoint: copies of its tensors, bit for bit, and its options."""

    key: str
    weight: Tensor
    bias: Tensor | None
    kind: Kind
    eps: float
    weight_offset: float
    round_before_weight: bool


# ---------------------------------------------------------------------------------------- sources


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def _describe_slice(view: Any) -> tuple[tuple[int, ...], torch.dtype | None]:
    return tuple(view.get_shape()), _DTYPES.get(view.get_dtype())


class _Files:
    """One safetensors file, or the shards of an index."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._config_path = (path if path.is_dir() else path.parent) / "config.json"
        self._config = _read_json(self._config_path) if self._config_path.is_file() else {}
        self._open: dict[Path, Any] = {}
        file = _single_file(path)
        if file is None:
            self._shards = _read_index(path / INDEX)
        else:
            self._shards = dict.fromkeys(self._file(file).keys(), file)

    def config(self, prefix: str) -> Config:
        return config_of(prefix, self._config, str(self._config_path))

    def names(self) -> set[str]:
        return set(self._shards)

    def get(self, name: str) -> Tensor | None:
        if name not in self._shards:
            return None
        tensor: Tensor = self._ask("get_tensor", name)
        return tensor

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype | None]:
        return _describe_slice(self._ask("get_slice", name))

    def shard(self, name: str) -> str | None:
        return self._shards[name].name

    def _ask(self, method: str, name: str) -> Any:
        path = self._shards[name]
        try:
            return getattr(self._file(path), method)(name)
        except SafetensorError as error:
            raise ValueError(f"{path}: cannot read {name}: {error}") from error

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            if not path.is_file():
                raise FileNotFoundError(f"{path}: listed in {INDEX}, but there is no such file")
            try:
                self._open[path] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path}: not a whole safetensors file: {error}") from error
        return self._open[path]


def _single_file(path: Path) -> Path | None:
    """The one file that holds everything; None if there is an index of several."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(f"{path}: expected a .safetensors file or a model folder")
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder")
    files = sorted(path.glob("*.safetensors"))
    whole = path / "model.safetensors"
    if whole in files:
        return whole
    if (path / INDEX).is_file():
        return None
    if not files:
        raise FileNotFoundError(f"{path}: no .safetensors file and no {INDEX} in this folder")
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4])
        raise ValueError(f"{path}: several files and no {INDEX}, name one of them: {names}")
    return files[0]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _read_index(path: Path) -> dict[str, Path]:
    names = _read_json(path).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
        raise ValueError(f"{path}: expected a weight_map from tensors to files, got {names!r:.60}")
    return {tensor: path.parent / name for tensor, name in names.items()}


class _Objects:
    """A dict of tensors, or an object with get_tensor, whose keys() are used if it has them."""

    def __init__(self, source: Any) -> None:
        self.name = f"this {type(source).__name__}"
        self._source = source
        is_mapping = isinstance(source, Mapping)
        self._read = source.__getitem__ if is_mapping else source.get_tensor
        self._names = set(source.keys()) if hasattr(source, "keys") else None

    def config(self, prefix: str) -> Config:
        return config_of(prefix, {}, self.name)

    def names(self) -> set[str] | None:
        return self._names

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

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype | None]:
        if hasattr(self._source, "get_slice"):
            return _describe_slice(self._source.get_slice(name))
        tensor = self._read(name)
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            return (), None
        return tuple(tensor.shape), tensor.dtype

    def shard(self, name: str) -> str | None:
        return None


_Tensors: TypeAlias = _Files | _Objects


def _opened(source: Source) -> _Tensors:
    if isinstance(source, (str, os.PathLike)):
        return _Files(Path(source))
    if not isinstance(source, Mapping) and not callable(getattr(source, "get_tensor", None)):
        raise TypeError(
            "source: expected a path, a dict of tensors or an object with get_tensor,"
            f" got {type(source).__name__}"
        )
    return _Objects(source)


# ------------------------------------------------------------------------------- finding by name

_BIAS_OF = {".weight": ".bias", ".gamma": ".beta"}  # the second as TensorFlow's BERT has them
_NORM_WORDS = frozenset(
    ("norm", "norms", "layernorm", "layernorms", "rmsnorm", "ln", "layrnorm", "enorm", "hnorm")
)
_OTHER_WORDS = frozenset(("batch", "group", "instance", "spectral", "weight", "linear", "proj"))
_HEAD_WORDS = frozenset(("q", "k", "query", "key"))
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def _split(name: str) -> tuple[str, str]:
    """The norm's name and the ending of its weight's; "" as ending where it is not a weight's."""
    ending = next((e for e in _BIAS_OF if name.endswith(e)), "")
    return name.removesuffix(ending), ending


def _words(prefix: str) -> set[str]:
    """The words in the last part of a name that is not just a number."""
    named = next((p for p in reversed(prefix.split(".")) if not p.isdecimal()), "")
    return {word.lower() for word in _WORD.findall(named)}


def _is_norm(prefix: str) -> bool:
    words = _words(prefix)
    return bool(words & _NORM_WORDS) and not words & _OTHER_WORDS


def _is_head_norm(prefix: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and _is_norm(prefix) and bool(_words(prefix) & _HEAD_WORDS)


def find_norms(source: Source) -> list[NormEntry]:
    """Find every norm of a checkpoint by names and shapes, without reading a tensor.

    A norm is a floating weight (n,) of a module called norm, layernorm, LayerNorm, ln_1, q_norm and
    the like, or (heads, head_dim) of one called q_norm or k_norm; TensorFlow's gamma and beta count
    as weight and bias.  Batch, group and instance norms are left out where their name or a running
    mean tells; a group norm that is just called "norm" cannot be told from a LayerNorm.

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
    names = tensors.names()
    if names is None:
        raise TypeError(f"source: expected an object with keys(), got {tensors.name}")
    found = (_entry(tensors, names, name) for name in sorted(names, key=_natural))
    return [entry for entry in found if entry is not None]


def _natural(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _entry(tensors: _Tensors, names: set[str], name: str) -> NormEntry | None:
    prefix, ending = _split(name)
    if not ending or not _is_norm(prefix) or f"{prefix}.running_mean" in names:
        return None
    shape, dtype = tensors.describe(name)
    if dtype is None or not (len(shape) == 1 or _is_head_norm(prefix, shape)):
        return None
    has_bias = prefix + _BIAS_OF[ending] in names
    config = tensors.config(prefix)
    kind = config.kind(has_bias)
    return NormEntry(
        prefix,
        kind,
        shape,
        dtype,
        has_bias,
        config.eps(kind),
        config.weight_offset(kind),
        tensors.shard(name),
    )


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
    if kind not in (None, "rms", "layer"):
        raise ValueError(f'kind: expected "rms", "layer" or None, got {kind!r}')
    tensors = _opened(source)
    prefix, weight, bias = _read(tensors, key)
    config = tensors.config(prefix)
    kind = kind or config.kind(bias is not None)
    if weight_offset is None:
        weight_offset = config.weight_offset(kind)
    if round_before_weight is None:
        round_before_weight = config.round_before_weight(kind)
    return StoredNorm(
        prefix,
        _copied(weight, device),
        None if bias is None else _copied(bias, device),
        kind,
        config.eps(kind) if eps is None else eps,
        weight_offset,
        round_before_weight,
    )


def _read(tensors: _Tensors, key: str) -> tuple[str, Tensor, Tensor | None]:
    prefix, given = _split(key)
    for ending in [given] if given else _BIAS_OF:
        weight = tensors.get(prefix + ending)
        if weight is None:
            continue
        bias = tensors.get(prefix + _BIAS_OF[ending])
        if weight.ndim == 0 or (bias is not None and bias.shape != weight.shape):
            shapes = " and ".join(str(tuple(t.shape)) for t in (weight, bias) if t is not None)
            raise ValueError(f"{prefix}: expected the shapes of a norm's tensors, got {shapes}")
        return prefix, weight, bias
    raise KeyError(f"no norm {key!r} in {tensors.name}{_nearest(tensors, prefix)}")


def _nearest(tensors: _Tensors, prefix: str) -> str:
    prefixes = {start for start, ending in map(_split, tensors.names() or ()) if ending}
    norms = {start for start in prefixes if _is_norm(start)}
    near = difflib.get_close_matches(prefix, norms or prefixes, n=3, cutoff=0.3)
    return f"; the nearest keys are {', '.join(near)}" if near else ""


def _copied(tensor: Tensor, device: torch.device | str | None) -> Tensor:
    # A copy, since what a file gives is a window on the whole of it: torch.save would store it all.
    return tensor.detach().to(device=device).clone(memory_format=torch.contiguous_format)


def load_norm(
    source: Source,
    key: str,
    *,
    kind: Kind | None = None,
    eps: float | None = None,
    weight_offset: float | None = None,
    round_before_weight: bool | None = None,
    device: torch.device | str | None = None,
) -> RMSNorm | LayerNorm | HeadNorm:
    """Make the module of a norm in a checkpoint, of the class that fits what is stored.

    The kind is "layer" if there is a bias; else "rms" if the name says so; else what config.json
    says: "layer" for the families that have LayerNorms without a bias, and where it has a
    layer_norm_eps and no rms_norm_eps, except in families whose RMSNorms take their eps from there
    (T5, Mamba); else "rms".  So a LayerNorm without a bias needs kind="layer" where there is no
    config.json, and an RMSNorm with a bias always needs kind="rms".  The weight (heads, head_dim)
    of a q_norm or k_norm makes a `HeadNorm` of that kind, any other an `RMSNorm` or `LayerNorm`.

    Args:
        source: a .safetensors file; a folder with model.safetensors, or with
            model.safetensors.index.json and its shards, or with one .safetensors file; a dict of
            tensors; or an object with get_tensor(name), which has keys() or raises KeyError for
            what it lacks.  Only the tensors of this norm are read.  A config.json beside the file
            is used: its text_config, or vision_config or audio_config where the key says so.
        key: name of the norm ("model.norm") or of its weight ("model.norm.weight").
        kind: "rms" or "layer"; None for the rule above.
        eps: None for that of config.json, or, without one, 1e-6 for "rms" and 1e-5 for "layer".
        weight_offset: None for 1.0 where the model family of config.json adds 1 (Gemma 1 to 3,
            Qwen3-Next and 3.5), else 0.
        round_before_weight: None for True where the family does so (Llama, Mistral, Qwen2, Qwen3
            and most that descend from them), else False.
        device: None for where the source gives its tensors.

    Returns:
        An RMSNorm, LayerNorm or HeadNorm with copies of the stored tensors, bit for bit and in the
        dtype stored.

    Raises:
        KeyError: source has no such norm; the message names the nearest.
        TypeError: source is none of these.
        ValueError: kind is none of these, a file is malformed, or the stored shapes do not fit.
        OSError: a file is missing or cannot be read.

    Nothing is rounded in loading.  Families are as in Hugging Face transformers.

    Example:
        >>> import normkit, torch
        >>> normkit.load_norm({"ln.weight": torch.ones(4), "ln.bias": torch.zeros(4)}, "ln")
        LayerNorm((4,), eps=1e-05, elementwise_affine=True, bias=True)
    """
    from normkit import modules  # which are built on this file

    stored = read_norm(
        source,
        key,
        kind=kind,
        eps=eps,
        weight_offset=weight_offset,
        round_before_weight=round_before_weight,
        device=device,
    )
    if _is_head_norm(stored.key, tuple(stored.weight.shape)):
        return modules.HeadNorm.from_stored(stored)
    if stored.kind == "layer":
        return modules.LayerNorm.from_stored(stored)
    return modules.RMSNorm.from_stored(stored)
