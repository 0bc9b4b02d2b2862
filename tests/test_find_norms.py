"""Every norm of a checkpoint is found, and nothing else."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from checkpoints import (
    LLAMA,
    MINILM,
    WithKeys,
    WithoutKeys,
    file_of,
    folder_of,
    same_bits,
    tensors,
)
from hostile_files import with_header
from normkit import LayerNorm, RMSNorm, load_norm
from normkit.checkpoint import find_norms

NORMS = """LayerNorm embeddings.LayerNorm layer_norm layernorm ln ln_1 ln_f ln_pre norm norm1 norm_f
input_layernorm post_attention_layernorm q_norm k_norm q_a_layernorm final_layer_norm model.norm
attention_norm self_attn_layer_norm layernorm_embedding layer_norm1 pre_layrnorm attn_ln norms.0
blocks.3.norm.1 encoder.final_RMSNorm enorm h.0.ln_2 blk.0.attn_q_norm output_norm
v.blk.0.ln1 blk.3.post_ffw_norm layers.0.ffn_norm block.0.attn.norm img_attn.norm.key_norm
LayerNorm_0 encoder.layers_0.pre_attention_layer_norm"""
OTHERS = """normalize_linear denormalizer norm_proj norm.linear layernorm_linear batch_norm
BatchNorm group_norm GroupNorm0 instance_norm weight_norm bn1 q_proj embed normal alternorm
norm.conv column lnear"""


@pytest.mark.parametrize("name", NORMS.split())
@pytest.mark.parametrize(("weight", "bias"), [("weight", "bias"), ("gamma", "beta")])
def test_norms_are_found_by_name(name, weight, bias):
    stored = {f"{name}.{weight}": torch.ones(4)}
    (entry,) = find_norms(stored)
    assert (entry.key, entry.spec.has_bias, entry.shape) == (name, False, (4,))
    stored[f"{name}.{bias}"] = torch.ones(4)
    (entry,) = find_norms(stored)
    assert (entry.key, entry.spec.has_bias, entry.spec.kind) == (name, True, "layer")
    assert load_norm(stored, entry.key).bias is not None


@pytest.mark.parametrize("name", OTHERS.split())
def test_other_names_are_not_found(name):
    assert find_norms({f"{name}.weight": torch.ones(4), f"{name}.bias": torch.ones(4)}) == []


@pytest.mark.parametrize(
    "stored",
    [
        {"norm.weight": torch.ones(4), "norm.running_mean": torch.ones(4)},
        {"conv.weight_g": torch.ones(4), "conv.weight_v": torch.ones(4)},
        {"norm.weight_g": torch.ones(4)},
        {"norm.bias": torch.ones(4)},
        {"norm.weight": torch.ones(3, 4)},
        {"norm.weight": torch.ones(())},
        {"norm.weight": torch.ones(4, dtype=torch.int64)},
        {"norm.weight": "text"},
        {},
    ],
)
def test_other_tensors_are_not_found(stored):
    assert find_norms(stored) == []


def test_entries_say_what_load_norm_makes(tmp_path):
    path = folder_of(tmp_path, tensors(), LLAMA)
    entries = find_norms(path)
    assert {entry.key for entry in entries} == {
        "model.layers.0.input_layernorm",
        "model.layers.0.self_attn.q_norm",
        "model.norm",
        "head.ln_1",
    }
    for entry in entries:
        module = load_norm(path, entry.key)
        assert isinstance(module, LayerNorm if entry.spec.kind == "layer" else RMSNorm)
        assert (entry.shape, entry.dtype) == (tuple(module.weight.shape), module.weight.dtype)
        assert entry.spec.has_bias == (module.bias is not None)
        assert (entry.spec.eps, entry.spec.weight_offset) == (module.eps, module.weight_offset)
        with safe_open(path / entry.shard, "pt") as file:
            assert f"{entry.key}.weight" in file.keys()  # noqa: SIM118 -- it is no dict


@pytest.mark.parametrize("make", [file_of, lambda _, stored: stored, lambda _, s: WithKeys(s)])
def test_numbers_in_names_are_sorted_as_numbers(tmp_path, make):
    stored = {f"layers.{i}.norm.weight": torch.ones(4) for i in (10, 9, 100, 1)}
    keys = [entry.key for entry in find_norms(make(tmp_path, stored))]
    assert keys == [f"layers.{i}.norm" for i in (1, 9, 10, 100)]


FLOAT8 = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}


@pytest.mark.parametrize("stored", FLOAT8)
def test_float8_weights_are_listed_and_refused_by_name(tmp_path, stored):
    header = {"norm.weight": {"dtype": stored, "shape": [4], "data_offsets": [0, 4]}}
    with_header(header, bytes(4))(tmp_path)
    (entry,) = find_norms(tmp_path)
    assert entry.dtype == FLOAT8[stored]
    with pytest.raises(TypeError, match=f"norm.weight: expected .*, got {entry.dtype}"):
        load_norm(tmp_path, "norm")


def test_all_norms_of_a_real_checkpoint_are_found():
    entries = find_norms(MINILM)
    assert len(entries) == 13  # one of the embeddings, two of each of 6 layers
    assert {
        (e.spec.kind, e.shape, e.dtype, e.spec.has_bias, e.spec.eps, e.shard) for e in entries
    } == {("layer", (384,), torch.float32, True, 1e-12, "model.safetensors")}
    with safe_open(MINILM / "model.safetensors", "pt") as file:
        for entry in entries:
            module = load_norm(MINILM, entry.key)
            assert same_bits(module.weight, file.get_tensor(f"{entry.key}.weight"))
            assert same_bits(module.bias, file.get_tensor(f"{entry.key}.bias"))


def test_finding_needs_keys():
    with pytest.raises(TypeError, match=r"source: expected an object with keys\(\)"):
        find_norms(WithoutKeys(tensors()))
