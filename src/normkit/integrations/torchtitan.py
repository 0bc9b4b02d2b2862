"""Norms of torchtitan, as overrides of its configuration.

    --override.imports normkit.integrations.torchtitan.rms_norm

torchtitan imports this module where it is named, and builds the classes here where a model's
configuration has its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torchtitan.config import derive, override
from torchtitan.models.common import nn_modules
from torchtitan.protocols.module import Module

from normkit import modules

__all__ = ["LayerNorm", "RMSNorm", "layer_norm", "rms_norm"]


class RMSNorm(modules.RMSNorm, Module):  # type: ignore[misc]
    """torchtitan's RMSNorm on normkit's kernels; a `torch.nn.RMSNorm` with the same state dict."""

    @dataclass(kw_only=True, slots=True)
    class Config(nn_modules.RMSNorm.Config):  # type: ignore[misc]
        """What torchtitan's own takes."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.normalized_shape, config.eps, config.elementwise_affine)


@override(  # type: ignore[untyped-decorator]
    target=nn_modules.RMSNorm.Config,
    exact=True,
    description="normkit's RMSNorm kernels, forward and backward",
)
def rms_norm(config: nn_modules.RMSNorm.Config) -> RMSNorm.Config:
    """Make the configuration of normkit's RMSNorm of that of torchtitan's."""
    return cast(RMSNorm.Config, derive(config, RMSNorm.Config))


class LayerNorm(modules.LayerNorm, Module):  # type: ignore[misc]
    """torchtitan's LayerNorm on normkit's kernels; as `RMSNorm`."""

    @dataclass(kw_only=True, slots=True)
    class Config(nn_modules.LayerNorm.Config):  # type: ignore[misc]
        """What torchtitan's own takes."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.normalized_shape, config.eps, config.elementwise_affine)


@override(  # type: ignore[untyped-decorator]
    target=nn_modules.LayerNorm.Config,
    exact=True,
    description="normkit's LayerNorm kernels, forward and backward",
)
def layer_norm(config: nn_modules.LayerNorm.Config) -> LayerNorm.Config:
    """Make the configuration of normkit's LayerNorm of that of torchtitan's."""
    return cast(LayerNorm.Config, derive(config, LayerNorm.Config))
