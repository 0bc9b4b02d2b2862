"""The statistics and reports of the benchmarks, on made-up clocks: no test depends on real time."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from normkit import _bench
from normkit._bench import COPY, NORMKIT, TORCH, Comparison


class FakeTimer:
    """Takes `seconds(run)` per call, run counting the calls of timeit; logs its name."""

    def __init__(self, name: str, seconds: Callable[[int], float], log: list[Any]) -> None:
        self.name, self.seconds, self.log, self.runs = name, seconds, log, 0

    def timeit(self, number: int) -> float:
        self.log.append((self.name, number))
        self.runs += 1
        return number * self.seconds(self.runs)


def cell(copies: float, us: float = 1.0) -> dict[str, Any]:
    return {
        "us": us,
        "copies": copies,
        "copies_quartiles": (copies * 0.9, copies * 1.1),
        "of_normkit": 2.0,
        "code": "y.copy_(x)",
    }


def result(op: str = "rms_norm", dtype: str = "bfloat16", **changes: Any) -> dict[str, Any]:
    made = {
        "op": op,
        "dtype": dtype,
        "shape": "16x4096",
        "elements": 16 * 4096,
        "rounds": 3,
        "threads": 1,
        "candidates": {COPY: cell(1.0), NORMKIT: cell(1.2), TORCH: cell(9.0)},
    }
    return made | changes


def test_a_ratio_is_taken_inside_a_round() -> None:
    """A machine that slows down tenfold hits both sides; a spike on one side is one round."""
    compared = Comparison({"a": (2.0, 2.0, 2.0, 20.0, 20.0), "b": (1.0, 1.0, 1.0, 10.0, 10.0)})
    assert compared.ratio("a", "b") == 2.0
    assert compared.quartiles("a", "b") == (2.0, 2.0)
    uneven = Comparison({"a": (2.0, 20.0, 2.0), "b": (1.0, 1.0, 10.0)})
    assert uneven.ratio("a", "b") == 2.0


def test_times_are_medians_over_the_rounds() -> None:
    compared = Comparison({"a": (1e-6, 500e-6, 3e-6)})
    assert compared.us("a") == pytest.approx(3.0)


def test_quartiles_of_one_round_are_its_ratio() -> None:
    assert Comparison({"a": (3.0,), "b": (2.0,)}).quartiles("a", "b") == (1.5, 1.5)


def test_quartiles_enclose_the_middle_half() -> None:
    compared = Comparison({"a": (1.0, 2.0, 3.0, 4.0, 5.0), "b": (1.0,) * 5})
    assert compared.quartiles("a", "b") == (2.0, 4.0)


@pytest.mark.parametrize("call", [1e-7, 3e-6, 1e-4])
def test_a_sample_of_a_short_call_lasts_long_enough_and_not_much_longer(call: float) -> None:
    calls = _bench.calls_per_sample(FakeTimer("a", lambda run: call, []), seconds=3e-4)
    assert 3e-4 <= calls * call < 6e-4


def test_a_sample_of_a_long_call_is_one_call() -> None:
    assert _bench.calls_per_sample(FakeTimer("a", lambda run: 0.08, []), seconds=3e-4) == 1


def test_the_first_call_does_not_decide_the_sample() -> None:
    """The first call compiles: taken for the rule, it would give samples of a single 1 us call."""
    slow_start = FakeTimer("a", lambda run: 5.0 if run == 1 else 1e-6, [])
    assert _bench.calls_per_sample(slow_start, seconds=3e-4) == 512


def test_every_round_starts_with_the_next_candidate_and_runs_all() -> None:
    log: list[Any] = []
    timers = {name: FakeTimer(name, lambda run: 1e-3, log) for name in "abc"}
    compared = _bench.paired(timers, rounds=4, seconds=3e-4)
    order = [
        name for name, _ in log[-2 * 3 * 4 :: 2]
    ]  # each sample follows an untimed call of its own
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert all(len(samples) == 4 for samples in compared.samples.values())


def test_each_sample_follows_an_untimed_call_of_the_same_candidate() -> None:
    """The fake is slow on every other call, as after a neighbour that emptied the cache."""
    log: list[Any] = []
    timers = {
        "a": FakeTimer("a", lambda run: 1e-3 if run % 2 == 0 else 1.0, log),
        "b": FakeTimer("b", lambda run: 2e-3 if run % 2 == 0 else 1.0, log),
    }
    compared = _bench.paired(timers, rounds=3, seconds=3e-4)
    assert compared.samples["a"] == [1e-3] * 3
    assert compared.ratio("b", "a") == 2.0


def test_samples_are_seconds_per_call() -> None:
    compared = _bench.paired({"a": FakeTimer("a", lambda run: 1e-6, [])}, rounds=1, seconds=3e-4)
    assert compared.samples["a"] == [pytest.approx(1e-6)]


def test_no_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        _bench.paired({"a": FakeTimer("a", lambda run: 1.0, [])}, rounds=0)


@pytest.mark.parametrize(
    ("rows", "n", "shape"),
    [
        (1, 4096, (1, 32, 128)),
        (8192, 8192, (8192, 64, 128)),
        (32768, 128, (1024, 32, 128)),
        (3, 128, (3, 1, 128)),
        (4, 64, (1, 4, 64)),
    ],
)
def test_a_head_norm_is_measured_on_the_same_number_of_elements(
    rows: int, n: int, shape: tuple[int, ...]
) -> None:
    assert _bench.shape_for(_bench.OPS["head_norm"], rows, n) == shape
    assert _bench.shape_for(_bench.OPS["rms_norm"], rows, n) == (rows, n)


def test_a_head_norm_of_unfitting_length_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 128, got 200"):
        _bench.shape_for(_bench.OPS["head_norm"], 4, 200)


def run(statement: str, names: dict[str, Any]) -> Any:
    """The value of the last of the statements."""
    *before, last = statement.split("; ")
    for part in before:
        exec(part, names)
    return eval(last, names)


@pytest.mark.parametrize("name", list(_bench.OPS))
@pytest.mark.parametrize("dtype", list(_bench.DTYPES))
def test_every_candidate_computes_what_normkit_computes(name: str, dtype: str) -> None:
    """A benchmark of two different things is none."""
    op = _bench.OPS[name]
    shape = _bench.shape_for(op, 4, 256)
    outputs = []
    for statement in (op.normkit, op.allocating, op.torch):
        names = _bench.operands(op, shape, _bench.DTYPES[dtype])
        with torch.no_grad():
            value = run(statement, names)
        y = value[0] if isinstance(value, tuple) else value
        outputs.append(y.double())
        if "out=y" in statement:
            assert torch.equal(names["y"].double(), outputs[-1])
    tolerance = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.02}[dtype]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=tolerance, atol=tolerance)


def test_measure_reports_what_ran() -> None:
    made = _bench.measure(
        "add_rms_norm", 2, 128, "bfloat16", 1, lambda op, names: {"half": "y.copy_(x)"}
    )
    assert (made["op"], made["dtype"], made["shape"]) == ("add_rms_norm", "bfloat16", "2x128")
    assert list(made["candidates"]) == [COPY, NORMKIT, TORCH, "half"]
    assert made["candidates"][COPY]["copies"] == 1.0
    assert made["candidates"][NORMKIT]["of_normkit"] == 1.0
    assert (
        made["candidates"][COPY]["code"].count("copy_") == 2
    )  # the fused add moves twice the bytes
    json.dumps(made)


# ---------------------------------------------------------------------------------------- the heap


@pytest.fixture
def restarts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    monkeypatch.setattr(_bench.os, "execve", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(_bench.platform, "libc_ver", lambda: ("glibc", "2.36"))
    for name in _bench.HEAP_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    return calls


def test_the_process_restarts_with_a_pinned_heap_and_the_same_arguments(
    restarts: list[Any],
) -> None:
    _bench.pin_heap(3)
    ((program, arguments, environment),) = restarts
    assert program == arguments[0] == sys.executable
    assert arguments[1:] == sys.orig_argv[1:]
    assert environment["MALLOC_MMAP_MAX_"] == "0"
    assert int(environment["MALLOC_TRIM_THRESHOLD_"]) == 17179869184
    assert environment["OMP_NUM_THREADS"] == "3"


def test_a_pinned_process_does_not_restart(
    restarts: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in _bench.HEAP_SETTINGS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    _bench.pin_heap(3)
    assert restarts == []
    _bench.pin_heap(2)
    assert len(restarts) == 1


# ----------------------------------------------------------------------------------------- reports


def test_the_machine_is_described() -> None:
    machine = _bench.machine()
    assert machine["cores"] >= 1
    assert machine["cpu"].strip()
    assert machine["isa"].strip()
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


def test_the_table_has_a_line_per_result() -> None:
    rich_console = pytest.importorskip("rich.console")
    console = rich_console.Console(width=150, file=io.StringIO())
    console.print(_bench.bench_table([result(), result("layer_norm", "float32")]))
    text = console.file.getvalue()
    for expected in ("rms_norm", "layer_norm", "9.00", "1.20", "2.0x"):
        assert expected in text


def test_the_plot_is_written_with_results_missing(tmp_path: Path) -> None:
    """Neither empty panels, nor a single result, nor a missing torch.compile may stop it."""
    pytest.importorskip("matplotlib")
    compiled = result()["candidates"] | {"torch.compile": cell(5.0)}
    results = [
        result(limit=1.2),
        result(shape="64x4096", elements=64 * 4096, candidates=compiled),
        result("layer_norm", "float32"),
    ]
    path = tmp_path / "new" / "plot.png"
    _bench.plot(results, "a machine", path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_importing_normkit_imports_none_of_the_packages_of_its_extras() -> None:
    code = (
        "import sys, normkit, normkit._bench; "
        "print([m for m in ('rich', 'typer', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
