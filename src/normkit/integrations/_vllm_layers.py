"""The layers that `normkit.integrations.vllm` registers: vLLM's own, with other forwards.

They round where vLLM's own formulas do (`vllm.ir.ops`): the sum of a fused add is rounded to be
returned only, and xhat is rounded to the weight's dtype before the weight multiplies it, which is
no rounding at all for a float32 weight.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm import envs
from vllm.model_executor.layers import layernorm

from normkit.functional import add_rms_norm, add_rms_norm_, layer_norm, rms_norm

Made = Tensor | tuple[Tensor, Tensor]


class RMSNorm(layernorm.RMSNorm):  # type: ignore[misc]
    """vLLM's RMSNorm; with a residual both tensors are overwritten, as by vLLM's own kernels."""

    def forward_cpu(self, x: Tensor, residual: Tensor | None = None) -> Made:
        """Normalise x, or add it to the residual first; else vLLM's own forward."""
        weight = self.weight.data if self.has_weight else None
        if self.variance_size_override is not None or not _is_served(x, residual, weight):
            made: Made = self.forward_native(x, residual)
            return made
        options: Any = {"round_before_weight": weight is not None and weight.dtype == x.dtype}
        eps = self.variance_epsilon
        if residual is None:
            return rms_norm(x, weight, None, eps, **options)
        in_place = x.stride(-1) == 1 == residual.stride(-1)
        add = add_rms_norm_ if in_place else add_rms_norm
        return add(x, residual, weight, None, eps, round_sum=False, **options)

    def forward_cuda(self, x: Tensor, residual: Tensor | None = None) -> Made:
        """As on the CPU, unless vLLM has kernels of its own that do not depend on the batch."""
        if envs.VLLM_BATCH_INVARIANT:
            made: Made = super().forward_cuda(x, residual)
            return made
        return self.forward_cpu(x, residual)


class GemmaRMSNorm(layernorm.GemmaRMSNorm):  # type: ignore[misc]
    """vLLM's GemmaRMSNorm, without a copy of the weight in float32 at each call."""

    def forward_cpu(self, x: Tensor, residual: Tensor | None = None) -> Made:
        """Normalise x, or add it to the residual first; else vLLM's own forward."""
        weight, eps = self.weight.data, self.variance_epsilon
        if not _is_served(x, residual, None):
            made: Made = self.forward_native(x, residual)
            return made
        if residual is None:
            return rms_norm(x, weight, None, eps, weight_offset=1.0)
        return add_rms_norm(x, residual, weight, None, eps, weight_offset=1.0, round_sum=False)

    forward_cuda = forward_cpu


class LayerNorm(layernorm.LayerNorm):  # type: ignore[misc]
    """vLLM's LayerNorm, without copies of x in the weight's dtype."""

    def forward_cpu(self, x: Tensor) -> Tensor:
        """Normalise x, whatever the weight's dtype is."""
        return layer_norm(x, self.weight, self.bias, self.eps)

    forward_cuda = forward_cpu


LAYERS = (RMSNorm, GemmaRMSNorm, LayerNorm)


def _is_served(x: Tensor, residual: Tensor | None, weight: Tensor | None) -> bool:
    """Whether these round as normkit does: of one dtype, or with a weight that is wider than x."""
    if residual is not None and residual.dtype != x.dtype:
        return False
    return weight is None or weight.dtype == x.dtype or weight.element_size() > x.element_size()
