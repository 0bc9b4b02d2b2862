"""Which compile-time choices of the CUDA kernels pay, and what they would change.

    python benchmarks/tune.py --build-only          # needs nvcc, but no GPU
    python benchmarks/tune.py                       # builds what is missing, then times
    python benchmarks/tune.py --variants packs-4 cluster-from-1024

Every variant is the extension built once more with macros of its own (-D), in build/tune/<variant>.
All are loaded into one process, and each round times every variant once on the same buffers: a
ratio is taken inside a round.  The default is timed twice; what its two copies differ by is the
noise, and a variant that gains less has gained nothing.  Prints the ratios, and which lines of
cpp/plan.h, cuda/row_norm.cuh or cuda/portable.cuh they speak for changing.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import gpu_cases
import gpu_report
import torch
from gpu_cases import Case
from gpu_method import Baselines, capture, device, device_state, noise, rotation, time_graphs

import normkit
import normkit.modules
from normkit import _bench, _dispatch, functional, inplace
from normkit._bench import NORMKIT

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "tune"
DEFAULT, AGAIN = "default", "default again"
# Less than this is not worth a line of code, however quiet the machine.
WORTH = 0.01


@dataclass(frozen=True)
class Variant:
    """The extension with other macros, the cases that it concerns, and what it would change."""

    name: str
    macros: Mapping[str, int]
    concerns: Callable[[Case], bool]
    change: str


def _n(case: Case) -> int:
    return case.shape[-1]


def _rows(case: Case) -> int:
    return case.elements // _n(case)


def _packs(case: Case) -> int:
    """16-byte packs of a row: what plan.h counts in."""
    return -(-_n(case) * (4 if case.dtype == "float32" else 2) // 16)


def _few_rows(case: Case) -> bool:
    return _rows(case) <= 128


VARIANTS = (
    Variant(
        "load-no-allocate",
        {"NORMKIT_TUNE_LOAD": 1},
        lambda c: True,
        "portable.cuh: NORMKIT_TUNE_LOAD 1 (x around the first-level cache)",
    ),
    Variant(
        "store-streaming",
        {"NORMKIT_TUNE_STORE": 1},
        lambda c: c.moved >= 50 << 20,
        "portable.cuh: NORMKIT_TUNE_STORE 1, from 50 MB on (y leaves the cache first)",
    ),
    Variant(
        "hoist-weight",
        {"NORMKIT_TUNE_HOIST_WEIGHT": 1},
        _few_rows,
        "row_norm.cuh: NORMKIT_TUNE_HOIST_WEIGHT 1 (only for weights that nobody is writing)",
    ),
    Variant(
        "early-trigger",
        {"NORMKIT_TUNE_EARLY_TRIGGER": 1},
        _few_rows,
        "row_norm.cuh: NORMKIT_TUNE_EARLY_TRIGGER 1",
    ),
    Variant(
        "packs-4",
        {"NORMKIT_TUNE_PACKS": 4},
        lambda c: _packs(c) > 512,
        "plan.h: NORMKIT_TUNE_PACKS 4 (kMaxPacks)",
    ),
    *(
        Variant(
            f"lanes-{lanes}",
            {"NORMKIT_TUNE_LANES": lanes},
            lambda c: _few_rows(c) and _packs(c) > 64,
            f"plan.h: NORMKIT_TUNE_LANES {lanes} (kMaxLanes)",
        )
        for lanes in (64, 128, 512)
    ),
    *(
        Variant(
            f"cluster-from-{packs}",
            {"NORMKIT_TUNE_CLUSTER_FROM": packs},
            lambda c: _packs(c) >= 512,
            f"plan.h: NORMKIT_TUNE_CLUSTER_FROM {packs} packs (changes the bits of longer rows)",
        )
        for packs in (512, 1024, 4096)
    ),
)


def tuning_cases(quick: bool) -> list[Case]:
    shapes = [(1, 4096), (64, 4096), (64, 8192), (16384, 8192), (64, 65536), (4096, 16384)]
    if not quick:
        shapes += [(1, 8192), (16, 5120), (32, 16384), (1024, 4096), (32768, 1024), (2048, 8192)]
        shapes += [(8192, 12288), (1, 32768), (2048, 65536), (1024, 131072)]
    found = [Case("rms_norm", "bfloat16", shape) for shape in shapes]
    found += [Case("add_rms_norm", "bfloat16", s) for s in ((64, 4096), (16384, 8192))]
    found += [Case("head_norm", "bfloat16", s) for s in ((64, 40, 128), (32768, 40, 128))]
    if not quick:
        found += [Case("layer_norm", "bfloat16", s) for s in ((64, 8192), (8192, 12288))]
        found += [Case("rms_norm", "float32", s) for s in ((64, 8192), (4096, 16384))]
    return found


# ---------------------------------------------------------------------------------------- building


def extension_of(folder: Path) -> Path | None:
    found = sorted(folder.glob("_C*.so"))
    return found[0] if found else None


def cmake_commands(variant: Mapping[str, int], folder: Path, arch: str, jobs: int) -> list[Any]:
    """Configure and build, with the variant's macros for both compilers."""
    flags = " ".join(f"-D{name}={value}" for name, value in variant.items())
    nanobind = importlib.util.find_spec("nanobind")
    where = Path(nanobind.origin).parent / "cmake" if nanobind and nanobind.origin else ""
    configure = ["cmake", "-S", ROOT, "-B", folder, "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DCMAKE_CUDA_FLAGS={flags}", f"-DCMAKE_CXX_FLAGS={flags}", "-DNORMKIT_CUDA=ON"]
    configure += [f"-DCMAKE_CUDA_ARCHITECTURES={arch}", f"-DPython_EXECUTABLE={sys.executable}"]
    configure += [f"-Dnanobind_DIR={where}", *(["-GNinja"] if shutil.which("ninja") else [])]
    return [configure, ["cmake", "--build", folder, "--target", "_C", "--parallel", str(jobs)]]


