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
from normkit._bench import ALLOCATING, COPY, NORMKIT, TORCH

cases, graphs, c_copy, peers = scripts.cases, scripts.graphs, scripts.c_copy, scripts.peers
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
    assert {COPY, NORMKIT, TORCH, ALLOCATING} <= set(row["candidates"])
    assert "--no-compile" in row["without"][cases.COMPILED]
    assert next(tmp_path.glob("cpu-*.png")).read_bytes().startswith(b"\x89PNG")
    _, again = run("cpu", *tiny, "--shapes", "4x64", "--no-compile", "--threads", "1")
    assert len(again["results"]) == 4
    assert again["results"][0] == row
    assert again["results"][1]["candidates"] != small["candidates"]


needs_a_compiler = pytest.mark.skipif(
    c_copy.missing(2) is not None, reason=f"no C copy: {c_copy.missing(2)}"
)


@needs_a_compiler
@pytest.mark.parametrize("form", c_copy.FORMS)
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 4099)])
def test_the_yardstick_copies_all_bytes_and_no_others(form: str, threads: int, shape: Any) -> None:
    op = _bench.OPS["add_rms_norm"]
    names = _bench.operands(op, shape, torch.float16)
    pairs = {"y": "x", "residual_out": "residual"}
    around = {k: torch.full((math.prod(shape) + 2,), 7, dtype=torch.float16) for k in pairs}
    names |= {k: t[1:-1].view(shape) for k, t in around.items()}
    copies = c_copy.copies_of(op, names, form, threads)
    c_copy.built()(c_copy.ctypes.pointer(copies))
    for written, read in pairs.items():
        assert torch.equal(names[written], names[read])
        assert around[written][[0, -1]].tolist() == [7, 7]


@needs_a_compiler
def test_the_yardstick_runs_on_the_threads_of_the_kernel() -> None:
    op = _bench.OPS["rms_norm"]
    with same_threads():
        for threads in (2, 1):
            torch.set_num_threads(threads)
            for rows, expected in ((1, 1), (64, threads)):
                names = _bench.operands(op, (rows, 4096), torch.bfloat16)
                assert c_copy.threads_of(op, names) == expected


@needs_a_compiler
def test_a_norm_is_held_against_a_copy_in_c_beside_that_of_torch(run: Any) -> None:
    tiny = ["--only", "rms_norm", "--dtypes", "float32", "--shapes", "4x64", "--rounds", "2"]
    out, kept = run("cpu", *tiny, "--no-compile")
    (result,) = kept["results"]
    assert result["floor"] == c_copy.C_COPY
    assert result["candidates"][c_copy.C_COPY]["copies"] == 1.0
    assert result["candidates"][COPY]["code"] == "y.copy_(x)"
    for head in ("C copy us", "copy us", "out= / C copy", "torch / allocating"):
        assert f"| {head} " in out


def test_without_a_compiler_the_copy_of_torch_is_the_yardstick_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(c_copy.shutil, "which", lambda name: None)
    monkeypatch.setattr(c_copy, "built", c_copy.built.__wrapped__)
    tiny = ["--only", "rms_norm", "--dtypes", "float32", "--shapes", "4x64", "--rounds", "1"]
    with same_threads():
        monkeypatch.setattr(_bench, "pin_heap", lambda threads: None)
        monkeypatch.setattr(sys, "argv", ["cpu", *tiny, "--no-compile", "--out", str(tmp_path)])
        scripts.cpu.main()
    told = capsys.readouterr()
    assert "left out: C copy, copy in its place: no C compiler" in told.err
    assert "| out= / copy " in told.out
    (result,) = json.loads(next(tmp_path.glob("*.json")).read_text())["results"]
    assert result["floor"] == COPY
    assert result["limit"] is None
    assert "no C compiler" in result["without"][c_copy.C_COPY]


def test_a_compiler_that_refuses_is_no_reason_to_end(monkeypatch: Any) -> None:
    monkeypatch.setenv("CC", f"{sys.executable} -c 1/0")
    monkeypatch.setattr(c_copy, "built", c_copy.built.__wrapped__)
    assert "ZeroDivisionError" in c_copy.missing(1)


def stand_in(statement: str) -> Any:
    """An engine that runs torch."""
    return lambda op, names: (f"engine({statement})", {"engine": lambda y, value: y.copy_(value)})


