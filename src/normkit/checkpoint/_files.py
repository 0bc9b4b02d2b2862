"""The files of a model folder, read with the care that files of strangers need.

No file is read outside of what was named, but through links, which the cache of Hugging Face is
made of; none is read that is not a plain file, or that would take more memory than its sense does.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from normkit.checkpoint._names import Layout, has_gguf_names, layout_of

CONFIG = "config.json"
MISTRAL, MISTRAL_CONFIG = "consolidated", "params.json"  # what Mistral's own files are called
INDEX = "model.safetensors.index.json"
# Of several files in a folder the first of these is the model: others are its variants or adapters.
_BEST_KNOWN = (
    "model.safetensors",
    INDEX,
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)
_INDEX_NAME = re.compile(r".*\.safetensors\.index(\.[\w-]+)?\.json", re.DOTALL)  # .index.fp16.json

# Whatever a file holds, reading it stays below 1 GB, torch included.  Parsed JSON takes up to 4
# bytes for a byte of text, and some 240 for a value; safetensors takes 160 for one of a header.
# The index of a model of 92,000 tensors has 10 MB, and a value for each; in a header, which is of
# one file only, a tensor takes 170 bytes and 8 values.
_MOST_CONFIG, _MOST_INDEX, _MOST_HEADER = 16 << 20, 48 << 20, 48 << 20
_MOST_VALUES, _MOST_HEADER_VALUES = 300_000, 1_000_000
# A model may have thousands of shards, and a process few hundred files open.
_MOST_OPEN = 128
# Weights of norms have some 10,000 elements; what is larger is a matrix that was asked for as one.
_MOST_TENSOR = 128 << 20

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
}


def printable(text: object, most: int = 200) -> str:
    """A name from a file for a message: what a terminal would obey is escaped, what is long cut."""
    shown = str(text)
    if len(shown) > most:
        shown = f"{shown[: most // 2]}...{shown[-most // 4 :]}"
    if shown.isprintable():
        return shown
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown
    )


def describe_slice(view: Any) -> tuple[tuple[int, ...], torch.dtype | str]:
    """The shape and dtype of a tensor that is not read; a dtype that torch lacks by its name."""
    dtype = view.get_dtype()
    return tuple(view.get_shape()), _DTYPES.get(dtype, dtype)


class Files:
    """One safetensors file, or the shards of an index, and the config beside them.

    Where an index lists the file that was named, what the file lacks is read from the other shards,
    such as the bias that goes with a weight; only the file's own tensors are listed.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        chosen = _chosen(path)
        self.folder = chosen.parent
        config = _config_path(chosen)
        self.config_name = str(config)
        exists = os.path.lexists(config)
        self.config: Mapping[str, object] = _read_json(config, _MOST_CONFIG) if exists else {}
        """What it holds, be it of transformers, diffusers or Mistral; empty without one."""
        self._open: dict[str, Any] = {}
        self._formats: dict[str, str | None] = {}
        self._index: Path | None = None
        if _is_index(chosen.name):
            self._index = chosen
            self._shards = _read_index(chosen)
            self._listed: Collection[str] = self._shards.keys()
        else:
            own = dict.fromkeys(self._file(chosen.name).keys(), chosen.name)
            self._index, indexed = _index_that_lists(chosen) if chosen == path else (None, {})
            self._shards = indexed | own
            self._listed = own.keys()

    def names(self) -> Collection[str]:
        """The names of all tensors that can be read."""
        return self._shards.keys()

    def listed(self) -> Collection[str]:
        """The names of the tensors of what was named: of a shard, only its own."""
        return self._listed

    def layout(self, name: str) -> Layout:
        """Who wrote the file that a tensor is in, as far as that says what its values are."""
        shard = self._shards[name]
        if shard not in self._formats:
            self._file(shard)
        return layout_of(self._is_gguf, self._formats[shard])

    @functools.cached_property
    def _is_gguf(self) -> bool:
        return has_gguf_names(self.names())

    def get(self, name: str) -> Tensor | None:
        """The tensor of that name, or None."""
        if name not in self._shards:
            return None
        shape, dtype = self.describe(name)
        if isinstance(dtype, str):
            raise TypeError(f"{printable(name)}: expected a dtype that torch has, got {dtype}")
        if math.prod(shape) * dtype.itemsize > _MOST_TENSOR:
            raise ValueError(
                f"{printable(name)}: expected a norm's tensor, of at most {_MOST_TENSOR >> 20} MiB,"
                f" got shape {shape} of {dtype}"
            )
        tensor: Tensor = self._ask("get_tensor", name)
        return tensor

    def get_tensor(self, name: str) -> Tensor:
        """The tensor of that name; with it, these files are a source as `load_norm` takes it."""
        tensor = self.get(name)
        if tensor is None:
            raise KeyError(name)
        return tensor

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype | str]:
        """Its shape and dtype, without reading it."""
        return describe_slice(self._ask("get_slice", name))

    def shard(self, name: str) -> str:
        """The name of the file it is in."""
        return self._shards[name]

    def _ask(self, method: str, name: str) -> Any:
        shard = self._shards[name]
        try:
            return getattr(self._file(shard), method)(name)
        except (SafetensorError, UnicodeError) as error:  # the latter of half a character
            raise ValueError(
                f"{self.folder / shard}: cannot read {printable(name)}: {printable(error)}"
            ) from error

    def _file(self, shard: str) -> Any:
        file = self._open.pop(shard, None)
        if file is None:
            if len(self._open) == _MOST_OPEN:
                del self._open[next(iter(self._open))]
            file = self._opened(shard)
            self._formats[shard] = (file.metadata() or {}).get("format")
        self._open[shard] = file  # the last used is the last
        return file

    def _opened(self, shard: str) -> Any:
        path = self.folder / shard
        _check_plain(path, f"listed in {self._index.name}, but there is" if self._index else "")
        _check_header(path)
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file: {printable(error)}") from error
        except RuntimeError as error:  # torch's, where the file is larger than the memory
            raise OSError(f"{path}: cannot be opened: {printable(error)}") from error


