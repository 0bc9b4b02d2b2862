"""How the norm modules of ExLlamaV2 are loaded: devices, names, files, and what is wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compat.exllamav2_support import (
    HEADS,
    all_norms,
    check,
    loaded,
    make,
    make_model,
    row_norms,
    rows_for,
    shape_of,
    values,
)
from conformance.support import assert_same_bits
from normkit.compat.exllamav2 import ExLlamaV2HeadNorm


@all_norms
def test_unload_lets_go_and_reload_brings_back(cls: Any, tmp_path: Path) -> None:
    norm = loaded(cls, tmp_path)
    x = rows_for(norm)
    y = norm.forward(x)
    norm.unload()
    assert (norm.weight, norm.bias, norm.layernorm) == (None, None, None)
    for use in (lambda: norm.forward(x), lambda: norm.forward_torch(x), norm.get_weight):
        with pytest.raises(RuntimeError, match=r"model\.norm: expected load\(\)"):
            use()
    norm.reload()
    assert_same_bits(norm.forward(x), y)
    norm.load(device_context=False)
    assert_same_bits(norm.forward(x), y)


@all_norms
def test_loading_again_shows_what_is_stored_now(cls: Any, tmp_path: Path) -> None:
    norm = loaded(cls, tmp_path, values(*shape_of(cls)), norm_constant_bias=1)
    assert norm.weight is not None
    stored = values(*shape_of(cls), seed=9)
    norm.model = make_model(tmp_path, {"model.norm.weight": stored})
    norm.archparams = norm.model.config.arch.lm
    norm.load()
    assert_same_bits(norm.weight.data, stored)


@all_norms
def test_devices_are_exllamav2s_indices(cls: Any, tmp_path: Path) -> None:
    norm = make(cls, tmp_path)
    assert norm.device() == "cpu"
    norm.set_device_idx(2)
    assert (norm.device_idx, norm.device()) == (2, "cuda:2")
    norm.set_device_idx(-1)
    assert norm.device() == "cpu"
    with torch.device("meta"):
        norm.load()
    assert norm.weight.device.type == "cpu"
    norm.set_device_idx(None)
    with torch.device("meta"):
        norm.reload()
    assert norm.weight.device.type == "meta"


@all_norms
def test_given_archparams_take_the_place_of_the_models(cls: Any, tmp_path: Path) -> None:
    norm = make(cls, tmp_path, norm_constant_bias=1, headnorm="rmsnorm")
    heads = HEADS if cls is ExLlamaV2HeadNorm else ()
    bare = SimpleNamespace()  # no constant, and LayerNorm for heads
    other = cls(norm.model, norm.key, *heads, archparams=bare)
    other.load()
    assert other.archparams is bare
    x = rows_for(other)
    bare.headnorm, bare.norm_constant_bias = "layernorm", 0
    check(other, other.forward(x), x, other.get_weight())


@all_norms
def test_a_missing_weight_is_an_error_that_names_key_and_map(cls: Any, tmp_path: Path) -> None:
    norm = make(cls, tmp_path)
    norm.key = "model.other"
    with pytest.raises(KeyError, match=r"tensor_file_map: expected model\.other\.weight"):
        norm.load()
    norm.alt_key = "model.another"
    with pytest.raises(KeyError, match=r"model\.other\.weight or model\.another\.weight"):
        norm.load()
    norm.alt_key = "model.norm"
    norm.load()
    assert norm.weight is not None


@all_norms
def test_files_that_do_not_hold_what_the_map_says_are_errors(cls: Any, tmp_path: Path) -> None:
    norm = make(cls, tmp_path)
    files = norm.model.config.tensor_file_map
    norm.key = "model.other"
    files["model.other.weight"] = files["model.norm.weight"]
    with pytest.raises(ValueError, match=r"part-0\.safetensors: expected a tensor model\.other"):
        norm.load()
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing of that kind")
    files["model.other.weight"] = str(broken)
    with pytest.raises(ValueError, match=r"broken\.safetensors: cannot read model\.other\.weight"):
        norm.load()
    files["model.other.weight"] = str(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError):
        norm.load()
    assert norm.weight is None


@all_norms
def test_a_failed_load_keeps_what_was_loaded(cls: Any, tmp_path: Path) -> None:
    norm = loaded(cls, tmp_path)
    x = rows_for(norm)
    y = norm.forward(x)
    norm.model.config.tensor_file_map = {}
    with pytest.raises(KeyError):
        norm.load()
    assert_same_bits(norm.forward(x), y)


@all_norms
@pytest.mark.parametrize(
    "keymap",
    [
        [("transformer.", "model.")],
        [("$transformer.n", "model.n")],
        [("x", "y"), ("$transformer.", "model.")],
    ],
)
def test_names_are_mapped_as_the_architecture_says(cls: Any, tmp_path: Path, keymap: Any) -> None:
    weight = values(*shape_of(cls))
    model = make_model(tmp_path, {"transformer.norm.weight": weight})
    files = model.config.tensor_file_map
    files["model.norm.weight"] = files.pop("transformer.norm.weight")
    model.config.arch.keymap = keymap
    norm = cls(model, "model.norm", *(HEADS if cls is ExLlamaV2HeadNorm else ()))
    norm.load()
    assert_same_bits(norm.get_weight(), weight)


@all_norms
@pytest.mark.parametrize("eps", [None, "1e-6", True])
def test_an_eps_that_is_no_number_is_an_error(cls: Any, tmp_path: Path, eps: Any) -> None:
    norm = make(cls, tmp_path)
    norm.model.config.norm_eps = eps
    with pytest.raises(TypeError, match=r"model\.config\.norm_eps: expected a number"):
        norm.load()


@all_norms
def test_weights_of_another_shape_are_errors(cls: Any, tmp_path: Path) -> None:
    norm = make(cls, tmp_path, values(4, 6))
    with pytest.raises(ValueError, match=r"model\.norm\.weight: expected shape .*\(4, 6\)"):
        norm.load()


@row_norms
def test_weights_of_another_model_are_errors(cls: Any, tmp_path: Path) -> None:
    norm = make(cls, tmp_path, values(24))
    norm.model.config.hidden_size = 32
    with pytest.raises(ValueError, match=r"expected shape \(32,\), by hidden_size, got \(24,\)"):
        norm.load()


@all_norms
def test_dtypes_that_no_norm_takes_are_errors_that_name_the_tensor(
    cls: Any, tmp_path: Path
) -> None:
    norm = make(cls, tmp_path, values(*shape_of(cls), dtype=torch.float64))
    with pytest.raises(
        TypeError, match=r"model\.norm\.weight: expected float32.*got torch\.float64"
    ):
        norm.load()
    assert norm.layernorm is None
