"""`normkit.integrations.megatron` in specifications of Megatron-Core."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkit
from normkit.integrations.megatron import Norm, spec_provider, with_norms

HOW = "`pip install --no-deps megatron-core`"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what else is not installed
    specs = pytest.importorskip(
        "megatron.core.models.gpt.gpt_layer_specs",
        reason=f"Megatron-Core is not installed: {HOW}",
        exc_type=ImportError,
    )
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

N = 64
EPS = 0.3
KINDS = ("LayerNorm", "RMSNorm")
every_kind = pytest.mark.parametrize("kind", KINDS)


def config(kind: str, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TransformerConfig(
            num_layers=1, hidden_size=N, num_attention_heads=4, normalization=kind, **options
        )


def built(kind: str, **options: Any) -> Any:
    return build_module(Norm, config=config(kind, **options), hidden_size=N, eps=EPS)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3 + 0.5


def randomise(norm: nn.Module) -> nn.Module:
    for seed, parameter in enumerate(norm.parameters()):
        parameter.data.copy_(random(N, seed=seed + 3))
    return norm


@every_kind
def test_a_norm_is_that_of_the_configuration(kind: str) -> None:
    norm = randomise(built(kind))
    own = build_module(WrappedTorchNorm, config=config(kind), hidden_size=N, eps=EPS)
    assert isinstance(norm, getattr(normkit, kind))
    assert norm.eps == own.eps == EPS
    own.load_state_dict(norm.state_dict())
    x = random(5, 2, N)

    def step(module: nn.Module) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        assert y._base is None  # Megatron-Core frees the memory of outputs that are no views
        return [y, *torch.autograd.grad(y.sin().sum(), [leaf, *module.parameters()])]

    for mine, other in zip(step(norm), step(own), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@every_kind
def test_weights_may_be_centred_on_zero(kind: str) -> None:
    norm = built(kind, layernorm_zero_centered_gamma=True)
    assert not norm.weight.any()
    plain = randomise(built(kind))
    norm.load_state_dict(plain.state_dict())
    norm.weight.data -= 1
    torch.testing.assert_close(norm(random(5, N)), plain(random(5, N)))


@every_kind
@pytest.mark.parametrize("parallel", [False, True])
def test_parameters_say_whether_sequences_are_split(kind: str, parallel: bool) -> None:
    options = {"sequence_parallel": True, "tensor_model_parallel_size": 2} if parallel else {}
    parameters = list(built(kind, **options).parameters())
    assert len(parameters) == (2 if kind == "LayerNorm" else 1)
    assert all(parameter.sequence_parallel is parallel for parameter in parameters)


def test_memory_efficient_norms_are() -> None:
    assert built("LayerNorm", memory_efficient_layer_norm=True).memory_efficient
    assert not built("LayerNorm").memory_efficient


def test_another_normalisation_is_an_error() -> None:
    with pytest.raises(ValueError, match="config.normalization: expected LayerNorm or RMSNorm"):
        built("L2Norm")


@every_kind
def test_every_norm_of_a_specification_is_replaced(kind: str) -> None:
    spec = specs.get_gpt_layer_local_spec(normalization=kind, qk_layernorm=True)
    made = with_norms(spec)
    layer, attention = made.submodules, made.submodules.self_attention.submodules
    named = [layer.input_layernorm, layer.pre_mlp_layernorm]
    named += [attention.q_layernorm, attention.k_layernorm]
    assert named == [Norm] * 4
    assert spec.submodules.input_layernorm is not Norm
    assert made.module is spec.module
    assert layer.self_attention.params == spec.submodules.self_attention.params
    assert attention.linear_qkv is spec.submodules.self_attention.submodules.linear_qkv
    assert layer.mlp == spec.submodules.mlp
    assert layer.sharded_state_dict_keys_map == spec.submodules.sharded_state_dict_keys_map
    block = with_norms(TransformerBlockSubmodules(layer_specs=[spec], layer_norm=WrappedTorchNorm))
    assert block.layer_norm is Norm
    assert block.layer_specs == [made]


def test_a_provider_gives_the_norm_and_else_what_its_base_does() -> None:
    provider = spec_provider()
    assert isinstance(provider, LocalSpecProvider)
    assert provider.layer_norm(rms_norm=True, for_qk=True) is Norm
    assert provider.row_parallel_linear() is LocalSpecProvider().row_parallel_linear()
    spec = specs.get_mlp_module_spec_for_backend(backend=provider)
    assert spec.submodules.linear_fc2 is provider.row_parallel_linear()
