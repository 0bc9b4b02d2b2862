"""Model folders as nobody should make them: how each is made, and what is said of it."""

from __future__ import annotations

import json
import os
import pickle
import socket
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

INDEX = "model.safetensors.index.json"
FILE = "model.safetensors"
FOLLOWS = 42.4242  # what every weight outside of the folder holds

Make = Callable[[Path], Any]


class Hostile(NamedTuple):
    make: Make
    """Fills a folder, which is the source, unless the path of another is returned."""
    status: int
    """The exit status of `normkit check`."""
    says: str
    """What `normkit check` says, in words."""
    finds: int | None = None
    """How many norms find_norms lists; None where it raises."""


# ------------------------------------------------------------------------------------- how to make


def good() -> dict[str, torch.Tensor]:
    return {"good.norm.weight": torch.ones(8)}


def stored(tensors: Mapping[str, torch.Tensor], config: Any = None) -> Make:
    """A model of one file; config is JSON, or something to make it of."""

    def make(folder: Path) -> None:
        save_file(dict(tensors), folder / FILE)
        if config is not None:
            text = config if isinstance(config, (str, bytes)) else json.dumps(config)
            data = text if isinstance(text, bytes) else text.encode()
            (folder / "config.json").write_bytes(data)

    return make


def beside_good(name: str, tensor: torch.Tensor, **others: torch.Tensor) -> Make:
    parts = {f"norm.{part}": value for part, value in others.items()}
    return stored({**good(), name: tensor, **parts})


def with_header(header: Any, data: bytes = b"", size: int | None = None) -> Make:
    """A file of that header, which may say another size than it has."""

    def make(folder: Path) -> None:
        raw = header if isinstance(header, bytes) else json.dumps(header).encode()
        length = struct.pack("<Q", len(raw) if size is None else size)
        (folder / FILE).write_bytes(length + raw + data)

    return make


