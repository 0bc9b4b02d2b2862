"""Norms of Megatron-Core, in the specifications of its layers.

    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from normkit.integrations import megatron

    spec = megatron.with_norms(get_gpt_layer_local_spec(normalization="RMSNorm"))

Unlike the norms of torch that Megatron-Core falls back to, these take sequence parallelism and
weights that are centred on zero.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from normkit.modules import LayerNorm, RMSNorm

__all__ = ["Norm", "spec_provider", "with_norms"]

# The classes of Megatron-Core that `Norm` takes the place of, by name: some need other packages.
REPLACED = ("FusedLayerNorm", "TENorm", "WrappedTorchNorm")


class Norm:
    """What specifications name: Megatron-Core calls it, and gets the module that its config means.

    Args:
        config: a `TransformerConfig`; `normalization`, `layernorm_zero_centered_gamma`,
            `memory_efficient_layer_norm` and `sequence_parallel` are read.
        hidden_size: elements of a row.
        eps: added to the statistic.

    Raises:
        ValueError: config.normalization is neither "LayerNorm" nor "RMSNorm".
    """

    def __new__(  # type: ignore[misc]
        cls, config: Any, hidden_size: int, eps: float = 1e-5
    ) -> RMSNorm | LayerNorm:
        """Make the module."""
        kinds: dict[str, type[RMSNorm | LayerNorm]] = {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}
        if config.normalization not in kinds:
            raise ValueError(
                f"config.normalization: expected {' or '.join(kinds)}, got {config.normalization!r}"
            )
        norm = kinds[config.normalization](
            hidden_size,
            eps,
            weight_offset=1.0 if config.layernorm_zero_centered_gamma else 0.0,
            memory_efficient=config.memory_efficient_layer_norm,
        )
        for parameter in norm.parameters():
            # Megatron-Core sums the gradients of these over the ranks that have parts of a sequence
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm


def with_norms(spec: Any) -> Any:
    """Return a specification with `Norm` for each norm that it names.

    Args:
        spec: a `ModuleSpec`, or the submodules of one.  It is not changed.

    What is fused with a linear layer (TELayerNormColumnParallelLinear) stays.
    """
    if isinstance(spec, type):
        return Norm if spec.__name__ in REPLACED else spec
    if isinstance(spec, list):
        return [with_norms(part) for part in spec]
    if not dataclasses.is_dataclass(spec):
        return spec
    fields = (field.name for field in dataclasses.fields(spec) if field.init)
    # submodules are dataclasses of specifications; what else a specification holds are arguments
    parts = {name: getattr(spec, name) for name in fields if name not in ("params", "metainfo")}
    instance: Any = spec
    return dataclasses.replace(instance, **{k: with_norms(v) for k, v in parts.items()})


def spec_provider(base: type | None = None) -> Any:
    """Make a `BackendSpecProvider` whose layer norm is `Norm`, for functions that take a backend.

    Args:
        base: whose other modules it provides; None for Megatron-Core's `LocalSpecProvider`.

    Raises:
        ImportError: base is None and Megatron-Core is not installed.
    """
    if base is None:
        from megatron.core.models.backends import LocalSpecProvider

        base = LocalSpecProvider

    def layer_norm(self: object, *_: object, **__: object) -> type[Norm]:
        return Norm

    return type("NormkitSpecProvider", (base,), {"layer_norm": layer_norm})()
