"""Norms as models have them, a model of some, and how many of its calls normkit runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import normkit
from normkit.conversion import _plan

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


class LlamaRMSNorm(nn.Module):
    """As in Hugging Face's transformers."""

    def __init__(self, n: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(n) + 0.5)
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        dtype = hidden_states.dtype
        x = hidden_states.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(dtype)


class UnweightedNorm(nn.Module):
    eps = 1e-6

    def forward(self, x):
        y = x.float()
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class HeadsNorm(nn.Module):
    """A LayerNorm of heads with a weight for each, as Cohere's."""

    def __init__(self, heads: int, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(heads, n) + 0.5)

    def forward(self, x):
        y = x.float()
        y = y - y.mean(-1, keepdim=True)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)
        return (self.weight.float() * y).to(x.dtype)


class Layer(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.norm, self.linear = LlamaRMSNorm(n), nn.Linear(n, n)

    def forward(self, x):
        return x + self.linear(self.norm(x))


def model(dtype: torch.dtype = F32, n: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(Layer(n), Layer(n), nn.LayerNorm(n))
    nn.init.normal_(made[2].weight)
    nn.init.normal_(made[2].bias)
    return made.to(dtype)


def rows(dtype: torch.dtype = F32, *shape: int) -> Tensor:
    return torch.randn(shape or (2, 5, 64), generator=torch.Generator().manual_seed(1)).to(dtype)


@contextmanager
def counted(sums: bool = False, modulated: bool = False) -> Iterator[list[Tensor]]:
    """The x of every call that normkit ran for a converted module, or of some of them only."""
    seen: list[Tensor] = []
    run = _plan.Plan.run

    def count(self, module, x, residual=None, modulation=(), z=None):
        y = run(self, module, x, residual, modulation, z)
        wanted = (residual is not None or not sums) and (modulation or not modulated)
        if y is not None and wanted:
            seen.append(x)
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_plan.Plan, "run", count)
        yield seen


def calls(module: nn.Module, *inputs: Tensor | None) -> int:
    with counted() as seen:
        module(*inputs)
    return len(seen)


def near(y: Tensor, expected: Tensor) -> bool:
    same_place = (y.shape, y.dtype, y.stride()) == (
        expected.shape,
        expected.dtype,
        expected.stride(),
    )
    step = {F32: 2e-6, BF16: 2**-7, F16: 2**-10}[y.dtype]
    return same_place and torch.allclose(y, expected, step, step)


def converted(module: nn.Module) -> nn.Module:
    assert normkit.convert(module).converted
    return module


# ------------------------------------------------------------------------------------- with a gate


class _Gated(nn.Module):
    def __init__(self, n: int = 64, groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(n, generator=torch.Generator().manual_seed(2)) + 0.5)
        self.variance_epsilon, self.groups = 1e-6, groups

    def xhat(self, x):
        parts = x.unflatten(-1, (self.groups, -1))
        parts = parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return parts.flatten(-2)


class GateFirstNorm(_Gated):
    """As of Mamba-2, Bamba and Zamba-2: no gate is a norm."""

    def forward(self, hidden_states, gate=None):
        dtype, x = hidden_states.dtype, hidden_states.float()
        if gate is not None:
            x = x * nn.functional.silu(gate.float())
        return self.weight * self.xhat(x).to(dtype)


class GateLastNorm(_Gated):
    """As of Qwen3-Next and OLMo-Hybrid: it needs a gate."""

    def forward(self, hidden_states, gate):
        dtype = hidden_states.dtype
        x = self.weight * self.xhat(hidden_states.float()).to(dtype)
        return (x * nn.functional.silu(gate.float())).to(dtype)


class SigmoidLastNorm(_Gated):
    """As of Kimi-Linear: rounded once."""

    def forward(self, hidden_states, gate=None):
        x = self.weight.float() * self.xhat(hidden_states.float())
        return (x * gate.float().sigmoid()).to(hidden_states.dtype)


class ChoiceNorm(_Gated):
    """As of Falcon-H1: no gate is a norm, and the gate is last."""

    def forward(self, hidden_states, gate=None):
        x = self.weight * self.xhat(hidden_states.float())
        if gate is not None:
            x = x * nn.functional.silu(gate.float())
        return x.to(hidden_states.dtype)


GATED = (GateFirstNorm, GateLastNorm, SigmoidLastNorm, ChoiceNorm)


def gates(dtype: torch.dtype = F32, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(shape or (2, 5, 64), generator=generator) * 2).to(dtype)
