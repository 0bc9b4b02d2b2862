"""Each script of benchmarks/ runs from end to end, on little work; a GPU is played by the host."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import normkit
from normkit import _bench
from normkit._bench import COPY, NORMKIT, TORCH
from normkit._serving import backends

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not part of this tree", allow_module_level=True)

sys.path.insert(0, str(BENCHMARKS))
try:
    NAMES = (
        "backward",
        "cases",
        "cpu",
        "gpu",
        "graphs",
        "host",
        "machine",
        "readme",
        "report",
        "tune",
    )
    scripts = SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
finally:
    sys.path.remove(str(BENCHMARKS))
    sys.modules.pop("gpu", None)  # tests/gpu is another one
cases, gpu, graphs, tune = scripts.cases, scripts.gpu, scripts.graphs, scripts.tune
Case = cases.Case
MIB, GIB = 1 << 20, 1 << 30
L2 = 60 * MIB
needs_extension = pytest.mark.skipif(
    not normkit.backends()["cpu"].usable, reason="needs the extension"
)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> Any:
    """Runs a script with arguments; returns what it prints, and the JSON that it keeps."""
    monkeypatch.setattr(_bench, "pin_heap", lambda threads: None)
    threads = torch.get_num_threads()

    def call(name: str, *arguments: str) -> tuple[str, Any]:
        monkeypatch.setattr(sys, "argv", [name, *arguments, "--out", str(tmp_path)])
        assert not getattr(scripts, name).main()
        kept = [json.loads(path.read_text()) for path in tmp_path.glob(f"{name}-*.json")]
        return capsys.readouterr().out, kept[0] if kept else None

    yield call
    torch.set_num_threads(threads)


# --------------------------------------------------------------------------------------------- CPU


def test_cpu_keeps_what_it_measures_and_replaces_the_same_case(run: Any, tmp_path: Path) -> None:
    tiny = ["--only", "rms_norm", "add_rms_norm", "--dtypes", "bfloat16", "--rounds", "2"]
    out, kept = run("cpu", *tiny, "--shapes", "1x4096", "4x64", "--no-compile", "--threads", "1")
    assert "| rms_norm" in out
    assert "4x64" in out
    assert "samples" in out
    assert [(r["op"], r["case"]) for r in kept["results"]] == [
        (op, shape) for op in ("rms_norm", "add_rms_norm") for shape in ("1x4096", "4x64")
    ]
    row, small = kept["results"][:2]
    assert row["kernel_us"] != 0
    assert set(row["candidates"]) == {COPY, NORMKIT, TORCH, cases.ALLOCATING}
    assert "--no-compile" in row["without"][cases.COMPILED]
    assert next(tmp_path.glob("cpu-*.png")).read_bytes().startswith(b"\x89PNG")
    _, again = run("cpu", *tiny, "--shapes", "4x64", "--no-compile", "--threads", "1")
    assert len(again["results"]) == 4
    assert again["results"][0] == row
    assert again["results"][1]["candidates"] != small["candidates"]


@torch.no_grad()
def test_torch_compile_gets_the_formula_of_every_op(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for op in _bench.OPS.values():
        names = _bench.operands(op, _bench.shape_for(op, 3, 64), torch.float32)
        function, statement = cases.compiled(op)
        got = cases.evaluated(statement, compiled=function)(names)
        expected = cases.evaluated(op.torch)(names)
        torch.testing.assert_close(got[-1] if op.adds else got, expected)


def test_a_compiler_that_fails_leaves_its_column_out(run: Any, monkeypatch: Any) -> None:
    def broken(op: Any) -> tuple[Any, str]:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(scripts.cpu, "compiled", broken)
    tiny = ["--only", "rms_norm", "--dtypes", "float32", "--shapes", "2x64", "--rounds", "1"]
    _, kept = run("cpu", *tiny)
    assert kept["results"][0]["without"] == {cases.COMPILED: "RuntimeError: no compiler here"}


def test_host_times_every_line(run: Any, monkeypatch: Any) -> None:
    lines = {name: code for name, code in scripts.host.CALLS.items() if name != "compiled call"}
    monkeypatch.setattr(scripts.host, "CALLS", lines)
    out, kept = run("host", "--rounds", "1", "--n", "8")
    assert "forward and backward" in out
    assert set(kept["lines"]) == set(lines)
    assert kept["lines"]["out="]["ns"].keys() == {"rms_norm", "layer_norm", "empty loop"}


def test_backward_times_the_gradients(run: Any) -> None:
    out, kept = run("backward", "--shapes", "3x64", "--dtypes", "float32", "--rounds", "1")
    assert [r["op"] for r in kept["results"]] == ["rms_norm", "layer_norm"]
    assert set(kept["results"][0]["candidates"]) == {COPY, NORMKIT, TORCH}
    assert "| layer_norm" in out


def test_what_is_missed_is_said() -> None:
    cell = {"us": 2.0, "over_us": 1.0, "copies": 1.4, "copies_quartiles": (1.3, 1.5)}
    candidates = {NORMKIT: cell | {"of_normkit": 1.0}, TORCH: cell | {"of_normkit": 0.5}}
    result = {"op": "rms_norm", "dtype": "bfloat16", "shape": "16x4096", "case": "16x4096"}
    result |= {"limit": 1.2, "candidates": candidates}
    found = scripts.report.shortfalls([result], scripts.cpu.aims)
    assert found == [
        "rms_norm bfloat16 16x4096, normkit: 1.4 copies, aim 1.2",
        "rms_norm bfloat16 16x4096: 2.000 times the time of torch",
    ]
    assert scripts.report.gains([result]) == ["rms_norm: 0.500 times as fast as torch"]


def test_results_are_named_after_what_tells_machines_apart(tmp_path: Path) -> None:
    path = scripts.machine.results_path
    zen = {"cpu": "AMD EPYC", "model": "AuthenticAMD-26-2-1", "isa": "AVX512+BF16", "cores": 2}
    zen |= {"caches": ["L1 48K", "L2 1024K"]}
    assert path("cpu", zen, tmp_path).name == (
        "cpu-authenticamd-26-2-1-avx512-bf16-l1-48k-l2-1024k-2-cores.json"
    )
    assert path("cpu", zen | {"model": "AuthenticAMD-25-1-1"}, tmp_path) != path(
        "cpu", zen, tmp_path
    )
    assert path("gpu", {"gpu": "NVIDIA H200"}, tmp_path).name == "gpu-nvidia-h200.json"
    for kept in scripts.machine.RESULTS.glob("*.json"):
        question = kept.name.split("-")[0]
        assert path(question, json.loads(kept.read_text())["machine"], kept.parent) == kept


def test_the_table_of_the_readme_is_that_of_the_results() -> None:
    (kept,) = scripts.machine.RESULTS.glob("cpu-*.json")
    block = scripts.readme.block(json.loads(kept.read_text()))
    assert block in scripts.readme.README.read_text()


# ------------------------------------------------------------------------------- GPU: what decides


@pytest.mark.parametrize("held", [4 << 10, 300 << 10, MIB, 16 * MIB, 200 * MIB, 2 * GIB, 17 * GIB])
def test_a_buffer_is_cold_when_its_turn_comes(held: int) -> None:
    """Between two uses of a set passes three times the cache, by other sets or by a flush."""
    calls, sets, flush = graphs.rotation(held, held, L2, 139 * GIB)
    assert calls % sets == 0
    assert graphs.MIN_CALLS <= calls <= 2 * graphs.MAX_CALLS
    assert flush or sets * held >= graphs.COLD_L2S * L2
    assert not flush or sets == calls  # within a replay no set is used twice
    assert sets * held <= graphs.MEMORY_SHARE * 139 * GIB


def test_little_memory_means_fewer_sets_and_a_flush_or_an_error() -> None:
    assert graphs.rotation(16 * MIB, 16 * MIB, L2, 100 * MIB) == (2, 2, True)
    with pytest.raises(MemoryError, match="8192 MiB"):
        graphs.rotation(8 * GIB, 8 * GIB, L2, 16 * GIB)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((2, 65536), (8, 256, 4)), ((64, 40, 128), (80, 128, 1)), ((3, 400000), (3, 512, 1))],
)
def test_the_empty_kernel_is_launched_as_the_plan_says(shape: Any, expected: Any, emu: Any) -> None:
    x = torch.zeros(shape, dtype=torch.bfloat16)
    with normkit.use_backend("emu"):
        plan = str(normkit.explain("rms_norm", x, x[..., 0, :].flatten()[: shape[-1]]).plan)
    launch = graphs.Launch.of_plan(plan, math.prod(shape[:-1]))
    assert launch[:3] == expected, plan
    assert launch.programmatic
    with pytest.raises(ValueError, match="threads of a block"):
        graphs.Launch.of_plan("a plan", 1)


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize(
    "op", ["rms_norm", "layer_norm", "head_norm", *cases.ADD, "add_layer_norm"]
)
@torch.no_grad()
def test_candidates_of_a_case_compute_the_same(op: str, layout: str) -> None:
    case = Case(op, "float32", (3, 4, 8) if op == "head_norm" else (3, 32), layout)
    (names,) = cases.make_sets(case, 1, "cpu")
    assert names["x"].is_contiguous() == (layout == "contiguous")
    without: dict[str, str] = {}
    calls = cases.candidates(case, "cpu", without)
    made = {name: call(names) for name, call in calls.items()}
    assert set(calls) == {NORMKIT, TORCH}
    torch.testing.assert_close(names["y"], made[TORCH])
    following = cases.following(names)
    assert following["x"] is names["y"]
    assert following["y"] is names["x"]


@torch.no_grad()
def test_a_competitor_that_is_missing_or_wrong_is_left_out(monkeypatch: Any) -> None:
    modules = {"liger": "no_such_package", "quack": "torch", "flashinfer": "torch", "vllm": "torch"}
    monkeypatch.setattr(cases, "RIVALS", modules)
    statements = {"liger rms_norm": "0", "quack rms_norm": "x * 2"}
    statements["flashinfer rms_norm"] = "F.rms_norm(x, x.shape[-1:], weight, 1e-6)"
    monkeypatch.setattr(cases, "RIVAL_STATEMENTS", statements)
    without: dict[str, str] = {}
    case = Case("rms_norm", "float32", (4, 64), rivals=True)
    assert set(cases.candidates(case, "cpu", without)) == {NORMKIT, TORCH, "flashinfer"}
    assert "ModuleNotFoundError" in without["liger"]
    assert "wrong by" in without["quack"]
    assert without["vllm"] == "LookupError: no rms_norm"


def test_each_case_comes_once_and_the_headlines_come_first() -> None:
    for listed in (cases.LATENCY, cases.THROUGHPUT):
        labels = [(c.op, c.dtype, c.label) for c in listed]
        assert len(set(labels)) == len(labels)
    assert cases.THROUGHPUT[: len(cases.HEADLINES)] == cases.HEADLINES
    assert {"rms_norm", "add_rms_norm", "head_norm"} <= {c.op for c in cases.HEADLINES}
    assert Case("rms_norm", "bfloat16", (16, 64)).moved == 2 * 16 * 64 * 2
    assert Case("add_rms_norm", "float32", (16, 64)).moved == 4 * 16 * 64 * 4


# ----------------------------------------------------------------------------------- GPU: dry runs


class Event:
    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        Event.now += 1.0
        self.at = Event.now

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


class Baselines:
    flushes = 0

    def copy(self, shape: Any, programmatic: bool, *pairs: Any) -> None:
        assert programmatic
        for source, target in pairs:
            target.copy_(source)

    def flush(self) -> None:
        Baselines.flushes += 1

    def launch(self, launch: Any, count: int = 1) -> None:
        assert launch.threads == 128


@pytest.fixture
def host(monkeypatch: Any) -> None:
    """Has the benchmarks take the host for a device."""
    properties = SimpleNamespace(name="host", major=9, minor=0, multi_processor_count=4)
    properties.L2_cache_size, properties.total_memory = 1 << 20, 1 << 24
    cuda = {
        "current_device": lambda: 0,
        "get_device_properties": lambda device: properties,
        "get_device_capability": lambda: (9, 0),
        "is_available": lambda: True,
        "synchronize": lambda: None,
        "mem_get_info": lambda: (1 << 24, 1 << 24),
        "empty_cache": lambda: None,
        "Event": Event,
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    plan = "32 lanes, 4 to a block of 128, programmatic launch"
    asked = SimpleNamespace(backend="cuda", plan=plan, reason="")
    monkeypatch.setattr(normkit, "explain", lambda *args, **options: asked)
    usable = SimpleNamespace(usable=True, reason="")
    monkeypatch.setattr(normkit, "backends", lambda: {"cuda": usable, "cpu": usable})
    monkeypatch.setattr(graphs, "DEVICE", "cpu")
    monkeypatch.setattr(graphs, "warm_up", lambda graph: graph.cuda_graph.replay())
    monkeypatch.setattr(tune, "DEVICE", "cpu")

    def capture(calls: list[Any]) -> Any:
        replay = SimpleNamespace(replay=lambda: [call() for call in calls])
        return graphs.Graph(replay, len(calls), None)

    monkeypatch.setattr(gpu, "capture", capture)
    for module in (gpu, tune, graphs):
        monkeypatch.setattr(module, "Baselines", Baselines)


LITTLE = [
    Case("rms_norm", "float32", (4, 64)),
    Case("add_rms_norm", "bfloat16", (2, 64), weight="float32"),
    Case("head_norm", "bfloat16", (2, 4, 16), "strided"),
]
TOO_LARGE = Case("rms_norm", "float32", (4096, 4096))


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # torch's, of a float32 weight
@pytest.mark.usefixtures("host")
def test_gpu_measures_keeps_and_reports(run: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "LATENCY", LITTLE)
    monkeypatch.setattr(gpu, "THROUGHPUT", [*LITTLE, TOO_LARGE])
    out, kept = run("gpu", "--rounds", "2", "--commit", "abc")
    results = kept["results"]
    assert kept["machine"]["gpu"] == "host"
    assert set(kept["failed"]) == {"throughput rms_norm float32 4096x4096, cold"}, kept["failed"]
    assert [(r["part"], r["floor"]) for r in results] == (
        [("latency", "empty kernel")] * 6 + [("throughput", COPY)] * 3
    )
    assert {r["commit"] for r in results} == {"abc"}
    assert results[0]["label"] == "4x64 hot, PDL"
    assert results[0]["launch"] == {"blocks": 1, "threads": 128, "cluster": 1, "programmatic": True}
    assert set(results[-1]["candidates"]) == {COPY, NORMKIT, TORCH}
    assert "nvml" in results[0]["device"]
    assert Baselines.flushes > 0
    for text in ("| rms_norm", "2x64 float32 weight cold, PDL", "2x4x16 strided", "128 MiB"):
        assert text in out
    (path,) = tmp_path.glob("gpu-*.json")
    assert path.with_suffix(".png").exists()
    assert path.with_suffix(".md").exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    again, _ = run("gpu", "--report", str(path))
    assert again == out


@pytest.mark.usefixtures("host")
def test_gpu_stops_where_the_device_fails_or_time_is_up(run: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu, "LATENCY", LITTLE)
    _, kept = run("gpu", "--parts", "latency", "--seconds", "-1")
    assert kept["failed"] == {"time": "6 cases left out after -1 s"}

    def broken() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert not gpu.measure(iter([("a case", broken)] * 2), Path(sys.argv[-1]) / "x.json", 9.0)


@needs_extension
@pytest.mark.usefixtures("host")
def test_tune_times_variants_next_to_the_default(
    run: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    built = Path(normkit._C.__file__)
    for name in (tune.AGAIN, "packs-4"):
        (tmp_path / name / "normkit").mkdir(parents=True)
        (tmp_path / name / "normkit" / built.name).write_bytes(built.read_bytes())
    monkeypatch.setattr(tune, "BUILD", tmp_path)
    monkeypatch.setattr(tune, "LATENCY", LITTLE[:1])
    monkeypatch.setattr(tune, "HEADLINES", LITTLE[2:])
    monkeypatch.setitem(tune.VARIANTS, "packs-4", tune.Variant("PACKS", 4))
    out, kept = run("tune", "--no-build", "--variants", "packs-4", "--rounds", "2")
    assert not kept["failed"]
    names = {"empty kernel", NORMKIT, TORCH, tune.AGAIN, "packs-4"}
    assert set(kept["results"][0]["candidates"]) == names
    assert not any(r["without"] for r in kept["results"])
    assert "times as fast as packs-4" in out


@needs_extension
def test_another_copy_of_the_extension_can_run_the_norms(tmp_path: Path) -> None:
    copy = tmp_path / Path(normkit._C.__file__).name
    copy.write_bytes(Path(normkit._C.__file__).read_bytes())
    module = tune.load(copy)
    assert module.__file__ == str(copy)
    x = torch.randn(3, 64)
    with tune.serving(module):
        assert backends._C is module
        y = normkit.rms_norm(x)
    assert torch.equal(y, normkit.rms_norm(x))
    assert backends._C is normkit._C


def test_each_variant_concerns_a_case_and_a_macro_of_the_sources(monkeypatch: Any) -> None:
    root = BENCHMARKS.parent
    text = "".join(p.read_text() for p in [*root.glob("cpp/*.h"), *root.glob("cuda/*.cuh")])
    for name, variant in tune.VARIANTS.items():
        assert any(map(variant.concerns, (*cases.LATENCY, *cases.HEADLINES))), name
        assert f"#ifndef NORMKIT_TUNE_{variant.macro}" in text, name


def test_the_macro_of_a_variant_reaches_both_compilers(monkeypatch: Any, tmp_path: Path) -> None:
    ran: list[Any] = []

    def pip(command: Any, env: dict[str, str], **options: Any) -> Any:
        ran.append((command, env))
        return SimpleNamespace(stdout="", stderr="", returncode=0)

    monkeypatch.setattr(subprocess, "run", pip)
    monkeypatch.setattr(tune, "BUILD", tmp_path)
    tune.build("packs-4", "90")
    ((command, environment),) = ran
    assert environment["CXXFLAGS"] == environment["CUDAFLAGS"] == "-DNORMKIT_TUNE_PACKS=4"
    assert (environment["CUDAARCHS"], environment["NORMKIT_CUDA"]) == ("90", "ON")
    assert tmp_path / "packs-4" in command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", [("gpu",), ("tune", "--no-build")])
def test_without_a_gpu_it_says_so_and_ends_well(script: Any, run: Any, capsys: Any) -> None:
    out, kept = run(*script)
    assert (out, kept) == ("", None)
