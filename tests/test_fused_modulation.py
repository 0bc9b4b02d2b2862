"""With fuse="layer", a norm and the scale and shift behind it are one pass with the same bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkit
from norm_models import BF16, F16, F32, counted, rows


class AdaNorm(nn.Module):
    """As AdaLayerNormZero of diffusers."""

    def __init__(self, n: int = 64, **options) -> None:
        super().__init__()
        self.silu, self.linear = nn.SiLU(), nn.Linear(n, 3 * n)
        self.norm = nn.LayerNorm(n, eps=1e-6, **({"elementwise_affine": False} | options))

    def forward(self, x, emb):
        emb = self.linear(self.silu(emb))
        shift, scale, gate = emb.chunk(3, dim=1)
        x = self.norm(x) * (1 + scale[:, None]) + shift[:, None]
        return x, gate


class Continuous(AdaNorm):
    """As AdaLayerNormContinuous: the sum has the index."""

    def forward(self, x, emb):
        shift, scale, gate = torch.chunk(self.linear(self.silu(emb)), 3, dim=1)
        x = self.norm(x) * (1 + scale)[:, None, :] + shift[:, None, :]
        return x, gate


class Block(nn.Module):
    """As FluxTransformerBlock: two statements behind a sum that is wanted again."""

    def __init__(self, n: int = 64) -> None:
        super().__init__()
        self.norm1, self.attn = AdaNorm(n), nn.Linear(n, n)
        self.norm2, self.mlp = nn.LayerNorm(n, elementwise_affine=False), nn.Linear(n, n)

    def forward(self, x, emb):
        normed, gate = self.norm1(x, emb)
        scale, shift = gate, emb
        x = x + gate.unsqueeze(1) * self.attn(normed)
        normed = self.norm2(x)
        normed = normed * (1 + scale[:, None]) + shift[:, None]
        return x + self.mlp(normed)


class PerToken(nn.Module):
    """As WanTransformerBlock: in float32, with a row for each token."""

    def __init__(self, n: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(n, elementwise_affine=False)

    def forward(self, x, emb):
        y = (self.norm(x.float()) * (emb[:, None].float() + 1) + x.float()).type_as(x)
        scale, shift = x.float() * 0.5, x.float()
        return y, (self.norm(x.float()) * (1 + scale) + shift).type_as(x)


class Others(nn.Module):
    """What only looks like it: computed in another order, or of something else."""

    def __init__(self, n: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(n, elementwise_affine=False)
        self.linear = nn.Linear(n, n)

    def forward(self, x, emb):
        scale = emb[:, None]
        a = self.norm(x) * (2 + scale) + scale  # another factor
        b = self.norm(x) * (1 + self.linear(scale)) + scale  # computed after the norm
        c = self.norm(x) * (1 + scale) - scale
        normed = self.norm(x)
        normed = normed * (1 + normed) + scale  # by itself
        d = self.norm(x) * (1 + scale)
        return a + b + c + d + normed


class Given(nn.Module):
    """A norm that is told how it is modulated."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)

    def forward(self, x, scale, shift):
        return self.norm(x) * (1 + scale) + shift


MODELS = ((AdaNorm(), 1, 0), (Continuous(), 1, 0), (Block(), 2, 1), (PerToken(), 1, 0))
MODELS += ((AdaNorm(elementwise_affine=True), 1, 0),)
every_model = pytest.mark.parametrize(
    ("model", "modulated", "sums"), MODELS, ids=[type(model).__name__ for model, *_ in MODELS]
)


def inputs(dtype: torch.dtype = BF16, n: int = 64) -> tuple[Tensor, Tensor]:
    return rows(dtype, 2, 5, n), rows(dtype, 2, n)


def outputs(model: nn.Module, *given: Tensor) -> list[Tensor]:
    made = model(*given)
    return list(made) if isinstance(made, tuple) else [made]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@every_model
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@torch.no_grad()
def test_the_bits_are_those_of_the_converted_norm_and_torchs_operations(
    model: nn.Module, modulated: int, sums: int, dtype: torch.dtype
) -> None:
    model, given = copy.deepcopy(model).to(dtype), inputs(dtype)
    before = outputs(model, *given)
    report = normkit.convert(model)
    expected = outputs(model, *given)
    report.revert()
    report = normkit.convert(model, fuse="layer")
    assert sum(len(layer.modulated) for layer in report.layers) == modulated
    assert sum(len(layer.norms) for layer in report.layers) == sums
    with counted(modulated=True) as seen:
        assert_same(outputs(model, *given), expected)
    assert len(seen) == modulated
    report.revert()
    assert_same(outputs(model, *given), before)


@torch.no_grad()
def test_a_sum_a_norm_and_its_modulation_are_one_call() -> None:
    model = Block().to(BF16)
    normkit.convert(model, fuse="layer")
    with counted(sums=True, modulated=True) as seen:
        model(*inputs())
    assert len(seen) == 1


@torch.no_grad()
def test_what_only_looks_like_it_stays() -> None:
    model, given = Others().to(BF16), inputs()
    normkit.convert(model)
    expected = outputs(model, *given)
    normkit.revert(model)
    report = normkit.convert(model, fuse="layer")
    assert report.layers == []
    assert_same(outputs(model, *given), expected)


@every_model
def test_gradients_are_those_of_torchs_operations(
    model: nn.Module, modulated: int, sums: int
) -> None:
    """Where a gradient may be wanted nothing is fused: it would be rounded elsewhere."""

    def gradients(model: nn.Module) -> list[Tensor]:
        given = [t.requires_grad_() for t in inputs()]
        total = sum(y.float().square().sum() for y in outputs(model, *given))
        return list(torch.autograd.grad(total, given))

    model = copy.deepcopy(model).to(BF16)
    normkit.convert(model)
    expected = gradients(model)
    normkit.revert(model)
    normkit.convert(model, fuse="layer")
    with counted(modulated=True) as seen:
        assert_same(gradients(model), expected)
    assert seen == []


@torch.no_grad()
def test_other_dtypes_and_shapes_are_left_to_torch() -> None:
    plain = Given().to(BF16)
    model = copy.deepcopy(plain)
    normkit.convert(model)
    fused = copy.deepcopy(plain)
    normkit.convert(fused, fuse="layer")
    x, row = rows(BF16, 2, 5, 64), rows(BF16, 64)
    token, sample = rows(BF16, 2, 5, 64), rows(BF16, 2, 1, 64)
    taken = [(row, row), (sample, row), (token, token)]
    left: list[tuple[Any, Any]] = [
        (row.float(), row),  # torch computes in float32
        (row, 0.5),
        (token, sample),  # in other rows
        (rows(BF16, 5, 64), row),  # of tokens, and not of samples
        (rows(BF16, 3, 2, 5, 64), row),  # y is larger than x
        (rows(BF16, 1), row),
    ]
    for given in (*taken, *left):
        with counted(modulated=True) as seen:
            assert_same([fused(x, *given)], [model(x, *given)])
        assert len(seen) == any(given is pair for pair in taken), given


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_compiled_and_traced_models_see_each_operation() -> None:
    torch._dynamo.reset()
    model, given = AdaNorm(), inputs(F32)
    with torch.no_grad():
        expected = outputs(model, *given)
        normkit.convert(model, fuse="layer")
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for y, right in zip(compiled(*given), expected, strict=True):
            torch.testing.assert_close(y, right)
        operations = str(torch.jit.trace(model, given).inlined_graph)
    assert "aten::layer_norm" in operations
    assert "normkit::" not in operations
