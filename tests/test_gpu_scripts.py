"""What is for a GPU runs here without one, statement by statement: no typo waits for the device.

Each rehearsal plays a part of the scripts on a stand-in for `torch.cuda`; the last test plays all
of them and sees which statements have not run.
"""

from __future__ import annotations

import builtins
import importlib.util
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import normkit
import stand_in_gpu
from benchmark_scripts import BENCHMARKS, ROOT, Runner, same_threads, scripts
from normkit._bench import COPY, NORMKIT, TORCH
from normkit._serving import backends
from statement_coverage import Lines, missed

cases, gpu, graphs, machine, tune = (
    getattr(scripts, name) for name in ("cases", "gpu", "graphs", "machine", "tune")
)
Case = cases.Case
_c = getattr(normkit, "_C", None)
STEPS = ROOT / "tests" / "gpu" / "steps.py"
spec = importlib.util.spec_from_file_location("steps", STEPS)
assert spec is not None
steps = importlib.util.module_from_spec(spec)
sys.modules["steps"] = steps  # where its NamedTuple looks up its annotations
spec.loader.exec_module(steps)  # type: ignore[union-attr]

# What needs no GPU, or runs on a CPU too.
OTHERS = (
    "c_copy", "cases", "compiled", "convert", "cpu", "errors", "figures", "fusions", "patched",
    "peers", "readme", "report",
)  # fmt: skip
FILES = [STEPS, *(path for path in BENCHMARKS.glob("*.py") if path.stem not in OTHERS)]
PLAN = "32 lanes, 4 to a block of 128, in clusters of 2, programmatic launch"
LITTLE = [
    Case("rms_norm", "bfloat16", (2, 8192)),
    Case("add_rms_norm", "bfloat16", (2, 64), weight="float32"),
    Case("head_norm", "bfloat16", (2, 4, 16), "strided", rivals=True),
]
ROPE = Case("norm_rope_", "bfloat16", (2, 4, 16), "strided")
TOO_LARGE = Case("rms_norm", "float32", (4096, 4096))


def drawn(results: Any, title: str, path: Path) -> None:
    """matplotlib takes a second for each."""
    path.write_bytes(title.encode())