RIGHT = "y, F.rms_norm(x, shape, weight, 1e-6)"


def test_peers_are_checked_and_those_that_are_missing_or_wrong_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The modules are some that are there."""
    fails = {"json": stand_in("y, x"), "pathlib": stand_in(f"{RIGHT}[:1].clone()"[3:])}
    found = {"no_such_engine": stand_in(RIGHT), "math": stand_in(RIGHT)}
    monkeypatch.setattr(peers, "PEERS", found | fails)
    op, without = _bench.OPS["rms_norm"], dict[str, str]()
    names = _bench.operands(op, (4, 64), torch.float32)
    statements, used = peers.candidates(op, names, "float32", without)
    assert list(statements) == ["math"]
    assert list(used) == ["engine"]
    assert "no_such_engine is not installed: normkit[bench-peers]" in without["no_such_engine"]
    assert "wrong by" in without["json"]
    assert "TypeError" in without["pathlib"]


def test_a_peer_is_timed_against_out_and_an_absent_one_is_named_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(
        peers, "PEERS", {"no_such_engine": stand_in(RIGHT), "pytest": stand_in(RIGHT)}
    )
    tiny = ["--only", "rms_norm", "--dtypes", "float32", "--shapes", "4x64", "2x64"]
    monkeypatch.setattr(_bench, "pin_heap", lambda threads: None)
    more = ["--rounds", "1", "--no-compile", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["cpu", *tiny, *more])
    with same_threads():
        scripts.cpu.main()
    told = capsys.readouterr()
    assert told.err.count("left out: no_such_engine comes with normkit[bench-peers]") == 1
    assert "| pytest / out= " in told.out
    for result in json.loads(next(tmp_path.glob("*.json")).read_text())["results"]:
        assert result["candidates"]["pytest"]["against"] == NORMKIT
        assert result["peers"] == {"pytest": pytest.__version__}


@pytest.mark.parametrize("dtype", list(_bench.DTYPES))
@pytest.mark.parametrize("name", list(peers.PEERS))
def test_models_of_the_peers_compute_the_ops(name: str, dtype: str, monkeypatch: Any) -> None:
    pytest.importorskip(name)
    if name == "onnxruntime":
        pytest.importorskip("onnx")
    monkeypatch.setattr(peers, "PEERS", {name: peers.PEERS[name]})
    for op in _bench.OPS.values():
        names = _bench.operands(op, _bench.shape_for(op, 3, 256), _bench.DTYPES[dtype])
        without: dict[str, str] = {}
        statements, _ = peers.candidates(op, names, dtype, without)
        expected = {} if statements else {name: "LookupError: no operator with weights per head"}
        assert without == expected
        assert statements or op.heads


def test_aims_are_of_a_shape_and_its_threads() -> None:
    limit = scripts.cpu.limit
    assert limit("rms_norm", "bfloat16", "32768x128", 2) == 1.6
    assert limit("layer_norm", "float16", "32x4096", 1) == 3.2
    assert limit("add_layer_norm", "float32", "2048x4096", 2) == 1.1
    assert limit("rms_norm", "bfloat16", "32768x128", 1) is None
    assert limit("head_norm", "bfloat16", "32768x128", 2) is None


@torch.no_grad()
def test_torch_compile_gets_the_formula_of_every_op(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for op in _bench.OPS.values():
        names = _bench.operands(op, _bench.shape_for(op, 3, 64), torch.float32)
        function, statement = cases.compiled(op)
        got = cases.evaluated(statement, compiled=function)(names)
        expected = cases.evaluated(op.torch)(names)
        torch.testing.assert_close(got[-1] if op.adds else got, expected)


@pytest.mark.parametrize("late", [False, True])
def test_a_compiler_that_fails_leaves_its_column_out(
    run: Any, monkeypatch: Any, late: bool
) -> None:
    """Where it is asked for the function, or at the function's first call."""

    def fail(*_: Any) -> Any:
        raise RuntimeError("no compiler here")

    def broken(op: Any) -> tuple[Any, str]:
        return (fail, "compiled(x)") if late else fail()

    monkeypatch.setattr(peers, "PEERS", {})
    monkeypatch.setattr(scripts.cpu, "compiled", broken)
    tiny = ["--only", "rms_norm", "--dtypes", "float32", "--shapes", "2x64", "--rounds", "1"]
    _, kept = run("cpu", *tiny)
    without = kept["results"][0]["without"]
    assert without[cases.COMPILED] == "RuntimeError: no compiler here"


