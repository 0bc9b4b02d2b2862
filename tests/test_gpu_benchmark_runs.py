"""Whole runs of the GPU benchmark and of the tuner, with the host in place of a device."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import normkit
from gpu_benchmarks import BENCHMARKS, cases, gpu, method, on_the_host, reporting, stamped, tune
from normkit._bench import COPY, NORMKIT, TORCH

Case = cases.Case
needs_extension = pytest.mark.skipif(
    not normkit.backends()["cpu"].usable, reason="needs the extension"
)

# --------------------------------------------------------------------------------- a run, on fakes


class HostGraph:
    """Runs the calls of a graph when it is replayed."""

    def __init__(self, calls: list[Any]) -> None:
        self.all = calls

    def replay(self) -> None:
        for call in self.all:
            call()


class FakeEvent:
    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        FakeEvent.now += 1.0
        self.at = FakeEvent.now

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


class FakeBaselines:
    def __init__(self) -> None:
        self.flushes = 0

    def copy(self, shape: Any, sources: Any, targets: Any) -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)

    def flush(self) -> None:
        self.flushes += 1

    def empty(self, shape: Any) -> None:
        assert shape.block[0] == 128

    def kernels_of(self, call: Any) -> list[Any]:
        call()
        return [method.LaunchShape((3, 1, 1), (128, 1, 1), 0, 1, 1)] * 2

    def launch_timer(self, shape: Any) -> Any:
        return SimpleNamespace(timeit=lambda number: number * 1e-6)


@pytest.fixture
def host(monkeypatch: Any) -> None:
    """Has the benchmark take the host for a device."""
    properties = SimpleNamespace(L2_cache_size=1 << 10, multi_processor_count=4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(gpu, "free_memory", lambda: 1 << 24)
    monkeypatch.setattr(gpu, "check_backend", lambda case, buffers: "a plan")
    monkeypatch.setattr(cases, "make_buffers", on_the_host(cases.make_buffers))

    def capture(calls: list[Any]) -> Any:
        return method.Graph(HostGraph(calls), len(calls), None)

    for module in (gpu, tune):
        monkeypatch.setattr(module, "capture", capture)


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm"])
def test_a_case_is_measured_and_reported(op: str, tmp_path: Path) -> None:
    baselines = FakeBaselines()
    result = gpu.Throughput(baselines, 3, compile_too=False).run(Case(op, "float32", (4, 64)))
    assert set(result["candidates"]) == {COPY, NORMKIT, TORCH}
    assert result["candidates"][NORMKIT]["of_normkit"] == 1.0
    assert (baselines.flushes > 0) == result["flushed"]
    assert json.loads(json.dumps(result))["plan"] == "a plan"
    kept = {"machine": {"gpu": "host"}, "results": [stamped(result)]}
    assert f"| {op} | float32 | 4x64 |" in reporting.markdown(kept)
    reporting.plot(kept, tmp_path / "plot.png")


@pytest.mark.usefixtures("host")
def test_a_case_that_is_too_large_says_so() -> None:
    with pytest.raises(gpu.Skipped, match="MiB"):
        gpu.Throughput(FakeBaselines(), 3, False).run(Case("rms_norm", "float32", (4096, 4096)))


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("hot", [True, False])
def test_latency_is_taken_above_an_empty_kernel_launched_alike(hot: bool) -> None:
    baselines = FakeBaselines()
    case = Case("add_rms_norm", "float32", (4, 64))
    found = gpu.measure_latency(baselines, case, hot, rounds=3)
    assert found["us"] == found["empty_us"] + found["over_empty"]
    assert found["launch"]["grid"] == [3, 1, 1]
    assert found["launch"]["programmatic"] is True
    assert (baselines.flushes == 0) == hot


@pytest.mark.usefixtures("host")
def test_eager_calls_are_held_against_a_bare_launch(monkeypatch: Any) -> None:
    on_host = lambda op, shape: gpu._bench.operands(op, shape, torch.bfloat16)  # noqa: E731
    monkeypatch.setattr(gpu, "eager_operands", on_host)
    with torch.no_grad():
        found = gpu.run_eager(FakeBaselines(), "rms_norm", (1, 64), rounds=2)
    cells = found["candidates"]
    assert cells[reporting.BARE]["us"] == pytest.approx(1.0)
    assert cells[NORMKIT]["over_launch"] == pytest.approx(cells[NORMKIT]["us"] - 1.0, rel=0.5)
    assert "| rms_norm | 1x64 |" in reporting.eager_table([found])


@needs_extension
@pytest.mark.usefixtures("host")
@pytest.mark.parametrize("hot", [True, False])
def test_variants_are_timed_in_pairs_and_compared_bit_by_bit(hot: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 24, 1 << 24))
    served = SimpleNamespace(backend="cuda", plan="a plan")
    monkeypatch.setattr(normkit, "explain", lambda *args: served)
    modules = dict.fromkeys((tune.DEFAULT, tune.AGAIN, "packs-4"), normkit._C)
    case = Case("add_rms_norm", "float32", (4, 64))
    result = tune.measure(case, modules, FakeBaselines(), rounds=3, hot=hot)
    assert set(result["variants"]) == set(modules)
    assert all(cell["same_bits"] for cell in result["variants"].values())
    assert len(tune.advice([result])) == 1


# ------------------------------------------------------------------------------------------ tuning


def tuned(name: str, of_default: float, again: float = 1.0, noise: float = 0.002) -> dict[str, Any]:
    def made(ratio: float) -> dict[str, Any]:
        figures = {"us": 10.0, "of_default": ratio, "noise": noise}
        return {**figures, "same_bits": True, "plan": ""}

    variants = {tune.DEFAULT: made(1.0), tune.AGAIN: made(again), name: made(of_default)}
    return {"op": "rms_norm", "dtype": "bfloat16", "shape": "64x4096", "variants": variants}


def test_a_gain_within_the_noise_changes_nothing() -> None:
    for result in (tuned("packs-4", 0.995), tuned("packs-4", 0.95, again=0.94)):
        (line,) = tune.advice([result])
        assert line.startswith("keep the default against packs-4")
    (line,) = tune.advice([tuned("packs-4", 0.9, noise=0.3)])
    assert line.startswith("keep")


def test_a_gain_names_the_line_that_it_would_change() -> None:
    (line,) = tune.advice([tuned("packs-4", 0.9)])
    assert line.startswith("change plan.h: NORMKIT_TUNE_PACKS 4")
    assert "0.900" in line
    slower = tuned("packs-4", 1.1) | {"shape": "1x4096"}
    (line,) = tune.advice([tuned("packs-4", 0.9), slower])
    assert line.startswith("split plan.h")
    assert "**0.900**" in tune.table([tuned("packs-4", 0.9)])


def test_other_bits_are_pointed_out() -> None:
    result = tuned("cluster-from-1024", 0.9)
    result["variants"]["cluster-from-1024"]["same_bits"] = False
    assert "ITS BITS DIFFER" in tune.advice([result])[0]


def test_each_variant_concerns_a_case_and_a_macro_of_the_sources() -> None:
    root = BENCHMARKS.parent
    sources = [*root.glob("cpp/*.h"), *root.glob("cuda/*.cuh")]
    text = "".join(path.read_text() for path in sources)
    for variant in tune.VARIANTS:
        assert any(variant.concerns(case) for case in tune.tuning_cases(quick=False)), variant
        for macro in variant.macros:
            assert f"#ifndef {macro}" in text, f"{macro} is read nowhere"


def test_macros_reach_both_compilers() -> None:
    configure, _ = tune.cmake_commands({"NORMKIT_TUNE_PACKS": 4}, Path("folder"), "90", 1)
    assert "-DCMAKE_CUDA_FLAGS=-DNORMKIT_TUNE_PACKS=4" in configure
    assert "-DCMAKE_CXX_FLAGS=-DNORMKIT_TUNE_PACKS=4" in configure


@needs_extension
def test_another_copy_of_the_extension_can_serve(tmp_path: Path) -> None:
    copy = tmp_path / Path(normkit._C.__file__).name
    copy.write_bytes(Path(normkit._C.__file__).read_bytes())
    module = tune.load(copy)
    assert module.__file__ == str(copy)
    x = torch.randn(3, 64)
    with tune.serving(module):
        assert normkit.explain("rms_norm", x).backend == "cpu"
        y = normkit.rms_norm(x)
    assert torch.equal(y, normkit.rms_norm(x))
    assert normkit._dispatch._C is normkit._C
