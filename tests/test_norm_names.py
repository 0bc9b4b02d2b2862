"""Norms are known by the names that files give them, whatever wraps the model."""

from __future__ import annotations

import pytest
import torch

from checkpoints import WithKeys, WithoutKeys, file_of, odd_values, same_bits
from normkit import HeadNorm, LayerNorm, RMSNorm, load_norm
from normkit.checkpoint import _names, find_norms, read_norm, weight_names
from normkit.checkpoint._files import Files
from normkit.checkpoint._names import canonical

WEIGHTS = ["weight", "scale", "gamma"]
BIASES = ["bias", "beta"]


def keys_of(stored):
    return [entry.key for entry in find_norms(stored)]


# ----------------------------------------------------------------------------------------- endings


@pytest.mark.parametrize("make", [lambda _, stored: stored, file_of])
@pytest.mark.parametrize("bias", [None, *BIASES])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_weights_and_biases_have_any_of_their_names_in_any_mix(tmp_path, weight, bias, make):
    key = "double_blocks.0.img_attn.norm.query_norm"
    stored = {f"{key}.{weight}": odd_values(8)}
    if bias:
        stored[f"{key}.{bias}"] = odd_values(8).flip(0)
    source = make(tmp_path, stored)
    (entry,) = find_norms(source)
    assert (entry.key, entry.spec.has_bias) == (key, bias is not None)
    for name in (key, f"{key}.{weight}"):
        module = load_norm(source, name)
        assert isinstance(module, LayerNorm if bias else RMSNorm)
        assert same_bits(module.weight, stored[f"{key}.{weight}"])
        assert (module.bias is None) == (bias is None)
        if bias:
            assert same_bits(module.bias, stored[f"{key}.{bias}"])


def test_a_source_without_keys_is_asked_for_every_name_of_a_bias():
    stored = {"ln.weight": torch.ones(4), "ln.beta": odd_values(4)}
    assert same_bits(load_norm(WithoutKeys(stored), "ln").bias, stored["ln.beta"])


@pytest.mark.parametrize(("first", "second"), [("weight", "scale"), ("scale", "gamma")])
def test_a_key_is_listed_once_with_the_first_of_its_weights(first, second):
    stored = {f"norm.{second}": torch.zeros(4), f"norm.{first}": odd_values(4)}
    assert keys_of(stored) == ["norm"]
    assert same_bits(load_norm(stored, "norm").weight, stored[f"norm.{first}"])
    assert same_bits(load_norm(stored, f"norm.{second}").weight, stored[f"norm.{second}"])


def test_a_bias_goes_with_the_weight_it_is_named_like():
    stored = {"ln.gamma": torch.ones(4), "ln.bias": torch.zeros(4), "ln.beta": odd_values(4)}
    assert same_bits(load_norm(stored, "ln").bias, stored["ln.beta"])
    stored["ln.weight"] = stored.pop("ln.gamma")
    assert same_bits(load_norm(stored, "ln").bias, stored["ln.bias"])


@pytest.mark.parametrize("key", ["blocks.0", "blocks.0.ls1", "stages.1.layers.0", "layer_scale_1"])
def test_a_layer_scale_is_no_norm(key):
    stored = {f"{key}.gamma": torch.ones(4), f"{key}.norm.weight": torch.ones(4)}
    assert keys_of(stored) == [f"{key}.norm"]


# ------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    "key", ["image_proj_norm", "proj_layer_norm", "before_rms", "normalization", "linear_norm"]
)
def test_what_a_norm_comes_after_does_not_forbid_it(key):
    assert keys_of({f"{key}.weight": torch.ones(4)}) == [key]


def test_what_is_asked_first_of_a_name_holds_for_every_word_of_a_norm():
    for word in _names._NORM_WORDS:
        assert keys_of({f"{word}.weight": torch.ones(4)}) == [word]


@pytest.mark.parametrize("key", ["norm_proj", "layernorm_linear", "norm.q", "attn.q", "attn_qk.q"])
def test_what_comes_after_a_norm_is_none(key):
    for shape in [(4,), (3, 4)]:
        assert keys_of({f"{key}.weight": torch.ones(shape)}) == []


HEADS = ["q_norm", "k_norm", "v_norm", "B_norm", "c_norm", "norm_q", "ln_k", "qk_norm.q"]


@pytest.mark.parametrize("key", [*HEADS, "qk_norm.key", "attn.value_layernorm", "qk_layernorm"])
def test_weights_per_head_are_known_by_every_name_of_a_head(key):
    stored = {f"attn.{key}.weight": odd_values(12).view(3, 4)}
    (entry,) = find_norms(stored)
    assert (entry.key, entry.shape) == (f"attn.{key}", (3, 4))
    module = load_norm(stored, entry.key)
    assert isinstance(module, HeadNorm)
    assert (module.num_heads, module.head_dim) == (3, 4)
    assert same_bits(module.weight, stored[f"attn.{key}.weight"])


