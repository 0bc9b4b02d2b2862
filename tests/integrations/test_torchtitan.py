"""`normkit.integrations.torchtitan` in a model of torchtitan."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkit

HOW = "`pip install --no-deps torchtitan`, and what its import then asks for"
llama3 = pytest.importorskip(
    "torchtitan.models.llama3", reason=f"torchtitan is not installed: {HOW}", exc_type=ImportError
)

from torchtitan.config.override import OverrideConfig, apply_overrides  # noqa: E402
from torchtitan.models.common import nn_modules  # noqa: E402

TARGETS = [f"normkit.integrations.torchtitan.{name}" for name in ("rms_norm", "layer_norm")]


def overridden(config: Any) -> list[str]:
    return apply_overrides(OverrideConfig(imports=list(TARGETS)), config)


def configuration() -> Any:
    return llama3.llama3_configs["debugmodel"]("flex")


@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm"])
def test_a_norm_is_built_as_normkits_and_is_still_torchs(name: str) -> None:
    cls = getattr(nn_modules, name)
    from normkit.integrations import torchtitan

    override = torchtitan.rms_norm if name == "RMSNorm" else torchtitan.layer_norm
    init = {"weight": nn.init.ones_}
    config = cls.Config(normalized_shape=64, eps=0.3, param_init=init)
    made, own = override(config).build(), config.build()
    assert isinstance(made, getattr(normkit, name))
    assert isinstance(made, getattr(nn, name))
    assert made.eps == 0.3
    assert made._param_init is init
    assert list(made.state_dict()) == list(own.state_dict())
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(made.weight)
    own.load_state_dict(made.state_dict())
    torch.testing.assert_close(made(x), own(x))
    plain = override(cls.Config(normalized_shape=64, elementwise_affine=False)).build()
    assert plain.weight is None


def test_all_norms_of_a_model_are_overridden() -> None:
    config = configuration()
    kinds = (nn_modules.RMSNorm.Config, nn_modules.LayerNorm.Config)
    norms = sum(1 for kind in kinds for _ in config.traverse(kind))
    assert len(overridden(config)) == norms == 13
    with torch.device("meta"):
        model = config.build()
    made = [m for m in model.modules() if isinstance(m, nn.RMSNorm | nn.LayerNorm)]
    assert len(made) == 13
    assert all(type(m).__module__ == "normkit.integrations.torchtitan" for m in made)


def test_a_block_trains_as_before() -> None:
    """The norms and the feed-forward of a layer: attention is compiled, which takes a minute."""
    config = configuration()
    before = copy.deepcopy(config)
    overridden(config)

    def step(layer: Any) -> list[Tensor]:
        torch.manual_seed(0)
        norm, mlp = layer.ffn_norm.build(), layer.feed_forward.build()
        norm.init_states()
        mlp.init_states()
        x = torch.randn(2, 8, 256, requires_grad=True)
        y = x + mlp(norm(x))
        parameters = [*norm.parameters(), *mlp.parameters()]
        return [y, *torch.autograd.grad(y.sin().sum(), [x, *parameters])]

    got, want = step(config.layers[0]), step(before.layers[0])
    assert len(got) == 6
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