# ---------------------------------------------------------------------------------- finding files

_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}


def _chosen(path: Path) -> Path:
    """The one file that holds everything, or the index of several."""
    mode = _mode(path, "no such file or folder")
    if stat.S_ISREG(mode):
        if path.suffix != ".safetensors" and not _is_index(path.name):
            raise ValueError(f"{path}: expected a .safetensors file or a model folder")
        return path
    if not stat.S_ISDIR(mode):
        expected = "a .safetensors file or a model folder"
        raise ValueError(f"{path}: expected {expected}, got {_kind(mode)}")
    found = sorted(file.name for file in path.iterdir())
    best = next((name for name in _BEST_KNOWN if name in found), None)
    if best is not None:
        return path / best
    files = [name for name in found if name.endswith(".safetensors")]
    indexes = [name for name in found if _is_index(name)]
    if not indexes and f"{MISTRAL}.safetensors" in files:
        return path / f"{MISTRAL}.safetensors"
    candidates = indexes or files
    if len(candidates) == 1:
        return path / candidates[0]
    folders = _folders_of_models(path)
    if not candidates:
        raise FileNotFoundError(
            f"{path}: no .safetensors file and no {INDEX} in this folder{folders}"
        )
    what = "indexes" if indexes else f"files and no {INDEX}"
    raise ValueError(f"{path}: several {what}, name one of them: {_some(candidates)}{folders}")


def _is_index(name: str) -> bool:
    return _INDEX_NAME.fullmatch(name) is not None


def _index_that_lists(file: Path) -> tuple[Path | None, dict[str, str]]:
    """The index beside a file that has it among its shards, and those by the names of tensors."""
    for index in sorted(path for path in file.parent.iterdir() if _is_index(path.name)):
        shards = _read_index(index)
        if file.name in shards.values():
            return index, shards
    return None, {}


