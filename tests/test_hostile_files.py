"""Whatever a file holds: nothing is read outside of its folder, and an error is a line of words."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("typer")

from typer.testing import CliRunner

from hostile_files import FOLLOWS, INDEX, LARGEST, TABLE, Hostile, good, outside
from normkit import RMSNorm, _check, cli, load_norm
from normkit.checkpoint import _files, find_norms

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="made with what POSIX has")

SECONDS = 100  # of a machine that others use too
opened: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if opened is not None and event in ("open", "os.listdir", "os.scandir"):
        opened.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes)) else "")


sys.addaudithook(_note)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty model folder, with another beside it that is none of its business."""
    made = tmp_path / "model"
    made.mkdir()
    outside(made).parent.mkdir()
    weights = {f"{name}.norm.weight": torch.full((8,), FOLLOWS) for name in ("a", "good")}
    save_file(weights, outside(made))
    return made


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The paths of all that is opened; safetensors opens files out of Python's sight."""
    global opened
    opened = []
    safe_open = _files.safe_open

    def noting(path: Path, **options: Any) -> Any:
        _note("open", (str(path),))
        return safe_open(path, **options)

    monkeypatch.setattr(_files, "safe_open", noting)
    yield opened
    opened = None


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise AssertionError(f"still at it after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def made(hostile: Hostile, folder: Path) -> Path:
    source = hostile.make(folder)
    return source if isinstance(source, Path) else folder


def inside(path: str, folder: Path) -> bool:
    """Whether a path is in the folder, or nowhere near it: Python opens files of its own."""
    plain = Path(os.path.normpath(path))  # as it was named: links may lead elsewhere
    return not plain.is_relative_to(folder.parent) or plain.is_relative_to(folder)


# With every option stated nothing is assumed, and the exit status is that of the files.
STATED = ["--kind", "rms", "--eps", "1e-6", "--weight-offset", "0", "--round-once"]


def check(source: Path, *options: str) -> tuple[int, str]:
    arguments = ["check", str(source), "--rows", "2", "--dtype", "float32", *STATED, *options]
    told = CliRunner().invoke(cli.app, arguments)
    assert told.exception is None or isinstance(told.exception, SystemExit), repr(told.exception)
    return told.exit_code, told.output


@pytest.mark.parametrize("name", TABLE)
def test_check_says_in_a_line_what_is_wrong(
    name: str, folder: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_check, "CHECK_ROUNDS", 1)
    monkeypatch.setattr(_check, "originals_of", lambda files: _check.NoOriginals("not asked"))
    monkeypatch.setattr(cli, "originals_of", _check.originals_of)
    hostile = TABLE[name]
    source = made(hostile, folder)
    reads.clear()
    status, output = check(source)
    assert status == hostile.status, output
    assert re.search(hostile.says, output), output
    assert all(letter == "\n" or letter.isprintable() for letter in output), repr(output)
    assert max(map(len, output.splitlines())) < 1500
    assert str(FOLLOWS) not in output
    assert all(inside(path, folder) for path in reads), reads


@pytest.mark.parametrize("name", TABLE)
def test_functions_load_a_norm_or_raise_what_they_document(
    name: str, folder: Path, reads: list[str]
) -> None:
    hostile = TABLE[name]
    source = made(hostile, folder)
    reads.clear()
    keys = ["a.norm", "bad.norm", "good.norm", "norm", "q_norm", "vision.ln"]
    if hostile.finds is None:
        with pytest.raises((OSError, ValueError)):
            find_norms(source)
    else:
        entries = find_norms(source)
        assert len(entries) == hostile.finds
        keys += [entry.key for entry in entries]
    for key in keys:
        with contextlib.suppress(KeyError, OSError, TypeError, ValueError):
            norm = load_norm(source, key)
            assert norm.weight.numel() > 0
            assert not (norm.weight == FOLLOWS).any()
    assert all(inside(path, folder) for path in reads), reads


def test_the_secret_would_be_seen(folder: Path, reads: list[str]) -> None:
    """What the tests above look for is there to be found."""
    assert (load_norm(outside(folder), "a.norm").weight == FOLLOWS).all()
    assert not all(inside(path, folder) for path in reads)


def test_a_file_larger_than_the_memory_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(path: Path, **options: Any) -> None:
        raise RuntimeError(f"unable to mmap 1099511627878 bytes from file <{path}>")

    monkeypatch.setattr(_files, "safe_open", too_large)
    save_file(good(), folder / "model.safetensors")
    status, output = check(folder)
    assert status == 2
    assert "model.safetensors: cannot be opened: unable to mmap" in output


def test_links_are_followed_as_in_the_cache_of_hugging_face(folder: Path, reads: list[str]) -> None:
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    save_file(good(), blobs / "0a")
    (blobs / "0b").write_text(json.dumps({"weight_map": {"good.norm.weight": "1.safetensors"}}))
    (blobs / "0c").write_text(json.dumps({"rms_norm_eps": 0.25}))
    for name, blob in {"1.safetensors": "0a", INDEX: "0b", "config.json": "0c"}.items():
        (folder / name).symlink_to(f"../blobs/{blob}")
    (entry,) = find_norms(folder)
    assert (entry.key, entry.spec.eps, entry.shard) == ("good.norm", 0.25, "1.safetensors")
    assert isinstance(load_norm(folder, "good.norm"), RMSNorm)


READ = """
import sys
from pathlib import Path
from normkit import load_norm
from normkit.checkpoint import find_norms
from typer.testing import CliRunner
from normkit import _check, cli
_check.CHECK_ROUNDS = 1
for path in sys.argv[1:]:
    try:
        found = find_norms(path)
        if len(found) == 1:
            load_norm(path, found[0].key)
            assert CliRunner().invoke(cli.app, ["check", path]).exit_code in (0, 2, 3)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
    status = Path("/proc/self/status").read_text()
    print(Path(path).name, int(status.split("VmHWM:")[1].split()[0]) // 1024, flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read memory from")
def test_no_file_takes_a_gigabyte_of_memory(tmp_path: Path) -> None:
    folders = []
    for name, make in LARGEST.items():
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        make()(folders[-1])
    command = [sys.executable, "-c", READ, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peaks = {name: int(peak) for name, peak in re.findall(r"(.*) (\d+)\n", done.stdout)}
    assert list(peaks) == list(LARGEST)
    assert max(peaks.values()) < 1000, peaks
    assert "values, got more" not in done.stderr  # the files are as large as is let through
    assert "MiB, got more" not in done.stderr
