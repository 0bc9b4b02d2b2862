"""The model that a stranger's config.json describes is built with care, and judges fairly."""

from __future__ import annotations

import logging
import os
import signal

import pytest
import torch

from normkit import LayerNorm, RMSNorm, _originals
from normkit._originals import NoOriginals, Originals
from normkit.checkpoint._families import part_of

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 96,
}
NORM = "model.norm.weight"


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 10**9},
        {"text_config": {"n_layer": 10**9}},
        {"depths": [1000, 1000, 1000]},
        {"parts": [{"num_blocks": 10**9}]},
        {"num_hidden_layers": 1000, "num_experts": 1000},
        {"num_labels": 10**9},
    ],
    ids=str,
)
def test_a_model_without_end_is_not_built(config):
    with pytest.raises(NoOriginals, match="than any model has"):
        _originals._check_sizes(config)


@pytest.mark.parametrize(
    "config",
    [
        {"block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2},
        {"num_hidden_layers": 61, "n_routed_experts": 384, "hidden_size": 7168},
        {"block_size": 4096, "num_labels": 1000},
    ],
    ids=str,
)
def test_published_sizes_are_none_without_end(config):
    _originals._check_sizes(config)


def test_what_reaches_beyond_the_config_is_left_out():
    config = {
        "attn_implementation": "someone/kernel",
        "use_pretrained_backbone": True,
        "auto_map": {"AutoConfig": "x.Y"},
        "vision_config": {"_attn_implementation": "someone/kernel", "depth": 2},
        "limits": [0.0, {"__float__": "Infinity"}],
    }
    written = _originals._as_written(config)
    assert written == {"vision_config": {"depth": 2}, "limits": [0.0, float("inf")]}


@pytest.mark.parametrize(
    "changed",
    [
        {"architectures": ["GPT2LMHeadModel"]},
        {"architectures": ["Conv1D", None, 3]},
        {"architectures": "os.system"},
        {"attn_implementation": "someone/kernel"},
        {"dtype": "os"},
    ],
    ids=str,
)
def test_what_decides_nothing_about_norms_hinders_no_comparison(transformers, changed):
    judge = Originals(LLAMA | changed).judge
    assert judge(NORM, RMSNorm(64, 1e-6, round_before_weight=True), "rms").same


def test_what_does_not_fit_is_said(transformers):
    judge = Originals(LLAMA).judge
    assert judge(NORM, RMSNorm(32), "rms").reason == "its weight is (64,), not (32,)"
    assert "no bias, and one is stored" in judge(NORM, LayerNorm(64), "layer").reason
    bert = {"model_type": "bert", "num_hidden_layers": 1, "hidden_size": 64, "vocab_size": 96}
    name = "embeddings.LayerNorm.weight"
    verdict = Originals(bert | {"num_attention_heads": 4}).judge(
        name, LayerNorm(64, bias=False), "layer"
    )
    assert verdict.reason == "it has a bias, and none is stored"


def test_a_dtype_that_could_not_be_compared_is_said(transformers):
    config = {"model_type": "deberta", "hidden_size": 64, "vocab_size": 96, "num_hidden_layers": 1}
    ours = LayerNorm(64, 1e-7, dtype=torch.bfloat16)
    verdict = Originals(config | {"num_attention_heads": 4, "intermediate_size": 64}).judge(
        "embeddings.LayerNorm.weight", ours, "layer"
    )
    assert verdict.same
    assert verdict.reason.startswith("not compared in torch.bfloat16: rounds elsewhere")


@pytest.mark.parametrize("rounds", [True, False])
def test_a_weight_that_is_rounded_with_its_offset_is_compared(transformers, rounds):
    config = LLAMA | {"model_type": "nemotron", "architectures": ["NemotronForCausalLM"]}
    ours = LayerNorm(64, 1e-5, weight_offset=1.0, round_weight=rounds, dtype=torch.bfloat16)
    verdict = Originals(config | {"num_key_value_heads": 4, "head_dim": 16}).judge(
        NORM, ours, "layer"
    )
    assert verdict.same is rounds
    assert rounds or verdict.reason == "round_weight is True, not False"


@pytest.mark.parametrize("family", [["llama"], {"a": 1}, 3, None, "nobody's", "\x1b[31m"])
def test_what_is_no_family_is_said(transformers, family):
    with pytest.raises(NoOriginals, match="has no family"):
        Originals(LLAMA | {"model_type": family})


def test_nesting_of_any_depth_is_no_crash(transformers):
    deep: dict[str, object] = {}
    for _ in range(5000):
        deep = {"a": deep}
    with pytest.raises(NoOriginals):
        Originals(LLAMA | {"a": deep})


def test_the_process_is_left_as_it_was(transformers):
    from huggingface_hub import constants

    def state():
        handler, timer = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
        offline = os.environ.get("HF_HUB_OFFLINE"), constants.HF_HUB_OFFLINE
        return handler, timer, offline, logging.root.manager.disable

    before = state()
    Originals(LLAMA)
    with pytest.raises(NoOriginals):
        Originals(LLAMA | {"hidden_size": "x"})
    assert state() == before


def test_a_model_that_takes_all_memory_is_given_up(monkeypatch):
    used = iter([0, 0, 9 << 30])
    monkeypatch.setattr(_originals, "_peak_bytes", lambda: next(used, 9 << 30))
    monkeypatch.setattr(_originals, "_CHECKED_EVERY", 0.01)

    @_originals._in_time()
    def build():
        while True:
            pass

    with pytest.raises(MemoryError, match="not built in 4 GiB"):
        build()


def test_a_section_is_of_the_parts_around_the_layers():
    tower = {"model_type": "siglip_vision_model"}
    config = {"model_type": "mpt", "attn_config": {}, "norm_config": {}, "q": {}, "vision": tower}
    for name in ("transformer.blocks.*.attn.q_ln", "transformer.norm_f", "model.norm"):
        assert part_of(config, name) is config
    assert part_of(config, "model.vision_tower.encoder.layers.*.norm1") is tower
