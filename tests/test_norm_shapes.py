"""The shape of a stored weight says which module it makes: one row, or one for each head."""

from __future__ import annotations

import pytest
import torch

from checkpoints import file_of, odd_values, same_bits
from normkit import HeadNorm, LayerNorm, RMSNorm, load_norm
from normkit.checkpoint import find_norms


def of_dict(_, stored):
    return stored


@pytest.mark.parametrize("key", ["attn.q_norm", "attn.k_norm", "attn.query_layernorm"])
@pytest.mark.parametrize(("config", "kind"), [({}, "rms"), ({"layer_norm_eps": 0.25}, "layer")])
def test_a_weight_per_head_makes_a_head_norm(tmp_path, key, config, kind):
    weight = odd_values(12).view(3, 4)
    path = file_of(tmp_path, {f"{key}.weight": weight}, config)
    for module in (load_norm(path, key), HeadNorm.from_checkpoint(path, key)):
        assert isinstance(module, HeadNorm)
        assert (module.num_heads, module.head_dim, module.kind) == (3, 4, kind)
        assert same_bits(module.weight, weight)
        module(torch.ones(2, 3, 4))
    assert load_norm(path, key, kind="layer").kind == "layer"
    assert [(e.spec.kind, e.shape) for e in find_norms(path)] == [(kind, (3, 4))]


def test_one_weight_for_all_heads_stays_one():
    stored = {"q_norm.weight": odd_values(4)}
    module = HeadNorm.from_checkpoint(stored, "q_norm")
    assert module.num_heads is None
    assert same_bits(module.weight, stored["q_norm.weight"])
    assert module(torch.ones(2, 7, 4)).shape == (2, 7, 4)
    assert isinstance(load_norm(stored, "q_norm"), RMSNorm)


def test_other_weights_of_several_dimensions_are_one_row():
    module = load_norm({"norm.weight": torch.ones(3, 4)}, "norm")
    assert isinstance(module, RMSNorm)
    assert module.normalized_shape == (3, 4)
    with pytest.raises(ValueError, match=r"norm: expected shape .*, got \(2, 3, 4\)"):
        HeadNorm.from_checkpoint({"norm.weight": torch.ones(2, 3, 4)}, "norm")


ONE_ROW = [(1, 8), (8, 1), (1, 1, 8), (8, 1, 1), (8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1)]


@pytest.mark.parametrize("make", [of_dict, file_of])
@pytest.mark.parametrize("key", ["norm", "attn.k_norm"])
@pytest.mark.parametrize("shape", ONE_ROW)
def test_dimensions_of_size_1_around_a_row_are_dropped(tmp_path, shape, key, make):
    weight, bias = odd_values(8), odd_values(8).flip(0)
    stored = {f"{key}.weight": weight.view(shape), f"{key}.bias": bias}
    for source in (stored, {f"{key}.weight": weight, f"{key}.bias": bias.view(shape)}):
        source = make(tmp_path, source)
        (entry,) = find_norms(source)
        assert (entry.key, entry.shape) == (key, (8,))
        for module in (load_norm(source, key), LayerNorm.from_checkpoint(source, key)):
            assert isinstance(module, LayerNorm)
            assert same_bits(module.weight, weight)
            assert same_bits(module.bias, bias)
            assert module(torch.ones(5, 8)).shape == (5, 8)


def test_a_row_of_one_element_stays_one():
    for shape in [(1,), (1, 1), (1, 1, 1)]:
        assert [e.shape for e in find_norms({"norm.weight": torch.ones(shape)})] == [(1,)]
        assert load_norm({"norm.weight": torch.ones(shape)}, "norm").weight.shape == (1,)


@pytest.mark.parametrize("shape", [(1, 3, 4), (3, 1, 4), (1, 3, 1, 4), (3, 4, 1)])
def test_dimensions_of_size_1_around_heads_are_dropped(shape):
    stored = {"attn.v_norm.weight": odd_values(12).view(shape)}
    assert [entry.shape for entry in find_norms(stored)] == [(3, 4)]
    module = load_norm(stored, "attn.v_norm")
    assert isinstance(module, HeadNorm)
    assert same_bits(module.weight, odd_values(12).view(3, 4))
