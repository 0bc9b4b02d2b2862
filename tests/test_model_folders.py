"""Of a model folder the right files are read, whoever laid it out, and each of them once."""

from __future__ import annotations

import json
import os
import re
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from checkpoints import LLAMA, file_of, folder_of, odd_values, same_bits, tensors
from normkit import LayerNorm, RMSNorm, load_norm
from normkit.checkpoint import _files, _opened, find_norms
from normkit.checkpoint._files import Files

INDEX = "model.safetensors.index.json"
DIFFUSERS = "diffusion_pytorch_model.safetensors"
SHARDS = ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]


def write_index(path, weight_map):
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def keys_of(source):
    return [entry.key for entry in find_norms(source)]


@pytest.fixture
def split(tmp_path):
    """A folder with the weight of a LayerNorm in the first of two shards, its bias in the other."""
    stored = {"ln.weight": odd_values(4), "ln.bias": odd_values(4).flip(0)}
    stored |= {"norm.weight": odd_values(8), "a.norm.weight": odd_values(6)}
    in_first = ["ln.weight", "a.norm.weight"]
    weight_map = {name: SHARDS[name not in in_first] for name in stored}
    for shard in SHARDS:
        held = {name: stored[name] for name in stored if weight_map[name] == shard}
        save_file(held, tmp_path / shard)
    write_index(tmp_path / INDEX, weight_map)
    return tmp_path, stored


# ---------------------------------------------------------------------------------- a named shard


def test_a_bias_in_another_shard_than_the_named_one_is_read(split):
    path, stored = split
    for source in (path / SHARDS[0], path, path / INDEX):
        entry = next(entry for entry in find_norms(source) if entry.key == "ln")
        assert (entry.spec.kind, entry.spec.has_bias, entry.shard) == ("layer", True, SHARDS[0])
        module = load_norm(source, "ln")
        assert isinstance(module, LayerNorm)
        assert same_bits(module.weight, stored["ln.weight"])
        assert same_bits(module.bias, stored["ln.bias"])


def test_a_norm_is_read_from_wherever_the_index_of_a_named_shard_says(split):
    path, stored = split
    for source in (path / SHARDS[0], path / SHARDS[1]):
        for key in ("norm", "a.norm"):
            assert same_bits(load_norm(source, key).weight, stored[f"{key}.weight"])


def test_of_a_named_shard_only_its_own_norms_are_listed(split):
    path, _ = split
    assert keys_of(path) == ["a.norm", "ln", "norm"]
    assert keys_of(path / SHARDS[0]) == ["a.norm", "ln"]
    assert keys_of(path / SHARDS[1]) == ["norm"]
    (path / SHARDS[1]).unlink()
    assert keys_of(path / SHARDS[0]) == ["a.norm", "ln"]
    missing = rf"{re.escape(str(path / SHARDS[1]))}: listed in {re.escape(INDEX)}, but there is no"
    for key in ("norm", "ln"):
        with pytest.raises(FileNotFoundError, match=missing):
            load_norm(path / SHARDS[0], key)


def test_a_named_file_comes_before_its_index(split):
    path, _ = split
    save_file({"norm.weight": torch.full((8,), 7.0)}, path / SHARDS[0])
    assert (load_norm(path / SHARDS[0], "norm").weight == 7).all()


def test_an_index_that_does_not_list_the_named_file_is_not_used(split):
    path, _ = split
    save_file({"other.norm.weight": torch.ones(3)}, path / "adapter_model.safetensors")
    with pytest.raises(KeyError, match="no norm 'norm' in .*adapter_model"):
        load_norm(path / "adapter_model.safetensors", "norm")


def test_a_broken_index_beside_a_named_shard_is_told(split):
    path, _ = split
    (path / INDEX).write_text("{")
    with pytest.raises(ValueError, match=f"{re.escape(str(path / INDEX))}: not JSON"):
        load_norm(path / SHARDS[0], "ln")


# ------------------------------------------------------------------------------ names of indexes


@pytest.mark.parametrize(
    "name",
    [
        f"{DIFFUSERS}.index.json",
        f"{DIFFUSERS}.index.fp16.json",
        "diffusion_pytorch_model.fp16.safetensors.index.json",
        "consolidated.safetensors.index.json",
        "my.safetensors.index.json",
    ],
)
def test_an_index_of_any_name_is_used(split, name):
    path, stored = split
    (path / INDEX).rename(path / name)
    for source in (path, path / name, path / SHARDS[0]):
        assert same_bits(load_norm(source, "ln").bias, stored["ln.bias"])
    assert keys_of(path) == ["a.norm", "ln", "norm"]


