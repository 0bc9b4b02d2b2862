"""The transforms of torch.func, alone, in one another and inside of torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

import normkit
from normkit import reference
from torch_integration.support import (
    FUNCTIONS,
    MODULES,
    adds,
    compiled,
    listed,
    loss_of,
    randomised,
    tensors,
)

# Torch loads the derivatives of its decompositions by torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def first(name: str, **options: Any) -> Callable[..., Tensor]:
    return lambda *given: listed(getattr(normkit, name)(*given, **options))[0]


def referred(name: str) -> Callable[..., Tensor]:
    """Give the same norm in plain torch, which torch can differentiate as it likes."""
    kind = "layer" if "layer" in name else "rms"
    eps = 1e-5 if kind == "layer" else 1e-6
    if adds(name):
        return lambda *given: reference.add_norm(*given, eps=eps, kind=kind)[0]
    return lambda *given: reference.norm(*given, eps=eps, kind=kind)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap_over_rows_and_over_weights(name: str) -> None:
    function, given = first(name), tensors(name, (2, 3, 8))
    affine = [torch.stack([t, 2 * t, -t]) for t in given[-2:]]
    inputs = given[:-2]
    over_inputs = (*(0 for _ in inputs), None, None)
    torch.testing.assert_close(vmap(function, over_inputs)(*given), function(*given))
    over_weights = (*(None for _ in inputs), 0, 0)
    each = torch.stack([function(*inputs, *ones) for ones in zip(*affine, strict=True)])
    torch.testing.assert_close(vmap(function, over_weights)(*inputs, *affine), each)
    over_both = vmap(vmap(function, over_inputs), over_weights)(*inputs, *affine)
    torch.testing.assert_close(over_both, each)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_vmap_over_any_dimension(dim: int) -> None:
    x, weight, _ = tensors("rms_norm", (8, 8, 8))
    got = vmap(normkit.rms_norm, (dim, None), dim)(x, weight)
    each = [normkit.rms_norm(t, weight) for t in x.unbind(dim)]
    torch.testing.assert_close(got, torch.stack(each, dim))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_of_torch_func_are_those_of_autograd(name: str) -> None:
    given = tensors(name)
    everything = tuple(range(len(given)))
    got = grad(lambda *g: loss_of(getattr(normkit, name)(*g)), everything)(*given)
    wanting = [t.clone().requires_grad_() for t in given]
    loss_of(getattr(normkit, name)(*wanting)).backward()
    torch.testing.assert_close(list(got), [t.grad for t in wanting])
    made, pull = vjp(first(name), *given)
    weights = torch.linspace(-1, 2, made.numel()).view(made.shape)
    expected = torch.autograd.grad(first(name)(*wanting), wanting, weights)
    torch.testing.assert_close(list(pull(weights)), list(expected))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_are_those_of_plain_torch(name: str) -> None:
    given = tensors(name, (3, 4), torch.float64)
    directions = tensors(name, (3, 4), torch.float64, seed=1)
    ours, theirs = first(name), referred(name)
    got = jvp(ours, tuple(given), tuple(directions))
    torch.testing.assert_close(got, jvp(theirs, tuple(given), tuple(directions)))
    for transform in (jacrev, jacfwd, hessian):
        for place in (0, len(given) - 2):
            torch.testing.assert_close(
                transform(ours, place)(*given), transform(theirs, place)(*given)
            )


@pytest.mark.parametrize("name", ["rms_norm", "head_norm", "add_layer_norm"])
def test_transforms_inside_of_compiled_functions(name: str) -> None:
    torch._dynamo.reset()
    given = tensors(name)
    over_inputs = (*(0 for _ in given[:-2]), None, None)

    def per_sample(*given: Tensor) -> Any:
        def loss(*one: Tensor) -> Tensor:
            return first(name)(*one).sin().sum()

        return vmap(grad(loss, len(given) - 2), over_inputs)(*given)

    def tangent(*given: Tensor) -> Any:
        return jvp(first(name), given, tuple(t.cos() for t in given))

    for function in (per_sample, tangent):
        torch.testing.assert_close(
            torch.compile(function, backend="aot_eager", fullgraph=True)(*given), function(*given)
        )


@pytest.mark.parametrize("kind", MODULES)
def test_an_ensemble_of_modules_is_one_call(kind: str) -> None:
    modules = [randomised(MODULES[kind](8), seed) for seed in range(4)]
    parameters, buffers = stack_module_state(modules)
    x, residual = tensors("add_rms_norm")[:2]

    def call(parameters: Any, buffers: Any, x: Tensor, residual: Tensor) -> Tensor:
        y, _ = functional_call(modules[0], (parameters, buffers), (x, residual))
        return y

    got = vmap(call, (0, 0, None, None))(parameters, buffers, x, residual)
    torch.testing.assert_close(got, torch.stack([m(x, residual)[0] for m in modules]))
    of_parameters = grad(lambda p: loss_of(vmap(call, (0, 0, None, None))(p, buffers, x, residual)))
    gradients = of_parameters(parameters)
    loss_of(torch.stack([m(x, residual)[0] for m in modules])).backward()
    for name, gradient in gradients.items():
        each = torch.stack([dict(m.named_parameters())[name].grad for m in modules])
        torch.testing.assert_close(gradient, each)


@pytest.mark.parametrize("kind", MODULES)
def test_functional_call_gives_gradients_of_what_it_is_given(kind: str) -> None:
    module = randomised(MODULES[kind](8))
    other = {k: (p.detach() + 1).requires_grad_() for k, p in module.named_parameters()}
    x = torch.randn(2, 3, 8)
    loss_of(functional_call(module, other, (x,))).backward()
    assert all(t.grad is not None for t in other.values())
    assert all(p.grad is None for p in module.parameters())
    compiled_call = compiled(lambda p, x: functional_call(module, p, (x,)))
    torch._dynamo.reset()
    torch.testing.assert_close(compiled_call(other, x), functional_call(module, other, (x,)))


def test_in_place_forms_work_inside_of_transforms() -> None:
    x, residual, weight, _ = tensors("add_rms_norm")

    def call(x: Tensor, residual: Tensor) -> Tensor:
        x, residual = x.clone(), residual.clone()
        normkit.add_rms_norm_(x, residual, weight)
        return x + residual

    torch.testing.assert_close(vmap(call)(x, residual), call(x, residual))


def test_errors_inside_of_transforms_name_the_argument() -> None:
    x = torch.randn(4, 3, 8)
    for call in (
        lambda: vmap(lambda t: normkit.rms_norm(t, torch.ones(7)))(x),
        lambda: grad(lambda t: normkit.rms_norm(t, torch.ones(7)).sum())(x),
    ):
        with pytest.raises(ValueError, match="weight: expected shape"):
            call()
