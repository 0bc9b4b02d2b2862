"""The layers that `normkit.integrations.sglang` registers: SGLang's own, with one backend more.

SGLang asks a layer for each call which of its backends may run it, and these say "plugin", the one
that is not SGLang's, where normkit rounds as the layer's formula in torch (`forward_native`) does.
Residuals are added in place, as by SGLang's own kernels.
"""

from __future__ import annotations

from typing import Any, ClassVar

from sglang.kernels.spec import KernelBackend
from sglang.srt.batch_invariant_ops import is_batch_invariant_mode_enabled
from sglang.srt.layers import layernorm
from torch import Tensor, float32

from normkit.functional import add_rms_norm, add_rms_norm_, layer_norm, rms_norm

Made = Tensor | tuple[Tensor, Tensor]


class _Plugged:
    """What all layers have: the backend, on any device that normkit has kernels for."""

    capabilities: ClassVar[dict[Any, frozenset[Any]]] = {KernelBackend.PLUGIN: frozenset()}

    def backend_eligible(self, backend: Any, x: Tensor, *args: Any, **options: Any) -> bool:
        """Whether a backend may run this call."""
        if backend is not KernelBackend.PLUGIN:
            asked: bool = super().backend_eligible(backend, x, *args, **options)  # type: ignore[misc]
            return asked
        return _is_here(self, x) and self.is_served(x, *args, **options)

    def is_served(self, x: Tensor, *args: Any, **options: Any) -> bool:
        """Whether the layer's formula is one of normkit's for these."""
        return True


class RMSNorm(_Plugged, layernorm.RMSNorm):  # type: ignore[misc]
    """SGLang's RMSNorm."""

    def is_served(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        post_residual_addition: Tensor | None = None,
        quant_linear: object = None,
    ) -> bool:
        """Not with what SGLang fuses more into, nor with other dtypes than these."""
        if (
            post_residual_addition is not None
            or quant_linear is not None
            or self._quant_linear is not None
            or self.variance_size_override is not None
            or x.shape[-1] != self.hidden_size
            or self.override_orig_dtype not in (None, x.dtype)
            or is_batch_invariant_mode_enabled()
        ):
            return False
        if self.cast_x_before_out_mul and self.weight.dtype != x.dtype:
            return False
        kept = float32 if self.fp32_residual else x.dtype
        return residual is None or residual.dtype == kept

    def forward_plugin(self, x: Tensor, residual: Tensor | None = None, *_: object) -> Made:
        """Normalise x, or add it to the residual first."""
        weight = self.weight.data if self.has_weight else None
        first = self.cast_x_before_out_mul
        eps = self.variance_epsilon
        if residual is None:
            return rms_norm(x, weight, None, eps, round_before_weight=first)
        return _add(x, residual, weight, None, eps, round_sum=False, round_before_weight=first)


class _Gemma(_Plugged):
    def is_served(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        post_residual_addition: Tensor | None = None,
    ) -> bool:
        """Not with a second sum, nor with one of two dtypes."""
        return post_residual_addition is None and (residual is None or residual.dtype == x.dtype)


class GemmaRMSNorm(_Gemma, layernorm.GemmaRMSNorm):  # type: ignore[misc]
    """SGLang's GemmaRMSNorm; the sum is rounded before it is normalised, on CUDA too."""

    def forward_plugin(self, x: Tensor, residual: Tensor | None = None, *_: object) -> Made:
        """Normalise x, or add it to the residual first."""
        return _gemma(x, residual, self.weight.data, self.variance_epsilon)


class Gemma3RMSNorm(_Gemma, layernorm.Gemma3RMSNorm):  # type: ignore[misc]
    """SGLang's Gemma3RMSNorm."""

    def forward_plugin(self, x: Tensor, residual: Tensor | None = None) -> Made:
        """Normalise x, or add it to the residual first."""
        return _gemma(x, residual, self.weight.data, self.eps)


class Gemma4RMSNorm(_Plugged, layernorm.Gemma4RMSNorm):  # type: ignore[misc]
    """SGLang's Gemma4RMSNorm."""

    def forward_plugin(self, x: Tensor) -> Tensor:
        """Normalise x."""
        weight = self.weight.data if self.with_scale else None
        return rms_norm(x, weight, None, self.eps, weight_offset=self.scale_shift)


class RMSNormWithoutScale(_Plugged, layernorm.RMSNormWithoutScale):  # type: ignore[misc]
    """SGLang's RMSNormWithoutScale."""

    def forward_plugin(self, x: Tensor) -> Tensor:
        """Normalise x."""
        return rms_norm(x, eps=self.eps)


class LayerNorm(_Plugged, layernorm.LayerNorm):  # type: ignore[misc]
    """SGLang's LayerNorm."""

    def is_served(self, x: Tensor) -> bool:
        """Not where x is rounded first."""
        return self.dtype in (float32, x.dtype)

    def forward_plugin(self, x: Tensor) -> Tensor:
        """Normalise x."""
        weight = self.weight.data if self.elementwise_affine else None
        bias = self.bias.data if self.use_bias else None
        return layer_norm(x, weight, bias, self.variance_epsilon)


LAYERS = (
    RMSNorm,
    GemmaRMSNorm,
    Gemma3RMSNorm,
    Gemma4RMSNorm,
    RMSNormWithoutScale,
    LayerNorm,
)


def _gemma(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Made:
    if residual is None:
        return rms_norm(x, weight, None, eps, weight_offset=1.0)
    return _add(x, residual, weight, None, eps, weight_offset=1.0)


def _add(x: Tensor, residual: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
    in_place = x.stride(-1) == 1 == residual.stride(-1)
    return (add_rms_norm_ if in_place else add_rms_norm)(x, residual, *rest, **options)


def _is_here(layer: Any, x: Tensor) -> bool:
    """Whether kernels may be there for x, and the weight is where x is."""
    weight = getattr(layer, "weight", None)
    return (x.is_cpu or x.is_cuda) and (weight is None or weight.device == x.device)
