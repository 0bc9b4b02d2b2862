"""Which compile-time choices of the CUDA kernels pay, and what they would change.

    python benchmarks/tune.py --build-only          # needs nvcc, but no GPU
    python benchmarks/tune.py --variants packs-4 cluster-from-1024  # builds, then times

Every variant is the extension built once more with a macro of its own, in build/tune/<variant>.
All are loaded into one process, and each round times every variant once on the same buffers, next
to the extension that is installed.  The default is built once more too: what it differs by from
the installed one is the noise, and a variant that gains less has gained nothing.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import machine
import torch
from cases import HEADLINES, LATENCY, Call, Case, Names, candidates, make_sets
from graphs import DEVICE, Baselines

import gpu
import normkit
import normkit.modules
from gpu import Result, Run, in_graphs
from normkit import functional
from normkit._bench import DTYPES, NORMKIT
from normkit._serving import backends
from normkit._serving.refusal import Refusal

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "tune"
AGAIN = "default again"
Modules = Mapping[str, ModuleType]


class Variant(NamedTuple):
    """The extension with another value of a macro, and the cases that it concerns."""

    macro: str
    value: int
    concerns: Callable[[Case], bool] = lambda case: True


def few_rows(case: Case) -> bool:
    return case.shape[0] <= 128


def long_rows(case: Case) -> bool:
    """Of 512 packs of 16 bytes, which is what plan.h counts in."""
    return case.shape[-1] * DTYPES[case.dtype].itemsize >= 512 * 16


VARIANTS = {
    AGAIN: Variant("LOAD", 0),
    "load-no-allocate": Variant("LOAD", 1),
    "store-streaming": Variant("STORE", 1, lambda c: c.moved >= 50 << 20),
    "hoist-weight": Variant("HOIST_WEIGHT", 1, few_rows),
    "early-trigger": Variant("EARLY_TRIGGER", 1, few_rows),
    "packs-4": Variant("PACKS", 4, long_rows),
}
VARIANTS |= {f"lanes-{n}": Variant("LANES", n, few_rows) for n in (64, 128, 512)}
VARIANTS |= {f"cluster-from-{n}": Variant("CLUSTER_FROM", n, long_rows) for n in (512, 1024, 4096)}


def build(name: str, arch: str) -> None:
    """Build a variant, with its macro for both compilers; says how that went."""
    folder, begin, variant = BUILD / name, time.monotonic(), VARIANTS[name]
    macro = f"-DNORMKIT_TUNE_{variant.macro}={variant.value}"
    flags = {"CXXFLAGS": macro, "CUDAFLAGS": macro, "CUDAARCHS": arch, "NORMKIT_CUDA": "ON"}
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    command += ["--upgrade", "--target", folder, f"-Cbuild-dir={folder}.build", ROOT]
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True)
    folder.with_suffix(".log").write_text(done.stdout + done.stderr)
    how = f"failed, see {folder}.log" if done.returncode else f"{time.monotonic() - begin:.0f} s"
    print(f"{name}: {how}", file=sys.stderr)


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


def run_by(module: ModuleType, call: Call, names: Names) -> Any:
    with serving(module):
        return call(names)


def measure(run: Run, case: Case, modules: Modules, hot: bool) -> Result:
    """Each variant's time over the default's, and which of them gave other bits."""
    case = case._replace(rivals=False)
    call = candidates(case, DEVICE, {})[NORMKIT]
    calls = {name: partial(run_by, module, call) for name, module in modules.items()}
    part = "latency" if few_rows(case) else "throughput"
    result = in_graphs(run, part, case, hot=hot, more=calls)
    (names,) = make_sets(case, 1, DEVICE)
    call(names)
    expected = names["y"].clone()
    for name, by_variant in calls.items():
        by_variant(names)
        if not torch.equal(names["y"], expected):
            result["without"][name] = f"gives other bits for {case.op} {case.label}"
    return result


def jobs(modules: Modules, run: Run) -> gpu.Jobs:
    for hot, cases in ((True, LATENCY), (False, LATENCY), (False, HEADLINES)):
        for case in cases:
            here = {name: m for name, m in modules.items() if VARIANTS[name].concerns(case)}
            where = f"{case.op} {case.label}, hot: {hot}"
            yield where, partial(measure, run, case, here, hot)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [name for name in VARIANTS if name != AGAIN]
    parser.add_argument("--variants", nargs="+", choices=names, default=names, metavar="VARIANT")
    parser.add_argument("--arch", help="the device's, or 90 where there is none")
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--no-build", action="store_true", help="time what has been built")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=200.0, help="start no case after")
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    args = parser.parse_args()
    chosen, present = [AGAIN, *args.variants], torch.cuda.is_available()
    arch = "{}{}".format(*torch.cuda.get_device_capability()) if present else "90"
    for name in [] if args.no_build else chosen:
        build(name, args.arch or arch)
    if args.build_only or not present:
        print("nothing was measured" + ("" if present else ": no CUDA device"), file=sys.stderr)
        return 0
    found = {name: next((BUILD / name).glob("normkit/_C*.so"), None) for name in chosen}
    modules = {name: load(path) for name, path in found.items() if path}
    path = machine.results_path("tune", machine.gpu(), args.out)
    alive = gpu.measure(jobs(modules, Run(Baselines(), args.rounds)), path, args.seconds)
    gpu.show(path, lambda result: [])
    return 0 if alive else 1


if __name__ == "__main__":
    sys.exit(main())