class Stage:
    """A machine with a GPU and an nvcc, as far as the scripts can tell."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, capsys: Any) -> None:
        self.patch, self.folder, self.capsys = patch, folder, capsys
        self.run = Runner(patch, folder / "out", capsys)
        self.cuda, self.library = stand_in_gpu.Cuda(), stand_in_gpu.Library("")
        self.explained = SimpleNamespace(backend="cuda", plan=PLAN, reason="")
        self.backend = SimpleNamespace(usable=True, reason="")
        patch.setattr(torch, "cuda", self.cuda)
        patch.setattr(torch.accelerator, "synchronize", self.cuda.synchronize)  # of torch's timer
        patch.setattr(graphs, "DEVICE", "cpu")
        patch.setattr(graphs.ctypes, "CDLL", lambda path: self.library)
        patch.setattr(normkit, "explain", lambda *args, **options: self.explained)
        patch.setattr(normkit, "backends", lambda: dict.fromkeys(("cpu", "cuda"), self.backend))
        patch.setitem(sys.modules, "pynvml", stand_in_gpu.nvml())
        patch.setattr(scripts.nvcc, "KEPT", folder / "kit")
        patch.setattr(steps, "KIT", folder / "kit")
        patch.setattr(gpu._bench, "plot", drawn)
        patch.setattr(graphs.warm_up, "__defaults__", (0.001,))
        patch.setattr(torch, "compile", lambda function, **options: function)
        for name in ("CUDA_HOME", "CUDA_PATH", "NORMKIT_PDL", "NORMKIT_COMMIT"):
            patch.delenv(name, raising=False)
        for module in (gpu, tune):
            for cases_of, little in (
                ("LATENCY", LITTLE),
                ("THROUGHPUT", LITTLE),
                ("HEADLINES", LITTLE),
            ):
                patch.setattr(module, cases_of, little, raising=False)
        self.program("nvcc", 'while [ "$1" != -o ]; do shift; done; echo compiled > "$2"')

    def program(self, name: str, script: str) -> Path:
        """Put a shell script of this name in front of the PATH."""
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        if str(path.parent) not in os.environ["PATH"]:
            self.patch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
        return path


Rehearsal = Callable[[Stage], None]


# ---------------------------------------------------------------------------------------- measuring


def gpu_measures_keeps_and_reports(stage: Stage) -> None:
    stage.patch.setattr(gpu, "THROUGHPUT", [*LITTLE, ROPE, TOO_LARGE])
    stage.patch.setenv("NORMKIT_COMMIT", "abc")
    out, kept = stage.run("gpu", "--rounds", "2")
    results = kept["results"]
    assert kept["machine"]["gpu"] == "NVIDIA H200"
    assert kept["machine"]["driver"] == "580.1"
    assert set(kept["failed"]) == {"throughput rms_norm float32 4096x4096, cold"}, kept["failed"]
    assert [(r["part"], r["floor"]) for r in results] == (
        [("latency", "empty kernel")] * 6 + [("throughput", COPY)] * 4
    )
    assert {r["commit"] for r in results} == {"abc"}
    assert results[0]["label"] == "2x8192 hot, PDL"
    assert results[0]["launch"] == {"blocks": 2, "threads": 128, "cluster": 2, "programmatic": True}
    assert set(results[-1]["candidates"]) == {COPY, NORMKIT, TORCH}
    assert {r["device"]["sm_mhz"] for r in results} == {1980}
    assert kept["predicted"] == {"rms_norm 2x8192": 1.0}
    for text in ("| rms_norm", "2x64 float32 weight cold, PDL", "2x4x16 strided", "128 MiB"):
        assert text in out
    assert "| rms_norm 2x8192 | 1.00 | 1.00 | 1980 |" in out
    (path,) = stage.run.folder.glob("gpu-*.json")
    assert path.with_suffix(".png").exists()
    assert path.with_suffix(".md").exists()
    stage.cuda.there = False
    again, _ = stage.run("gpu", "--report", str(path))
    assert again == out


def the_prediction_is_kept_before_anything_is_measured(stage: Stage) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    stage.patch.setattr(gpu, "in_graphs", fail)
    with pytest.raises(KeyboardInterrupt):
        stage.run("gpu")
    (path,) = stage.run.folder.glob("gpu-*.json")
    kept = json.loads(path.read_text())
    assert kept["predicted"]
    assert not kept["results"]


def results_without_overlap_stand_beside_the_others(stage: Stage) -> None:
    stage.patch.setattr(gpu, "THROUGHPUT", LITTLE[:1])
    little = ("--parts", "throughput", "--rounds", "1")
    stage.run("gpu", *little)
    stage.patch.setenv("NORMKIT_PDL", "0")
    stage.explained.plan = "512 lanes, one row by 512"
    _, kept = stage.run("gpu", *little)
    assert [r["label"] for r in kept["results"]] == ["2x8192", "2x8192 NORMKIT_PDL=0"]
    assert [r["launch"]["programmatic"] for r in kept["results"]] == [True, False]


def a_rival_that_fails_is_left_out_and_normkit_is_not(stage: Stage) -> None:
    def candidates(case: Any, device: str, without: Any, *, compiles: bool) -> Any:
        def fails(names: Any) -> None:
            raise ValueError("no such shape")

        return {NORMKIT: lambda names: names["y"].zero_(), broken: fails}

    stage.patch.setattr(cases, "candidates", candidates)
    stage.patch.setattr(gpu, "LATENCY", LITTLE[:1])
    broken = "a rival"
    _, kept = stage.run("gpu", "--parts", "latency", "--rounds", "1")
    assert kept["results"][0]["without"] == {broken: "ValueError: no such shape"}
    broken = NORMKIT
    _, kept = stage.run("gpu", "--parts", "latency", "--rounds", "1")
    assert set(kept["failed"].values()) == {"ValueError: no such shape"}


def a_capture_that_fails_halfway_is_ended(stage: Stage) -> None:
    done = []

    def once_more() -> None:
        done.append(None)
        if len(done) > 2:  # the first two are no part of the graph
            raise ValueError("out of luck")

    with pytest.raises(ValueError, match="out of luck"):
        graphs.capture([once_more])


def gpu_stops_where_the_device_fails_or_time_is_up(stage: Stage) -> None:
    _, kept = stage.run("gpu", "--parts", "latency", "--seconds", "-1")
    assert kept["failed"] == {"time": "6 cases left out after -1 s"}
    stage.cuda.failure = RuntimeError("an illegal memory access was encountered")
    _, kept = stage.run("gpu", "--parts", "latency", status=1)
    assert kept["failed"]["the device"].endswith("illegal memory access was encountered")


def what_would_measure_something_else_is_refused(stage: Stage) -> None:
    stage.explained.backend, stage.explained.reason = "reference", "the driver is too old"
    _, kept = stage.run("gpu", "--parts", "latency")
    assert set(kept["failed"].values()) == {
        "RuntimeError: the backend is reference: the driver is too old"
    }
    stage.backend.usable = False
    stage.run("gpu", status=1)
    stage.cuda.there = False
    assert stage.run("gpu")[0] == ""
    with pytest.raises(ValueError, match="threads of a block"):
        graphs.Launch.of_plan("a plan", 1)
    with pytest.raises(MemoryError, match="8192 MiB"):
        graphs.rotation(8 << 30, 8 << 30, 60 << 20, 16 << 30)
    assert graphs.rotation(4096, 4096, 60 << 20, 1 << 37)[2]


def the_aims_are_for_usual_cases(stage: Stage) -> None:
    usual = {"op": "head_norm", "shape": "32768x40x64", "label": "32768x40x64", "bytes": 1 << 30}
    usual |= {"part": "throughput", "dtype": "bfloat16"}
    assert gpu.aims(usual) == [(NORMKIT, "copies", 1 / 0.92)]
    assert gpu.aims(usual | {"label": "32768x40x64 NORMKIT_PDL=0"}) == []


def a_failed_launch_is_an_error_with_its_text(stage: Stage) -> None:
    stage.library.error = b"invalid configuration argument"
    with pytest.raises(RuntimeError, match="nk_launch: invalid configuration argument"):
        graphs.Baselines().launch(graphs.Launch(1, 32, 1, True))


def a_plot_is_not_needed(stage: Stage) -> None:
    def no_matplotlib(*args: Any) -> None:
        raise ModuleNotFoundError("No module named 'matplotlib'")

    stage.patch.setattr(gpu._bench, "plot", no_matplotlib)
    out, kept = stage.run("gpu", "--parts", "throughput", "--rounds", "1")
    assert len(kept["results"]) == 3
    assert "| rms_norm" in out


# ------------------------------------------------------------------------------------ the machine


def clocks_are_read_while_the_device_is_busy(stage: Stage) -> None:
    clock = stand_in_gpu.Clock
    graph = graphs.capture([lambda: None])
    begun = threading.Event()
    before = clock.ms

    def read() -> float:
        begun.wait(10)
        return clock.ms

    stage.patch.setattr(stage.cuda, "synchronize", begun.set, raising=False)
    assert graphs.under_load(graph, read) > before
    graphs.warm_up(graph, seconds=0.0)


def the_state_comes_from_nvml_or_nvidia_smi_or_says_why_not(stage: Stage) -> None:
    state = machine.gpu_state()
    assert (state["driver"], state["sm_mhz"], state["memory_mhz"]) == ("580.1", 1980, 3201)
    assert state["celsius"] == "Not Supported"
    stage.patch.setitem(sys.modules, "pynvml", None)
    smi = 'test "$1" = --id=GPU-0-1-2 && echo "580.2, 1755, 1980, 2619, 412.5, 700.00, [N/A]"'
    stage.program("nvidia-smi", smi)
    state = machine.gpu_state()
    assert (state["driver"], state["sm_mhz"]) == ("580.2", 1755)
    assert (state["milliwatts"], state["celsius"]) == (412500, "[N/A]")
    assert "pynvml" in state["nvml"]
    stage.program("nvidia-smi", "exit 9")
    assert set(machine.gpu_state()) == {"nvml", "nvidia-smi"}


def programs_are_compiled_once_and_carried(stage: Stage) -> None:
    nvcc = scripts.nvcc
    built = nvcc.compiled(nvcc.BASELINES, "sm_90")
    assert built.read_text() == "compiled\n"
    stage.program("nvcc", "exit 1")
    assert nvcc.compiled(nvcc.BASELINES, "sm_90") == built
    stage.patch.setenv("PATH", "")
    stage.patch.setenv("CUDA_HOME", str(stage.folder / "bin"))
    stage.patch.setattr(nvcc.shutil, "which", lambda name, path=None: None)
    with pytest.raises(FileNotFoundError, match=r"nvcc in PATH.*make gpu-wheels"):
        nvcc.compiled(nvcc.BROKEN, "sm_90")


def machines_without_a_gpu_have_a_name_too(stage: Stage) -> None:
    cpu = {"cpu": "AMD EPYC", "isa": "AVX2", "caches": ["L1 32K"], "cores": 2}
    assert machine.results_path("cpu", cpu, Path()).name == "cpu-amd-epyc-avx2-l1-32k-2-cores.json"


# ------------------------------------------------------------------------------------ other scripts


def tune_compares_builds_in_one_process_and_their_bits(stage: Stage) -> None:
    built = Path(normkit._C.__file__)
    same, other = stage.folder / "same.so", stage.folder / "other.so"
    for copy in (same, other):
        shutil.copy(built, copy)

    def other_bits(module: Any, call: Any, names: Any) -> Any:
        assert backends._C is normkit._C
        result = run_by(module, call, names)
        if module.__file__ == str(other):
            names["y"].add_(1)
        return result

    run_by = tune.run_by
    stage.patch.setattr(tune, "run_by", other_bits)
    stage.patch.setattr(tune, "LATENCY", LITTLE[:1])
    stage.patch.setattr(tune, "HEADLINES", LITTLE[1:2])
    out, kept = stage.run("tune", str(same), str(other), "--rounds", "2")
    assert not kept["failed"]
    names = {NORMKIT, TORCH, tune.AGAIN, "same", "other"}
    for result, floor in zip(kept["results"], (COPY, "empty kernel"), strict=True):
        assert set(result["candidates"]) == names | {floor}
        assert list(result["without"]) == ["other"]
    assert "times as fast as same" in out
    assert "gives other bits for add_rms_norm 2x64 float32 weight" in out
    stage.cuda.there = False
    assert stage.run("tune", str(same))[0] == ""


def a_build_that_serves_is_the_one_that_runs(stage: Stage) -> None:
    shutil.copy(normkit._C.__file__, stage.folder / "copy.so")
    module = tune.load(stage.folder / "copy.so")
    assert module.__file__ == str(stage.folder / "copy.so")
    x = torch.randn(3, 64)
    with tune.serving(module):
        assert backends._C is module
        y = normkit.rms_norm(x)
    assert torch.equal(y, normkit.rms_norm(x))
    assert backends._C is normkit._C


def calls_and_gradients_are_timed_on_a_gpu_too(stage: Stage) -> None:
    stage.patch.setitem(scripts.backward.SHAPES, "cuda", ("3x64",))
    host = scripts.host
    stage.patch.setattr(
        host,
        "CALLS",
        {line: host.CALLS[line] for line in ("out=", "forward and backward", "compiled call")},
    )
    little = ("--device", "cuda", "--rounds", "1")
    _, kept = stage.run("host", *little, "--n", "8", "--no-compile")
    assert list(kept["lines"]) == ["out=", "forward and backward"]
    assert kept["lines"]["out="]["ns"].keys() == {
        "rms_norm",
        "layer_norm",
        "empty loop",
        "bare launch",
    }
    assert set(stage.library.launches) == {(4, 128, 1, 1, host.LAUNCHES)}
    _, kept = stage.run("backward", *little, "--dtypes", "float32", "--threads", "1")
    assert [r["op"] for r in kept["results"]] == ["rms_norm", "layer_norm"]
    stage.run("host", "--rounds", "1", "--n", "8", "--no-compile")


def a_call_of_each_counted_kernel_is_made(stage: Stage) -> None:
    counters = scripts.counters
    little = [case._replace(shape=(2, *case.shape[1:])) for case in cases.HEADLINES]
    stage.patch.setattr(counters, "HEADLINES", little)
    counters.main()
    lines = stage.capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(counters.COUNTED)
    expected = scripts.predictions.INSTRUCTIONS["rms_norm 5120"]
    assert f"rms_norm 5120: 40 packs of warps, {expected} instructions each expected" in lines


def predictions_are_printed(stage: Stage) -> None:
    assert "| head_norm 128 | " in scripts.predictions.forecast()
    assert scripts.predictions.outcome([]) == ""


# -------------------------------------------------------------------------------------------- steps


def played(stage: Stage, *arguments: str, fails: str = "never") -> tuple[int, str, list[str]]:
    """Runs steps.py with a python and an ncu that only write down how they were called."""
    log = stage.folder / "log"
    log.write_text("")
    told = 'told="PDL=$NORMKIT_PDL TEST=$NORMKIT_TEST_BACKENDS PATH=$PYTHONPATH '
    told += (
        f'COMMIT=$NORMKIT_COMMIT $*"; echo $told >> {log}; case "$*" in *{fails}*) exit 3;; esac'
    )
    stage.patch.setattr(sys, "executable", str(stage.program("python", told)))
    stage.program("ncu", told)
    stage.patch.setattr(sys, "argv", ["steps", *arguments, "--out", str(stage.folder / "out")])
    status = steps.main()
    return status, stage.capsys.readouterr().out, log.read_text().splitlines()


def kit(stage: Stage) -> None:
    (stage.folder / "kit" / "builds").mkdir(parents=True)
    for name in ("normkit-1-cp310-abi3-linux_x86_64.whl", "builds/lean.so"):
        (stage.folder / "kit" / name).write_text("")
    (stage.folder / "kit" / "commit").write_text("abc-dirty\n")


def check_runs_every_step_with_the_wheels_and_sanitizers_last(stage: Stage) -> None:
    kit(stage)
    status, out, calls = played(stage, "check")
    assert status == 0, out
    assert len(calls) == 8
    assert "-m pip install" in calls[0]
    assert "--no-index --no-deps" in calls[0]
    assert calls[0].endswith("normkit-1-cp310-abi3-linux_x86_64.whl")
    site = calls[0].partition("--target ")[2].split()[0]
    assert all(f"PATH={site}" in call and "COMMIT=abc-dirty" in call for call in calls)
    assert "-m normkit info" in calls[1]
    tested = [call for call in calls if "-m pytest" in call]
    assert len(tested) == 3
    assert all("TEST=cuda" in call and "-W default" in call for call in tested)
    assert "tests/conformance -n 8" in tested[1]
    assert "test_sanitizer.py" in calls[-1]
    assert "sanitizers: passed" in out


def bench_predicts_measures_compares_and_counts(stage: Stage) -> None:
    kit(stage)
    status, out, calls = played(stage, "bench")
    assert status == 0, out
    order = ("pip install", "predictions.py", "gpu.py", "gpu.py", "tune.py", "counters.py")
    assert [name in call for name, call in zip(order, calls, strict=True)] == [True] * 6
    assert [call.startswith("PDL=0") for call in calls] == [False] * 3 + [True] + [False] * 2
    assert f"{stage.folder}/kit/builds/lean.so" in calls[4]
    for counter in steps.COUNTERS:
        assert counter in calls[5]
    limits = [step.seconds for step in steps.parts(stage.folder)["bench"]]
    assert sum(limits) < 480
    status, out, _ = played(stage, "bench", fails="counters.py")
    assert status == 0, out
    assert "counters: did not work: exit status 3" in out


def a_step_that_fails_or_hangs_fails_the_whole_but_not_the_next(stage: Stage) -> None:
    status, out, calls = played(stage, "check", fails="conformance")
    assert status == 1
    assert len(calls) == 7  # no wheels: nothing is installed
    assert "conformance: FAILED: exit status 3" in out
    hanging = stage.program("hangs", "sleep 60")
    late = [steps.Step("one", 1, [str(hanging)]), steps.Step("two", 9, [str(hanging)])]
    assert not steps.run(late, 1.5, os.environ)
    out = stage.capsys.readouterr().out
    assert "one: FAILED: took more than 1 s" in out
    assert "two: FAILED: no time was left" in out


def make_gpu_builds_first(stage: Stage) -> None:
    kit(stage)
    status, out, calls = played(stage, "build", "more")
    assert status == 0, out
    assert "--editable .[bench]" in calls[0]
    assert len(calls) == 6
    assert "COMMIT= " in calls[0]


def no_gpu_is_told_from_a_broken_torch(stage: Stage) -> None:
    stage.cuda.there = False
    stage.patch.setattr(steps, "DEVICES", stage.folder / "dev")
    status, out, calls = played(stage, "check")
    assert (status, calls) == (0, [])
    assert out.startswith(f"skipped: torch {torch.__version__}")
    (stage.folder / "dev").mkdir()
    (stage.folder / "dev" / "nvidia0").touch()
    with pytest.raises(RuntimeError, match=r"nvidia0; but torch .* finds no CUDA device"):
        steps.main()
    importing = builtins.__import__

    def broken(name: str, *rest: Any) -> Any:
        if name == "torch":
            raise ImportError("libcudart.so.13: cannot open shared object file")
        return importing(name, *rest)

    stage.patch.setattr(builtins, "__import__", broken)
    with pytest.raises(ImportError, match=r"libcudart.so.13"):
        steps.main()


def steps_know_a_profiler_that_is_not_in_the_path(stage: Stage) -> None:
    stage.patch.setattr(steps.shutil, "which", lambda name: None)
    assert steps.profiler() is None or Path(steps.profiler()).name == "ncu"


REHEARSALS: list[Rehearsal] = [
    gpu_measures_keeps_and_reports,
    the_prediction_is_kept_before_anything_is_measured,
    results_without_overlap_stand_beside_the_others,
    a_rival_that_fails_is_left_out_and_normkit_is_not,
    a_capture_that_fails_halfway_is_ended,
    gpu_stops_where_the_device_fails_or_time_is_up,
    what_would_measure_something_else_is_refused,
    the_aims_are_for_usual_cases,
    a_failed_launch_is_an_error_with_its_text,
    a_plot_is_not_needed,
    clocks_are_read_while_the_device_is_busy,
    the_state_comes_from_nvml_or_nvidia_smi_or_says_why_not,
    programs_are_compiled_once_and_carried,
    machines_without_a_gpu_have_a_name_too,
    tune_compares_builds_in_one_process_and_their_bits,
    a_build_that_serves_is_the_one_that_runs,
    calls_and_gradients_are_timed_on_a_gpu_too,
    a_call_of_each_counted_kernel_is_made,
    predictions_are_printed,
    check_runs_every_step_with_the_wheels_and_sanitizers_last,
    bench_predicts_measures_compares_and_counts,
    a_step_that_fails_or_hangs_fails_the_whole_but_not_the_next,
    make_gpu_builds_first,
    no_gpu_is_told_from_a_broken_torch,
    steps_know_a_profiler_that_is_not_in_the_path,
]


# --------------------------------------------------------------------------------------- statements


@pytest.mark.skipif(_c is None, reason="needs the extension")
@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # torch's, of a float32 weight
def test_every_statement_for_the_gpu_runs_without_one(tmp_path: Path, capsys: Any) -> None:
    with same_threads(), Lines(FILES) as lines:
        torch.set_num_threads(1)  # others may use the cores, and threads would wait for each other
        for rehearsal in REHEARSALS:
            folder = tmp_path / rehearsal.__name__
            folder.mkdir()
            with pytest.MonkeyPatch.context() as patch:
                rehearsal(Stage(patch, folder, capsys))
    assert not missed(lines)


def test_a_statement_that_does_not_run_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "some.py"
    path.write_text(
        "def f(x):\n    if x:\n        return (\n            1\n        )\n    return 2\n"
    )
    names: dict[str, Any] = {}
    exec(compile(path.read_text(), str(path), "exec"), names)
    with Lines([path]) as lines:
        names["f"](0)
    assert missed(lines) == ["some.py:3: return ("]
