"""A call that wants a gradient gets the right one, and one that cannot have it says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import normkit
from conformance.support import (
    BARE,
    EVERY,
    EVERY_AFFINE,
    OPS,
    Inputs,
    Op,
    formula,
    inputs_for,
    needs_kernels,
    run,
)
from normkit.testing import make_inputs


def call(name: str, *tensors: Any, **options: Any) -> Any:
    return getattr(normkit, name)(*tensors, **options)


def _used(op: Op, inputs: Inputs) -> list[Tensor]:
    return [t for t in op.tensors(inputs) if t is not None]


def _wanting(op: Op, inputs: Inputs) -> Inputs:
    return Inputs(*(t if t is None else t.detach().clone().requires_grad_() for t in inputs))


@pytest.mark.parametrize("op", EVERY_AFFINE, ids=str)
def test_gradients_are_right_in_float64(op: Op) -> None:
    inputs = inputs_for(op, (2, 3), 5, torch.float64)

    def function(*tensors: Tensor) -> Any:
        return call(op.name, *tensors, eps=0.3, weight_offset=1.0, **op.selected)

    assert torch.autograd.gradcheck(function, _used(op, _wanting(op, inputs)))
    assert torch.autograd.gradgradcheck(function, _used(op, _wanting(op, inputs)))


@needs_kernels
@pytest.mark.parametrize("op", OPS, ids=str)
def test_one_tensor_that_wants_a_gradient_is_enough(op: Op) -> None:
    for wanted in op.takes:
        made = inputs_for(op, 3, 8, torch.bfloat16)
        inputs = made._replace(**{wanted: op.tensor(wanted, made).clone().requires_grad_()})
        explanation = normkit.explain(op.name, *op.tensors(inputs), **op.selected)
        assert explanation.backend == "cpu"
        assert explanation.reason == "served natively, gradients too"
        assert run(call, op, inputs).y.requires_grad
        with torch.no_grad():
            assert not run(call, op, inputs).y.requires_grad


@pytest.mark.parametrize("op", EVERY, ids=str)
def test_without_grad_mode_the_kernels_serve_tensors_that_require_one(kernels: Any, op: Op) -> None:
    inputs = _wanting(op, inputs_for(op, 3, 8, torch.bfloat16))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            run(kernels, op, inputs)


@pytest.mark.parametrize("op", EVERY, ids=str)
def test_in_place_refuses_a_gradient_and_names_the_way_out(backend: Any, op: Op) -> None:
    for wanted in op.takes:
        made = inputs_for(op, 3, 8, torch.float32)
        inputs = made._replace(**{wanted: op.tensor(wanted, made).clone().requires_grad_()})
        given = _used(op, inputs)
        before = [t.detach().clone() for t in given]
        with pytest.raises(RuntimeError, match=rf"\b{op.name}\b"):
            backend.unexplained(f"{op.name}_", *op.tensors(inputs), **op.selected)
        for t, old in zip(given, before, strict=True):
            assert torch.equal(t.detach(), old)


@pytest.mark.parametrize("op", EVERY, ids=str)
def test_outputs_refuse_a_gradient_and_name_the_way_out(backend: Any, op: Op) -> None:
    made = inputs_for(op, 3, 8, torch.float32)
    cases: list[tuple[Inputs, dict[str, Tensor]]] = [
        (_wanting(op, made), {"out": torch.zeros(3, 8)}),
        (made, {"out": torch.zeros(3, 8, requires_grad=True)}),
    ]
    if op.adds:
        cases.append((_wanting(op, made), {"residual_out": torch.zeros(3, 8)}))
        cases.append((made, {"residual_out": torch.zeros(3, 8, requires_grad=True)}))
    for inputs, outputs in cases:
        with pytest.raises(RuntimeError, match=rf"\b{op.name}\b"):
            run(backend.unexplained, op, inputs, **outputs)
        assert all((t.detach() == 0).all() for t in outputs.values())


@pytest.mark.parametrize("op", OPS, ids=str)
def test_autograd_learns_of_what_is_written(backend: Any, op: Op) -> None:
    """A tensor that autograd saved and a norm then wrote makes backward fail instead of lie."""
    x = torch.randn(3, 8, requires_grad=True)
    inputs = inputs_for(op, 3, 8, torch.float32)
    for name in ("x", *(["residual"] if op.adds else [])):
        saved = x * 1.0
        loss = (saved * saved).sum()
        with torch.no_grad():
            written = inputs._replace(**{name: saved})
            backend(f"{op.name}_", *op.tensors(written), **op.selected)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    for output in ("out", *(["residual_out"] if op.adds else [])):
        saved = x * 1.0
        loss = (saved * saved).sum()
        with torch.no_grad():
            run(backend, op, inputs, **{output: saved})
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # in torch's own jvp
@pytest.mark.parametrize("op", EVERY, ids=str)
def test_forward_mode_derivatives_are_not_lost(op: Op) -> None:
    inputs = inputs_for(op, 3, 8, torch.float32)
    direction = torch.ones(3, 8)
    with forward_ad.dual_level():
        dual = inputs._replace(x=forward_ad.make_dual(inputs.x, direction))
        tangent = forward_ad.unpack_dual(run(call, op, dual).y).tangent
    assert tangent is not None
    expected = torch.func.jvp(
        lambda t: formula(op, inputs._replace(x=t)).y, (inputs.x,), (direction,)
    )[1]
    torch.testing.assert_close(tangent, expected)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_transforms_of_torch_func(op: Op) -> None:
    """vmap, grad and jvp: their tensors have no memory a kernel could read."""
    inputs = inputs_for(op, (4, 3), 8, torch.float32)
    rest = op.tensors(inputs)[1:]

    def y(x: Tensor, *others: Tensor) -> Tensor:
        made = call(op.name, x, *others, **op.selected)
        return made[0] if op.adds else made

    expected = y(inputs.x, *rest)
    batched = tuple(0 if name in ("x", "residual", "z") else None for name in op.takes)
    torch.testing.assert_close(torch.vmap(y, batched)(inputs.x, *rest), expected)
    wanting = inputs.x.clone().requires_grad_()
    (y(wanting, *rest) ** 2).sum().backward()
    gradient = torch.func.grad(lambda t: (y(t, *rest) ** 2).sum())(inputs.x)
    torch.testing.assert_close(gradient, wanting.grad)


class Tagged(torch.Tensor):
    """A subclass that records nothing and changes nothing: it must come out again."""


@pytest.mark.parametrize("op", EVERY, ids=str)
def test_a_tensor_subclass_takes_the_reference_path(op: Op) -> None:
    inputs = inputs_for(op, 3, 8, torch.float32)
    tagged = inputs._replace(x=inputs.x.as_subclass(Tagged))
    assert normkit.explain(op.name, *op.tensors(tagged), **op.selected).backend == "reference"
    result = run(call, op, tagged)
    assert type(result.y) is Tagged
    torch.testing.assert_close(result.y.as_subclass(Tensor), run(call, op, inputs).y)


@pytest.mark.parametrize("op", BARE, ids=str)
def test_float64_is_served_in_float64(op: Op) -> None:
    inputs = make_inputs((3, 4, 20), torch.float64, per_head=op.per_head)
    assert normkit.explain(op.name, *op.tensors(inputs), **op.selected).backend == "reference"
    result = run(call, op, inputs)
    assert result.y.dtype == torch.float64
    total = inputs.x + inputs.residual if op.adds else inputs.x
    kind = torch.nn.functional.layer_norm if op.kind == "layer" else torch.nn.functional.rms_norm
    expected = kind(total, (20,), eps=op.eps) * inputs.weight + inputs.bias
    torch.testing.assert_close(result.y, expected, rtol=1e-13, atol=1e-13)
    assert not torch.equal(result.y, result.y.float().double())


@pytest.mark.parametrize("op", OPS, ids=str)
def test_compiled_functions_give_the_same_values(op: Op) -> None:
    """With nothing but tracing: no graph break, and gradients too."""
    torch._dynamo.reset()  # or the ops together exceed its limit of recompilations
    inputs = inputs_for(op, (2, 3), 16, torch.bfloat16)
    selected = op.selected  # a property, which torch 2.10 cannot trace
    compiled = torch.compile(
        lambda *tensors: call(op.name, *tensors, **selected), fullgraph=True, backend="aot_eager"
    )
    made = compiled(*op.tensors(inputs))
    y = made[0] if op.adds else made
    torch.testing.assert_close(y, run(call, op, inputs).y)
    wanting = _wanting(op, inputs)
    made = compiled(*op.tensors(wanting))
    (made[0] if op.adds else made).float().sum().backward()
    assert all(t.grad is not None for t in _used(op, wanting))
