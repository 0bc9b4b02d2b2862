"""The measuring and reporting of `normkit check` and `normkit bench`, on a clock made up here."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.benchmark import Measurement, Timer
from torch.utils.benchmark.utils.common import TaskSpec

from normkit import _bench
from normkit._bench import ALLOCATING, COPY, NORMKIT, TORCH, Comparison
from starting import loaded


class Clock:
    """Stands still but for calls of what `timer` makes; `log` has their names."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, list[str]()

    def timer(self, name: str, seconds: Callable[[int], float]) -> Timer:
        calls = 0

        def call() -> None:
            nonlocal calls
            calls += 1
            self.now += seconds(calls)
            self.log.append(name)

        return Timer("call()", globals={"call": call}, timer=lambda: self.now)


def compared(**samples: tuple[float, ...]) -> Comparison:
    spec = TaskSpec("pass", "")
    return Comparison({name: Measurement(1, list(times), spec) for name, times in samples.items()})


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bench, "_interruptions", lambda: 0)
    monkeypatch.setattr(_bench, "PAUSE_SECONDS", 0)


# -------------------------------------------------------------------------------------- statistics


def test_a_ratio_is_taken_inside_a_round() -> None:
    """A machine that slows down tenfold hits both sides; a spike on one side is one round."""
    slowed = compared(a=(2.0, 2.0, 2.0, 20.0, 20.0), b=(1.0, 1.0, 1.0, 10.0, 10.0))
    assert slowed.ratio("a", "b") == 2.0
    assert slowed.quartiles("a", "b") == (2.0, 2.0)
    assert compared(a=(2.0, 20.0, 2.0), b=(1.0, 1.0, 10.0)).ratio("a", "b") == 2.0


def test_a_difference_is_taken_inside_a_round() -> None:
    found = compared(norm=(3e-6, 5e-6, 13e-6), empty=(1e-6, 3e-6, 11e-6))
    assert found.over_us("norm", "empty") == pytest.approx(2.0)


def test_times_are_medians_and_quartiles_enclose_the_middle_half() -> None:
    assert compared(a=(1e-6, 500e-6, 3e-6)).us("a") == pytest.approx(3.0)
    assert compared(a=(1.0, 2.0, 3.0, 4.0, 5.0), b=(1.0,) * 5).quartiles("a", "b") == (2.0, 4.0)
    assert compared(a=(3.0,), b=(2.0,)).quartiles("a", "b") == (1.5, 1.5)


# ----------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("call", [1e-6, 1e-4, 0.08])
def test_a_sample_lasts_long_enough_and_not_much_longer(call: float, monkeypatch: Any) -> None:
    """Nor does the first call decide, which compiles: it would make samples of single calls."""
    calls: list[int] = []
    real = Timer.timeit
    spy = lambda timer, number: (calls.append(number), real(timer, number))[1]  # noqa: E731
    monkeypatch.setattr(Timer, "timeit", spy)
    timer = Clock().timer("a", lambda calls: 5.0 if calls == 1 else call)
    _bench.paired({"a": timer}, rounds=1, seconds=3e-4)
    assert calls == [_bench.UNTIMED_CALLS, max(1, round(3e-4 / call))]


def test_every_round_starts_with_the_next_candidate_and_runs_all() -> None:
    clock = Clock()
    timers = {name: clock.timer(name, lambda calls: 1e-3) for name in "abc"}
    found = _bench.paired(timers, rounds=4, seconds=3e-4)
    order = [name for i, name in enumerate(clock.log) if clock.log[i - 1] != name]
    assert "".join(order).endswith("abc" + "bca" + "cab" + "abc")
    assert [len(m.times) for m in found.measurements.values()] == [4, 4, 4]
    assert (found.retaken, found.disturbed) == (0, 0)


def test_each_sample_follows_untimed_calls_of_the_same_candidate() -> None:
    """Whoever comes next finds the caches of its neighbour: the first calls are slow."""
    clock = Clock()

    def slow_at_first(name: str, seconds: float) -> Callable[[int], float]:
        return lambda calls: seconds if clock.log[-4:] == [name] * 4 else 1.0

    timers = {name: clock.timer(name, slow_at_first(name, 1e-3 * (i + 1)))
              for i, name in enumerate("ab")}  # fmt: skip
    found = _bench.paired(timers, rounds=3, seconds=3e-4)
    assert found.measurements["a"].times == pytest.approx([1e-3] * 3)
    assert found.ratio("b", "a") == pytest.approx(2.0)