@pytest.mark.parametrize("best", [INDEX, f"{DIFFUSERS}.index.json", "model.safetensors", DIFFUSERS])
def test_of_several_files_the_best_known_is_the_model(split, best):
    path, _ = split
    weight_map = {"best.norm.weight": "best.safetensors"}
    save_file({"best.norm.weight": torch.ones(3)}, path / "best.safetensors")
    (path / INDEX).rename(path / "a.safetensors.index.json")
    if best.endswith(".json"):
        write_index(path / best, weight_map)
    else:
        (path / "best.safetensors").rename(path / best)
    assert keys_of(path) == ["best.norm"]


def test_of_several_indexes_that_nobody_knows_one_has_to_be_named(split):
    path, stored = split
    (path / INDEX).rename(path / "b.safetensors.index.json")
    write_index(path / "a.safetensors.index.json", {"norm.weight": "part.safetensors"})
    names = r"several indexes, name one of them: a\.safetensors\.index\.json, b\.safetensors\.index"
    with pytest.raises(ValueError, match=names):
        load_norm(path, "norm")
    found = load_norm(path / "b.safetensors.index.json", "norm")
    assert same_bits(found.weight, stored["norm.weight"])


def test_the_index_that_lists_a_named_shard_is_the_one_used(split):
    path, stored = split
    (path / INDEX).rename(path / "b.safetensors.index.json")
    write_index(path / "a.safetensors.index.json", {"ln.bias": "part.safetensors"})
    assert same_bits(load_norm(path / SHARDS[0], "ln").bias, stored["ln.bias"])


# ----------------------------------------------------------------------- other makers of folders


def mistral(path):
    """What mistral-inference reads."""
    layers = [f"layers.0.{name}.weight" for name in ("attention_norm", "ffn_norm")]
    stored = {name: odd_values(8) for name in [*layers, "norm.weight"]}
    stored["layers.0.attention.wq.weight"] = torch.ones(8, 8)
    save_file(stored, path / "consolidated.safetensors")
    params = {"dim": 8, "n_layers": 1, "norm_eps": 0.25, "vocab_size": 4}
    (path / "params.json").write_text(json.dumps(params))
    return params


def test_mistrals_own_files_are_read_with_their_params(tmp_path):
    params = mistral(tmp_path)
    save_file({"adapter.norm.weight": torch.ones(3)}, tmp_path / "lora.safetensors")
    for source in (tmp_path, tmp_path / "consolidated.safetensors"):
        assert keys_of(source) == ["layers.0.attention_norm", "layers.0.ffn_norm", "norm"]
        files = Files(source)
        assert files.config == params
        assert files.config_name == str(tmp_path / "params.json")
        module = load_norm(source, "layers.0.ffn_norm")
        assert isinstance(module, RMSNorm)
        assert module.eps == 0.25


def test_a_params_json_is_a_config_of_mistrals_own_files_alone(tmp_path):
    mistral(tmp_path)
    save_file(tensors(), tmp_path / "other.safetensors")
    assert Files(tmp_path / "other.safetensors").config == {}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert Files(tmp_path).config == LLAMA
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes())
    assert "model.norm" in keys_of(tmp_path)


def test_an_error_in_params_json_is_named(tmp_path):
    mistral(tmp_path)
    (tmp_path / "params.json").write_text('{"norm_eps": "small"}')
    with pytest.raises(ValueError, match=r"params\.json: norm_eps: expected a number"):
        load_norm(tmp_path, "norm")


def test_the_config_of_diffusers_is_what_the_file_holds(tmp_path):
    config = {"_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.42", "eps": 1e-6}
    path = file_of(tmp_path, tensors(), config)
    assert Files(path).config == config


@pytest.mark.parametrize("beside", [[], ["flux1-dev.safetensors", "ae.safetensors"]])
def test_a_pipeline_of_several_models_is_told_with_its_folders(tmp_path, beside):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    for name in ("transformer", "vae", "scheduler"):
        (tmp_path / name).mkdir()
    save_file(tensors(), tmp_path / "transformer" / DIFFUSERS)
    save_file(tensors(), tmp_path / "vae" / DIFFUSERS)
    for name in beside:
        save_file(tensors(), tmp_path / name)
    with pytest.raises(
        (FileNotFoundError, ValueError), match="these have files: transformer, vae$"
    ):
        find_norms(tmp_path)
    assert len(keys_of(tmp_path / "vae")) == 4


# ----------------------------------------------------------------------- who wrote what is stored


