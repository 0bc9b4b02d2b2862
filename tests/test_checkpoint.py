"""Norms come out of a checkpoint as they were stored, with the options their model has."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from checkpoints import (
    LLAMA,
    WithKeys,
    WithoutKeys,
    file_of,
    folder_of,
    same_bits,
    tensors,
)
from normkit import HeadNorm, LayerNorm, RMSNorm, load_norm
from normkit.checkpoint import _files, find_norms, read_norm

SOURCES = {
    "file": file_of,
    "folder of shards": folder_of,
    "folder of one file": lambda path, stored: file_of(path, stored).parent,
    "str": lambda path, stored: str(file_of(path, stored)),
    "dict": lambda path, stored: stored,
    "object": lambda path, stored: WithKeys(stored),
    "object without keys": lambda path, stored: WithoutKeys(stored),
    "open file": lambda path, stored: safe_open(file_of(path, stored), "pt"),
}


@pytest.fixture(params=SOURCES)
def source(request, tmp_path):
    return SOURCES[request.param](tmp_path, tensors())


# ----------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("ending", ["", ".weight"])
def test_tensors_are_what_was_stored_bit_for_bit(source, ending):
    stored = tensors()
    for key, cls in [
        ("model.layers.0.input_layernorm", RMSNorm),
        ("model.norm", RMSNorm),
        ("head.ln_1", LayerNorm),
    ]:
        for module in (
            load_norm(source, key + ending),
            cls.from_checkpoint(source, key + ending),
        ):
            assert type(module) is cls
            assert same_bits(module.weight, stored[f"{key}.weight"])
            if cls is LayerNorm:
                assert same_bits(module.bias, stored[f"{key}.bias"])
            else:
                assert module.bias is None


def test_a_missing_key_names_the_nearest(source):
    with pytest.raises(KeyError, match=r"no norm 'model\.layer\.0\.input_layernorm'") as caught:
        load_norm(source, "model.layer.0.input_layernorm")
    if not isinstance(source, WithoutKeys) or isinstance(source, WithKeys):
        assert "nearest keys are model.layers.0.input_layernorm" in str(caught.value)


@pytest.mark.parametrize("key", ["head.ln_1.bias", "model.embed", "model", "", "weight"])
def test_what_is_no_norm_weight_is_missing(key):
    with pytest.raises(KeyError, match="no norm"):
        load_norm(tensors(), key)


def test_the_module_owns_its_tensors(source):
    module = load_norm(source, "model.norm")
    file = io.BytesIO()
    torch.save(module, file)
    assert file.tell() < 10_000  # a window on the file would take all of it along
    module.weight.data.fill_(7)
    assert same_bits(load_norm(source, "model.norm").weight, tensors()["model.norm.weight"])


def test_views_of_a_dict_are_stored_contiguously():
    packed = torch.randn(8, 3)
    module = load_norm({"norm.weight": packed[:, 1]}, "norm")
    assert module.weight.is_contiguous()
    assert torch.equal(module.weight, packed[:, 1])


def test_parameters_are_trainable_and_apart_from_the_source():
    stored = {"norm.weight": torch.nn.Parameter(torch.ones(4))}
    module = load_norm(stored, "norm")
    assert module.weight.requires_grad
    assert module.weight.is_leaf
    module(torch.ones(2, 4)).sum().backward()
    assert stored["norm.weight"].grad is None


def test_device():
    module = load_norm(tensors(), "head.ln_1", device="meta")
    assert module.weight.is_meta
    assert module.bias.is_meta


def test_a_loaded_norm_computes_what_torch_does_with_the_same_tensors():
    weight, bias = torch.randn(8), torch.randn(8)
    module = load_norm({"ln.weight": weight, "ln.bias": bias}, "ln", eps=0.3)
    x = torch.randn(5, 8)
    expected = torch.nn.functional.layer_norm(x, (8,), weight, bias, 0.3)
    torch.testing.assert_close(module(x), expected, rtol=2e-6, atol=2e-6)


# --------------------------------------------------------------------------- only what is asked for


def test_only_the_tensors_asked_for_are_read(tmp_path, monkeypatch):
    read = []

    class Counting:
        def __init__(self, *args, **options):
            self.file = safe_open(*args, **options)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_tensor(self, name):
            read.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr(_files, "safe_open", Counting)
    path = folder_of(tmp_path, tensors())
    load_norm(path, "head.ln_1")
    assert sorted(read) == ["head.ln_1.bias", "head.ln_1.weight"]
    read.clear()
    assert len(find_norms(path)) == 4
    assert read == []


def test_model_safetensors_is_the_one_of_several_files(tmp_path):
    file_of(tmp_path, tensors())
    save_file({"model.norm.weight": torch.ones(2)}, tmp_path / "adapter.safetensors")
    assert load_norm(tmp_path, "model.norm").weight.shape == (8,)


def test_a_dict_is_asked_for_nothing_else():
    class Picky(Mapping):
        def __getitem__(self, name):
            assert name in ("head.ln_1.weight", "head.ln_1.bias")
            return tensors()[name]

        def __iter__(self):
            return iter(tensors())

        def __len__(self):
            return len(tensors())

    assert isinstance(load_norm(Picky(), "head.ln_1"), LayerNorm)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"no header")])
def test_a_shard_that_is_not_needed_may_be_damaged(tmp_path, damage):
    path = folder_of(tmp_path, tensors())
    weight_map = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = path / weight_map["model.norm.weight"]
    other = next(path / shard for shard in weight_map.values() if shard != needed.name)
    damage(other)
    assert load_norm(path, "model.norm").weight.shape == (8,)
    lost = next(k for k, shard in weight_map.items() if shard == other.name and "norm" in k)
    with pytest.raises((OSError, ValueError), match=re.escape(str(other))):
        load_norm(path, lost)


# ------------------------------------------------------------------------------ config.json, kinds


@pytest.mark.parametrize("make", [file_of, folder_of])
def test_options_come_from_config(tmp_path, make):
    module = load_norm(make(tmp_path, tensors(), LLAMA), "model.norm")
    assert (module.eps, module.weight_offset, module.round_before_weight) == (3e-5, 0.0, True)


def test_an_explicit_argument_wins(tmp_path):
    path = file_of(tmp_path, tensors(), {**LLAMA, "model_type": "gemma"})
    assert load_norm(path, "model.norm").weight_offset == 1.0
    options = {"eps": 0.5, "weight_offset": 0.0, "round_before_weight": True}
    for module in (
        load_norm(path, "model.norm", **options),
        RMSNorm.from_checkpoint(path, "model.norm", **options),
        HeadNorm.from_checkpoint(path, "model.norm", **options),
    ):
        assert {name: getattr(module, name) for name in options} == options
    layer = load_norm(path, "model.norm", kind="layer", **options)
    assert isinstance(layer, LayerNorm)
    assert layer.eps == 0.5


@pytest.mark.parametrize(
    "name",
    ["rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"],
)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_eps_is_found_under_any_of_its_names(tmp_path, name, kind):
    path = file_of(tmp_path, tensors(), {name: 0.25})
    assert load_norm(path, "model.norm", kind=kind).eps == 0.25


@pytest.mark.parametrize("config", [None, {}, {"rms_norm_eps": None, "layer_norm_eps": None}])
def test_eps_without_a_config_is_that_of_the_class(tmp_path, config):
    path = file_of(tmp_path, tensors(), config)
    assert load_norm(path, "model.norm").eps == RMSNorm(1).eps == 1e-6
    assert load_norm(path, "head.ln_1").eps == LayerNorm(1).eps == 1e-5


# family, or family of the text_config; the norm; weight_offset, round_before_weight
FAMILIES = [
    ("llama", "model.norm", 0.0, True),
    ("mistral", "model.norm", 0.0, True),
    ("mixtral", "model.norm", 0.0, True),
    ("qwen2", "model.norm", 0.0, True),
    ("qwen3", "model.layers.0.self_attn.q_norm", 0.0, True),
    ("olmo2", "model.norm", 0.0, False),
    ("gpt_oss", "model.norm", 0.0, False),
    ("gemma", "model.norm", 1.0, False),
    ("gemma2", "model.norm", 1.0, False),
    ("gemma3_text", "model.layers.0.self_attn.q_norm", 1.0, False),
    ("qwen3_next", "model.norm", 1.0, False),
    ("qwen3_next", "model.layers.0.linear_attn.norm", 0.0, True),
    ("gemma3n_text", "model.norm", 0.0, False),
    ("gemma4_text", "model.norm", 0.0, False),
    ("some_new_model", "model.norm", 0.0, False),
]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("family", "key", "offset", "rounds"), FAMILIES)
def test_families_are_those_of_transformers(tmp_path, family, key, offset, rounds, nested):
    config = {"model_type": family, "rms_norm_eps": 0.25}
    if nested:
        config = {"model_type": "several_towers", "rms_norm_eps": 0.5, "text_config": config}
    module = load_norm(file_of(tmp_path, {f"{key}.weight": torch.ones(4)}, config), key)
    assert isinstance(module, RMSNorm)
    assert (module.eps, module.weight_offset) == (0.25, offset)
    assert module.round_before_weight is rounds


def test_a_tower_goes_by_its_own_config(tmp_path):
    config = {
        "model_type": "gemma3",
        "rms_norm_eps": 0.75,  # of nothing: both parts have a config of their own
        "text_config": {"model_type": "gemma3_text", "rms_norm_eps": 0.25},
        "vision_config": {"model_type": "siglip_vision_model", "layer_norm_eps": 0.5},
    }
    stored = {
        "language_model.model.norm.weight": torch.ones(4),
        "vision_tower.encoder.layer_norm1.weight": torch.ones(4),
        "vision_tower.encoder.layer_norm1.bias": torch.ones(4),
    }
    text, vision = find_norms(file_of(tmp_path, stored, config))
    assert (text.spec.kind, text.spec.eps, text.spec.weight_offset) == ("rms", 0.25, 1.0)
    assert (vision.spec.kind, vision.spec.eps, vision.spec.weight_offset) == ("layer", 0.5, 0.0)


def test_an_index_of_a_large_model_is_read(tmp_path):
    """With 208,000 tensors, of the longest names there are, it is within every limit."""
    names = [
        f"language_model.model.layers.{layer}.mlp.experts.{expert}.down_proj.weight_packed_{part}"
        for layer in range(65)
        for expert in range(400)
        for part in range(8)
    ]
    weight_map = dict.fromkeys(names, "model-00001-of-00062.safetensors")
    folder_of(tmp_path, tensors())
    index = tmp_path / "model.safetensors.index.json"
    weight_map |= json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2))
    assert index.stat().st_size > 20e6
    assert len(find_norms(tmp_path)) == 4


def test_a_tower_takes_nothing_from_the_language_model(tmp_path):
    config = {"model_type": "gemma", "layer_norm_eps": 0.25, "vision_config": {"hidden_size": 4}}
    path = file_of(tmp_path, {"vision_model.norm.weight": torch.ones(4)}, config)
    (entry,) = find_norms(path)
    assert (entry.spec.kind, entry.spec.eps, entry.spec.weight_offset) == ("rms", 1e-6, 0.0)


@pytest.mark.parametrize(
    ("name", "config", "kind"),
    [
        ("norm", {}, "rms"),
        ("norm", {"rms_norm_eps": 0.1}, "rms"),
        ("norm", {"layer_norm_eps": 0.1}, "layer"),
        ("norm", {"layer_norm_eps": 0.1, "rms_norm_eps": 0.1}, "rms"),
        ("rms_norm", {"layer_norm_eps": 0.1}, "rms"),
        ("layer_norm", {"layer_norm_epsilon": 0.1, "model_type": "t5"}, "rms"),
        ("norm_f", {"layer_norm_epsilon": 0.1, "model_type": "mamba"}, "rms"),
        ("final_norm", {"norm_eps": 0.1, "model_type": "modernbert"}, "layer"),
        ("input_layernorm", {"layer_norm_eps": 0.1, "model_type": "cohere"}, "layer"),
    ],
)
def test_the_kind_without_a_bias_is_told_by_name_and_config(tmp_path, name, config, kind):
    path = file_of(tmp_path, {f"{name}.weight": torch.ones(4)}, config)
    assert [entry.spec.kind for entry in find_norms(path)] == [kind]
    assert isinstance(load_norm(path, name), RMSNorm if kind == "rms" else LayerNorm)


def test_an_rms_norm_with_a_bias_is_asked_for():
    stored = {"norm.weight": torch.ones(4), "norm.bias": torch.full((4,), 2.0)}
    module = load_norm(stored, "norm", kind="rms")
    assert isinstance(module, RMSNorm)
    assert torch.equal(module.bias, stored["norm.bias"])


# ---------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("source", [None, 3, torch.ones(4), torch.nn.Linear(2, 2), [1]])
def test_a_source_of_the_wrong_type_is_refused(source):
    for function in (find_norms, lambda s: load_norm(s, "norm")):
        with pytest.raises(TypeError, match=r"source: expected .*, got"):
            function(source)


def test_a_value_that_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match=r"norm\.weight: expected a torch\.Tensor, got list"):
        load_norm({"norm.weight": [1.0]}, "norm")


@pytest.mark.parametrize("function", [load_norm, RMSNorm.from_checkpoint, read_norm])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"key": 3}, TypeError, "key: expected a str, got int"),
        ({"eps": "1e-6"}, TypeError, "eps: expected a number, got str"),
        ({"eps": [1e-6]}, TypeError, "eps: expected a number, got list"),
        ({"eps": float("nan")}, ValueError, "eps: expected a finite number, got nan"),
        ({"eps": float("inf")}, ValueError, "eps: expected a finite number, got inf"),
        ({"eps": 10**400}, ValueError, "eps: expected a finite number, got 1000"),
        ({"eps": 10**5000}, ValueError, "eps: expected a finite number, got one of thousands"),
        ({"eps": -1e-6}, ValueError, "eps: expected a number >= 0, got -1e-06"),
        ({"weight_offset": "1"}, TypeError, "weight_offset: expected a number, got str"),
        ({"weight_offset": float("nan")}, ValueError, "weight_offset: expected a finite number"),
        ({"round_before_weight": 1}, TypeError, "round_before_weight: expected True, False or"),
    ],
)
def test_an_option_that_no_call_can_use_is_refused_at_once(function, options, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        function(tensors(), **{"key": "model.norm", **options})


FLOAT8 = [
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, *FLOAT8])
def test_tensors_in_a_dtype_of_no_norm_are_refused(tmp_path, dtype):
    wrong, right = torch.ones(4).to(dtype), torch.ones(4)
    sources = [lambda stored: stored]
    if dtype != torch.float8_e8m0fnu:  # which safetensors reads and does not write
        sources.append(lambda stored: file_of(tmp_path, stored))
    for source in sources:
        for part, stored in [
            ("weight", {"norm.weight": wrong}),
            ("bias", {"norm.weight": right, "norm.bias": wrong}),
        ]:
            message = f"norm.{part}: expected float32, float16 or bfloat16, or float64, got {dtype}"
            with pytest.raises(TypeError, match=message):
                load_norm(source(stored), "norm")


def test_a_kind_that_is_none_is_refused():
    with pytest.raises(ValueError, match='kind: expected "rms", "layer" or None'):
        load_norm(tensors(), "model.norm", kind="batch")


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"norm: expected .*, got \(4,\) and \(5,\)"):
        load_norm({"norm.weight": torch.ones(4), "norm.bias": torch.ones(5)}, "norm")
    for shape in [(), (0,), (0, 4), (4, 0)]:
        with pytest.raises(ValueError, match=r"norm\.weight: expected the shape of a norm's"):
            load_norm({"norm.weight": torch.ones(shape)}, "norm")


def test_an_error_of_the_source_is_not_taken_for_a_missing_tensor():
    class Broken(WithKeys):
        def get_tensor(self, name):
            if name.endswith("bias"):
                raise KeyError("the cable is out")
            return super().get_tensor(name)

    with pytest.raises(KeyError, match="the cable is out"):
        load_norm(Broken(tensors()), "head.ln_1")


@pytest.mark.parametrize("size", [0, 4, 8, 60, -1])
def test_a_truncated_file_is_named(tmp_path, size):
    path = file_of(tmp_path, tensors())
    path.write_bytes(path.read_bytes()[:size])
    for source in (path, tmp_path):
        for function in (find_norms, lambda s: load_norm(s, "model.norm")):
            with pytest.raises(ValueError, match=re.escape(str(path))):
                function(source)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object, got list"),
        ("{}", "expected a weight_map"),
        ('{"weight_map": []}', "expected a weight_map"),
        ('{"weight_map": {"norm.weight": 1}}', "expected a weight_map"),
    ],
)
def test_a_malformed_index_is_named(tmp_path, content, message):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(index))}: {message}"):
        load_norm(tmp_path, "norm")


def test_an_index_that_lies_is_told(tmp_path):
    path = folder_of(tmp_path, tensors())
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"norm.weight": "model-1-of-2.safetensors"}}))
    with pytest.raises(ValueError, match=r"model-1-of-2\.safetensors: cannot read norm\.weight"):
        load_norm(path, "norm")


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_a_malformed_config_is_named(tmp_path, content):
    path = file_of(tmp_path, tensors())
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "config.json"))):
        load_norm(path, "model.norm")


@pytest.mark.parametrize("value", ["1e-5", True, [1e-5]])
def test_an_eps_that_is_no_number_is_told(tmp_path, value):
    path = file_of(tmp_path, tensors(), {"rms_norm_eps": value})
    with pytest.raises(ValueError, match=r"config\.json: rms_norm_eps: expected a number, got"):
        load_norm(path, "model.norm")


def test_a_path_that_holds_no_checkpoint_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_norm(tmp_path / "nowhere", "norm")
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file"):
        load_norm(tmp_path, "norm")
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected a \.safetensors file"):
        load_norm(tmp_path / "model.bin", "norm")
    for name in ("a", "b"):
        save_file(tensors(), tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"name one of them: a\.safetensors, b\.safetensors"):
        load_norm(tmp_path, "norm")
