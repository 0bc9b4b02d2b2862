"""How fast are the norms on this GPU, against a copy of the same bytes, an empty kernel, others?

    python benchmarks/gpu.py --quick              # about 90 seconds
    python benchmarks/gpu.py                      # within 5 minutes; what matters most comes first
    python benchmarks/gpu.py --parts latency      # or eager, or throughput
    python benchmarks/gpu.py --report results/gpu-nvidia-h200.json    # without a GPU

Keeps the results of all runs on a device in results/gpu-<device>.json, draws them, and prints
Markdown.  README.md in this folder says how to read it.  Without a GPU it says so, and ends well.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gpu_cases
import gpu_report
import torch
from gpu_cases import Buffers, Case
from gpu_method import (
    COPY_SHAPES,
    MAX_CALLS,
    MEMORY_SHARE,
    Baselines,
    EagerTimer,
    Graph,
    LaunchShape,
    capture,
    device,
    device_state,
    differences,
    rotation,
    spread,
    time_graphs,
)

import normkit
from normkit import _bench
from normkit._bench import COPY, NORMKIT, TORCH

PARTS = ("latency", "eager", "throughput")
EMPTY = "empty"
CHILD_SECONDS = 120


class Skipped(RuntimeError):
    """A case cannot be measured here."""


def free_memory() -> int:
    """What the driver has left, and what torch keeps without using it."""
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(torch.cuda.mem_get_info()[0]) + unused


def check_backend(case: Case, buffers: Buffers) -> str:
    """The plan of a call that the CUDA kernels serve; raises where others would be measured."""
    adds = (buffers.residual,) if case.adds else ()
    bias = (buffers.bias,) if "layer" in case.op else ()
    asked = normkit.explain(case.op, buffers.x, *adds, buffers.weight, *bias)
    if asked.backend != "cuda":
        raise Skipped(f"served by {asked.backend}: {asked.reason}")
    return str(asked.plan)


# -------------------------------------------------------------------------------------- throughput


class Throughput:
    """Times all candidates of a case in paired rounds, and the best of a few plain copies."""

    def __init__(self, baselines: Baselines, rounds: int, compile_too: bool) -> None:
        self._baselines, self._rounds = baselines, rounds
        self._missing: dict[str, str] = {}
        if not compile_too:
            self._missing[gpu_cases.COMPILED] = "not asked for (--no-compile)"

    def run(self, case: Case) -> dict[str, Any]:
        l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        plan = rotation(case.moved, case.held, l2, free_memory())
        if plan is None:
            raise Skipped(f"one call needs {case.held >> 20} MiB, and that is too much here")
        sets = gpu_cases.make_buffers(case, plan.sets)
        turns = [sets[i % plan.sets] for i in range(plan.calls)]
        explained = check_backend(case, sets[0])
        flush = self._baselines.flush if plan.flush else None
        copy_name, graphs = self._best_copy(case, turns, flush)
        calls, without = gpu_cases.candidates(case, self._missing)
        for name, call in calls.items():
            try:
                graphs[name] = capture(_bound(call, turns))
            except Exception as error:
                if name == NORMKIT:
                    raise
                without[name] = gpu_cases.first_line(error)
                torch.cuda.synchronize()
        compared = time_graphs(graphs, self._rounds, flush)
        return {
            "part": "throughput",
            "op": case.op,
            "dtype": case.dtype,
            "shape": case.label,
            "layout": case.layout,
            "bytes": case.moved,
            "calls": plan.calls,
            "sets": plan.sets,
            "flushed": plan.flush,
            "rounds": self._rounds,
            "plan": explained,
            "copy": copy_name,
            "candidates": {name: _cell(compared, name, case.moved) for name in graphs},
            "without": without,
        }

    def _best_copy(
        self, case: Case, turns: list[Buffers], flush: Callable[[], None] | None
    ) -> tuple[str, dict[str, Graph]]:
        graphs = {}
        for shape in COPY_SHAPES:

            def copy(b: Buffers, shape: Any = shape) -> None:
                both = case.adds
                sources = (b.x, b.residual) if both else (b.x,)
                self._baselines.copy(shape, sources, (b.y, b.residual_out) if both else (b.y,))

            graphs[str(shape)] = capture(_bound(copy, turns))
        tried = time_graphs(graphs, 3, flush)
        best = min(graphs, key=tried.us)
        return best, {COPY: graphs[best]}


def _bound(call: Callable[[Buffers], Any], turns: Iterable[Buffers]) -> list[Callable[[], Any]]:
    return [lambda b=b: call(b) for b in turns]  # type: ignore[misc]


def _cell(compared: _bench.Comparison, name: str, moved: int) -> dict[str, Any]:
    us = compared.us(name)
    of_copy = compared.ratios(COPY, name)
    return {
        "us": us,
        "us_quartiles": [value * 1e6 for value in spread(compared.samples[name])],
        "tb_s": moved / us / 1e6,
        "of_copy": statistics.median(of_copy),
        "of_copy_quartiles": spread(of_copy),
        "of_normkit": compared.ratio(name, NORMKIT),
    }


# ----------------------------------------------------------------------------------------- latency


def measure_latency(baselines: Baselines, case: Case, hot: bool, rounds: int) -> dict[str, Any]:
    """Microseconds of a call in a graph of 200, and of an empty kernel in its place.

    Hot: each call reads what the one before has written, all of it in the second-level cache.
    Cold: each call has buffers and weights of its own, which have been driven out of the cache;
    what a call depends on is then the order of the stream alone.
    """
    sets = 1 if hot else min(MAX_CALLS, int(free_memory() * MEMORY_SHARE) // case.held)
    if sets < 1:
        raise Skipped("too little memory")
    made = gpu_cases.make_buffers(case, sets)
    pair = (made[0], made[0].next())
    turns = [pair[i % 2] if hot else made[i % sets] for i in range(MAX_CALLS)]
    explained = check_backend(case, made[0])
    calls, _ = gpu_cases.candidates(case, {})
    kernels = baselines.kernels_of(lambda: calls[NORMKIT](made[0]))
    if not kernels:
        raise Skipped("the graph of a call holds no kernel")
    graphs = {EMPTY: capture([lambda: baselines.empty(kernels[0])] * MAX_CALLS)}
    graphs |= {name: capture(_bound(call, turns)) for name, call in calls.items()}
    compared = time_graphs(graphs, rounds, None if hot else baselines.flush)
    return {
        "us": compared.us(NORMKIT),
        "empty_us": compared.us(EMPTY),
        "torch_us": compared.us(TORCH),
        "over_empty": statistics.median(differences(compared, NORMKIT, EMPTY)),
        "launch": kernels[0].described(),
        "kernels_of_two_calls": len(kernels),
        "plan": explained,
    }


def latency_child(path: Path, quick: bool, rounds: int) -> None:
    """Everything one process measures; whether launches overlap is fixed at its start."""
    baselines, found = Baselines(), []
    for case in gpu_cases.latency_cases(quick):
        for hot in (True, False):
            entry: dict[str, Any] = {
                "op": case.op,
                "dtype": case.dtype,
                "shape": case.label,
                "hot": hot,
            }
            try:
                entry |= measure_latency(baselines, case, hot, rounds)
            except Exception as error:
                entry["failed"] = gpu_cases.first_line(error)
                torch.cuda.synchronize()
            found.append(entry)
            _bench.write_json(path, found)


def gather_latency(runs: Iterable[tuple[bool, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """One result a case from what the processes found, as (whether launches overlap, entries)."""
    columns = {v: k for k, v in gpu_report.COLUMNS.items()}
    grouped: dict[tuple[str, str, str], dict[str, list[dict[str, Any]]]] = {}
    for overlap, entries in runs:
        for entry in entries:
            if "failed" in entry:
                continue
            of_case = grouped.setdefault((entry["op"], entry["dtype"], entry["shape"]), {})
            of_case.setdefault(columns[entry["hot"], overlap], []).append(entry)
    found = []
    for (op, dtype, shape), of_case in grouped.items():
        cells = {}
        for column, entries in of_case.items():
            cell = {
                name: statistics.median(entry[name] for entry in entries)
                for name in ("us", "empty_us", "torch_us", "over_empty")
            }
            over = [entry["over_empty"] for entry in entries]
            kept = {name: entries[0].get(name) for name in ("launch", "plan")}
            cells[column] = cell | {"over_empty_range": [min(over), max(over)], **kept}
            cells[column]["processes"] = len(entries)
        named = {"part": "latency", "op": op, "dtype": dtype, "shape": shape}
        found.append({**named, "layout": "contiguous", "columns": cells, "without": {}})
    return found


def run_latency(processes: int, quick: bool, rounds: int, failed: dict[str, str]) -> list[Any]:
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(processes):
            for overlap in (True, False):
                path = Path(folder) / "latency.json"
                path.unlink(missing_ok=True)
                where = f"latency, process {number + 1}, PDL {'on' if overlap else 'off'}"
                print(where, file=sys.stderr)
                command = [sys.executable, __file__, "--latency-child", str(path)]
                command += ["--rounds", str(rounds)] + ["--quick"] * quick
                environment = os.environ | {"NORMKIT_PDL": "1" if overlap else "0"}
                try:
                    done = subprocess.run(
                        command,
                        env=environment,
                        timeout=CHILD_SECONDS,
                        capture_output=True,
                        text=True,
                    )
                    if done.returncode:
                        failed[where] = (
                            done.stderr.strip()[-300:] or f"ended with {done.returncode}"
                        )
                except subprocess.TimeoutExpired:
                    failed[where] = f"took more than {CHILD_SECONDS} s"
                entries = json.loads(path.read_text()) if path.exists() else []
                runs.append((overlap, entries))
                for e in entries:
                    if "failed" in e:
                        failed[f"{where}, {e['op']} {e['shape']}"] = e["failed"]
    return gather_latency(runs)


# ------------------------------------------------------------------------------------------- eager


def eager_operands(op: _bench.Op, shape: tuple[int, ...]) -> dict[str, Any]:
    names = _bench.operands(op, shape, torch.bfloat16)
    for name, value in names.items():
        if isinstance(value, torch.nn.Parameter):
            names[name] = torch.nn.Parameter(value.detach().cuda())
        elif isinstance(value, torch.Tensor):
            names[name] = value.cuda()
    return names


def run_eager(baselines: Baselines, name: str, shape: tuple[int, ...], rounds: int) -> Any:
    """Microseconds of whole calls, as the host sees them; the device is quicker than they are."""
    op = _bench.OPS[name]
    names = eager_operands(op, shape)
    kernels = baselines.kernels_of(lambda: eval(op.normkit, names))
    launch = kernels[0] if kernels else LaunchShape((1, 1, 1), (128, 1, 1), 0, 1, 0)
    code = {
        NORMKIT: op.normkit,
        f"{NORMKIT}, allocating": op.allocating,
        TORCH: op.torch,
        "torch.add(out=)": "torch.add(x, x, out=y)",
    }
    timers: dict[str, Any] = {k: EagerTimer(v, globals=names) for k, v in code.items()}
    timers[gpu_report.BARE] = baselines.launch_timer(launch)
    compared = _bench.paired(timers, rounds, seconds=1e-3)
    cells = {
        k: {
            "us": compared.us(k),
            "us_quartiles": [value * 1e6 for value in spread(compared.samples[k])],
            "over_launch": statistics.median(differences(compared, k, gpu_report.BARE)),
            "code": code.get(k, "cudaLaunchKernelEx in a loop in C"),
        }
        for k in timers
    }
    label = "x".join(map(str, shape))
    named = {"part": "eager", "op": name, "dtype": "bfloat16", "shape": label}
    return {**named, "layout": "contiguous", "candidates": cells, "without": {}}


# --------------------------------------------------------------------------------------------- all


class Run:
    """The results of a device, kept as they come."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.begin = time.monotonic()
        self.stamp = _bench.run_stamp()
        if args.commit:
            self.stamp["commit"] = args.commit
        self.state: dict[str, Any] = {}
        machine = device()
        self.path = args.out / f"gpu-{gpu_report.slug(machine['gpu'])}.json"
        old = json.loads(self.path.read_text())["results"] if self.path.exists() else []
        self.failed: dict[str, str] = {}
        self.kept: dict[str, Any] = {"machine": machine, "results": old, "failed": self.failed}

    def seconds(self) -> float:
        return time.monotonic() - self.begin

    def add(self, result: Mapping[str, Any]) -> None:
        stamped = {**result, **self.stamp, "device": self.state}
        self.kept["results"] = gpu_report.merge(self.kept["results"], stamped)

    def write(self) -> None:
        _bench.write_json(self.path, self.kept)

    def attempt(self, where: str, measure: Callable[[], Mapping[str, Any]]) -> bool:
        """Measure and keep; False where the device cannot go on."""
        try:
            self.add(measure())
        except Exception as error:
            self.failed[where] = gpu_cases.first_line(error)
            print(f"{where}: {self.failed[where]}", file=sys.stderr)
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            self.failed["the device"] = gpu_cases.first_line(error)
            return False
        return True

    def measure(self) -> bool:
        self.state = device_state()
        _bench.write_json(self.path, self.kept)
        args = self.args
        if "latency" in args.parts:
            for result in run_latency(args.processes, args.quick, args.rounds, self.failed):
                self.add(result)
            self.write()
        baselines = Baselines()
        if "eager" in args.parts:
            for name, shape in (
                ("rms_norm", (1, 4096)),
                ("add_rms_norm", (1, 4096)),
                ("layer_norm", (1, 4096)),
                ("head_norm", (1, 40, 128)),
            ):
                timed = lambda n=name, s=shape: run_eager(baselines, n, s, 4 * args.rounds)  # noqa: E731
                if not self.attempt(f"eager {name}", timed):
                    return False
            self.write()
        return "throughput" not in args.parts or self.measure_throughput(baselines)

    def measure_throughput(self, baselines: Baselines) -> bool:
        args = self.args
        throughput = Throughput(baselines, args.rounds, not args.no_compile)
        cases = [case for case in gpu_cases.cases(args.quick) if case.op in args.only]
        for number, case in enumerate(cases, 1):
            if self.seconds() > args.seconds:
                rest = len(cases) - number + 1
                self.failed["throughput"] = f"{rest} cases left out after {args.seconds:.0f} s"
                break
            print(f"[{number}/{len(cases)}] {case}", file=sys.stderr)
            if not self.attempt(str(case), lambda case=case: throughput.run(case)):  # type: ignore[misc]
                return False
            if number % 20 == 0:
                self.state = device_state()
                self.write()
        return True


