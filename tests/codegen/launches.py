"""What calls launch: kernels, grids and arguments, from the project's own host code.

`arguments.cpp` is compiled with that code as the emulation compiles it, for the host alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from compiled_kernels import CUDA, KEPT, ROOT, find
from sass_thread import Launch

HERE = Path(__file__).parent
EMULATOR = ROOT / "tests" / "emu"
FLAGS = ("-std=c++17", "-O0", "-w", "-fno-strict-aliasing", f"-I{EMULATOR}", f"-I{CUDA}")


class KernelLaunch(NamedTuple):
    symbol: str  # as both compilers mangle it; empty for a kernel of an unnamed namespace
    declaration: str
    launch: Launch


class Planned(NamedTuple):
    plan: str  # in words
    tensors: dict[int, str]  # address / 2^40: name
    launches: list[KernelLaunch]


Call = Mapping[str, "int | str"]  # dtypes of the tensors that are there, and numbers


def planned(arch: int, calls: Iterable[Call]) -> list[Planned]:
    lines = [
        f"clusters={int(arch >= 90)} " + " ".join(f"{k}={v}" for k, v in call.items())
        for call in calls
    ]
    command, text = [str(_program())], "".join(f"{line}\n" for line in lines)
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr.strip())
    return [_planned(text) for text in done.stdout.split("call\n")[1:]]


def _planned(text: str) -> Planned:
    plan, tensors, launches = "", {}, []
    for kind, *fields in (line.split("\t") for line in text.splitlines()):
        if kind == "plan":
            plan = fields[0]
        elif kind == "tensor":
            tensors[int(fields[1], 16) >> 40] = fields[0]
        else:
            symbol, declaration, grid, block, cluster, arguments = fields
            launch = Launch(bytes.fromhex(arguments), _three(grid), _three(block), int(cluster))
            launches.append(KernelLaunch(symbol, declaration, launch))
    return Planned(plan, tensors, launches)


def _three(text: str) -> tuple[int, int, int]:
    x, y, z = map(int, text.split())
    return x, y, z


def _units() -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Sources of the program, with flags of their own."""
    as_cpp = ("-x", "c++")
    for source in sorted(CUDA.glob("instances*.cu")):
        yield source, as_cpp
    for source in sorted(CUDA.glob("launch*.cu")):
        yield source, (*as_cpp, "-include", str(HERE / "launch_printer.hpp"))
    for source in (HERE / "arguments.cpp", EMULATOR / "emu.cpp", EMULATOR / "device.cpp"):
        yield source, ()


def _headers_of_cuda() -> Path:
    nvcc = find("nvcc")
    places = [Path(nvcc).resolve().parents[1] / "include"] if nvcc else []
    for folder in sys.path:
        places += Path(folder or ".").glob("nvidia/cu*/include")
    return next(place for place in places if (place / "cuda_bf16.h").is_file())


_made: list[Path] = []  # once a process is enough: sources do not change meanwhile


def _program() -> Path:
    if _made:
        return _made[0]
    folders = (CUDA, EMULATOR, HERE, ROOT / "cpp")
    kinds = (".cu", ".cuh", ".h", ".hpp", ".cpp")
    sources = [path for folder in folders for path in folder.iterdir() if path.suffix in kinds]
    text = b"".join(path.name.encode() + path.read_bytes() for path in sorted(sources))
    key = hashlib.sha256(text + repr(FLAGS).encode()).hexdigest()[:16]
    kept = KEPT / f"arguments.{key}"
    KEPT.mkdir(parents=True, exist_ok=True)
    with (KEPT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes of the tests want it too
        if not kept.exists():
            _compile(kept)
    _made.append(kept)
    return kept


def _compile(program: Path) -> None:
    for old in KEPT.glob("arguments.*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    folder = program.with_suffix(".objects")
    folder.mkdir()
    headers = f"-isystem{_headers_of_cuda()}"

    def compiled(unit: tuple[Path, tuple[str, ...]]) -> str:
        source, flags = unit
        object_ = folder / f"{source.name}.o"
        command = ["g++", *FLAGS, headers, *flags, "-c", str(source), "-o", str(object_)]
        subprocess.run(command, check=True)
        return str(object_)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, _units()))
    # Names of kernels are looked up by their addresses.
    subprocess.run(
        ["g++", "-rdynamic", *objects, "-o", str(folder / "arguments"), "-ldl"], check=True
    )
    (folder / "arguments").rename(program)
    shutil.rmtree(folder)