def test_a_sample_during_which_a_core_was_taken_away_is_taken_again(monkeypatch: Any) -> None:
    """Every thirtieth call is interrupted, and takes a time slice longer."""
    clock, state = Clock(), {"interruptions": 0, "calls": 0}

    def seconds(calls: int) -> float:
        state["calls"] += 1
        if state["calls"] % 30 == 0:
            state["interruptions"] += 1
            return 4.0
        return 1e-3

    monkeypatch.setattr(_bench, "_interruptions", lambda: state["interruptions"])
    found = _bench.paired({"a": clock.timer("a", seconds)}, rounds=40, seconds=3e-3)
    assert max(found.measurements["a"].times) == pytest.approx(1e-3)
    assert found.retaken > 0
    assert found.disturbed == 0
    monkeypatch.setattr(_bench, "RETAKES", 0)
    without = _bench.paired({"a": clock.timer("a", seconds)}, rounds=40, seconds=3e-3)
    assert max(without.measurements["a"].times) > 1.0
    assert without.disturbed > 0


def test_retakes_end_and_what_is_kept_is_counted(monkeypatch: Any) -> None:
    interruptions = iter(range(10**6))
    monkeypatch.setattr(_bench, "_interruptions", lambda: next(interruptions))
    found = _bench.paired({"a": Clock().timer("a", lambda calls: 1e-3)}, rounds=5)
    assert found.retaken == 5 * _bench.RETAKES
    assert found.disturbed == 5
    told = {"samples": 5, "retaken": 5 * _bench.RETAKES, "disturbed": 5}
    assert _bench.retakes(found) == told


def test_patience_ends_and_what_is_kept_is_counted(monkeypatch: Any) -> None:
    """A second passes at each look on the clock; all samples are interrupted."""
    interruptions, now = iter(range(10**6)), iter(range(10**6))
    monkeypatch.setattr(_bench, "_interruptions", lambda: next(interruptions))
    monkeypatch.setattr(_bench.time, "monotonic", lambda: next(now))
    timer = Clock().timer("a", lambda calls: 1e-3)
    found = _bench.paired({"a": timer}, rounds=5, patience=4)
    assert (found.retaken, found.disturbed) == (3, 5)


def test_no_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        _bench.paired({}, rounds=0)


# -------------------------------------------------------------------------------- what is measured


@pytest.mark.parametrize(
    ("rows", "n", "shape"),
    [(1, 4096, (1, 32, 128)), (32768, 128, (1024, 32, 128)), (3, 128, (3, 1, 128)),
     (4, 64, (1, 4, 64))],
)  # fmt: skip
def test_a_head_norm_is_measured_on_as_many_elements(rows: int, n: int, shape: Any) -> None:
    assert _bench.shape_for(_bench.OPS["head_norm"], rows, n) == shape
    assert _bench.shape_for(_bench.OPS["rms_norm"], rows, n) == (rows, n)
    with pytest.raises(ValueError, match="multiple of 128 for a head norm, got 200"):
        _bench.shape_for(_bench.OPS["head_norm"], 4, 200)


def run(statement: str, names: dict[str, Any]) -> Any:
    """The value of the last of the statements."""
    return [eval(part, names) for part in statement.split("; ")][-1]


@pytest.mark.parametrize("name", list(_bench.OPS))
@pytest.mark.parametrize("dtype", list(_bench.DTYPES))
def test_every_candidate_computes_what_normkit_computes(name: str, dtype: str) -> None:
    """A benchmark of two different things is none."""
    op = _bench.OPS[name]
    outputs = []
    for statement in (op.normkit, op.allocating, op.torch, op.torch_allocating):
        names = _bench.operands(op, _bench.shape_for(op, 4, 256), _bench.DTYPES[dtype])
        with torch.no_grad():
            value = run(statement, names)
        if isinstance(value, tuple):
            value, total = reversed(value) if statement == op.torch_allocating else value
            assert torch.equal(total, names["x"] + names["residual"])
        outputs.append(value.double())
        if "out=y" in statement:
            assert torch.equal(names["y"].double(), outputs[-1])
    tolerance = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.02}[dtype]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=tolerance, atol=tolerance)


@pytest.fixture
def made() -> dict[str, Any]:
    names = _bench.operands(_bench.OPS["add_rms_norm"], (2, 128), torch.bfloat16)
    names |= {"half": lambda x: x, "engine": lambda x, y: y.copy_(x)}
    more: dict[str, Any] = {"allocating": {"half": "half(x)"}, "given": {"engine": "engine(x, y)"}}
    return _bench.measure("add_rms_norm", 2, 128, "bfloat16", 1, names=names, **more)


def test_measure_reports_what_ran(made: dict[str, Any]) -> None:
    assert (made["op"], made["dtype"], made["shape"]) == ("add_rms_norm", "bfloat16", "2x128")
    assert list(made["candidates"]) == [COPY, NORMKIT, "engine", ALLOCATING, TORCH, "half"]
    assert made["floor"] == COPY
    assert made["candidates"][COPY]["copies"] == 1.0
    assert made["candidates"][NORMKIT]["of_normkit"] == 1.0
    assert made["candidates"][COPY]["code"].count("copy_") == 2  # a fused add moves twice the bytes
    assert (made["samples"], made["retaken"], made["disturbed"]) == (6, 0, 0)
    json.dumps(made)