def _folders_of_models(path: Path) -> str:
    """For a message: the folders inside, such as those of a diffusers pipeline, that have files."""
    found = []
    for inside in sorted(path.iterdir()):
        with contextlib.suppress(OSError):  # what cannot be listed is none
            if inside.is_dir() and any(name.suffix == ".safetensors" for name in inside.iterdir()):
                found.append(inside.name)
    return f"; of its folders, these have files: {_some(found)}" if found else ""


def _some(names: list[str]) -> str:
    return ", ".join(map(printable, names[:8])) + (", ..." if len(names) > 8 else "")


def _config_path(chosen: Path) -> Path:
    config, mistral = chosen.parent / CONFIG, chosen.parent / MISTRAL_CONFIG
    if chosen.name.startswith(MISTRAL) and not os.path.lexists(config) and os.path.lexists(mistral):
        return mistral
    return config


def read_config(path: Path) -> Mapping[str, object]:
    """What a config.json holds; path is it, or its folder.

    Raises:
        OSError: it is missing or cannot be read.
        ValueError: it is malformed.
    """
    return _read_json(path / CONFIG if path.is_dir() else path, _MOST_CONFIG)


def _mode(path: Path, missing: str) -> int:
    try:
        return path.stat().st_mode
    except FileNotFoundError as error:
        reason = missing
        if path.is_symlink():
            reason = f"a broken link, to {printable(path.readlink())}"
        raise FileNotFoundError(f"{path}: {reason}") from error


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "a device")


def _check_plain(path: Path, listed: str = "") -> None:
    """Raise unless it is a file or a link to one: to open a FIFO would wait for ever."""
    mode = _mode(path, f"{listed or 'there is'} no such file")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: expected a file, got {_kind(mode)}")


# ---------------------------------------------------------------------------------- reading them


def _read_json(path: Path, most: int) -> dict[str, Any]:
    _check_plain(path)
    with path.open("rb") as file:
        raw = file.read(most + 1)
    # Other letters than ASCII's may make every character of the text take 4 bytes.
    if len(raw) > most or (len(raw) > most // 4 and not raw.isascii()):
        limit = most if raw.isascii() else most // 4
        raise ValueError(f"{path}: expected at most {limit >> 20} MiB, got more")
    _check_values(path, raw, _MOST_VALUES)
    try:
        content = json.loads(raw)
    except RecursionError as error:
        raise ValueError(f"{path}: not JSON of a model: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _check_values(path: Path, raw: bytes, most: int) -> None:
    """Raise if JSON holds too many values; commas and brackets within text count as well."""
    if sum(map(raw.count, (b",", b"[", b"{"))) > most:
        raise ValueError(f"{path}: expected at most {most} values, got more")


def _check_header(path: Path) -> None:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > _MOST_HEADER:
            raise ValueError(
                f"{path}: not a safetensors file: expected a header of at most"
                f" {_MOST_HEADER >> 20} MiB, got one of {size} bytes"
            )
        _check_values(path, file.read(size), _MOST_HEADER_VALUES)


def _read_index(path: Path) -> dict[str, str]:
    """The files of an index by the names of tensors."""
    shards = _read_json(path, _MOST_INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(n, str) for n in shards.values()):
        got = "others" if isinstance(shards, dict) else type(shards).__name__
        raise ValueError(f"{path}: expected a weight_map from tensors to names of files, got {got}")
    for shard in set(shards.values()):
        if not _names_a_file_inside(shard):
            raise ValueError(
                f"{path}: expected names of files in this folder, got {printable(repr(shard))}"
            )
    return shards


def _names_a_file_inside(name: str) -> bool:
    # As Windows reads it too, where "C:x" and "..\x" point elsewhere.
    parts = re.split(r"[/\\]", name)
    leaves = parts[0] == "" or ".." in parts or ":" in name
    return not leaves and parts[-1] not in ("", ".") and name.isprintable()
