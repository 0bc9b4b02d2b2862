"""The benchmarks of a CPU run from end to end, and what decides on a GPU is as it should be."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import normkit
from benchmark_scripts import Runner, same_threads, scripts
from normkit import _bench
from normkit._bench import COPY, NORMKIT, TORCH

cases, graphs = scripts.cases, scripts.graphs
Case = cases.Case
MIB, GIB = 1 << 20, 1 << 30
L2 = 60 * MIB


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> Iterator[Runner]:
    with same_threads():
        yield Runner(monkeypatch, tmp_path, capsys)


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


def test_the_tables_of_the_docs_are_those_of_the_results() -> None:
    kept = json.loads(scripts.figures.kept_results("cpu").read_text())
    for path, short in ((scripts.readme.README, True), (scripts.readme.PAGE, False)):
        assert scripts.readme.block(kept, short=short) in path.read_text()


def test_the_table_of_the_readme_is_of_one_commit() -> None:
    kept = json.loads(scripts.figures.kept_results("cpu").read_text())
    assert len({r["commit"] for r in kept["results"]}) > 1  # or nothing is left out
    assert len({r["commit"] for r in scripts.readme.of_one_commit(kept["results"])}) == 1


@pytest.mark.parametrize("name", scripts.figures.FIGURES)
def test_figures_are_drawn_from_the_results_that_are_kept(name: str, tmp_path: Path) -> None:
    kept = scripts.figures.kept_results(scripts.figures.FIGURES[name][1])
    stamp = f"{kept.name} {scripts.figures.digest(kept)}"
    figure = scripts.figures.IMAGES / f"{name}.svg"
    assert stamp in figure.read_text()
    assert figure.stat().st_size < 100_000
    assert stamp in scripts.figures.draw(name, kept, tmp_path).read_text()


def test_errors_are_measured_against_float64(run: Any) -> None:
    out, kept = run("errors", "--columns", "64", "--means", "1", "1000", "--rows", "16")
    assert "as models write it" in out
    assert 0 < kept["length"]["64"]["rms, normkit"] < 1
    far = kept["mean"]["1000"]
    assert far["normkit"] < 1e-4 < far["E[x²] - E[x]²"]
    assert kept["bfloat16"]["normkit"]["beyond a half"] == 0
    assert kept["bfloat16"]["as models write it"]["beyond a half"] > 0.1
    assert 0 < kept["rows"]["16"]["normkit"] < 1e-6


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


def test_the_predictions_of_the_docs_are_those_of_the_instructions() -> None:
    docs = scripts.nvcc.ROOT / "docs" / "benchmarks.md"
    assert scripts.predictions.forecast() in docs.read_text()


def test_a_prediction_is_what_the_issue_slots_leave() -> None:
    """At 7 TB/s, 592 instructions a clock at 1.85 GHz: 160 while a copy moves 1024 bytes."""
    predictions = scripts.predictions
    case = Case("head_norm", "bfloat16", (32768, 40, 128))
    counted = predictions.INSTRUCTIONS["head_norm 128"]
    expected = pytest.approx(0.8 * 160.2 / counted, rel=1e-3)
    assert predictions.fraction(case, "NVIDIA B200") == expected
    assert predictions.fraction(case._replace(dtype="float32"), "NVIDIA B200") is None
    assert predictions.fraction(case, "NVIDIA A100") is None
    adding = Case("add_rms_norm", "bfloat16", (16384, 8192))
    assert predictions.fraction(adding, "NVIDIA H100") == 1


def test_every_prediction_belongs_to_a_case_that_is_measured_and_matters() -> None:
    measured = {scripts.predictions.name_of(case) for case in cases.HEADLINES}
    assert set(scripts.predictions.INSTRUCTIONS) <= measured
    shapes = {(case.op, case.shape, case.weight) for case in cases.HEADLINES}
    for shape, weight in (((16384, 5120), ""), ((16384, 2880), ""), ((16384, 2560), "")):
        assert ("rms_norm", shape, weight) in shapes
    assert ("rms_norm", (16384, 8192), "float32") in shapes
    assert any(case.weight == "float32" for case in cases.LATENCY)


# ------------------------------------------------------------------- compiled, patched, converted


@pytest.mark.filterwarnings("ignore:.torch.jit.script")  # of Inductor, at its first use
def test_both_forms_of_a_compiled_norm_are_counted_and_timed(run: Any) -> None:
    sizes = ["--only", "alone", "--n", "64", "--tokens", "2", "--dtypes", "float32"]
    with normkit.compile_mode("op"):  # is put back by the script's own
        out, kept = run("compiled", *sizes, "--rounds", "3", "--threads", "1")
    (result,) = kept["results"]
    forms = result["forms"]
    assert forms["op"]["calls"] == {"normkit": 1, "fused": 0, "others": 0}
    assert forms["inline"]["calls"] == {"normkit": 0, "fused": 1, "others": 0}
    assert forms["op"]["of_op"] == 1
    assert "| alone | 64 | 2 | float32 |" in out


def test_torch_is_timed_as_it_is_and_normkit_where_torch_is_patched(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    active, seen = set(), {TORCH: set(), NORMKIT: set()}
    paired, patch_torch = _bench.paired, scripts.patched.patch_torch

    class Patch:
        def __init__(self) -> None:
            self.patch = patch_torch()
            active.add(self)

        def revert(self) -> None:
            self.patch.revert()
            active.remove(self)

    def looked_at(timers: Any, rounds: int) -> Any:
        for who, timer in timers.items():
            timer.timeit(1)
            seen[who].add(len(active))
        return paired(timers, rounds)

    monkeypatch.setattr(scripts.patched, "patch_torch", Patch)
    monkeypatch.setattr(_bench, "paired", looked_at)
    monkeypatch.setattr(_bench, "pin_heap", lambda threads: None)
    arguments = ["patched.py", "--shapes", "2x64", "--dtypes", "float32", "--rounds", "3"]
    monkeypatch.setattr(sys, "argv", arguments)
    with same_threads():
        scripts.patched.main()
    assert seen == {TORCH: {0}, NORMKIT: {1}}
    assert not active
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("| 2 x 64 float32 |")
    assert len(re.findall(r"\d+, \d+ \(\d+\.\d\d\)", row)) == 4


def test_a_converted_model_is_timed_beside_the_model_and_its_launches_are_counted(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    tiny = ("llama", {**sizes, "num_hidden_layers": 1, "vocab_size": 1000})
    monkeypatch.setattr(scripts.convert, "SHAPES", {"Llama 1B, 2 layers": tiny})
    chosen = ["--only", "Llama 1B, 2 layers", "--dtypes", "float32"]
    out, kept = run("convert", *chosen, "--prompt", "4", "--rounds", "3")
    (result,) = kept["results"]
    assert result["norms"] == 3
    assert result["difference"] < 1e-5
    count = result["launches"]
    assert count["after"] == count["before"] - count["in norms"] + 3
    assert count["in norms"] >= 3 * 5
    assert count["fused"] == count["after"] - 1
    layer = result["launches of a layer"]
    assert layer["before"] - layer["in norms"] + 2 == layer["after"] == layer["fused"] + 1
    assert result["token"]["gain"] > 0
    assert result["token"]["fused_gain"] > 0
    assert f"launches {count['before']} -> {count['after']} ({count['fused']} fused)" in out