def test_gains_pair_allocating_with_allocating_and_given_outputs_with_out() -> None:
    """A call that allocates has a part that one with out= has not."""
    times = {COPY: 1.0, NORMKIT: 2.0, ALLOCATING: 4.0, TORCH: 8.0, "engine": 8.0}
    found = _bench.cells_of(compared(**{k: (v,) for k, v in times.items()}), COPY, {TORCH})
    assert [found[k]["of_normkit"] for k in (TORCH, "engine", NORMKIT)] == [2.0, 4.0, 1.0]
    assert [found[k]["against"] for k in (TORCH, "engine")] == [ALLOCATING, NORMKIT]
    assert found[TORCH]["copies"] == 8.0


def test_what_torch_is_charged_for_allocates_as_it_does(made: dict[str, Any]) -> None:
    code = {k: cell["code"] for k, cell in made["candidates"].items()}
    assert "out=" in code[NORMKIT]
    assert "out=" not in code[ALLOCATING] + code[TORCH]
    assert [made["candidates"][k]["against"] for k in ("half", TORCH)] == [ALLOCATING] * 2
    assert made["candidates"]["engine"]["against"] == NORMKIT


def test_a_pause_after_each_sample_lets_other_threads_fall_asleep(monkeypatch: Any) -> None:
    slept: list[float] = []
    monkeypatch.setattr(_bench.time, "sleep", slept.append)
    timers = {name: Clock().timer(name, lambda calls: 1e-3) for name in "ab"}
    _bench.paired(timers, rounds=3, settle=0.25)
    assert slept == [0.25] * 6


def test_the_table_and_the_plot_show_results_with_gaps(made: Any, tmp_path: Path) -> None:
    console = pytest.importorskip("rich.console").Console(width=220, file=io.StringIO())
    pytest.importorskip("matplotlib")
    other = _bench.measure("layer_norm", 2, 128, "float32", 2) | {"limit": 1.2}
    console.print(_bench.bench_table([made, other]))
    text = console.file.getvalue()
    gain = f"{made['candidates'][TORCH]['of_normkit']:.1f}x"
    heads = ("copy us", "out= / copy", "torch / allocating", "half / allocating", "engine / out=")
    for expected in ("add_rms_norm", "layer_norm", "2x128", gain, "0 retaken", *heads):
        assert expected in text
    _bench.plot([made, other], "a machine", tmp_path / "new" / "plot.png")
    assert (tmp_path / "new" / "plot.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------- the heap


def test_the_process_restarts_once_with_a_pinned_heap_and_the_same_arguments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    restarts: list[Any] = []
    monkeypatch.setattr(_bench.os, "execve", lambda *arguments: restarts.append(arguments))
    monkeypatch.setattr(_bench.platform, "libc_ver", lambda: ("glibc", "2.36"))
    for name in _bench.HEAP_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    _bench.pin_heap(3)
    ((program, arguments, environment),) = restarts
    assert program == arguments[0] == sys.executable
    assert arguments[1:] == sys.orig_argv[1:]
    assert environment["MALLOC_MMAP_MAX_"] == "0"
    assert int(environment["MALLOC_TRIM_THRESHOLD_"]) == 17179869184
    assert environment["OMP_NUM_THREADS"] == "3"
    for name in (*_bench.HEAP_SETTINGS, "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, environment[name])
    _bench.pin_heap(3)
    assert len(restarts) == 1
    _bench.pin_heap(2)
    assert len(restarts) == 2


# ----------------------------------------------------------------------------------------- reports


CPUINFO = """\
processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 26
model\t\t: 2
model name\t: AMD EPYC
stepping\t: 1
flags\t\t: fpu avx2 avx512f avx512_bf16

processor\t: 1
model\t\t: 3
"""


def test_the_machine_is_described_by_what_tells_cpus_apart(monkeypatch: Any) -> None:
    read = Path.read_text

    def told(path: Path, *a: Any, **k: Any) -> str:
        return CPUINFO if str(path) == "/proc/cpuinfo" else read(path, *a, **k)

    monkeypatch.setattr(Path, "read_text", told)
    machine = _bench.machine()
    assert machine["cpu"] == "AMD EPYC"
    assert machine["model"] == "AuthenticAMD-26-2-1"
    assert machine["isa"].endswith("+BF16")
    assert machine["cores"] >= 1
    stamp = _bench.run_stamp()
    assert stamp["torch"] == torch.__version__
    assert stamp["time"].endswith("+00:00")
    json.dumps([machine, stamp])


def test_json_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    _bench.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        _bench.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_importing_normkit_imports_none_of_the_packages_of_its_extras() -> None:
    """Nor torch.utils.benchmark, which loads setuptools: half a second of `normkit info`."""
    late = {"rich", "typer", "matplotlib", "torch.utils.benchmark"}
    assert late.isdisjoint(loaded()[1])
