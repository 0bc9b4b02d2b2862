"""`GatedRMSNorm` is the norm of the models that have one, as a module."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import normkit
from normkit import testing


class Before(nn.Module):
    """As Mamba-2 and its relatives compute it."""

    def __init__(self, norm: normkit.GatedRMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps
        self.size = norm.group_size or norm.hidden_size

    def forward(self, x: Tensor, z: Tensor | None) -> Tensor:
        wide = x.float() if z is None else x.float() * nn.functional.silu(z.float())
        groups = wide.unflatten(-1, (-1, self.size))
        rstd = torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (groups * rstd).flatten(-2).to(x.dtype)


class Behind(Before):
    """As Qwen3-Next and its relatives do."""

    def forward(self, x: Tensor, z: Tensor | None) -> Tensor:
        n = super().forward(x, None)
        return n if z is None else (n * nn.functional.silu(z.float())).to(x.dtype)


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("model", [Before, Behind])
def test_it_computes_what_models_do(model: type[Before], group_size: int | None) -> None:
    norm = normkit.GatedRMSNorm(
        64,
        norm_before_gate=model is Behind,
        group_size=group_size,
        round_before_weight=True,
        round_each=model is Behind,
    )
    norm.weight.data.normal_(1, 0.3)
    for dtype, gated in itertools.product((torch.bfloat16, torch.float16), (True, False)):
        norm.to(dtype)
        x, z, *_ = testing.make_inputs((5, 40, 64), dtype)
        given = (x, z if gated else None)
        same = norm(*given) == model(norm)(*given)
        assert same.float().mean() > 0.999, (dtype, gated)


def test_it_is_a_module() -> None:
    norm = normkit.GatedRMSNorm(8, 1e-5, activation="sigmoid", group_size=4, dtype=torch.float16)
    assert list(norm.state_dict()) == ["weight"]
    assert torch.equal(norm.weight, torch.ones(8, dtype=torch.float16))
    assert repr(norm) == "GatedRMSNorm(8, eps=1e-05, activation='sigmoid', group_size=4)"
    x, z, *_ = testing.make_inputs((3, 8))
    assert torch.equal(copy.deepcopy(norm)(x, z), norm(x, z))
    y = norm(x.requires_grad_(), z)
    assert torch.autograd.grad(y.sum(), (x, norm.weight))[1].dtype == torch.float16


def test_a_rank_with_whole_groups_computes_its_own_columns() -> None:
    whole = normkit.GatedRMSNorm(96, group_size=24, norm_before_gate=False)
    whole.weight.data.normal_()
    x, z, *_ = testing.make_inputs((4, 96))
    parts = []
    for columns in (slice(0, 48), slice(48, 96)):
        rank = normkit.GatedRMSNorm(48, group_size=24, norm_before_gate=False)
        rank.load_state_dict({"weight": whole.weight.data[columns]})
        parts.append(rank(x[:, columns], z[:, columns]))
    assert torch.equal(torch.cat(parts, -1), whole(x, z))


def test_it_compiles_whole() -> None:
    norm = normkit.GatedRMSNorm(32, group_size=16).requires_grad_(False)
    x, z, *_ = testing.make_inputs((3, 32))
    compiled = torch.compile(norm, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, z), norm(x, z), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden_size": 0}, ValueError, r"^hidden_size: expected at least 1, got 0"),
        (
            {"group_size": 5},
            ValueError,
            r"^group_size: expected a divisor of .* got 5",
        ),
        ({"activation": "relu"}, ValueError, r"^activation: expected .* got 'relu'"),
        ({"norm_before_gate": None}, TypeError, r"^norm_before_gate: expected True or False"),
        ({"eps": -1}, ValueError, r"^eps: expected a number >= 0"),
    ],
)
def test_its_arguments_are_checked(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        normkit.GatedRMSNorm(**({"hidden_size": 64} | arguments))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^x: expected a shape that ends in \(64,\)"):
        normkit.GatedRMSNorm(64)(torch.ones(2, 63), torch.ones(2, 63))
