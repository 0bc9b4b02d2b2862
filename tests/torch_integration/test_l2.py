"""L2 norms inside PyTorch: operators, compiled, exported, under autocast and jagged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import normkit
from torch_integration.support import (
    assert_equal_bits,
    clones,
    compiled,
    operator,
    results_and_gradients,
)

both = pytest.mark.parametrize("eps_outside", [False, True])


def rows() -> Tensor:
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(3))
    return x * torch.tensor([1e-2, 1.0, 1e2])[:, None]


@both
@pytest.mark.parametrize("grad", [False, True])
def test_operators_keep_torchs_rules(eps_outside: bool, grad: bool) -> None:
    given = rows().requires_grad_(grad), 0.3, eps_outside
    torch.library.opcheck(operator("l2_norm"), given)
    if not grad:
        torch.library.opcheck(operator("l2_norm", "_"), tuple(clones(given)))


@both
def test_forms_that_write_give_what_the_functional_one_does(eps_outside: bool) -> None:
    x = rows().bfloat16()
    expected = normkit.l2_norm(x, 0.3, eps_outside=eps_outside)
    y, rstd = operator("l2_norm")(x, 0.3, eps_outside)
    assert_equal_bits(y, expected)
    assert rstd.shape == x.shape[:-1]
    out = torch.empty_like(x)
    operator("l2_norm", "_out")(out, x, 0.3, eps_outside)
    assert_equal_bits(out, expected)
    operator("l2_norm", "_")(x, 0.3, eps_outside)
    assert_equal_bits(x, expected)


# Tracing an autograd function makes one, of which torch itself warns.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@both
@pytest.mark.parametrize("mode", ["op", "inline"])
def test_compiled_calls_give_what_eager_ones_do(mode: str, eps_outside: bool) -> None:
    torch._dynamo.reset()

    def call(x: Tensor) -> Tensor:
        return normkit.l2_norm(x, 0.3, eps_outside=eps_outside)

    with normkit.compile_mode(mode):
        made = compiled(call)
        got, expected = (results_and_gradients(f, [rows()]) for f in (made, call))
    if mode == "op":
        assert_equal_bits([*got[0], *got[1]], [*expected[0], *expected[1]])
    else:
        torch.testing.assert_close(got, expected)


@both
def test_exported_programs_have_the_operator(eps_outside: bool) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return normkit.l2_norm(x, 0.3, eps_outside=eps_outside)

    program = torch.export.export(Model(), (rows(),))
    assert "normkit.l2_norm" in str(program.graph)
    assert_equal_bits(program.module()(rows()), Model()(rows()))


def test_jagged_rows_are_those_of_the_values() -> None:
    values = torch.randn(7, 8)
    ragged = torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, 3, 7]))
    assert_equal_bits(normkit.l2_norm(ragged).values(), normkit.l2_norm(values))
