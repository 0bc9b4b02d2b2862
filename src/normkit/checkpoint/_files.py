"""The files of a model folder, read with the care that files of strangers need.

No file is read outside of what was named, but through links, which the cache of Hugging Face is
made of; none is read that is not a plain file, or that would take more memory than its sense does.
"""

from __future__ import annotations

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

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"

# Whatever a file holds, reading it stays below 1 GB, torch included.  Parsed JSON takes up to 4
# bytes for a byte of text, and some 240 for a value; safetensors takes 160 for one of a header.
# The index of a model of 92,000 tensors has 10 MB, and a value for each; in a header, which is of
# one file only, a tensor takes 170 bytes and 8 values.
_MOST_CONFIG, _MOST_INDEX, _MOST_HEADER = 16 << 20, 48 << 20, 48 << 20
_MOST_VALUES, _MOST_HEADER_VALUES = 300_000, 1_000_000
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
    """One safetensors file, or the shards of an index, and the config.json beside them."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        file = _single_file(path)
        folder = path if file is None else file.parent
        config = folder / CONFIG
        self.config_name = str(config)
        exists = os.path.lexists(config)
        self.config: Mapping[str, object] = _read_json(config, _MOST_CONFIG) if exists else {}
        self._open: dict[str, Any] = {}
        self.folder = folder
        self._indexed = file is None
        self._shards = (
            _read_index(path / INDEX)
            if file is None
            else dict.fromkeys(self._file(file.name).keys(), file.name)
        )

    def names(self) -> Collection[str]:
        """The names of all tensors."""
        return self._shards.keys()

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
        if shard not in self._open:
            path = self.folder / shard
            _check_plain(path, f"listed in {INDEX}, but there is" if self._indexed else "")
            _check_header(path)
            try:
                self._open[shard] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(
                    f"{path}: not a whole safetensors file: {printable(error)}"
                ) from error
            except RuntimeError as error:  # torch's, where the file is larger than the memory
                raise OSError(f"{path}: cannot be opened: {printable(error)}") from error
        return self._open[shard]


# ---------------------------------------------------------------------------------- finding files

_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}


def _single_file(path: Path) -> Path | None:
    """The one file that holds everything; None if there is an index of several."""
    mode = _mode(path, "no such file or folder")
    if stat.S_ISREG(mode):
        if path.suffix != ".safetensors":
            raise ValueError(f"{path}: expected a .safetensors file or a model folder")
        return path
    if not stat.S_ISDIR(mode):
        expected = "a .safetensors file or a model folder"
        raise ValueError(f"{path}: expected {expected}, got {_kind(mode)}")
    listed = {file.name for file in path.iterdir()}
    files = sorted(name for name in listed if name.endswith(".safetensors"))
    if "model.safetensors" in files:
        return path / "model.safetensors"
    if INDEX in listed:
        return None
    if not files:
        raise FileNotFoundError(f"{path}: no .safetensors file and no {INDEX} in this folder")
    if len(files) > 1:
        names = ", ".join(map(printable, files[:4]))
        raise ValueError(f"{path}: several files and no {INDEX}, name one of them: {names}")
    return path / files[0]


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
