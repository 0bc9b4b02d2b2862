"""Proof that the sweep sees what it is there to see: broken kernels, each of which must fail.

Every mutant is a patch of the kernels or of their launch, and stands for a bug that somebody has
had.  The unbroken kernels must pass in the same builds.

    python tests/emu/mutants.py [--only NAME] [--jobs 2]
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from mutations import ADDRESS, PLAIN, THREAD, Mutant
from mutations import MUTANTS as OF_WHOLE_ROWS
from mutations_gated import GATED
from mutations_modulated import MODULATED
from mutations_parts import PARTS
from mutations_post_norm import POST_NORM
from mutations_rare import RARE
from mutations_rotation import ROTATION
from mutations_strided import STRIDED

ROOT = Path(__file__).resolve().parents[2]
MUTANTS = (*OF_WHOLE_ROWS, *PARTS, *MODULATED, *GATED, *POST_NORM, *ROTATION, *RARE, *STRIDED)
# What the sweep runs: all of it, or a part where a sanitizer makes it slow.
SHARE = {PLAIN: ("0", "1"), ADDRESS: ("0", "8"), THREAD: ("0", "12")}
TIME_LIMIT = 300  # seconds for a sweep; an endless loop is no catch


@dataclass(frozen=True)
class Result:
    name: str
    build: str
    good: bool
    what: str
    seconds: float


class NeedsCare(Exception):
    """The proof itself does not work: no catch, whatever the exit code."""


def output_of(command: list[str], limit: float) -> tuple[int, str]:
    environment = dict(os.environ, TSAN_OPTIONS="halt_on_error=1", ASAN_OPTIONS="detect_leaks=0")
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=limit,
        env=environment,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def patched(text: str, patches: tuple[tuple[str, str], ...]) -> str:
    for old, new in patches:
        if text.count(old) != 1:
            raise NeedsCare(f"the mutant needs care: {text.count(old)} times in the file: {old!r}")
        text = text.replace(old, new)
    return text


def build(tree: Path, kind: str) -> Path:
    folder = tree / kind.replace(",", "-")
    if not (folder / "build.ninja").exists():
        code, nanobind = output_of([sys.executable, "-m", "nanobind", "--cmake_dir"], 60)
        if code:
            raise NeedsCare("nanobind is not installed beside this Python")
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "Python_EXECUTABLE": sys.executable,
            "nanobind_ROOT": nanobind.strip(),
            "SKBUILD_SABI_VERSION": "3.10",
            "NORMKIT_SANITIZE": "" if kind == PLAIN else kind,
        }
        code, text = output_of(
            ["cmake", "-S", str(tree / "tests/emu"), "-B", str(folder), "-GNinja"]
            + [f"-D{key}={value}" for key, value in options.items()],
            120,
        )
        if code:
            raise NeedsCare("cmake failed: " + " ".join(text.split())[-300:])
    code, text = output_of(
        ["cmake", "--build", str(folder), "--target", "sweep", "--parallel", "1"], 600
    )
    if code:
        errors = re.findall(r".*error: .*", text)
        raise NeedsCare("it does not compile: " + (errors or [text[-300:]])[0].strip())
    return folder / "sweep"


def reason(code: int, text: str) -> str:
    patterns = (
        r"SUMMARY: \w+Sanitizer: [\w-]+(?: race)?",
        r"runtime error: .{,50}",
        r"emu: .*",
        r".*the bits follow.*",
        r"\w+ at row .*",
        r"this plan was not run.*",
    )
    for pattern in patterns:
        if found := re.search(pattern, text):
            return found.group().strip()
    return f"exit code {code}"


def work(tree: Path, name: str, kind: str, change: Mutant | None) -> Result:
    began = time.monotonic()
    path = tree / change.file if change else None
    original = path.read_text() if path else ""
    try:
        if path and change:
            path.write_text(patched(original, change.patches))
        sweep = build(tree, kind)
        only = [change.only] if change else []
        code, text = output_of([str(sweep), "1", *SHARE[kind], *only], TIME_LIMIT)
        if change is None:
            good, what = code == 0, "passes" if code == 0 else reason(code, text)
        else:
            good, what = code != 0, reason(code, text) if code else "SURVIVES"
    except subprocess.TimeoutExpired as error:
        good, what = False, f"still running after {error.timeout:.0f} s"
    except NeedsCare as error:
        good, what = False, str(error)
    finally:
        if path:
            path.write_text(original)
    return Result(name, kind, good, what, time.monotonic() - began)


def worker(
    tree: Path, todo: queue.SimpleQueue[tuple[str, str, Mutant | None]], done: list[Result]
) -> None:
    for part in ("cpp", "cuda", "tests/emu"):
        shutil.copytree(ROOT / part, tree / part)
    while True:
        try:
            name, kind, change = todo.get_nowait()
        except queue.Empty:
            return
        result = work(tree, name, kind, change)
        done.append(result)
        verdict = "ok  " if result.good else "FAIL"
        print(
            f"{verdict} {name:24}{kind:19}{result.seconds:4.0f} s  {result.what[:110]}", flush=True
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", metavar="NAME", help="one mutant")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    chosen = [m for m in MUTANTS if arguments.only in (None, m.name)]
    if not chosen:
        parser.error(f"no mutant is named {arguments.only!r}")
    began = time.monotonic()
    todo: queue.SimpleQueue[tuple[str, str, Mutant | None]] = queue.SimpleQueue()
    for kind in (ADDRESS, THREAD, PLAIN):
        if any(m.build == kind for m in chosen):
            todo.put(("(unbroken)", kind, None))
    for m in chosen:
        todo.put((m.name, m.build, m))
    done: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="normkit-mutants-") as folder:
        threads = [
            threading.Thread(target=worker, args=(Path(folder) / str(i), todo, done))
            for i in range(min(arguments.jobs, len(chosen) + 1))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    expected = len(chosen) + len({m.build for m in chosen})
    bad = [r.name for r in done if not r.good]
    print(f"{len(chosen)} mutants in {time.monotonic() - began:.0f} s", end="; ")
    print("not as they should be: " + ", ".join(bad) if bad else "all are caught")
    return int(bool(bad) or len(done) != expected)


if __name__ == "__main__":
    sys.exit(main())
