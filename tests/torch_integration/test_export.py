"""Exported programs: our operators, any number of rows, and the way through a file."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

import normkit
from torch_integration.support import (
    FUNCTIONS,
    MODULES,
    adds,
    assert_equal_bits,
    called,
    clones,
    randomised,
    results_and_gradients,
    tensors,
)

# Torch's own deep copies warn, and in 2.10 what reads a program from a file.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*LeafSpec:FutureWarning", "ignore:The given buffer is not writable:UserWarning"
)

both_ways = pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])


class Calling(nn.Module):
    """A function as a module; weights and biases are its parameters."""

    def __init__(self, function: Callable[..., Any], parameters: list[Tensor]) -> None:
        super().__init__()
        self.function = function
        for place, t in enumerate(parameters):  # no ParameterList, which torch 2.10 cannot unpack
            self.register_parameter(f"given_{place}", nn.Parameter(t))

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors, *self.parameters())


def exported(module: nn.Module, given: list[Tensor], strict: bool) -> ExportedProgram:
    """Export with the first dimension of all inputs left open."""
    rows = {0: Dim("rows", min=2, max=1 << 20)}
    shapes = tuple(rows for _ in given)
    dynamic: Any = (shapes,) if isinstance(module, Calling) else shapes
    return torch.export.export(module.eval(), tuple(given), dynamic_shapes=dynamic, strict=strict)


def through_a_file(program: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@both_ways
@pytest.mark.parametrize("name", FUNCTIONS)
def test_exported_functions_equal_eager_ones_bit_for_bit(name: str, strict: bool) -> None:
    function = getattr(normkit, name)
    given = tensors(name, dtype=torch.bfloat16, weight_dtype=torch.float32)
    module = Calling(function, given[-2:]).requires_grad_(False)
    program = exported(module, given[:-2], strict)
    assert called(program.graph_module, "normkit") == [f"normkit.{name}.default"]
    decomposed = program.run_decompositions().graph_module
    assert called(decomposed, "normkit") == [f"normkit.{name}_kernel.default"]
    assert not called(decomposed, "aten")
    for rows in (2, 7):
        x = tensors(name, (rows, 3, 8), torch.bfloat16)[:-2]
        assert_equal_bits(program.module()(*x), module(*x))


def test_a_decomposed_program_has_gradients() -> None:
    module = normkit.LayerNorm(8)
    program = torch.export.export(module, (torch.randn(3, 8),))
    x = torch.randn(3, 8)
    _, expected = results_and_gradients(program.module(), [x])
    _, made = results_and_gradients(program.run_decompositions().module(), [x])
    torch.testing.assert_close(made, expected)


@both_ways
@pytest.mark.parametrize("kind", MODULES)
def test_exported_modules_can_be_saved_and_take_other_rows(kind: str, strict: bool) -> None:
    module = randomised(MODULES[kind](8, memory_efficient=True))
    given = tensors("add_rms_norm")[:2]
    loaded = through_a_file(exported(module, given, strict)).module()
    for rows in (5, 64):
        x, residual = tensors("add_rms_norm", (rows, 3, 8), seed=rows)[:2]
        assert_equal_bits(loaded(x, residual), module(x, residual))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.weight = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        residual = residual.clone()
        for linear in self.linears:
            x = linear(x)
            normkit.add_rms_norm_(x, residual, self.weight)
        return normkit.layer_norm_(x + residual)


@both_ways
def test_in_place_layers_can_be_exported_and_saved(strict: bool) -> None:
    model, given = Decoder().requires_grad_(False), tensors("add_rms_norm", (4, 8))[:2]
    program = exported(model, given, strict)
    operators = ["normkit.add_rms_norm_.default"] * 3 + ["normkit.layer_norm_.default"]
    assert called(program.graph_module, "normkit") == operators
    for loaded in (through_a_file(program), program.run_decompositions()):
        x, residual = tensors("add_rms_norm", (9, 8))[:2]
        before = clones([x, residual])
        assert_equal_bits(loaded.module()(x, residual), model(x, residual))
        assert_equal_bits([x, residual], before)


@both_ways
def test_outputs_given_by_the_caller_are_written_by_the_program(strict: bool) -> None:
    class Writing(nn.Module):
        def forward(self, x: Tensor, residual: Tensor, out: Tensor) -> Tensor:
            return normkit.add_rms_norm(x, residual, out=out, residual_out=residual)[0]

    x, residual = tensors("add_rms_norm")[:2]
    program = exported(Writing(), [*clones([x, residual]), torch.zeros(2, 3, 8)], strict)
    mine, theirs = ([*clones([x, residual]), torch.zeros(2, 3, 8)] for _ in range(2))
    assert_equal_bits(program.module()(*mine), Writing()(*theirs))
    assert_equal_bits(mine, theirs)


@both_ways
def test_shape_errors_are_found_while_exporting(strict: bool) -> None:
    with pytest.raises(Exception, match=r"weight: expected shape \(8,\)"):
        exported(Calling(normkit.rms_norm, [torch.ones(7)]), [torch.ones(4, 8)], strict)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_trace_of_make_fx_calls_our_operators(name: str) -> None:
    given = tensors(name)
    for mode in ("fake", "symbolic"):
        graph = make_fx(lambda *g: getattr(normkit, name)(*g), tracing_mode=mode)(*given)
        assert called(graph, "normkit") == [f"normkit.{name}_kernel.default"]
        made = graph(*given)
        assert_equal_bits(made, getattr(normkit, name)(*given))
        assert isinstance(made, tuple) == adds(name)