def report(kept: Mapping[str, Any], path: Path) -> None:
    gpu_report.plot(kept, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(gpu_report.markdown(kept) + "\n")
    print(gpu_report.markdown(kept))
    print(f"\n{path}\n{path.with_suffix('.png')}", file=sys.stderr)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ops = sorted({case.op for case in gpu_cases.cases(quick=False)})
    parser.add_argument("--quick", action="store_true", help="the headline cases, one process")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--only", nargs="+", choices=ops, default=ops, metavar="OP")
    parser.add_argument("--rounds", type=int, help="9 if not given, 7 with --quick")
    parser.add_argument("--processes", type=int, help="of the latency part; 2, 1 with --quick")
    parser.add_argument("--seconds", type=float, help="start no case after; 280, 85 with --quick")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--commit", help="of the sources, where they are no git checkout")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--report", type=Path, metavar="JSON", help="only print and draw this")
    parser.add_argument("--latency-child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.rounds = args.rounds or (7 if args.quick else 9)
    args.processes = args.processes or (1 if args.quick else 2)
    args.seconds = args.seconds or (85.0 if args.quick else 280.0)
    return args


def main() -> int:
    args = arguments()
    if args.report:
        report(json.loads(args.report.read_text()), args.report)
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured", file=sys.stderr)
        return 0
    cuda = normkit.backends()["cuda"]
    if not cuda.usable:
        print(f"the CUDA kernels cannot be used: {cuda.reason}", file=sys.stderr)
        return 1
    with torch.no_grad():
        if args.latency_child:
            latency_child(args.latency_child, args.quick, args.rounds)
            return 0
        run = Run(args)
        alive = run.measure()
        run.kept["seconds"] = run.seconds()
        run.write()
        report(run.kept, run.path)
    return 0 if alive else 1


if __name__ == "__main__":
    sys.exit(main())
