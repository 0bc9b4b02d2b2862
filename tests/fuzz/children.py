"""Runs calls in child processes, so that one that crashes or hangs is one failure more."""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

_TESTS = Path(__file__).parents[1]
_HANGS = 60.0  # seconds without a next call
_MOST_CRASHES = 20


class Found(NamedTuple):
    """A failure, and the number of its call."""

    number: int
    kind: str
    detail: str


# ---------------------------------------------------------------- in the child


def serve(seed: int, begin: int, end: int, progress: str, how: str | None) -> None:
    """Run calls; a line for each failure, and the number of each call in the file as it begins."""
    from fuzz.making import make
    from fuzz.memory import Arena
    from fuzz.running import check
    from fuzz.spoiling import spoiled

    faulthandler.enable()
    arena = Arena()
    with (
        Path(progress).open("r+b") as file,
        mmap.mmap(file.fileno(), 8) as shown,
        spoiled(how) if how else nullcontext(),
    ):
        for number in range(begin, end):
            shown[:8] = number.to_bytes(8, "little")
            for failure in check(make(seed, number, arena), arena):
                print(json.dumps([number, *failure]), flush=True)
        shown[:8] = end.to_bytes(8, "little")


# ---------------------------------------------------------------- in the parent


class _Child:
    """A child with its share of the calls; started again behind a call that it did not survive."""

    def __init__(self, seed: int, begin: int, end: int, folder: str, spoiled: str | None) -> None:
        self._seed, self._end, self._spoiled = seed, end, spoiled
        self._progress = Path(folder) / f"progress-{begin}"
        self._said = Path(folder) / f"said-{begin}"
        self._errors = Path(folder) / f"errors-{begin}"
        self.found: list[Found] = []
        self._crashes = 0
        self._start(begin)

    def _start(self, begin: int) -> None:
        self._begin = begin
        self._progress.write_bytes(begin.to_bytes(8, "little"))
        self._last, self._since = begin, time.monotonic()
        command = [sys.executable, "-W", "error", "-m", "fuzz", "--seed", str(self._seed)]
        command += ["--child", str(begin), str(self._end), "--progress", str(self._progress)]
        if self._spoiled:
            command += ["--spoiled", self._spoiled]
        path = os.pathsep.join([str(_TESTS), *filter(None, map(os.path.abspath, sys.path))])
        with self._said.open("wb") as said, self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                command, stdout=said, stderr=errors, env={**os.environ, "PYTHONPATH": path}
            )

    def is_done(self) -> bool:
        """Whether it is through with its calls, after it was looked after."""
        code = self._process.poll()
        if code is None and not self._hangs():
            return False
        self._process.kill()
        self._process.wait()
        self.found += [Found(*json.loads(line)) for line in self._said.read_text().splitlines()]
        if code == 0:
            return True
        number = self._number()
        told = self._errors.read_text(errors="replace").strip()
        if code is not None and code > 0:
            raise RuntimeError(f"call {number} of seed {self._seed}: {told}")
        cause = "hangs" if code is None else f"signal {-code}"
        self.found.append(Found(number, "crash", f"{cause}: {' | '.join(told.splitlines()[:6])}"))
        self._crashes += 1
        if number + 1 >= self._end or self._crashes >= _MOST_CRASHES:
            return True
        self._start(number + 1)
        return False

    def _number(self) -> int:
        return int.from_bytes(self._progress.read_bytes(), "little")

    def _hangs(self) -> bool:
        number, now = self._number(), time.monotonic()
        if number != self._last:
            self._last, self._since = number, now
        return now - self._since > _HANGS

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def run(seed: int, calls: int, *, spoiled: str | None = None) -> list[Found]:
    """Run so many calls, one half in each of two children; with norms that are wrong somehow."""
    half = (calls + 1) // 2
    with tempfile.TemporaryDirectory() as folder:
        shares = [(0, half), (half, calls)]
        children = [_Child(seed, *share, folder, spoiled) for share in shares]
        try:
            running = children
            while running := [child for child in running if not child.is_done()]:
                time.sleep(0.05)
        finally:
            for child in children:
                child.stop()
        return sorted(found for child in children for found in child.found)


def report(seed: int, failures: list[Found], most: int = 4) -> str:
    """A line for each failure, the first of each kind, with what runs that call again."""
    lines, shown = [], Counter[str]()
    for number, kind, detail in failures:
        shown[kind] += 1
        if shown[kind] <= most:
            again = f"PYTHONPATH=tests python -m fuzz --seed {seed} --call {number}"
            lines.append(f"{again}\n    {kind}: {detail[:500]}")
    lines += [f"{count:6} {kind}" for kind, count in shown.most_common()]
    return "\n".join(lines)
