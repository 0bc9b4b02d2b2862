"""Fused norms inside PyTorch: operators, compiled, exported, transformed, under modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import normkit
from normkit._spec import MODULATORS, NEXT, OPS
from normkit.testing import make_inputs
from torch_integration.support import (
    Recorder,
    assert_equal_bits,
    called,
    clones,
    compiled,
    operator,
    results_and_gradients,
)

NAMES = tuple(name for name, op in OPS.items() if op.fused)
every_op = pytest.mark.parametrize("name", NAMES)
# What each computes, and rounds, that its defaults do not.
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    name: ({}, {"alpha": 0.7, "beta": 1.3} if op.post else {"round_each": True})
    for name, op in OPS.items()
    if op.fused
}


def tensors(name: str, dtype: torch.dtype = torch.float32, *, grad: bool = False) -> list[Tensor]:
    """Make an op's tensors: a gate, scale and shift for each sample, and z of x's shape."""
    made = make_inputs((2, 3, 8), dtype)._asdict()
    made |= dict(zip(MODULATORS, make_inputs((3, 2, 8), dtype, seed=1).x, strict=True))
    made |= dict(zip(NEXT, make_inputs((8,), dtype, seed=3)[2:], strict=True))
    angles = make_inputs((2, 1, 4), seed=4).x[:, 0]
    made |= {"cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype)}
    made["z"] = make_inputs((2, 3, 8), dtype, seed=2).x
    given = [made[field] for field in OPS[name].fields if field in made]
    return [t.clone().requires_grad_(grad) for t in given]


def listed(made: Any) -> list[Tensor]:
    return [made] if isinstance(made, Tensor) else list(made)


def function(name: str, **options: Any) -> Callable[..., Any]:
    return lambda *given: getattr(normkit, name)(*given, **options)


@every_op
@pytest.mark.parametrize("grad", [False, True])
def test_operators_keep_torchs_rules(name: str, grad: bool) -> None:
    """Schemas, fakes, gradients by their formula under AOTAutograd, with dynamic shapes."""
    given = tuple(tensors(name, grad=grad))
    torch.library.opcheck(operator(name), given)
    if not grad:
        torch.library.opcheck(operator(name, "_"), tuple(clones(given)))


@every_op
def test_forms_that_write_give_what_the_functional_one_does(name: str) -> None:
    given = tensors(name, torch.bfloat16)
    expected = listed(operator(name)(*given))[: len(listed(getattr(normkit, name)(*given)))]
    outputs = [torch.empty_like(given[0]) for _ in expected]
    operator(name, "_out")(*outputs, *given)
    assert_equal_bits(outputs, expected)
    written = dict(zip(OPS[name].fields, clones(given), strict=False))
    operator(name, "_")(*written.values())
    places = OPS[name].written
    results = [written.pop(places[output]) for output in ("out", "residual_out")[: len(expected)]]
    assert_equal_bits(results, expected)
    untouched = dict(zip(OPS[name].fields, given, strict=False))
    assert_equal_bits(list(written.values()), [untouched[field] for field in written])


@every_op
@pytest.mark.parametrize("which", [0, 1])
def test_compiled_calls_have_the_bits_of_eager_ones(name: str, which: int) -> None:
    """With mode "op"; one graph for each, and the gradients too."""
    torch._dynamo.reset()
    call = function(name, **OPTIONS[name][which])
    with normkit.compile_mode("op"):
        made = compiled(call)
        given = tensors(name, torch.bfloat16)
        assert_equal_bits(made(*given), call(*given))
        for got, expected in zip(
            results_and_gradients(made, given), results_and_gradients(call, given), strict=True
        ):
            assert_equal_bits(got, expected)


@every_op
def test_inlined_calls_round_where_eager_ones_do(name: str) -> None:
    torch._dynamo.reset()
    call, recorder = function(name, **OPTIONS[name][1]), Recorder()
    with normkit.compile_mode("inline"), torch.no_grad():
        given = tensors(name, torch.bfloat16)
        got = torch.compile(call, fullgraph=True, backend=recorder.backend)(*given)
    assert not called(recorder.graphs[0], "normkit")
    with normkit.use_backend("reference"):
        assert_equal_bits(got, call(*given))


@every_op
def test_a_call_that_needs_gradients_is_an_operator_when_compiled(name: str) -> None:
    """Inductor would leave out the casts of plain torch, and so its roundings."""
    torch._dynamo.reset()
    recorder = Recorder()
    with normkit.compile_mode("inline"):
        made = torch.compile(function(name), fullgraph=True, backend=recorder.backend)
        results_and_gradients(made, tensors(name))
    assert f"normkit.{name}_kernel.default" in called(recorder.graphs[0])
    assert "normkit.norm_backward_kernel.default" in called(recorder.graphs[1])


@every_op
def test_exported_programs_run_one_operator(name: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, *given: Tensor) -> Any:
            return getattr(normkit, name)(*given)

    given = tuple(tensors(name))
    program = torch.export.export(Module(), given)
    assert called(program.graph_module, "normkit") == [f"normkit.{name}.default"]
    assert_equal_bits(program.module()(*given), getattr(normkit, name)(*given))


@every_op
def test_transforms_of_torch_func_see_every_tensor(name: str) -> None:
    given = tensors(name)

    def loss(*tensors: Tensor) -> Tensor:
        return listed(getattr(normkit, name)(*tensors))[0].square().sum()

    by_func = torch.func.grad(loss, argnums=tuple(range(len(given))))(*given)
    wanting = clones(given, grad=True)
    for got, expected in zip(by_func, torch.autograd.grad(loss(*wanting), wanting), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@every_op
def test_what_is_nested_is_refused_and_what_is_fake_gets_shapes(name: str) -> None:
    given = tensors(name)
    jagged = torch.nested.nested_tensor(list(given[0].unbind()), layout=torch.jagged)
    with pytest.raises(ValueError, match="^x: expected a dense tensor"):
        getattr(normkit, name)(jagged, *given[1:])
    narrow = [given[0].bfloat16(), *given[1:]]
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in narrow]
        made = listed(getattr(normkit, name)(*fakes))
    assert [(t.shape, t.dtype) for t in made] == [
        (t.shape, t.dtype) for t in listed(getattr(normkit, name)(*narrow))
    ]
