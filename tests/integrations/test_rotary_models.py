"""q and k of models that are there already: norm_rope computes what their own code does."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import normkit

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about itself
# A model's folder in transformers, its norm, the options of normkit, and how many columns rotate.
MODELS = (
    ("qwen3", "Qwen3RMSNorm", {"round_before_weight": True}, 32),
    ("qwen3_moe", "Qwen3MoeRMSNorm", {"round_before_weight": True}, 32),
    ("gemma3", "Gemma3RMSNorm", {"weight_offset": 1.0}, 32),
    ("qwen3_next", "Qwen3NextRMSNorm", {"weight_offset": 1.0}, 8),
    ("glm4_moe", "Glm4MoeRMSNorm", {"round_before_weight": True}, 16),
)
# The float32 inside a norm is the model's but for its last bit, which decides next to a tie.
SAME = 0.998
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def modeling(name: str) -> Any:
    pytest.importorskip("transformers", reason="transformers is not installed")
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


@dtypes
@pytest.mark.parametrize(("name", "norm", "options", "columns"), MODELS, ids=lambda v: str(v))
def test_q_and_k_are_those_of_the_model(
    name: str, norm: str, options: dict[str, Any], columns: int, dtype: torch.dtype
) -> None:
    code = modeling(name)
    torch.manual_seed(0)
    q, k = torch.randn(2, 7, 4, 32).to(dtype), torch.randn(2, 7, 2, 32).to(dtype)
    angles = 3 * torch.randn(2, 7, columns // 2)
    cos, sin = (torch.cat((t, t), -1).to(dtype) for t in (angles.cos(), angles.sin()))
    own = getattr(code, norm)(32).to(dtype)
    with torch.no_grad():
        own.weight.normal_(0 if "weight_offset" in options else 1, 0.2)
        normalised = own(q).transpose(1, 2), own(k).transpose(1, 2)
        expected = code.apply_rotary_pos_emb(*normalised, cos, sin)
        table = cos[..., : columns // 2], sin[..., : columns // 2]
        weights = own.weight, own.weight
        made = normkit.qk_norm_rope(q, k, *table, *weights, round_each=True, **options)
    for got, one in zip(made, expected, strict=True):
        assert (got.transpose(1, 2) == one).float().mean() > SAME


def test_logits_of_a_model_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.bfloat16
    code = modeling("qwen3")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "vocab_size": 200}
    layers = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = code.Qwen3ForCausalLM(code.Qwen3Config(**sizes, **layers)).to(dtype).eval()
    ids = torch.randint(0, 200, (2, 11))
    attentions = [layer.self_attn for layer in model.model.layers]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1, 0.2)
        expected = model(ids).logits
    norms = iter([(a.q_norm, a.k_norm) for a in attentions])
    for attention in attentions:
        attention.q_norm = attention.k_norm = torch.nn.Identity()

    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, **_: Any) -> tuple[Tensor, ...]:
        of_q, of_k = next(norms)
        half = cos.shape[-1] // 2
        made = normkit.qk_norm_rope(
            q.transpose(1, 2), k.transpose(1, 2), cos[..., :half], sin[..., :half],
            of_q.weight, of_k.weight, eps=of_q.variance_epsilon,
            round_each=True, round_before_weight=True,
        )  # fmt: skip
        return tuple(t.transpose(1, 2) for t in made)

    monkeypatch.setattr(code, "apply_rotary_pos_emb", rotated)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    assert next(norms, None) is None


@dtypes
def test_flux_rotates_neighbours_in_float32(dtype: torch.dtype) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    embeddings = importlib.import_module("diffusers.models.embeddings")
    torch.manual_seed(0)
    q, weight = torch.randn(2, 9, 4, 32).to(dtype), torch.rand(32).to(dtype)
    angles = torch.randn(9, 16)
    both = tuple(t.repeat_interleave(2, -1) for t in (angles.cos(), angles.sin()))
    norm = torch.nn.functional.rms_norm(q, (32,), weight, 1e-6)
    expected = embeddings.apply_rotary_emb(norm, both, sequence_dim=1)
    options: dict[str, Any] = {"interleaved": True, "round_norm": True}
    got = normkit.norm_rope(q, angles.cos(), angles.sin(), weight, **options)
    assert (got == expected).float().mean() > SAME
