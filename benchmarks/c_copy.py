"""The yardstick of a CPU: a copy in C of the bytes that an op moves, on as many threads.

It is compiled when it is first needed, runs on the OpenMP pool that torch has loaded, as the
kernels do, and is called as directly as Python can: 0.1 to 0.15 us of its time are the call's.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

import normkit
from normkit import _bench
from normkit._bench import Names, Op

C_COPY = "C copy"
STATEMENT = "c_copy(c_copies)"
SOURCE = Path(__file__).with_suffix(".c")
# memcpy, a loop over vectors, and stores around the caches: which is fastest depends on the size.
FORMS = ("memcpy", "loop", "stream")


class Copies(ctypes.Structure):
    """`Copies` of c_copy.c."""

    _fields_ = (
        ("to", ctypes.c_void_p * 2),
        ("from_", ctypes.c_void_p * 2),
        ("bytes", ctypes.c_long),
        ("buffers", ctypes.c_int),
        ("threads", ctypes.c_int),
        ("form", ctypes.c_int),
        ("parallel", ctypes.c_void_p),
        ("thread_num", ctypes.c_void_p),
        ("num_threads", ctypes.c_void_p),
    )


def compiler() -> list[str]:
    if told := os.environ.get("CC"):
        return shlex.split(told)
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    raise LookupError("no C compiler: none of cc, gcc and clang was found, and CC is not set")


@cache
def built() -> Any:
    """The compiled function."""
    native = ["-march=native"] * (platform.machine() in ("x86_64", "AMD64"))
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "c_copy.so")
        flags = ["-O3", *native, "-shared", "-fPIC", "-o", str(library), str(SOURCE)]
        subprocess.run([*compiler(), *flags], check=True, capture_output=True, text=True)
        run = ctypes.PyDLL(str(library)).run  # which keeps the GIL: to release it takes time
    run.restype = None
    return run


@cache
def pool() -> Any:
    """The libgomp that is loaded already; another one would start threads of its own."""
    maps = Path("/proc/self/maps")
    found = re.search(r"/\S*libgomp\S*", maps.read_text() if maps.exists() else "")
    if not found:
        raise LookupError("no libgomp in this process: a C copy on several threads needs its pool")
    return ctypes.CDLL(found.group())


def missing(threads: int) -> str | None:
    """Why there is no such copy here."""
    try:
        built()
        if threads > 1:
            pool()
    except subprocess.CalledProcessError as error:
        return f"{error} {error.stderr.strip()}"
    except (LookupError, OSError) as error:
        return str(error)
    return None


def threads_of(op: Op, names: Names) -> int:
    """On how many threads the kernel runs, by its plan."""
    tensors = [names[name] for name in op.tensors]
    options = {"kind": "layer"} if op.heads and op.layer else {}
    plan = str(normkit.explain(op.function, *tensors, **options).plan)
    found = re.search(r"(\d+) threads?", plan)
    if not found:
        raise LookupError(f"how many threads is not in the plan of {op.function}: {plan}")
    return int(found.group(1))


def copies_of(op: Op, names: Names, form: str, threads: int) -> Copies:
    """x to y, and for a fused add the residual to residual_out."""
    pairs = [("x", "y"), *[("residual", "residual_out")] * op.adds]
    made = Copies(buffers=len(pairs), threads=threads, form=FORMS.index(form))
    for i, (source, target) in enumerate(pairs):
        read, written = names[source], names[target]
        assert isinstance(read, torch.Tensor)
        assert isinstance(written, torch.Tensor)
        assert read.is_contiguous()
        assert written.is_contiguous()
        made.from_[i], made.to[i] = read.data_ptr(), written.data_ptr()
        made.bytes = read.nbytes
    if made.threads > 1:
        functions = {"parallel": "GOMP_parallel", "thread_num": "omp_get_thread_num"}
        functions["num_threads"] = "omp_get_num_threads"
        for field, name in functions.items():
            setattr(made, field, ctypes.cast(getattr(pool(), name), ctypes.c_void_p).value)
    return made


def fastest(op: Op, names: Names) -> tuple[str, Names]:
    """The form that is fastest on these tensors, and the names that STATEMENT uses."""
    threads = threads_of(op, names)
    made = {form: copies_of(op, names, form, threads) for form in FORMS}
    bound: dict[str, Names] = {
        form: {"c_copy": built(), "c_copies": ctypes.pointer(copies)}
        for form, copies in made.items()
    }
    timers = {form: _bench.timer(STATEMENT, more) for form, more in bound.items()}
    looked = _bench.paired(timers, rounds=3)
    form = min(FORMS, key=looked.us)
    return form, bound[form]