# ------------------------------------------------------------------ what wraps a module or a model

WRAPPED = {
    "base_model.model.model.norm": "model.norm",
    "base_model.model.norm": "norm",
    "model.norm.modules_to_save.default": "model.norm",
    "model.norm.modules_to_save.my-adapter": "model.norm",
    "model.norm.modules_to_save": "model.norm",
    "model.norm.ln_tuning_layers.default": "model.norm",
    "model.norm.original_module": "model.norm",
    "model.norm.base_layer": "model.norm",
    "_orig_mod.model.norm": "model.norm",
    "model.layers.0._orig_mod.norm": "model.layers.0.norm",
    "module.model.norm": "model.norm",
    "module._orig_mod.base_model.model.model.norm.modules_to_save.a": "model.norm",
    "_fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.norm": "layers.0.norm",
}
PLAIN = ["model.norm", "", "module", "base_model.norm", "a.module.norm", "base_layers.norm"]


@pytest.mark.parametrize(("prefix", "name"), [*WRAPPED.items(), *((p, p) for p in PLAIN)])
def test_the_canonical_name_is_that_in_the_plain_model(prefix, name):
    assert canonical(prefix) == name
    assert canonical(name) == name


@pytest.mark.parametrize(("prefix", "name"), WRAPPED.items())
def test_a_wrapped_norm_is_found_as_stored_and_has_its_plain_name_too(prefix, name):
    stored = {f"{prefix}.weight": odd_values(4), f"{prefix}.bias": torch.ones(4)}
    assert keys_of(stored) == [prefix]
    for key in (prefix, name, f"{name}.weight"):
        module = load_norm(WithKeys(stored), key)
        assert isinstance(module, LayerNorm)
        assert same_bits(module.weight, stored[f"{prefix}.weight"])
        assert read_norm(stored, key).key == prefix


@pytest.mark.parametrize("wrapper", ["modules_to_save", "ln_tuning_layers"])
@pytest.mark.parametrize("replaced", ["original_module", "base_layer"])
def test_of_a_norm_that_is_trained_the_plain_name_means_the_trained_one(wrapper, replaced):
    norm = "base_model.model.model.norm"
    stored = {
        f"{norm}.{replaced}.weight": torch.ones(4),
        f"{norm}.{wrapper}.default.weight": odd_values(4),
    }
    assert set(keys_of(stored)) == {f"{norm}.{replaced}", f"{norm}.{wrapper}.default"}
    trained = stored[f"{norm}.{wrapper}.default.weight"]
    for key in ("model.norm", "model.norm.weight", norm, f"{norm}.{wrapper}.default"):
        assert same_bits(load_norm(stored, key).weight, trained)
    assert same_bits(load_norm(stored, f"{norm}.{replaced}").weight, torch.ones(4))


def test_of_several_adapters_one_has_to_be_named():
    stored = {f"norm.modules_to_save.{name}.weight": torch.ones(4) for name in ("b", "a")}
    several = r"several: norm\.modules_to_save\.a, norm\.modules_to_save\.b"
    with pytest.raises(KeyError, match=several):
        load_norm(stored, "norm")
    assert load_norm(stored, "norm.modules_to_save.a").weight.shape == (4,)


# ----------------------------------------------------------------------- what a model's code knows


def test_what_is_known_of_a_model_comes_before_the_words(tmp_path):
    """Lumina 2 has a norm in a Sequential, and MobileBERT's LayerNorms normalise nothing."""
    in_sequential = "time_caption_embed.caption_embedder.0"
    keys = [in_sequential, "norm_out.norm", "layers.0.norm1.linear"]
    config = {"_class_name": "Lumina2Transformer2DModel"}
    path = file_of(tmp_path, {f"{key}.weight": torch.ones(4) for key in keys}, config)
    assert [entry.key for entry in find_norms(path)] == ["norm_out.norm", in_sequential]
    config = {"model_type": "mobilebert"}
    stored = {"encoder.layer.0.output.LayerNorm.weight": torch.ones(4), "a.weight": torch.ones(4)}
    assert find_norms(file_of(tmp_path, stored, config)) == []
    assert weight_names(Files(tmp_path)) == ["encoder.layer.0.output.LayerNorm.weight"]


def test_what_is_known_of_a_model_does_not_make_a_norm_of_what_has_no_weight(tmp_path):
    names = ["norm.bias", "norm.weight_g", "bn.weight", "bn.running_mean"]
    config = {"model_type": "llama"}  # of which all that is called so is a norm
    files = Files(file_of(tmp_path, {name: torch.ones(4) for name in names}, config))
    assert weight_names(files) == []
