"""What the command `normkit` promises: its output, its exit statuses, and its one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")

from typer.testing import CliRunner

import normkit
from normkit import _bench, cli


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


# ------------------------------------------------------------------------------------------- info


def test_info_tells_of_every_backend_why_it_is_usable_or_not() -> None:
    told = run("info")
    assert told.exit_code == 0
    words = " ".join(told.stdout.split())
    assert torch.__version__ in words
    for name in normkit.backends():
        assert name in words

    told = run("info", "--json")
    data = json.loads(told.stdout)
    assert data["backends"] == {
        name: {"usable": b.usable, "reason": b.reason} for name, b in normkit.backends().items()
    }
    assert data["versions"]["normkit"] == normkit.__version__
    assert data["machine"]["cores"] >= 1


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "normkit", "info", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reference" in json.loads(done.stdout)["backends"]


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_its_packages_the_command_says_how_to_get_them(package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; import normkit.__main__ as m; m.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line == f"normkit: the command line needs {package}: pip install 'normkit[cli]'"


def test_the_version_is_that_of_the_package() -> None:
    told = run("--version")
    assert (told.exit_code, told.stdout) == (0, f"normkit {normkit.__version__}\n")


@pytest.mark.parametrize("words", [["-h"], ["info", "-h"], ["check", "-h"], ["bench", "-h"]])
def test_h_is_help(words: list[str]) -> None:
    told = run(*words)
    assert told.exit_code == 0
    assert told.stdout == run(*words[:-1], "--help").stdout
    assert "Usage: " in told.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "powershell"])
def test_shells_complete_the_commands(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"COMP_WORDS": "normkit ch", "COMP_CWORD": "1", "_TYPER_COMPLETE_ARGS": "normkit ch"}
    asked |= {"_TYPER_COMPLETE_WORD_TO_COMPLETE": "ch", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    for name, value in (asked | {"_NORMKIT_COMPLETE": f"complete_{shell}"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        cli.app(prog_name="normkit")
    completed = capsys.readouterr().out
    assert "check" in completed
    assert "bench" not in completed


# ---------------------------------------------------------------------------------------- convert


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A folder of which only the config is there."""
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_convert_says_what_would_be_converted(gpt2: Path) -> None:
    pytest.importorskip("transformers")
    told = run("convert", gpt2, "--dry-run")
    assert told.exit_code == 0, told.stderr
    words = " ".join(told.stdout.split())
    assert "layer, eps 1e-05, bias" in words
    assert "5 of 5 norms would be converted" in words

    told = run("convert", gpt2, "--dry-run", "--json", "--exclude", "*.ln_1")
    data = json.loads(told.stdout)
    assert told.exit_code == 0
    assert [len(data[name]) for name in ("converted", "left")] == [3, 2]
    assert data["converted"][0]["equal_share"] >= 0.995  # of bfloat16, as the config says


def test_convert_ends_with_1_where_a_norm_would_be_left(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    config = {"model_type": "mobilebert", "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = run("convert", tmp_path / "config.json", "--dry-run")
    assert told.exit_code == 1
    assert "NoNorm" in told.stdout


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--dry-run", "--include", "nothing"], "include: expected what matches a path"),
        ([], "convert: expected --dry-run"),
    ],
)
def test_convert_fails_in_one_line(gpt2: Path, arguments: list[str], error: str) -> None:
    if arguments:
        pytest.importorskip("transformers")
    told = run("convert", gpt2, *arguments)
    assert told.exit_code == 2
    assert error in told.stderr
    assert told.stderr.count("\n") == 1


def test_convert_without_a_model_says_why(tmp_path: Path) -> None:
    assert "no such file" in run("convert", tmp_path / "no", "--dry-run").stderr
    (tmp_path / "config.json").write_text('{"model_type": "no such family"}')
    told = run("convert", tmp_path, "--dry-run")
    assert told.exit_code == 2
    assert "has no family" in told.stderr or "is not installed" in told.stderr


@pytest.mark.parametrize("dtype", [[], {}, 3, "no dtype", None], ids=str)
def test_a_config_may_say_anything_of_its_dtype(dtype: object) -> None:
    assert cli._dtype_of({"dtype": dtype, "torch_dtype": "bfloat16"}) is torch.bfloat16
    assert cli._dtype_of({"text_config": dtype}) is torch.float32


# ------------------------------------------------------------------------------------------ bench


@pytest.fixture
def small_bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_bench, "pin_heap", lambda threads: None)
    monkeypatch.setattr(cli, "QUICK_SHAPES", ((1, 128), (2, 128)))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_bench_writes_figures_and_a_plot(small_bench: None, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    told = run("bench", "--quick", "--out", tmp_path / "new", "--threads", "1")
    assert told.exit_code == 0, told.output
    assert "layer_norm" in told.stdout
    data = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert len(data["results"]) == 2 * 2 * 2
    assert {r["threads"] for r in data["results"]} == {1}
    assert data["machine"]["cpu"]
    assert (tmp_path / "new" / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_bench_quick_gives_up_on_a_busy_machine_and_says_what_it_kept(
    small_bench: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interruptions = iter(range(10**6))
    monkeypatch.setattr(_bench, "_interruptions", lambda: next(interruptions))
    monkeypatch.setattr(cli, "QUICK_PATIENCE", 0)
    told = run("bench", "--quick", "--out", tmp_path, "--threads", "1")
    assert "224 samples, 0 retaken, 224 kept though interrupted" in " ".join(told.stdout.split())


def test_bench_prints_json_that_it_also_writes(small_bench: None, tmp_path: Path) -> None:
    told = run("bench", "--quick", "--out", tmp_path, "--threads", "1", "--json")
    assert json.loads(told.stdout) == json.loads((tmp_path / "bench.json").read_text())


def test_bench_without_matplotlib_says_so_and_still_reports(
    small_bench: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    told = run("bench", "--quick", "--out", tmp_path, "--threads", "1")
    assert told.exit_code == 0, told.output
    assert "pip install 'normkit[bench]'" in told.stderr
    assert (tmp_path / "bench.json").exists()
    assert not (tmp_path / "bench.png").exists()
