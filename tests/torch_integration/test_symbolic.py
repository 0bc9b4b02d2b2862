"""torch.fx and torch.jit.script of models with modules of this package."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import normkit
from normkit import HeadNorm, LayerNorm, RMSNorm
from torch_integration.support import FUNCTIONS, adds, assert_equal_bits, randomised, tensors

NORMS = {
    "RMSNorm": lambda: RMSNorm(8, eps=None),
    "RMSNorm of Gemma": lambda: RMSNorm(8, weight_offset=1.0, bias=True),
    "RMSNorm of two dimensions": lambda: RMSNorm((3, 8), round_before_weight=True),
    "RMSNorm without a weight": lambda: RMSNorm(8, elementwise_affine=False),
    "LayerNorm": lambda: LayerNorm(8),
    "LayerNorm without a bias": lambda: LayerNorm(8, bias=False, eps=1e-3),
    "HeadNorm": lambda: HeadNorm(3, 8, bias=True),
    "HeadNorm of all heads": lambda: HeadNorm(None, 8, kind="layer"),
}
X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=NORMS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return randomised(nn.Sequential(NORMS[request.param](), nn.Linear(8, 8)))


# ------------------------------------------------------------------------------------------- fx


def test_modules_are_leaves_as_those_of_torch_are(model: nn.Module) -> None:
    traced = fx.symbolic_trace(model)
    called = [node for node in traced.graph.nodes if node.op != "placeholder"]
    assert [(node.op, node.target) for node in called[:2]] == [
        ("call_module", "0"),
        ("call_module", "1"),
    ]
    assert_equal_bits(traced(X), model(X))
    assert_equal_bits(pickle.loads(pickle.dumps(traced))(X), model(X))


def test_a_residual_and_a_dtype_are_recorded() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = randomised(RMSNorm(8))
            self.heads = randomised(HeadNorm(3, 8))

        def forward(self, x: Tensor, residual: Tensor) -> Any:
            y, residual = self.norm(x, residual, out_dtype=torch.bfloat16)
            return self.heads(y, residual)

    block = Block()
    traced = fx.symbolic_trace(block)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert targets == ["norm", "heads"]
    for got, expected in zip(traced(X, X), block(X, X), strict=True):
        assert_equal_bits(got, expected)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("form", ["", "_"])
def test_functions_are_recorded_as_calls_of_themselves(name: str, form: str) -> None:
    function = getattr(normkit, name + form)
    weight = tensors(name)[-2]

    def call(*given: Tensor) -> Any:
        return function(*given, weight, eps=0.5, round_before_weight=True)

    given = [X] * (1 + adds(name))
    traced = _traced(call, len(given))
    assert function in [node.target for node in traced.graph.nodes]
    got = traced(*(t.clone() for t in given))
    expected = call(*(t.clone() for t in given))
    for one, other in zip(_tuple(got), _tuple(expected), strict=True):
        assert_equal_bits(one, other)


def _traced(call: Any, count: int) -> fx.GraphModule:
    return fx.symbolic_trace((lambda x: call(x)) if count == 1 else (lambda x, r: call(x, r)))


def _tuple(made: Any) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


# ------------------------------------------------------------------------------------------- jit

script = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")


@script
def test_a_scripted_model_computes_the_same(model: nn.Module) -> None:
    expected = model(X)
    keys = list(model.state_dict())
    scripted = torch.jit.script(model)
    assert_equal_bits(scripted(X), expected)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    assert list(loaded.state_dict()) == keys
    assert_equal_bits(loaded(X), expected)


@script
def test_a_scripted_model_has_gradients(model: nn.Module) -> None:
    model(X).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    scripted = torch.jit.script(model)
    scripted(X).square().sum().backward()
    for got, gradient in zip(scripted.parameters(), expected, strict=True):
        assert_equal_bits(got.grad, gradient)


@script
def test_a_scripted_norm_checks_the_shape() -> None:
    scripted = torch.jit.script(RMSNorm((3, 8)))
    with pytest.raises(torch.jit.Error, match=r"x: expected a shape that ends in \[3, 8\]"):
        scripted(torch.ones(2, 4, 8))