@pytest.mark.parametrize("as_source", [Files, lambda path: safe_open(path, "pt")])
@pytest.mark.parametrize(
    ("names", "metadata", "layout"),
    [
        (["model.norm.weight"], None, "hf"),
        (["model.norm.weight"], {"format": "pt"}, "hf"),
        (["model.norm.weight"], {"format": "mlx"}, "mlx"),
        (["output_norm.weight", "blk.0.attn_norm.weight"], {"format": "pt"}, "gguf"),
        (["output_norm.weight", "dec.blk.11.attn_norm.weight"], None, "gguf"),
        (["output_norm.weight", "backbone.blk.0.norm.weight"], None, "hf"),
    ],
)
def test_the_layout_is_told_by_names_and_metadata(tmp_path, names, metadata, layout, as_source):
    path = tmp_path / "model.safetensors"
    save_file({name: torch.ones(4) for name in names}, path, metadata)
    assert _opened(as_source(path)).layout(names[0]) == layout


def test_the_layout_of_a_dict_is_told_by_names():
    stored = {"output_norm.weight": torch.ones(4)}
    assert _opened(stored).layout("output_norm.weight") == "hf"
    stored["blk.0.attn_q_norm.weight"] = torch.ones(4)
    assert _opened(stored).layout("output_norm.weight") == "gguf"


def test_the_metadata_is_that_of_the_shard_a_tensor_is_in(tmp_path):
    folder_of(tmp_path, {"a.norm.weight": torch.ones(4), "b.norm.weight": torch.ones(4)})
    save_file({"b.norm.weight": torch.ones(4)}, tmp_path / SHARDS[1], {"format": "mlx"})
    files = Files(tmp_path)
    assert [files.layout(f"{name}.norm.weight") for name in "ab"] == ["hf", "mlx"]


# --------------------------------------------------------------------------------- large models


def many_shards(path, shards, layers, experts=0):
    """A norm in each layer, spread so that neighbours lie in different files, and experts.

    The tensors of experts are in the index alone.
    """
    files = [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(shards)]
    weight_map = {}
    for shard, file in enumerate(files):
        held = [f"model.layers.{i}.input_layernorm.weight" for i in range(shard, layers, shards)]
        save_file({name: torch.ones(2) for name in held}, path / file)
        weight_map |= dict.fromkeys(held, file)
    for layer in range(layers):
        for expert in range(experts):
            for part in ("gate_proj.weight", "up_proj.weight_scale_inv", "down_proj.weight"):
                name = f"model.layers.{layer}.mlp.experts.{expert}.{part}"
                weight_map[name] = files[layer % shards]
    write_index(path / INDEX, weight_map)
    return weight_map


def test_each_shard_is_opened_once_and_few_stay_open(tmp_path, monkeypatch):
    many_shards(tmp_path, shards=2 * _files._MOST_OPEN, layers=6 * _files._MOST_OPEN)
    opened, alive, most = [], set(), []

    class Noting:
        def __init__(self, path, **options):
            opened.append(os.fspath(path))
            alive.add(id(self))
            most.append(len(alive))
            self.file = safe_open(path, **options)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __del__(self):
            alive.discard(id(self))

    monkeypatch.setattr(_files, "safe_open", Noting)
    assert len(find_norms(tmp_path)) == 6 * _files._MOST_OPEN
    assert len(opened) == len(set(opened)) == 2 * _files._MOST_OPEN
    assert max(most) <= _files._MOST_OPEN


def test_an_index_is_parsed_once(tmp_path, monkeypatch):
    many_shards(tmp_path, shards=4, layers=20)
    parsed = []
    read = _files._read_index
    monkeypatch.setattr(_files, "_read_index", lambda path: parsed.append(path) or read(path))
    files = Files(tmp_path)
    for entry in find_norms(files):
        assert load_norm(files, entry.key).weight.shape == (2,)
    assert parsed == [tmp_path / INDEX]


def test_the_norms_of_a_model_of_92000_tensors_are_found_in_seconds(tmp_path):
    assert len(many_shards(tmp_path, shards=160, layers=320, experts=96)) > 92_000
    start = time.process_time()
    entries = find_norms(tmp_path)
    assert len(entries) == 320
    assert load_norm(tmp_path, entries[-1].key).weight.shape == (2,)
    with pytest.raises(KeyError, match=r"nearest keys are .*model\.layers\.0\.input_layernorm"):
        load_norm(tmp_path, "model.layer.0.input_layernorm")
    assert time.process_time() - start < 20  # 2 s; minutes if anything were looked up in a list
