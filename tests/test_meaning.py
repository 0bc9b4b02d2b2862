"""What a stored norm computes, and where that was said: by the caller, by files, by nobody."""

from __future__ import annotations

import warnings

import pytest
import torch

from checkpoints import LLAMA, file_of
from normkit import LayerNorm, RMSNorm, load_norm
from normkit.checkpoint import AssumedWarning, NoRowError, find_norms, read_norm

W, B = torch.ones(8), torch.zeros(8)


def entry_of(tmp_path, key, config, *, bias=False):
    stored = {f"{key}.weight": W} | ({f"{key}.bias": B} if bias else {})
    (found,) = find_norms(file_of(tmp_path, stored, config))
    return found


def options(entry):
    spec = entry.spec
    return spec.kind, spec.eps, spec.weight_offset, spec.round_before_weight


def sources(entry):
    return {name: origin.source for name, origin in entry.origins.items()}


# ------------------------------------------------------------------------------- known families

VL = {"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text"}, "vision_config": {}}
GEMMA3 = {
    "model_type": "gemma3",
    "text_config": {"model_type": "gemma3_text"},
    "vision_config": {"model_type": "siglip_vision_model"},
}
PIXTRAL = {"model_type": "mistral3", "vision_config": {"model_type": "pixtral"}}
QFORMER = {"model_type": "blip-2", "qformer_config": {"layer_norm_eps": 0.25}}
COLPALI = {"model_type": "colpali", "vlm_config": {"model_type": "paligemma"}}
KNOWN = {
    "a default of the config's class": (
        GEMMA3, "vision_tower.vision_model.encoder.layers.0.layer_norm1", True,
        ("layer", 1e-6, 0.0, False),
    ),
    "an eps that the code fixes": (
        VL, "model.visual.blocks.0.norm1", True, ("layer", 1e-6, 0.0, False)
    ),
    "a part with an eps of its own": (
        PIXTRAL, "vision_tower.transformer.layers.0.attention_norm", False,
        ("rms", 1e-5, 0.0, True),
    ),
    "a section of another name": (
        QFORMER, "qformer.encoder.layer.0.attention.output.LayerNorm", True,
        ("layer", 0.25, 0.0, False),
    ),
    "a section within a section": (
        COLPALI, "vlm.language_model.model.layers.0.input_layernorm", False,
        ("rms", 1e-6, 1.0, False),
    ),
    "an rms norm called LayerNorm": (
        {"model_type": "t5", "layer_norm_epsilon": 0.25}, "encoder.final_layer_norm", False,
        ("rms", 0.25, 0.0, True),
    ),
    "a LayerNorm without a bias": (
        {"model_type": "cohere"}, "model.norm", False, ("layer", 1e-5, 0.0, False)
    ),
    "one norm of a family that is unlike the others": (
        {"model_type": "deepseek_v3", "rms_norm_eps": 0.25},
        "model.layers.0.self_attn.q_a_layernorm", False, ("rms", 1e-6, 0.0, True),
    ),
    "an offset of a LayerNorm": (
        {"model_type": "videoprism_vision_model"}, "layernorm1", True,
        ("layer", 1e-6, 1.0, False),
    ),
    "a model of diffusers": (
        {"_class_name": "LTXVideoTransformer3DModel", "norm_eps": 0.25},
        "transformer_blocks.0.attn1.norm_q", False, ("rms", 1e-5, 0.0, False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_family_is_what_its_own_code_computes(tmp_path, name):
    config, key, bias, expected = KNOWN[name]
    entry = entry_of(tmp_path, key, config, bias=bias)
    assert options(entry) == expected
    assert "assumed" not in sources(entry).values()


def test_each_option_says_where_it_came_from(tmp_path):
    entry = entry_of(tmp_path, "model.norm", LLAMA)
    assert {k: str(v) for k, v in entry.origins.items()} == {
        "kind": "family: llama",
        "eps": "config: rms_norm_eps",
        "weight_offset": "family: llama",
        "round_before_weight": "family: llama",
    }
    stored = read_norm(tmp_path, "model.norm", eps=0.5, kind="rms")
    assert {k: v.source for k, v in stored.origins.items()} == {
        "kind": "given",
        "eps": "given",
        "weight_offset": "family",
        "round_before_weight": "family",
    }


# ------------------------------------------------------------------------------ no norms of rows

NONE = {
    "weight * x + bias": ({"model_type": "mobilebert"}, "encoder.layer.0.output.LayerNorm", True),
    "a group norm": ({"_class_name": "AutoencoderKL"}, "encoder.mid_block.resnets.0.norm1", True),
    "groups of a row": (
        {"model_type": "mamba2", "n_groups": 8},
        "backbone.layers.0.mixer.norm",
        False,
    ),
}


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_norm_of_rows_is_neither_listed_nor_loaded(tmp_path, name):
    config, key, bias = NONE[name]
    stored = {f"{key}.weight": W} | ({f"{key}.bias": B} if bias else {})
    path = file_of(tmp_path, stored, config)
    assert find_norms(path) == []
    with pytest.raises(NoRowError, match="no norm of rows: "):
        load_norm(path, key)
    assert isinstance(load_norm(path, key, kind="layer", eps=1e-5), LayerNorm)


def test_a_gate_beside_the_norm_is_told(tmp_path):
    key = "backbone.layers.0.mixer.norm"
    entry = entry_of(tmp_path, key, {"model_type": "mamba2", "n_groups": 1})
    assert entry.note == "gate before-silu"
    assert entry_of(tmp_path, "model.norm", LLAMA).note == ""


# ------------------------------------------------------------------------ what nobody has stated


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (None, "no config.json"),
        ({}, "no config.json"),
        ({"rms_norm_eps": 0.25}, "no family in config.json"),
        ({"model_type": "of_tomorrow", "rms_norm_eps": 0.25}, "the family of_tomorrow is unknown"),
    ],
)
def test_what_nobody_stated_is_assumed_and_said(tmp_path, config, why):
    path = file_of(tmp_path, {"model.norm.weight": W}, config)
    with pytest.warns(AssumedWarning, match=why):
        module = load_norm(path, "model.norm")
    assert isinstance(module, RMSNorm)
    assert module.eps == (0.25 if config else 1e-6)
    with pytest.warns(AssumedWarning, match=why):
        RMSNorm.from_checkpoint(path, "model.norm")
    (entry,) = find_norms(path)
    assert set(sources(entry).values()) == {"assumed"}


def test_what_is_stated_is_not_warned_of(tmp_path):
    stated = {"kind": "rms", "eps": 0.5, "weight_offset": 0.0, "round_before_weight": False}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_norm({"norm.weight": W}, "norm", **stated)
        load_norm(file_of(tmp_path, {"model.norm.weight": W}, LLAMA), "model.norm")
    for name in stated:
        rest = {k: v for k, v in stated.items() if k != name}
        with pytest.warns(AssumedWarning, match=f"so {name}="):
            load_norm({"norm.weight": W}, "norm", **rest)


def test_the_warning_is_shown_once_for_a_source(tmp_path):
    keys = [f"model.layers.{i}.input_layernorm" for i in range(5)]
    path = file_of(tmp_path, {f"{key}.weight": W.clone() for key in keys})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for key in keys:
            load_norm(path, key)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_on_what_all_norms_of_a_family_agree_is_known_of_an_unknown_name(tmp_path):
    config = {"model_type": "aimv2", "vision_config": {}, "text_config": {}}
    entry = entry_of(tmp_path, "a_new.norm_of_its_own", config)
    assert options(entry) == ("rms", 1e-6, 0.0, True)
    assert sources(entry)["kind"] == sources(entry)["round_before_weight"] == "family"
    assert sources(entry)["eps"] == "assumed"


def test_a_norm_with_a_bias_is_none_of_a_family_without(tmp_path):
    entry = entry_of(tmp_path, "mm_projector.norm", LLAMA, bias=True)
    assert entry.spec.kind == "layer"
    assert sources(entry)["kind"] == "assumed"


def test_a_tower_added_to_a_family_takes_nothing_of_it(tmp_path):
    config = {"model_type": "gemma", "rms_norm_eps": 0.25, "vision_config": {"depth": 2}}
    entry = entry_of(tmp_path, "vision_tower.norm", config)
    assert options(entry) == ("rms", 1e-6, 0.0, False)
    assert set(sources(entry).values()) == {"assumed"}


# ------------------------------------------------------------------------ layouts of other tools


def test_weights_that_contain_the_1_are_not_offset_again(tmp_path):
    config = {"model_type": "gemma", "rms_norm_eps": 0.25}
    stored = {"blk.0.attn_norm.weight": W, "output_norm.weight": B}
    entries = find_norms(file_of(tmp_path, stored, config))
    assert [e.spec.weight_offset for e in entries] == [0.0, 0.0]
    assert {e.origins["weight_offset"].source for e in entries} == {"layout"}
    assert load_norm(tmp_path, "output_norm", weight_offset=1.0).weight_offset == 1.0