def tensor(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def indexed(text: Any) -> Make:
    """A whole shard, and an index of that text."""

    def make(folder: Path) -> None:
        save_file(good(), folder / "part.safetensors")
        data = text if isinstance(text, bytes) else text.encode()
        (folder / INDEX).write_bytes(data)

    return make


def pointing(name: str) -> Make:
    """An index that has a norm in the file of that name."""
    weight_map = {"a.norm.weight": name, "good.norm.weight": "part.safetensors"}
    return indexed(json.dumps({"weight_map": weight_map}))


def outside(folder: Path) -> Path:
    return folder.parent / "outside" / "secret.safetensors"


def pointing_at(name_of: Callable[[Path], str]) -> Make:
    return lambda folder: pointing(name_of(folder))(folder)


def many(count: int, form: str) -> str:
    """A JSON object of so many members, with their numbers in."""
    return "{" + ",".join(form.format(i=i) for i in range(count)) + "}"


def fifo(path: Path) -> None:
    os.mkfifo(path)


def listens(path: Path) -> None:
    """A socket; its path may be longer than the address of one may be."""
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link(to: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(to)


def instead_of(name: str, make: Callable[[Path], None]) -> Make:
    """A good model, in which one file is something else."""

    def changed(folder: Path) -> None:
        if name == FILE or name == "config.json":
            stored(good())(folder)
        else:
            pointing("other.safetensors")(folder)
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return changed


def as_source(name: str, make: Callable[[Path], Any]) -> Make:
    def made(folder: Path) -> Path:
        make(folder / name)
        return folder / name

    return made


def as_named(name: str, make: Make) -> Make:
    """One of the files that are made, as the source."""

    def made(folder: Path) -> Path:
        make(folder)
        return folder / name

    return made


def renamed(name: str, to: str, make: Make) -> Make:
    def made(folder: Path) -> None:
        make(folder)
        (folder / name).rename(folder / to)

    return made


def of_mistral(make: Make) -> Make:
    return renamed(FILE, "consolidated.safetensors", make)


def of_bytes(data: bytes) -> Make:
    return lambda folder: (folder / FILE).write_bytes(data)


def sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def wide(elements: int) -> Make:
    """A norm of so many elements, that take no room on the disk."""

    def make(folder: Path) -> None:
        size = 4 * elements
        header = {"norm.weight": tensor(shape=(elements,), offsets=(0, size))}
        with_header(header)(folder)
        with (folder / FILE).open("r+b") as file:
            file.truncate(file.seek(0, os.SEEK_END) + size)

    return make


# -------------------------------------------------------------------------------------- the table

NAMES = r"index\.json: expected names of files in this folder, got"
TEN_TO_400 = "1" + "0" * 400

POINTS_OUTSIDE = {
    "..": lambda folder: "../outside/secret.safetensors",
    "absolute": lambda folder: str(outside(folder)),
    "absolute, two slashes": lambda folder: f"/{outside(folder)}",
    "there and back": lambda folder: "x/../../outside/secret.safetensors",
    ".. in the middle": lambda folder: f"../{folder.name}/part.safetensors",
    "only ..": lambda folder: "..",
    "only .": lambda folder: ".",
    "empty": lambda folder: "",
    "root": lambda folder: "/",
    "a folder": lambda folder: "x/",
    "backslashes": lambda folder: "..\\outside\\secret.safetensors",
    "a drive": lambda folder: "C:secret.safetensors",
    "a share": lambda folder: "\\\\server\\share\\secret.safetensors",
    "an address": lambda folder: f"file://{outside(folder)}",
    "NUL": lambda folder: "part.safetensors\0.json",
    "a line feed": lambda folder: "part\n.safetensors",
    "escape": lambda folder: "\x1b[2Jpart.safetensors",
    "right to left": lambda folder: "\u202epart.safetensors",
    "half a character": lambda folder: "\ud800.safetensors",
    "/dev/zero": lambda folder: "/dev/zero",
    "/proc/self/mem": lambda folder: "/proc/self/mem",
}
NOT_FOUND = {
    "~": "~/secret.safetensors",
    "a variable": "$HOME/secret.safetensors",
    "percent": "%2e%2e/outside/secret.safetensors",
    "three dots": ".../outside/secret.safetensors",
}
BAD_EPS = {
    "NaN": ("NaN", "expected a finite number, got nan"),
    "infinite": ("Infinity", "expected a finite number, got inf"),
    "minus infinity": ("-Infinity", "expected a finite number, got -inf"),
    "negative": ("-1e-6", "expected a number >= 0, got -1e-06"),
    "1e400": ("1e400", "expected a finite number, got inf"),
    "1e39": ("1e39", r"expected a finite number, got 1e\+39"),
    "10^400": (TEN_TO_400, r"expected a finite number, got 1000"),
    "text": ('"1e-6"', "expected a number, got str"),
    "true": ("true", "expected a number, got bool"),
    "a list": ("[1e-6]", "expected a number, got list"),
    "an object": ("{}", "expected a number, got dict"),
}
NO_PLAIN_FILE = {
    "a FIFO": (fifo, "expected a file, got a FIFO"),
    "a folder": (Path.mkdir, "expected a file, got a folder"),
    "a socket": (listens, "expected a file, got a socket"),
    "a device": (device, "expected a file, got a device"),
    "a broken link": (link("../blobs/0123"), r"a broken link, to \.\./blobs/0123"),
    "a link to itself": (loop, "[Ss]ymbolic links"),
}
WEIGHTS = {  # of a norm beside a good one: status, what is said of it, whether it is listed
    "float64": (torch.ones(8).double(), 0, "got torch.float64, which only a float64 x takes", 1),
    "float8": (torch.ones(8).to(torch.float8_e4m3fn), 0, "got torch.float8_e4m3fn", 1),
    "float8_e5m2": (torch.ones(8).to(torch.float8_e5m2), 0, "got torch.float8_e5m2", 1),
    "int8": (torch.ones(8, dtype=torch.int8), 0, "got torch.int8", 0),
    "int64": (torch.ones(8, dtype=torch.int64), 0, "got torch.int64", 0),
    "uint16": (torch.ones(8, dtype=torch.uint16), 0, "got torch.uint16", 0),
    "bool": (torch.ones(8, dtype=torch.bool), 0, "got torch.bool", 0),
    "complex": (torch.ones(8, dtype=torch.complex64), 0, "got torch.complex64", 0),
    "no elements": (torch.ones(0), 2, r"expected the shape of a norm's tensor, got \(0,\)", 0),
    "too wide": (torch.ones((1 << 16) + 1), 0, "expected at most 65536 elements, got 65537", 1),
}
BIASES = {
    "int32": (torch.zeros(8, dtype=torch.int32), 0, "norm.bias: .*got torch.int32"),
    "float64": (torch.zeros(8).double(), 0, "bias: .*got torch.float64"),
    "float8": (torch.zeros(8).to(torch.float8_e4m3fn), 0, "bias: .*got torch.float8_e4m3fn"),
    "of another size": (torch.zeros(9), 2, r"of one shape, got \(8,\) and \(9,\)"),
    "no elements": (torch.zeros(0), 2, r"norm.bias: expected the shape of a norm's tensor"),
}
NOT_FINITE = {"inf": float("inf"), "minus inf": float("-inf"), "NaN": float("nan")}
NORM_NAMES = {
    "markup": ("[/]a.norm", r"\[/\]a\.norm"),
    "more markup": ("[bold red]a[link=file:///etc/passwd].norm", r"\[bold red\]a\[link"),
    "an emoji's code": (":smile:.norm", ":smile:"),
    "escape": ("\x1b[2Ja.norm", r"\\x1b\[2Ja\.norm"),
    "a link of a terminal": ("\x1b]8;;http://x\x07a.norm", r"\\x1b\]8;;http"),
    "lines": ("a\r\nnormkit: all is well\n.norm", r"a\\r\\nnormkit: all is well\\n\.norm"),
    "right to left": ("\u202ea.norm", r"\\u202ea\.norm"),
    "C1 control": ("\x9b2Ja.norm", r"\\x9b2Ja"),
    "NUL": ("a\0.norm", r"a\\x00\.norm"),
    "a number of 5000 digits": (f"{'7' * 5000}.norm", "7777"),
    "a number of other digits": ("٣.norm", "٣"),
    "100,000 characters": (f"{'a' * 100_000}.norm", "aaaa"),
    "100,000 dots": (f"{'.' * 100_000}norm", r"\.\.\."),
    "100,000 capitals": (f"a.{'N' * 100_000}orm.norm", "NNNN"),
}
BROKEN_HEADERS: dict[str, Make] = {
    "empty": of_bytes(b""),
    "7 bytes": of_bytes(b"1234567"),
    "only a size": with_header(b""),
    "a size of 2^64 - 1": with_header(b"{}", size=2**64 - 1),
    "a size beyond the file": with_header(b"{}", size=1000),
    "no JSON": with_header(b"no JSON at all"),
    "a list": with_header([]),
    "deep": with_header(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "no UTF-8": with_header(b'{"\xff.norm.weight": {}}'),
    "half a character": with_header(b'{"\\ud800.norm.weight": {}}'),
    "no data": with_header({"norm.weight": tensor()}),
    "a tail": with_header({"norm.weight": tensor()}, bytes(9)),
    "overlap": with_header({"a.norm.weight": tensor(), "b.norm.weight": tensor()}, bytes(8)),
    "a hole": with_header({"norm.weight": tensor(offsets=(8, 16))}, bytes(16)),
    "backwards": with_header({"norm.weight": tensor(offsets=(8, 0))}, bytes(8)),
    "negative offsets": with_header({"norm.weight": tensor(offsets=(-8, 0))}, bytes(8)),
    "a negative shape": with_header({"norm.weight": tensor(shape=(-2,))}, bytes(8)),
    "another shape": with_header({"norm.weight": tensor(shape=(3,))}, bytes(8)),
    "2^124 elements": with_header({"norm.weight": tensor(shape=(2**62, 2**62))}, bytes(8)),
    "2^64 elements": with_header({"norm.weight": tensor(shape=(2**32, 2**32))}, bytes(8)),
    "1e400 elements": with_header(b'{"norm.weight":{"dtype":"F32","shape":[1e400]}}'),
    "a made up dtype": with_header({"norm.weight": tensor("Q8_K")}, bytes(8)),
    "metadata of numbers": with_header({"__metadata__": {"a": 1}, "norm.weight": tensor()}),
    "a pickle": of_bytes(pickle.dumps({"norm.weight": [1.0]})),
    "an archive": of_bytes(b"PK\x03\x04" + bytes(100)),
    "GGUF": of_bytes(b"GGUF\x03\x00\x00\x00" + bytes(100)),
    "zeros": lambda folder: sparse(folder / FILE, 1 << 30),
}
BROKEN_JSON = {
    "empty": (b"", "not JSON"),
    "cut": (b'{"a": ', "not JSON"),
    "bytes": (b"\xff\xfe\xfd", "not JSON"),
    "a list": (b"[]", "expected a JSON object, got list"),
    "null": (b"null", "expected a JSON object, got NoneType"),
    "deep": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    "deep lists": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
    "5000 digits": (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
    "too many values": (b'{"a": [' + b"{}," * 300_000 + b"1]}", "at most 300000 values"),
    "too many letters": ('{"a": "é' + "x" * (13 << 20) + '"}', "expected at most (4|12) MiB"),
}
BROKEN_WEIGHT_MAPS = {
    "none": "{}",
    "null": '{"weight_map": null}',
    "a list": '{"weight_map": ["a.norm.weight"]}',
    "of numbers": '{"weight_map": {"a.norm.weight": 1}}',
    "of objects": '{"weight_map": {"a.norm.weight": {"file": "part.safetensors"}}}',
    "of lists": '{"weight_map": {"a.norm.weight": ["part.safetensors"]}}',
}


def _table() -> dict[str, Hostile]:
    table: dict[str, Hostile] = {}
    for name, of in POINTS_OUTSIDE.items():
        table[f"index points outside: {name}"] = Hostile(pointing_at(of), 2, NAMES)
    for name, to in NOT_FOUND.items():
        says = r"listed in model\.safetensors\.index\.json, but there is no such file"
        table[f"index points nowhere: {name}"] = Hostile(pointing(to), 2, says)
    long = pointing("a" * 5000 + ".safetensors")
    table["index points nowhere: 5000 letters"] = Hostile(long, 2, "[Ff]ile name too long")
    for name, text in BROKEN_WEIGHT_MAPS.items():
        says = "index.json: expected a weight_map from tensors to names of files"
        table[f"weight_map: {name}"] = Hostile(indexed(text), 2, says)
    for name, (text, says) in BROKEN_JSON.items():
        table[f"index: {name}"] = Hostile(indexed(text), 2, f"index.json: .*{says}")
        table[f"config: {name}"] = Hostile(stored(good(), text), 2, f"config.json: .*{says}")
    for name, (make, says) in NO_PLAIN_FILE.items():
        for file in (FILE, "config.json", INDEX, "other.safetensors"):
            words = says if name == "a link to itself" else f"{file}: {says}"
            table[f"{file} is {name}"] = Hostile(instead_of(file, make), 2, words)
    for name, make in BROKEN_HEADERS.items():
        table[f"file: {name}"] = Hostile(make, 2, rf"{FILE}: not a (whole )?safetensors file")
    for name, (value, says) in BAD_EPS.items():
        make = stored({**good(), "a.ln.weight": torch.ones(8)}, f'{{"rms_norm_eps": {value}}}')
        table[f"eps: {name}"] = Hostile(make, 2, f"config.json: rms_norm_eps: {says}")
    for name, (weight, status, says, listed) in WEIGHTS.items():
        make = beside_good("bad.norm.weight", weight)
        table[f"weight: {name}"] = Hostile(make, status, f"bad.norm: not run: .*{says}", 1 + listed)
    for name, (bias, status, says) in BIASES.items():
        make = beside_good("norm.weight", torch.ones(8), bias=bias)
        table[f"bias: {name}"] = Hostile(make, status, f"norm: not run: .*{says}", 2)
    for name, value in NOT_FINITE.items():
        weight = torch.rand(8)
        weight[3] = value
        make = beside_good("norm.weight", weight)
        table[f"weight holds {name}"] = Hostile(make, 0, "norm: holds inf or NaN, 1 of them", 2)
    for name, (key, says) in NORM_NAMES.items():
        weights = {**good(), f"{key}.weight": torch.ones(8)}
        table[f"name: {name}"] = Hostile(stored(weights), 0, says, 2)
        weights[f"{key}.weight"] = torch.ones(8).double()
        says = f"{says}.*: not run"
        table[f"name of what is not run: {name}"] = Hostile(stored(weights), 0, says, 2)
    return table


VISION_NAN = {"vision_config": {"layer_norm_eps": float("nan")}, "rms_norm_eps": 1e-5}
VISION = {"vision.ln.weight": torch.ones(8), "vision.ln.bias": torch.ones(8)}
LIES = {"weight_map": dict.fromkeys(("a.norm.weight", "good.norm.weight"), "part.safetensors")}
HALF = '{"weight_map": {"\\ud800.norm.weight": "part.safetensors"}}'

TABLE = _table() | {
    "a named shard whose index points outside": Hostile(
        as_named("part.safetensors", pointing_at(POINTS_OUTSIDE[".."])), 2, NAMES
    ),
    "a named shard whose index is a FIFO": Hostile(
        as_named("part.safetensors", instead_of(INDEX, fifo)), 2, "expected a file, got a FIFO"
    ),
    "an index of another name that points outside": Hostile(
        renamed(INDEX, "x.safetensors.index.json", pointing_at(POINTS_OUTSIDE["absolute"])),
        2,
        NAMES,
    ),
    "a params.json that is a device": Hostile(
        renamed("config.json", "params.json", of_mistral(instead_of("config.json", device))),
        2,
        "params.json: expected a file, got a device",
    ),
    "folders that are none": Hostile(
        lambda folder: [make(folder / make.__name__) for make in (fifo, loop, Path.mkdir, device)],
        2,
        r"no \.safetensors file and no .* in this folder$",
    ),
    "index: 1 GB": Hostile(
        instead_of(INDEX, lambda path: sparse(path, 1 << 30)), 2, "expected at most 48 MiB"
    ),
    "config: 1 GB": Hostile(
        instead_of("config.json", lambda path: sparse(path, 1 << 30)), 2, "expected at most 16 MiB"
    ),
    "index that lies": Hostile(
        indexed(json.dumps(LIES)), 2, "a.norm: not run: .*part.safetensors: cannot read"
    ),
    "index of half a character": Hostile(indexed(HALF), 2, r"cannot read \\ud800\.norm\.weight"),
    "too many tensors": Hostile(
        with_header(b"{" + b'"":{"":1},' * 500_000 + b"}"), 2, "expected at most 1000000 values"
    ),
    "too many norms": Hostile(
        indexed('{"weight_map": ' + many(10_001, '"{i}.norm.weight": "x"') + "}"),
        2,
        "expected at most 10000 norms, got 10001",
    ),
    "a dtype that torch lacks": Hostile(
        with_header({"norm.weight": tensor("F4", (16,))}, bytes(8)), 2, "got F4", 0
    ),
    "q_norm of 0 heads": Hostile(
        beside_good("q_norm.weight", torch.ones(0, 8)), 2, r"q_norm: not run: .*\(0, 8\)", 1
    ),
    "q_norm of heads of 0": Hostile(
        beside_good("q_norm.weight", torch.ones(8, 0)), 2, r"q_norm: not run: .*\(8, 0\)", 1
    ),
    "norm of no dimensions": Hostile(
        beside_good("norm.weight", torch.ones(())), 0, "1 norms, all within", 1
    ),
    "a norm of 1 GB": Hostile(wide(1 << 28), 2, "expected at most 65536 elements", 1),
    "a tower's eps": Hostile(
        stored({**good(), **VISION}, json.dumps(VISION_NAN)),
        2,
        "vision.ln: not run: .*layer_norm_eps: expected a finite number, got nan",
    ),
    "odd sections": Hostile(
        stored(good(), {"text_config": [], "vision_config": 1, "model_type": [{}]}), 0, "1 norms", 1
    ),
    "weights of zeros": Hostile(stored({"norm.weight": torch.zeros(8)}), 0, "1 norms", 1),
    "weights of the largest": Hostile(
        stored({"norm.weight": torch.full((8,), torch.finfo(torch.float32).max)}), 0, "1 norms", 1
    ),
    "only what is not run": Hostile(
        stored({"norm.weight": torch.ones(8).double()}), 2, "0 norms, 1 not run", 1
    ),
    "a name without a module": Hostile(
        stored({".weight": torch.ones(8), "weight": torch.ones(8)}), 2, "no norms found", 0
    ),
    "no norms": Hostile(stored({"up_proj.weight": torch.ones(8)}), 2, "no norms found", 0),
    "an empty folder": Hostile(lambda folder: None, 2, r"no \.safetensors file and no"),
    "only a pickle": Hostile(
        lambda folder: (folder / "model.bin").write_bytes(pickle.dumps(1)),
        2,
        r"no \.safetensors file and no",
    ),
    "several files": Hostile(
        lambda folder: [save_file(good(), folder / f"{n}.safetensors") for n in "a\n"],
        2,
        r"name one of them: \\n\.safetensors, a\.safetensors",
    ),
    "source: a FIFO": Hostile(as_source("x.safetensors", fifo), 2, "model folder, got a FIFO"),
    "source: a device": Hostile(lambda folder: Path("/dev/zero"), 2, "model folder, got a device"),
    "source: a socket": Hostile(as_source("x", listens), 2, "model folder, got a socket"),
    "source: a broken link": Hostile(
        as_source("x", link("../y")), 2, r"x: a broken link, to \.\./y"
    ),
    "source: a link to itself": Hostile(as_source("x", loop), 2, "[Ss]ymbolic links"),
    "source: nothing": Hostile(lambda folder: folder / "x", 2, "no such file or folder"),
    "source: escapes": Hostile(lambda folder: folder / "\x1b[2J", 2, r"\\x1b\[2J: no such file"),
}

# ---------------------------------------------------------------------------- what memory they take

NAMED, MEMBER = '"{i}.norm.weight": "m"', '"{i}": ""'
LONG = '"{i:0120}.norm.weight' + "\\ud83d\\ude00" + '": "x"'
EMPTY = '"{i}.norm.weight": {{"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}'
WIDE = "\\ud83d\\ude00"  # a letter that makes each of a text take 4 bytes

# As much as is let through, of what takes the most memory.
LARGEST: dict[str, Callable[[], Make]] = {
    "index": lambda: indexed(f'{{"weight_map": {many(299_990, NAMED)}}}'),
    "index of wide names": lambda: indexed(f'{{"weight_map": {many(299_990, LONG)}}}'),
    "index of one text": lambda: indexed(f'{{"weight_map": "{WIDE}{"x" * (47 << 20)}"}}'),
    "config of objects": lambda: stored(good(), '{"a": [' + '{"":1},' * 149_990 + "1]}"),
    "config of other letters": lambda: stored(good(), f'{{"a": "\U0001f600{"x" * (4000 << 10)}"}}'),
    "header of tensors": lambda: with_header(many(142_000, EMPTY).encode()),
    "header of metadata": lambda: with_header(
        f'{{"__metadata__": {many(999_990, MEMBER)}}}'.encode()
    ),
    "header of one name": lambda: with_header({"x" * (47 << 20): tensor("U8", (0,), (0, 0))}),
    "a wide norm": lambda: wide(1 << 25),
    "a wider norm": lambda: wide(1 << 30),
    "the widest norm that is run": lambda: wide(1 << 16),
}