def test_host_times_every_line(run: Any, monkeypatch: Any) -> None:
    lines = {name: code for name, code in scripts.host.CALLS.items() if "compiled" not in name}
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
    source = scripts.figures.kept_results("cpu")
    kept = json.loads(source.read_text())
    for path, short in ((scripts.readme.README, True), (scripts.readme.PAGE, False)):
        assert scripts.readme.block(kept, source.name, short=short) in path.read_text()


def kept_result(shape: str, commit: str, copies: float, **more: Any) -> dict[str, Any]:
    cell = {"us": 1.0, "copies": copies, "of_normkit": 3.0, **more.pop("cell", {})}
    candidates = dict.fromkeys((NORMKIT, ALLOCATING, TORCH), cell)
    found = {"op": "rms_norm", "dtype": "bfloat16", "shape": shape, "candidates": candidates}
    return found | {"commit": commit, "threads": 2, "torch": "2", "kernel_us": 1.0} | more


def test_a_table_has_one_commit_and_says_from_which_file_it_is() -> None:
    machine = {"cpu": "A", "cores": 2, "isa": "B", "caches": ["C"]}
    results = [kept_result(shape, "new", 1.25) for shape in ("1x4096", "16x4096")]
    one_thread = kept_result("16x4096", "new", 4.25, threads=1)
    kept = {
        "machine": machine,
        "results": [kept_result("64x4096", "old", 9.75), *results, one_thread],
    }
    page = scripts.readme.block(kept, "some.json", short=False)
    new, old = page.split("Commit old")
    assert "Commit new, torch 2:" in new
    assert "|  | dtype | 16x4096 |\n" in new
    assert "| `rms_norm` | bfloat16 | 1.25 (3.0x) |\n" in new
    assert "One row of 4096 in bfloat16: 1.00 us" in new
    assert "| `rms_norm` | bfloat16 | 9.75 (3.0x) |\n" in old
    assert "One row" not in old
    for text in (page, scripts.readme.block(kept, "some.json", short=True)):
        assert "`benchmarks/results/some.json`" in text
        assert "4.25" not in text
    assert "old" not in scripts.readme.block(kept, "some.json", short=True)


def test_the_tables_say_which_copy_they_count_and_what_a_gain_compares() -> None:
    older = [kept_result("16x4096", "a", 1.0)]
    assert "calls of torch's `copy_`" in scripts.readme.yardstick(older)
    assert "that call" in scripts.readme.yardstick(older)
    newer = [kept_result("16x4096", "a", 1.0, floor="C copy", cell={"against": ALLOCATING})]
    assert "copies in C of the same bytes" in scripts.readme.yardstick(newer)
    assert "an allocating call" in scripts.readme.yardstick(newer)
    with pytest.raises(ValueError, match="results: expected one kind of copies and gains"):
        scripts.readme.yardstick([*older, *newer])


def test_the_verdict_is_of_one_commit_and_one_copy() -> None:
    mine = {"commit": "a", "floor": "C copy"}
    others = [{"commit": "b", "floor": "C copy"}, {"commit": "a", "floor": COPY}, {"commit": "a"}]
    assert scripts.report.comparable([mine, *others], mine) == [mine]


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


def test_a_norm_with_rotary_embedding_is_timed_in_place_where_the_heads_lie() -> None:
    case = next(case for case in cases.THROUGHPUT if case.rotates)
    case = case._replace(shape=(5, *case.shape[1:]), dtype="float32")
    (names,) = cases.make_sets(case, 1, "cpu")
    x = names["x"]
    assert not x.is_contiguous()
    expected = names["roped"](*(names[name] for name in case.tensors))
    before, found = x.clone(), cases.candidates(case, "cpu", {})
    assert set(found) == {NORMKIT, TORCH}
    for call in found.values():
        x.copy_(before)
        with torch.no_grad():
            call(names)
        torch.testing.assert_close(x, expected)
    assert case.moved == 2 * 5 * 40 * 128 * 4


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
