"""How fast are the norms on this GPU, against a copy of the same bytes, an empty kernel, others?

    python benchmarks/gpu.py                      # two minutes; what matters most comes first
    python benchmarks/gpu.py --compile --seconds 480                # with torch.compile
    NORMKIT_PDL=0 python benchmarks/gpu.py --parts latency          # launches do not overlap
    python benchmarks/gpu.py --report results/gpu-nvidia-h200.json  # without a GPU

Keeps the results of all runs on a device in results/gpu-<device>.json, draws them, and prints
Markdown.  docs/measuring.md says how to read it.  Without a GPU it says so, and ends well.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import cases
import graphs
import machine
import predictions
import report
import torch
from cases import LATENCY, THROUGHPUT, Call, Case, Names
from graphs import COPY_SHAPES, Baselines, Graph, Launch, capture, properties, time_graphs

import normkit
from normkit import _bench
from normkit._bench import COPY, NORMKIT, Comparison

Result = dict[str, Any]
Jobs = Iterator[tuple[str, Callable[[], Result]]]
LARGE_BYTES = 256 << 20  # below this, what a launch costs shows even in a plain copy
PARTS, EMPTY = ("latency", "throughput"), "empty kernel"
PDL = "NORMKIT_PDL"  # 0: the norms' launches do not overlap


def launch_of(case: Case, names: Names) -> Launch:
    """How the CUDA kernels are launched; raises where something else would be measured."""
    asked = normkit.explain(case.op, *(names[name] for name in case.tensors))
    if asked.backend != "cuda":
        raise RuntimeError(f"the backend is {asked.backend}: {asked.reason}")
    return Launch.of_plan(str(asked.plan), math.prod(case.shape[:-1]))


def in_turn(case: Case, *, hot: bool) -> tuple[list[Names], bool]:
    """What each call of a graph works on, and whether a flush has to come before.

    Hot: each call reads what the one before has written, all of it in the second-level cache.
    Cold: each call has buffers and weights of its own, which have been driven out of the cache;
    what a call depends on is then the order of the stream alone.
    """
    l2, held = properties().L2_cache_size, case.moved * (1 + (case.layout == "strided"))
    calls, count, flush = graphs.rotation(case.moved, held, l2, torch.cuda.mem_get_info()[0])
    sets = cases.make_sets(case, 1 if hot else count, graphs.DEVICE)
    if hot:
        sets.append(cases.following(sets[0]))
    return [sets[i % len(sets)] for i in range(calls)], flush and not hot


def on_each(call: Call, turns: Sequence[Names]) -> Graph:
    return capture([lambda names=names: call(names) for names in turns])  # type: ignore[misc]


class Run(NamedTuple):
    baselines: Baselines
    rounds: int
    compiles: bool = False  # time torch.compile where rivals are timed


def in_graphs(run: Run, part: str, case: Case, *, hot: bool, more: Any = ()) -> Result:
    """Calls in a graph: throughput against the fastest copy, or latency against an empty kernel."""
    turns, flushed = in_turn(case, hot=hot)
    launch, without = launch_of(case, turns[0]), dict[str, str]()
    floors = {EMPTY: capture([lambda: run.baselines.launch(launch)] * len(turns))}
    if part == "throughput":
        ends = [("x", "y"), ("residual", "residual_out")][: 1 + case.like.adds]

        def copy(shape: Sequence[int], names: Names) -> None:
            pairs = ((names[source], names[target]) for source, target in ends)
            run.baselines.copy(shape, launch.programmatic, *pairs)

        floors = {f"copy {shape}": on_each(partial(copy, shape), turns) for shape in COPY_SHAPES}
    captured = dict(floors)
    calls = cases.candidates(case, graphs.DEVICE, without, compiles=run.compiles) | dict(more)
    for name, call in calls.items():
        try:
            captured[name] = on_each(call, turns)
        except Exception as error:
            if name == NORMKIT:
                raise
            without[name] = cases.first_line(error)
            torch.cuda.synchronize()  # raises where the device cannot go on
    graphs.warm_up(captured[NORMKIT])
    compared = time_graphs(captured, run.rounds, run.baselines.flush if flushed else None)
    best = min(floors, key=compared.us)
    floor = COPY if part == "throughput" else EMPTY
    only = {floor: compared.measurements[best]}
    only |= {name: compared.measurements[name] for name in captured if name not in floors}
    how = f" {PDL}=0" if os.environ.get(PDL) == "0" else ""
    if part == "latency":
        how = f" {'hot' if hot else 'cold'}, {'PDL' if launch.programmatic else 'no PDL'}"
    named = {"part": part, "op": case.op, "dtype": case.dtype, "shape": case.label.split()[0]}
    named |= {"label": case.label + how, "hot": hot, "bytes": case.moved}
    told = {"elements": math.prod(case.shape), "calls": len(turns), "flushed": flushed}
    told |= {"best": best, "launch": launch._asdict()}
    if part == "throughput":
        told["predicted"] = predictions.fraction(case, properties().name)
    told["device"] = graphs.under_load(captured[NORMKIT], machine.gpu_state)
    cells = _bench.cells_of(Comparison(only), floor)
    return named | told | {"without": without, "floor": floor, "candidates": cells}


def aims(result: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """What the project wants to reach."""
    *_, n = sizes = [int(size) for size in result["shape"].split("x")]
    if result["part"] == "latency":
        usual = result["op"] != "head_norm" and sizes[0] <= 64 and 4096 <= n <= 8192
        return [(NORMKIT, "over_us", 0.7 if result["hot"] else 1.2)] if usual else []
    usual = result["dtype"] == "bfloat16" and result["shape"] == result["label"] and n % 8 == 0
    fraction = 0.92 if (result["op"], n) == ("head_norm", 64) else 0.95
    return [(NORMKIT, "copies", 1 / fraction)] if usual and result["bytes"] >= LARGE_BYTES else []


def jobs(args: argparse.Namespace) -> Jobs:
    """What a run measures, in the order in which it matters."""
    run = Run(Baselines(), args.rounds, args.compile)
    work = {"latency": product(LATENCY, (True, False)), "throughput": product(THROUGHPUT, (False,))}
    for part in args.parts:
        for case, hot in work[part]:
            where = f"{part} {case.op} {case.dtype} {case.label}, {'hot' if hot else 'cold'}"
            yield where, partial(in_graphs, run, part, case, hot=hot)


def measure(jobs: Jobs, path: Path, seconds: float) -> bool:
    """Measure and keep what is found; False where the device cannot go on."""
    old = json.loads(path.read_text())["results"] if path.exists() else []
    failed: dict[str, str] = {}
    kept = {"machine": machine.gpu(), "results": old, "failed": failed}
    expected = ((c, predictions.fraction(c, kept["machine"]["gpu"])) for c in THROUGHPUT)
    kept["predicted"] = {f"{c.op} {c.label}": value for c, value in expected if value}
    _bench.write_json(path, kept)  # before anything is measured
    stamp, end = _bench.run_stamp(), time.monotonic() + seconds
    for where, job in jobs:
        if time.monotonic() > end:
            failed["time"] = f"{1 + sum(1 for _ in jobs)} cases left out after {seconds:.0f} s"
            break
        print(where, file=sys.stderr)
        try:
            with torch.no_grad():
                new = job() | stamp
            kept["results"] = report.merge(kept["results"], new)
        except Exception as error:
            failed[where] = cases.first_line(error)
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            failed["the device"] = cases.first_line(error)
            break
        _bench.write_json(path, kept)
    _bench.write_json(path, kept)
    return "the device" not in failed


def show(path: Path, aims: report.Aims) -> None:
    kept = json.loads(path.read_text())
    results = sorted(kept["results"], key=lambda r: (r["op"], r["dtype"], r["bytes"]))
    text = report.written(results, results, aims)
    reasons = [*(r["without"] for r in results), kept["failed"]]
    lines = {f"{what}: {why}" for found in reasons for what, why in found.items()}
    text += "\n\n" + report.bullets("Failed or left out:", sorted(lines))
    if compared := predictions.outcome(results):
        text += f"\n\nFractions of a copy's speed:\n\n{compared}"
    path.with_suffix(".md").write_text(text + "\n")
    print(f"{text}\n\n{path}")
    if large := [r for r in results if r["part"] == "throughput"]:
        try:
            _bench.plot(large, f"normkit on {kept['machine']['gpu']}", path.with_suffix(".png"))
        except ModuleNotFoundError as error:  # matplotlib
            print(f"not drawn: {error}; --report {path} draws it elsewhere", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=90.0, help="start no case after")
    parser.add_argument("--compile", action="store_true", help="time torch.compile too")
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    parser.add_argument("--report", type=Path, metavar="JSON", help="only print and draw this")
    args = parser.parse_args()
    if args.report:
        show(args.report, aims)
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured", file=sys.stderr)
        return 0
    cuda = normkit.backends()["cuda"]
    if not cuda.usable:
        print(f"the CUDA kernels cannot be used: {cuda.reason}", file=sys.stderr)
        return 1
    path = machine.results_path("gpu", machine.gpu(), args.out)
    alive = measure(jobs(args), path, args.seconds)
    show(path, aims)
    return 0 if alive else 1


if __name__ == "__main__":
    sys.exit(main())
