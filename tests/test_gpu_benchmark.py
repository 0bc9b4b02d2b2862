"""The arithmetic, tables and plots of the GPU benchmarks: nothing here needs a GPU."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu_benchmarks import BENCHMARKS, cases, gpu, method, on_the_host, reporting, stamped
from normkit._bench import COPY, NORMKIT, TORCH, Comparison

Case = cases.Case
MIB, GIB = 1 << 20, 1 << 30
L2 = 60 * MIB


def throughput(op: str = "rms_norm", shape: str = "16384x8192", **changes: Any) -> dict[str, Any]:
    sizes = [int(size) for size in shape.split("x")]
    moved = 4 * torch.Size(sizes).numel() * (2 if op.startswith("add") else 1)
    cells = {
        COPY: cell(1.0, of_normkit=0.96),
        NORMKIT: cell(0.96),
        TORCH: cell(0.5, of_normkit=1.9),
        "liger": cell(0.9, of_normkit=1.07),
    }
    made = {
        "part": "throughput",
        "op": op,
        "dtype": "bfloat16",
        "shape": shape,
        "layout": "contiguous",
        "bytes": moved,
        "candidates": cells,
        "without": {"quack": "ModuleNotFoundError: No module named 'quack'"},
        "torch": "2.11.0",
        "commit": "abc",
    }
    return made | changes


def cell(of_copy: float, of_normkit: float = 1.0) -> dict[str, Any]:
    return {
        "us": 100.0,
        "us_quartiles": [99.0, 101.0],
        "tb_s": 4.1,
        "of_copy": of_copy,
        "of_copy_quartiles": (of_copy - 0.01, of_copy + 0.01),
        "of_normkit": of_normkit,
    }


def latency_entry(over: float, hot: bool = True, **changes: Any) -> dict[str, Any]:
    made = {
        "op": "rms_norm",
        "dtype": "bfloat16",
        "shape": "64x4096",
        "hot": hot,
        "us": 1.0 + over,
        "empty_us": 1.0,
        "torch_us": 3.0,
        "over_empty": over,
        "launch": {},
        "plan": "",
    }
    return made | changes


def eager_result() -> dict[str, Any]:
    us = {NORMKIT: 2.4, f"{NORMKIT}, allocating": 3.4, TORCH: 9.0, reporting.BARE: 2.0}
    cells = {name: {"us": value, "over_launch": value - 2.0} for name, value in us.items()}
    named = {"part": "eager", "op": "rms_norm", "dtype": "bfloat16", "shape": "1x4096"}
    return stamped({**named, "layout": "contiguous", "candidates": cells, "without": {}})


def everything() -> dict[str, Any]:
    runs = [(True, [latency_entry(0.5), latency_entry(1.0, hot=False)])]
    latency = [stamped(result) for result in gpu.gather_latency(runs)]
    moved = [throughput(), throughput("add_rms_norm"), throughput("head_norm", "32768x40x128")]
    return {
        "machine": {"gpu": "NVIDIA H200"},
        "results": [*latency, eager_result(), *moved, throughput(shape="64x4096")],
        "failed": {"rms_norm bfloat16 1x1": "RuntimeError: out of memory"},
    }


# ---------------------------------------------------------------------------------------- rotation


@pytest.mark.parametrize("held", [4 << 10, 300 << 10, MIB, 16 * MIB, 200 * MIB, 2 * GIB, 17 * GIB])
def test_a_buffer_is_cold_when_its_turn_comes(held: int) -> None:
    """Between two uses of a set passes three times the cache, by other sets or by a flush."""
    plan = method.rotation(held, held, L2, 139 * GIB)
    assert plan.calls % plan.sets == 0
    assert method.MIN_CALLS <= plan.calls <= 2 * method.MAX_CALLS
    assert plan.flush or plan.sets * held >= method.COLD_L2S * L2
    if plan.flush:
        assert plan.sets == plan.calls  # within a replay no set is used twice
    assert plan.sets * held <= method.MEMORY_SHARE * 139 * GIB


def test_a_case_that_does_not_fit_the_memory_is_left_out() -> None:
    assert method.rotation(8 * GIB, 8 * GIB, L2, 16 * GIB) is None


def test_little_memory_means_fewer_sets_and_a_flush() -> None:
    plan = method.rotation(16 * MIB, 16 * MIB, L2, 100 * MIB)
    assert plan.sets == plan.calls == 2
    assert plan.flush


def test_a_hot_rotation_stays_on_one_set() -> None:
    plan = method.rotation(MIB, MIB, L2, GIB, hot=True)
    assert (plan.sets, plan.flush) == (1, False)


# -------------------------------------------------------------------------------------- statistics


def test_the_time_above_empty_is_taken_inside_a_round() -> None:
    compared = Comparison({"norm": (3e-6, 5e-6, 13e-6), "empty": (1e-6, 3e-6, 11e-6)})
    assert method.differences(compared, "norm", "empty") == pytest.approx([2.0, 2.0, 2.0])


def test_spread_and_noise() -> None:
    assert method.spread([5.0]) == (5.0, 5.0)
    assert method.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)
    assert method.noise([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)


def test_what_nvidia_smi_says_becomes_numbers_where_it_is_one() -> None:
    found = method.parse_smi("NVIDIA H200, 580.159, 1980, 3201, 1980, 700.00, 120.5, [N/A]")
    assert found["gpu"] == "NVIDIA H200"
    assert found["driver"] == "580.159"
    assert found["power_cap_w"] == 700.0
    assert found["celsius"] == "[N/A]"


def test_processes_are_gathered_by_column() -> None:
    """The median over processes, with their range; a failed entry is left out."""
    runs = [
        (True, [latency_entry(0.5), latency_entry(1.0, hot=False)]),
        (True, [latency_entry(0.7), {**latency_entry(9.0, hot=False), "failed": "RuntimeError"}]),
        (False, [latency_entry(0.9)]),
    ]
    (result,) = gpu.gather_latency(runs)
    assert set(result["columns"]) == {"hot, PDL", "hot, no PDL", "cold, PDL"}
    hot = result["columns"]["hot, PDL"]
    assert hot["over_empty"] == pytest.approx(0.6)
    assert hot["over_empty_range"] == [0.5, 0.7]
    assert hot["processes"] == 2
    assert result["columns"]["cold, PDL"]["processes"] == 1


# ------------------------------------------------------------------------------------------- cases


@pytest.mark.parametrize("quick", [True, False])
def test_each_case_comes_once_and_the_headlines_come_first(quick: bool) -> None:
    found = cases.cases(quick)
    named = [(c.op, c.dtype, c.shape, c.layout) for c in found]
    assert len(named) == len(set(named))
    headline = list(cases.headline_cases())
    assert found[: len(headline)] == headline
    large = [c for c in headline if c.moved >= reporting.LARGE_BYTES]
    assert {"rms_norm", "add_rms_norm", "head_norm"} <= {c.op for c in large}


def test_the_full_grid_is_the_one_of_the_method() -> None:
    found = {(c.op, c.shape) for c in cases.cases(quick=False)}
    for op in ("rms_norm", "add_rms_norm"):
        assert {(op, (rows, n)) for rows in cases.ROWS for n in cases.SIZES} <= found
        assert {(op, (rows, n)) for rows in cases.LONG_ROWS for n in cases.LONG_SIZES} <= found
    heads = {("head_norm", (32768, heads, n)) for heads in cases.HEADS for n in cases.HEAD_DIMS}
    assert heads <= found
    assert any(c.layout == "strided" for c in cases.cases(quick=False))
    assert {c.dtype for c in cases.cases(quick=False)} == {"bfloat16", "float16", "float32"}
    assert any(c.shape[-1] % 2 for c in cases.cases(quick=False))


def test_bytes_are_those_that_have_to_move() -> None:
    assert Case("rms_norm", "bfloat16", (16, 64)).moved == 2 * 16 * 64 * 2
    assert Case("add_rms_norm", "float32", (16, 64)).moved == 4 * 16 * 64 * 4


@pytest.mark.parametrize("layout", ["contiguous", "strided", "offset"])
@pytest.mark.parametrize("op", ["rms_norm", "layer_norm", "head_norm", *cases.ADDING])
def test_candidates_compute_the_same(op: str, layout: str) -> None:
    shape = (3, 4, 8) if op == "head_norm" else (3, 32)
    case = Case(op, "float32", shape, layout)
    (buffers,) = cases.make_buffers(case, 1, device="cpu")
    assert buffers.x.is_contiguous() == (layout != "strided")
    calls, without = cases.candidates(case, {})
    assert set(calls) == {NORMKIT, TORCH}
    assert not without
    made = {name: call(buffers) for name, call in calls.items()}
    ours = cases.output_of(NORMKIT, case, made[NORMKIT], buffers)
    torch.testing.assert_close(ours, made[TORCH])
    assert ours is buffers.y
    assert buffers.next().x is buffers.y


def test_a_competitor_that_is_missing_or_wrong_is_recorded(monkeypatch: Any) -> None:
    monkeypatch.setattr(cases, "make_buffers", on_the_host(cases.make_buffers))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    makers = {
        "liger": lambda case: importlib.import_module("no_such_package_anywhere"),
        "quack": lambda case: lambda b: b.x * 2,
        "flashinfer": lambda case: lambda b: torch.nn.functional.rms_norm(b.x, (64,), b.weight),
        "vllm": lambda case: lambda b: 1 / 0,
    }
    monkeypatch.setattr(cases, "_MAKERS", makers)
    monkeypatch.setattr(cases, "_IN_PLACE", ())
    missing: dict[str, str] = {}
    case = Case("rms_norm", "float32", (4, 64), rivals=True)
    calls, without = cases.candidates(case, missing)
    assert set(calls) == {NORMKIT, TORCH, "flashinfer"}
    assert "ModuleNotFoundError" in without["liger"]
    assert set(missing) == {"liger"}
    assert "wrong by" in without["quack"]
    assert "ZeroDivisionError" in without["vllm"]


# --------------------------------------------------------------------------------------- reporting


def test_a_repeated_case_replaces_the_old_one() -> None:
    old, new = throughput(commit="old"), throughput(commit="new")
    other = throughput(shape="64x4096")
    kept = reporting.merge([old, other], new)
    assert [r["commit"] for r in kept] == ["abc", "new"]
    strided = throughput(layout="strided")
    assert len(reporting.merge(kept, strided)) == 3


def test_headlines_come_from_the_large_cases_and_say_whether_they_are_met(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reporting, "AIM_RMS", 0.97)
    found = {
        what: (text, met) for what, text, _, met in reporting.headlines(everything()["results"])
    }
    text, met = found["rms_norm bf16 from 256 MB, of copy"]
    assert text == "0.960 at worst, 0.960 median of 1"
    assert met is False
    assert found["add_rms_norm bf16 from 256 MB, of copy"][1] is True
    assert found["head_dim 128 bf16 from 256 MB, of copy"][1] is True
    assert "head_dim 64 bf16 from 256 MB, of copy" not in found
    assert found["1 to 64 rows of 4096 to 8192, above empty, hot L2"][1] is True
    assert found["eager with out=, above a bare launch"][0].startswith("0.40 us")
    assert found["eager allocating, above a bare launch"][1] is False
    assert found["best competitor over normkit, at worst"][0].startswith("1.07 (liger")
    assert any(what.startswith("the same, geometric mean of 4") for what in found)


def test_the_markdown_has_every_part_and_what_failed() -> None:
    text = reporting.markdown(everything())
    for part in ("### latency", "### eager", "### throughput", "### failed", "### left out"):
        assert part in text
    assert "out of memory" in text
    assert "quack: ModuleNotFoundError" in text
    for block in text.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in rows}) <= 1


def test_a_part_that_was_not_measured_is_no_error(tmp_path: Path) -> None:
    kept = {"machine": {"gpu": "NVIDIA H200"}, "results": []}
    assert reporting.markdown(kept).startswith("| figure |")
    reporting.plot(kept, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 1000


def test_a_kept_file_is_reported_without_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "gpu-nvidia-h200.json"
    path.write_text(json.dumps(everything()))
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--report", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "| figure | measured | aim | met |" in done.stdout
    assert path.with_suffix(".png").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["gpu.py", "tune.py"])
def test_without_a_gpu_it_says_so_and_ends_well(script: str) -> None:
    command = [sys.executable, str(BENCHMARKS / script)] + ["--no-build"] * (script == "tune.py")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "no CUDA device: nothing was measured" in done.stderr
    assert done.stdout == ""