def build(name: str, macros: Mapping[str, int], arch: str, jobs: int) -> str:
    """Empty, or why there is no such extension."""
    folder = BUILD / name
    folder.mkdir(parents=True, exist_ok=True)
    for command in cmake_commands(macros, folder, arch, jobs):
        done = subprocess.run(command, capture_output=True, text=True)
        (folder / "log.txt").write_text(done.stdout + done.stderr)
        if done.returncode:
            errors = [
                line for line in (folder / "log.txt").read_text().splitlines() if "rror" in line
            ]
            return f"{' '.join(errors[:3]) or 'failed'} (see {folder / 'log.txt'})"
    return "" if extension_of(folder) else f"no _C*.so in {folder}"


# ----------------------------------------------------------------------------------------- loading


def load(path: Path) -> ModuleType:
    """Another copy of the extension, beside the one that is imported."""
    loader = importlib.machinery.ExtensionFileLoader("normkit._C", str(path))
    spec = importlib.util.spec_from_file_location("normkit._C", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    module.bind_torch(torch)
    return module


@contextmanager
def serving(module: ModuleType) -> Iterator[None]:
    """Have the norms served by this copy."""
    native = _dispatch.Native(module.norm, module.norm_backward)
    places: dict[tuple[ModuleType, str], Any] = {
        (_dispatch, "_C"): module,  # which is told whether its quick path is on
        (_dispatch, "natives"): _dispatch.natives | dict.fromkeys(("auto", "cpu", "cuda"), native),
        (functional, "_native"): module.norm,
        (inplace, "_native"): module.norm,
        (normkit.modules, "_native"): module.norm,
    }
    before = {place: getattr(*place) for place in places}
    try:
        for place, value in places.items():
            setattr(*place, value)
        yield
    finally:
        for place, value in before.items():
            setattr(*place, value)


# --------------------------------------------------------------------------------------- measuring


def measure(
    case: Case, modules: Mapping[str, ModuleType], baselines: Baselines, rounds: int, hot: bool
) -> dict[str, Any]:
    """Each variant's time over the default's, and whether it gave the same bits.

    Hot: each call reads what the one before has written, as in a decoding step.
    """
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    plan = rotation(case.moved, case.held, l2, torch.cuda.mem_get_info()[0], hot=hot)
    if plan is None:
        raise RuntimeError("too little memory")
    sets = gpu_cases.make_buffers(case, plan.sets)
    cycle = [sets[0], sets[0].next()] if hot else sets
    turns = [cycle[i % len(cycle)] for i in range(plan.calls)]
    call = gpu_cases.candidates(case, {})[0][NORMKIT]
    graphs, same, plans = {}, {}, {}
    expected: torch.Tensor | None = None
    for name, module in modules.items():
        with serving(module), normkit.use_backend("auto"):
            adds = (sets[0].residual,) if case.adds else ()
            asked = normkit.explain(case.op, sets[0].x, *adds, sets[0].weight)
            if asked.backend != "cuda":
                raise RuntimeError(f"{name} is served by {asked.backend}: {asked.reason}")
            plans[name] = str(asked.plan)
            sets[0].y.fill_(float("nan"))
            call(sets[0])
            expected = sets[0].y.clone() if expected is None else expected
            same[name] = torch.equal(sets[0].y, expected)
            graphs[name] = capture([lambda b=b: call(b) for b in turns])  # type: ignore[misc]
    compared = time_graphs(graphs, rounds, baselines.flush if plan.flush else None)
    return {
        "op": case.op,
        "dtype": case.dtype,
        "shape": case.label + (", hot" if hot else ""),
        "variants": {
            name: {
                "us": compared.us(name),
                "of_default": compared.ratio(name, DEFAULT),
                "noise": noise(compared.ratios(name, DEFAULT)),
                "same_bits": same[name],
                "plan": plans[name],
            }
            for name in modules
        },
    }


# --------------------------------------------------------------------------------------- reporting


def verdict(cell: Mapping[str, Any], again: Mapping[str, Any]) -> str:
    """ "faster", "slower" or "": beyond what the default differs from itself by."""
    unsure = max(WORTH, abs(again["of_default"] - 1), again["noise"] / 2, cell["noise"] / 2)
    if cell["of_default"] < 1 - unsure:
        return "faster"
    return "slower" if cell["of_default"] > 1 + unsure else ""


def table(results: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for r in results for name in r["variants"]))
    lines = ["| case | default us | " + " | ".join(names[1:]) + " |"]
    lines.append("|---|--:|" + "--:|" * len(names[1:]))
    for r in results:
        cells, again = [], r["variants"][AGAIN]
        for name in names[1:]:
            cell = r["variants"].get(name)
            marked = f"{cell['of_default']:.3f}" if cell else "-"
            cells.append(f"**{marked}**" if cell and verdict(cell, again) else marked)
        where = f"{r['op']} {r['dtype']} {r['shape']}"
        lines.append(f"| {where} | {r['variants'][DEFAULT]['us']:.2f} | {' | '.join(cells)} |")
    note = "Time over the default's; bold where that is more than noise."
    return "\n".join([*lines, "", note])


