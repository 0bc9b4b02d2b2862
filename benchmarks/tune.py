"""Which of several builds of the extension is fastest, and whether they give the same bits.

    python benchmarks/tune.py one.so another.so      # next to the one that is installed

All of them are loaded into one process, and each round times every one of them once, on the same
buffers.  The installed one is loaded once more too: what it differs by from itself is the noise,
and a build that gains less has gained nothing.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any
from unittest.mock import patch

import graphs
import machine
import torch
from cases import HEADLINES, LATENCY, Case, Names, candidates, make_sets
from graphs import Baselines

import gpu
import normkit
import normkit.modules
from gpu import Result, Run, in_graphs
from normkit import functional
from normkit._bench import NORMKIT
from normkit._serving import backends
from normkit._serving.refusal import Refusal

AGAIN = "installed, again"
Modules = Mapping[str, ModuleType]


def load(path: Path) -> ModuleType:
    """Another copy of the extension, beside the one that is imported."""
    loader = importlib.machinery.ExtensionFileLoader("normkit._C", str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("normkit._C", loader))
    loader.exec_module(module)
    module.bind_torch(torch, Refusal)
    return module


@contextmanager
def serving(module: ModuleType) -> Iterator[None]:
    """Have this copy run the norms."""
    natives = dict.fromkeys(("auto", "cpu", "cuda"), backends.Native.of(module))
    places = ((functional, "_norm"), (functional, "_add_norm"), (normkit.modules, "quick"))
    with ExitStack() as stack:
        stack.enter_context(patch.object(backends, "_C", module))  # its quick path is set
        stack.enter_context(patch.dict(backends.natives, natives))
        for place, name in places:
            stack.enter_context(patch.object(place, name, module.try_norm))
        yield


def run_by(module: ModuleType, call: Callable[[Names], Any], names: Names) -> Any:
    with serving(module):
        return call(names)


def measure(run: Run, case: Case, modules: Modules, hot: bool) -> Result:
    """Each build's time, and which of them gave other bits than the installed one."""
    case = case._replace(rivals=False)
    call = candidates(case, graphs.DEVICE, {})[NORMKIT]
    calls = {name: partial(run_by, module, call) for name, module in modules.items()}
    result = in_graphs(run, "latency" if hot else "throughput", case, hot=hot, more=calls)
    (names,) = make_sets(case, 1, graphs.DEVICE)
    written = [names[name] for name in ("y", "residual_out") if name in names]
    call(names)
    expected = [values.clone() for values in written]
    for name, by_build in calls.items():
        for values in written:
            values.zero_()
        by_build(names)
        if not all(map(torch.equal, written, expected)):
            result["without"][name] = f"gives other bits for {case.op} {case.label}"
    return result


def jobs(modules: Modules, run: Run) -> gpu.Jobs:
    for hot, cases in ((False, HEADLINES), (True, LATENCY)):
        for case in cases:
            where = f"{case.op} {case.label}, {'hot' if hot else 'cold'}"
            yield where, partial(measure, run, case, modules, hot)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("builds", nargs="+", type=Path, metavar="SO")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=200.0, help="start no case after")
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured", file=sys.stderr)
        return 0
    path = machine.results_path("tune", machine.gpu(), args.out)
    with TemporaryDirectory() as folder:  # the same file would not be loaded twice
        again = shutil.copy(normkit._C.__file__, folder)
        modules = {AGAIN: load(Path(again))} | {build.stem: load(build) for build in args.builds}
        alive = gpu.measure(jobs(modules, Run(Baselines(), args.rounds)), path, args.seconds)
    gpu.show(path, lambda result: [])
    return 0 if alive else 1


if __name__ == "__main__":
    sys.exit(main())