def advice(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What each variant speaks for: the change, the ratio, the noise, and where it costs."""
    lines = []
    for variant in VARIANTS:
        cells = [
            (
                f"{r['op']} {r['dtype']} {r['shape']}",
                r["variants"][variant.name],
                r["variants"][AGAIN],
            )
            for r in results
            if variant.name in r["variants"]
        ]
        if not cells:
            continue
        judged = {where: verdict(cell, again) for where, cell, again in cells}
        faster = [where for where, found in judged.items() if found == "faster"]
        slower = [where for where, found in judged.items() if found == "slower"]
        mean = statistics.geometric_mean(cell["of_default"] for _, cell, _ in cells)
        noisy = statistics.median(abs(again["of_default"] - 1) for _, _, again in cells)
        figures = f"time x {mean:.3f} over {len(cells)} cases, noise {noisy:.3f}"
        if faster and not slower:
            text = f"change {variant.change}: {figures}; faster on {', '.join(faster)}"
        elif faster:
            text = f"split {variant.change}: {figures}; faster on {', '.join(faster)}, "
            text += f"slower on {', '.join(slower)}"
        else:
            text = f"keep the default against {variant.name}: {figures}"
        if not all(cell["same_bits"] for _, cell, _ in cells):
            text += "; ITS BITS DIFFER"
        lines.append(text)
    return lines


# --------------------------------------------------------------------------------------------- all


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--variants", nargs="+", choices=names, default=names, metavar="VARIANT")
    parser.add_argument("--arch", help="the device's, or 90 where there is none")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--no-build", action="store_true", help="time what has been built")
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=200.0, help="start no case after")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args()


def build_all(chosen: Iterable[Variant], arch: str, jobs: int) -> None:
    for name, macros in [(DEFAULT, {}), *((v.name, v.macros) for v in chosen)]:
        begin = time.monotonic()
        error = build(name, macros, arch, jobs)
        print(f"{name}: {error or f'{time.monotonic() - begin:.0f} s'}", file=sys.stderr)


def load_all(chosen: Iterable[Variant]) -> dict[str, ModuleType]:
    modules: dict[str, ModuleType] = {}
    for name in (DEFAULT, AGAIN, *(variant.name for variant in chosen)):
        path = extension_of(BUILD / (DEFAULT if name == AGAIN else name))
        if path is None:
            print(f"{name}: not built", file=sys.stderr)
            continue
        modules[name] = modules[DEFAULT] if name == AGAIN else load(path)
    return modules


def main() -> int:
    args = arguments()
    chosen = [variant for variant in VARIANTS if variant.name in args.variants]
    present = torch.cuda.is_available()
    major, minor = torch.cuda.get_device_capability() if present else (9, 0)
    if not args.no_build:
        build_all(chosen, args.arch or f"{major}{minor}", args.jobs)
    if args.build_only:
        return 0
    if not present:
        print("no CUDA device: nothing was measured", file=sys.stderr)
        return 0
    modules = load_all(chosen)
    if DEFAULT not in modules:
        return 1
    baselines, results, begin = Baselines(), [], time.monotonic()
    with torch.no_grad():
        cases = [(case, False) for case in tuning_cases(args.quick)]
        for case, hot in [*((c, True) for c, _ in cases if _few_rows(c)), *cases]:
            if time.monotonic() - begin > args.seconds:
                print(f"left out from {case} on, after {args.seconds:.0f} s", file=sys.stderr)
                break
            concerned = {v.name for v in chosen if v.concerns(case)} | {DEFAULT, AGAIN}
            here = {name: module for name, module in modules.items() if name in concerned}
            print(f"{case}, {'hot' if hot else 'cold'}", file=sys.stderr)
            try:
                results.append(measure(case, here, baselines, args.rounds, hot))
            except Exception as error:
                print(f"{case}: {gpu_cases.first_line(error)}", file=sys.stderr)
                torch.cuda.synchronize()
            torch.cuda.empty_cache()
    if not results:
        return 1
    machine = device()
    path = args.out / f"tune-{gpu_report.slug(machine['gpu'])}.json"
    kept = {"machine": machine, "device": device_state(), "results": results, **_bench.run_stamp()}
    _bench.write_json(path, kept)
    print(table(results))
    print("\n" + "\n".join(f"- {line}" for line in advice(results)))
    print(f"\n{path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
