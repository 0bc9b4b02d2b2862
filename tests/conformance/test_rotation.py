"""Rotated norms: the unfused formula, which cos and sin a row has, and what is rounded where."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import normkit
from conformance.support import (
    DTYPES,
    ROTATED,
    Guarded,
    Inputs,
    assert_same_bits,
    inputs_for,
    lazily_negated,
    run_and_check,
    threads,
)
from normkit import testing
from normkit.reference import rotation

F32, F16, BF16 = DTYPES
(OP,) = ROTATED
LAWS: tuple[dict[str, bool], ...] = ({}, {"round_norm": True}, {"round_each": True})
pairings = pytest.mark.parametrize("interleaved", [False, True])


def table(
    shape: tuple[int, ...], half: int, dtype: torch.dtype = F32, seed: int = 5
) -> tuple[Tensor, Tensor]:
    """cos and sin of angles up to some turns."""
    angles = 5 * testing.make_inputs((*shape, max(half, 1)), seed=seed).x[..., :half]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def made(
    shape: tuple[int, ...], dtype: torch.dtype, half: int, table_dtype: torch.dtype = F32
) -> Inputs:
    """Inputs with a weight for each head, and cos and sin for each token."""
    inputs = inputs_for(OP, shape[:-1], shape[-1], dtype)
    cos, sin = table(shape[:-2], half, table_dtype)
    return inputs._replace(cos=cos, sin=sin)


def rotate_half(x: Tensor) -> Tensor:
    """As models of transformers have it, whose cos and sin repeat their columns."""
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def rotate_neighbours(x: Tensor) -> Tensor:
    """As GPT-J has it."""
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def in_torch(n: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """n * cos + rotate(n) * sin of its first columns, each operation by torch."""
    width = 2 * cos.shape[-1]
    if interleaved:
        cos, sin = (t.repeat_interleave(2, -1) for t in (cos, sin))
    else:
        cos, sin = (torch.cat((t, t), -1) for t in (cos, sin))
    turned, rest = n[..., :width], n[..., width:]
    rotate = rotate_neighbours if interleaved else rotate_half
    y = turned * cos.unsqueeze(-2) + rotate(turned) * sin.unsqueeze(-2)
    return torch.cat((y, rest.to(y.dtype)), -1)


# ---------------------------------------------------------------------------------------- rounding


@pairings
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize(("n", "half"), [(2, 1), (7, 3), (64, 32), (128, 64), (100, 31), (300, 65)])
def test_fused_equals_unfused_bit_for_bit_where_each_operation_is_rounded(
    backend: Any, kind: str, n: int, half: int, interleaved: bool
) -> None:
    for dtype, table_dtype in itertools.product(DTYPES, DTYPES):
        x, _, weight, bias, *_, cos, sin = made((2, 3, 4, n), dtype, half, table_dtype)
        norm = backend("head_norm", x, weight, bias, kind=kind)
        options = {"kind": kind, "interleaved": interleaved}
        expected = in_torch(norm, cos, sin, interleaved=interleaved)
        y = backend("norm_rope", x, cos, sin, weight, bias, round_each=True, **options,
                    out_dtype=expected.dtype)  # fmt: skip
        assert_same_bits(y, expected)
        wide = rotation.rotated(norm.float(), cos.float(), sin.float(), interleaved=interleaved)
        y = backend("norm_rope", x, cos, sin, weight, bias, round_norm=True, **options)
        assert_same_bits(y, wide.to(dtype))
        unrounded = backend("head_norm", x, weight, bias, kind=kind, out_dtype=F32)
        wide = rotation.rotated(unrounded, cos.float(), sin.float(), interleaved=interleaved)
        assert_same_bits(backend("norm_rope", x, cos, sin, weight, bias, **options), wide.to(dtype))


@pairings
@pytest.mark.parametrize("law", LAWS, ids=str)
def test_every_law_is_accurate_in_any_dtypes(
    backend: Any, law: dict[str, bool], interleaved: bool
) -> None:
    for dtype, (n, half) in itertools.product(DTYPES, ((128, 64), (96, 20), (1030, 515))):
        for kind, out_dtype in itertools.product(("rms", "layer"), (None, F32)):
            op, inputs = OP._replace(kind=kind), made((3, 2, n), dtype, half, BF16)
            options = {"interleaved": interleaved, "out_dtype": out_dtype, **law}
            run_and_check(backend, op, inputs, **options)


def test_the_options_of_a_norm_hold_in_front_of_the_rotation(backend: Any) -> None:
    inputs = made((4, 3, 40), BF16, 20)
    x, weight, cos, sin = inputs.x, inputs.weight, inputs.cos, inputs.sin
    for options in (
        {"weight_offset": 1.0},
        {"round_before_weight": True},
        {"round_rstd": True},
        {"round_weight": True, "weight_offset": 1.0},
        {"eps": 0.3},
    ):
        norm = backend("head_norm", x, weight, **options, out_dtype=F32)
        y = backend("norm_rope", x, cos, sin, weight, **options)
        assert_same_bits(y, rotation.rotated(norm, cos, sin).to(BF16))


def test_without_columns_in_cos_nothing_is_rotated(backend: Any) -> None:
    inputs = made((4, 3, 40), BF16, 0)
    y = backend("norm_rope", *OP.tensors(inputs))
    assert_same_bits(y, backend("head_norm", inputs.x, inputs.weight, inputs.bias))


@pytest.mark.parametrize("name", ["x", "cos", "sin"])
@pytest.mark.parametrize("columns", [1, 6])
def test_what_is_negated_lazily_counts_as_negative(backend: Any, name: str, columns: int) -> None:
    inputs = made((4, 3, 2 * columns + 1), F32, columns)
    t = getattr(inputs, name)
    given = inputs._replace(**{name: lazily_negated(t)}), inputs._replace(**{name: -t})
    for options in ({}, {"positions": torch.tensor([1, 0, 3, 2])}):
        y, expected = (backend.unexplained("norm_rope", *OP.tensors(i), **options) for i in given)
        assert_same_bits(y, expected)


@pytest.mark.parametrize("law", ["round_norm", "round_each"])
def test_without_columns_in_cos_the_norm_is_rounded_where_it_should_be(law: str) -> None:
    inputs = made((4, 3, 40), BF16, 0)
    y = normkit.norm_rope(*OP.tensors(inputs), **{law: True}, out_dtype=F32)
    assert_same_bits(y, normkit.head_norm(inputs.x, inputs.weight, inputs.bias).float())


# ---------------------------------------------------------------------- which cos and sin a row has


@pairings
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_positions_choose_rows_of_a_table(
    backend: Any, dtype: torch.dtype, interleaved: bool
) -> None:
    x, _, weight, *_ = made((2, 5, 3, 40), BF16, 16)
    cos, sin = table((9,), 16, BF16)
    for positions in (
        torch.tensor([[0, 8, 3, 3, 1], [2, 0, 7, 8, 5]]),
        torch.tensor([4, 0, 8, 1, 1]),
        torch.tensor([[3], [8]]),
        torch.tensor(6),
    ):
        every = positions.expand(2, 5)
        given = {"weight": weight, "interleaved": interleaved}
        y = backend("norm_rope", x, cos, sin, positions=positions.to(dtype), **given)
        assert_same_bits(y, backend("norm_rope", x, cos[every], sin[every], **given))


@pytest.mark.parametrize("outside", [-1, 9, 2**31 - 1, -(2**31), 2**40, -(2**62)])
def test_a_position_outside_of_the_table_is_nan_in_the_columns_that_rotate(
    backend: Any, outside: int
) -> None:
    x, *_ = made((5, 3, 40), F32, 16)
    cos, sin = table((9,), 16)
    positions = torch.tensor([1, outside, 8, outside, 0])
    if abs(outside) <= 2**31 and outside != 2**31:
        positions = positions.int()
    y = backend("norm_rope", x, cos, sin, positions=positions)
    assert y[[1, 3], :, :32].isnan().all()
    assert y[..., 32:].isfinite().all()
    inside = torch.tensor([1, 0, 8, 0, 0])
    expected = backend("norm_rope", x, cos, sin, positions=inside)
    assert_same_bits(y[[0, 2, 4]], expected[[0, 2, 4]])


def test_a_table_without_rows_has_no_position_inside(backend: Any) -> None:
    x, *_ = made((2, 3, 8), F32, 4)
    cos, sin = (torch.empty(0, 2) for _ in "cs")
    y = backend("norm_rope", x, cos, sin, positions=torch.zeros(2, dtype=torch.int64))
    assert y[..., :4].isnan().all()
    assert y[..., 4:].isfinite().all()


def test_tokens_share_cos_and_sin_by_broadcasting(backend: Any) -> None:
    x, *_ = made((2, 3, 5, 4, 24), BF16, 12)
    for shape in ((5,), (3, 5), (3, 1), (2, 1, 5), (1, 1, 1), (), (2, 3, 5)):
        cos, sin = table(shape, 12)
        every = [t.expand(2, 3, 5, 12).contiguous() for t in (cos, sin)]
        expected = backend("norm_rope", x, *every)
        assert_same_bits(backend("norm_rope", x, cos, sin), expected)


def test_strides_of_every_tensor_are_read_where_they_are(backend: Any) -> None:
    """Slices of a packed projection, x behind heads, both halves of one table."""
    packed = testing.make_inputs((3, 5, 12, 24), BF16).x
    cache = torch.cat(table((7,), 12, BF16), -1)
    cos, sin = cache.chunk(2, -1)
    positions = torch.tensor([[6, 0, 3, 1, 1], [0, 0, 0, 2, 4], [5, 6, 5, 6, 5]])
    wide = torch.stack((positions, positions + 1), -1)[..., 0]
    heads_first = packed.transpose(1, 2).contiguous().transpose(1, 2)
    expected = backend("norm_rope", packed[:, :, 2:6].contiguous(), cos.contiguous(),
                       sin.contiguous(), positions=positions)  # fmt: skip
    for x in (packed, heads_first):
        given = (x[:, :, 2:6], cos, sin)
        assert_same_bits(backend("norm_rope", *given, positions=wide), expected)
        assert "copied" not in normkit.explain("norm_rope", *given, positions=wide).reason


@pairings
@pytest.mark.parametrize("n", [40, 65])
def test_heads_of_a_packed_projection_are_written_in_place_and_nothing_else(
    backend: Any, n: int, interleaved: bool
) -> None:
    guarded = Guarded((4, 6, n), BF16, strides=(9 * n + 3, n + 1, 1))
    inputs = made((4, 6, n), BF16, n // 2)
    x = guarded.fill(inputs.x)
    expected = backend("norm_rope", *OP.tensors(inputs), interleaved=interleaved)
    given = OP.tensors(inputs._replace(x=x))
    assert backend("norm_rope_", *given, interleaved=interleaved) is x
    assert_same_bits(x, expected)
    guarded.assert_only_elements_written()


def test_a_row_has_the_same_bits_wherever_it_stands(backend: Any) -> None:
    inputs = made((301, 7, 128), BF16, 64)
    x, cos, sin, weight, bias = OP.tensors(inputs)
    with threads(1):
        alone = torch.cat(
            [backend("norm_rope", x[i : i + 1], cos[i : i + 1], sin[i : i + 1], weight, bias)
             for i in (0, 1, 150, 299, 300)]
        )  # fmt: skip
    for count in (1, 2):
        with threads(count):
            y = backend("norm_rope", x, cos, sin, weight, bias)
        assert_same_bits(y[[0, 1, 150, 299, 300]], alone)


# --------------------------------------------------------------------------------------- gradients


@pairings
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize(("n", "half"), [(6, 3), (40, 12), (130, 65)])
def test_gradients_are_those_of_the_formula(
    backend: Any, kind: str, n: int, half: int, interleaved: bool
) -> None:
    inputs = made((3, 2, 4, n), F32, half)
    for positions in (None, torch.tensor([[0, 5], [5, 1], [2, 5]])):
        cos, sin = (inputs.cos, inputs.sin) if positions is None else table((6,), half)
        given = [inputs.x, cos, sin, inputs.weight, inputs.bias]
        leaves = [t.clone().requires_grad_() for t in given if t is not None]
        options = {"kind": kind, "interleaved": interleaved, "positions": positions}
        y = backend("norm_rope", *leaves, **options)
        grad_y = testing.make_inputs(tuple(y.shape), seed=9).x
        got = torch.autograd.grad(y, leaves, grad_y)
        again = [t.detach().double().requires_grad_() for t in leaves]
        truth = rotation.norm_rope(*again, **options)
        expected = torch.autograd.grad(truth, again, grad_y.double())
        for name, t, t64 in zip(OP.takes, got, expected, strict=True):
            size = t64.abs().max().item()
            torch.testing.assert_close(t.double(), t64, rtol=2e-5, atol=2e-5 * size, msg=name)


@pairings
def test_gradients_can_be_differentiated_again(interleaved: bool) -> None:
    given = [t.double() for t in OP.tensors(made((2, 2, 6), F32, 2))]
    assert torch.autograd.gradgradcheck(
        lambda *tensors: normkit.norm_rope(*tensors, eps=0.3, interleaved=interleaved),
        [t.requires_grad_() for t in given],
    )


def test_no_tokens_give_a_table_no_gradient(backend: Any) -> None:
    leaves = [torch.ones(shape, requires_grad=True) for shape in ((0, 4, 24), (7, 1), (7, 1))]
    y = backend("norm_rope", *leaves, positions=torch.tensor(4))
    for leaf, gradient in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
        assert_same_bits(gradient, torch.zeros_like(leaf))


def test_cos_and_sin_get_the_gradients_of_the_tokens_that_share_them(backend: Any) -> None:
    x, *_ = made((2, 5, 3, 8), F32, 4)
    for shape in ((5,), (2, 1), ()):
        cos, sin = (t.requires_grad_() for t in table(shape, 4))
        y = backend("norm_rope", x, cos, sin)
        got = torch.autograd.grad(y.square().sum() + y[..., 0].sum(), (cos, sin))
        again = [t.detach().double().requires_grad_() for t in (cos, sin)]
        truth = rotation.norm_rope(x.double(), *again, kind="rms")
        expected = torch.autograd.grad(truth.square().sum() + truth[..., 0].sum(), again)
        for t, t64 in zip(got, expected, strict=True):
            torch.testing.assert_close(t.double(), t64, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cos": None}, TypeError, r"^cos: expected a torch.Tensor, got NoneType"),
        ({"sin": torch.ones(4, 11)}, ValueError, r"^sin: expected cos's shape \(4, 12\), got"),
        ({"sin": torch.ones(4, 12).half()}, TypeError, r"^sin: expected cos's dtype torch.float32"),
        ({"cos": torch.ones(4, 12).int()}, TypeError, r"^cos: expected float32.*got torch.int32"),
        (
            {"cos": torch.ones(4, 13), "sin": torch.ones(4, 13)},
            ValueError,
            r"^cos: expected at most 12 columns, half of x's 24, got \(4, 13\)",
        ),
        (
            {"cos": torch.ones(3, 12), "sin": torch.ones(3, 12)},
            ValueError,
            r"^cos: expected rows for x's tokens \(4,\), got shape \(3, 12\)",
        ),
        (
            {"positions": torch.ones(4)},
            TypeError,
            r"^positions: expected int32 or int64, got torch.float32",
        ),
        (
            {"positions": [0, 1, 2, 3]},
            TypeError,
            r"^positions: expected a torch.Tensor, got list",
        ),
        (
            {"positions": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"^positions: expected x's tokens \(4,\), got shape \(3,\)",
        ),
        (
            {
                "positions": torch.zeros(4, dtype=torch.int64),
                "cos": torch.ones(2, 4, 12),
                "sin": torch.ones(2, 4, 12),
            },
            ValueError,
            r"^cos: expected a table \(positions, columns\), got shape \(2, 4, 12\)",
        ),
        ({"interleaved": 1}, TypeError, r"^interleaved: expected True or False, got int"),
        ({"round_norm": None}, TypeError, r"^round_norm: expected True or False, got NoneType"),
    ],
)
def test_errors_name_the_argument_and_nothing_is_written(
    backend: Any, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    x = torch.randn(4, 2, 24)
    before = x.clone()
    given = {"x": x, "cos": torch.ones(4, 12), "sin": torch.ones(4, 12)} | change
    with pytest.raises(error, match=message):
        backend.unexplained("norm_rope_", **given)
    assert_same_bits(x, before)


def test_an_output_that_crosses_a_table_is_refused(backend: Any) -> None:
    memory = torch.randn(5, 2, 24)
    cos = memory[0, 0, :12]
    with pytest.raises(ValueError, match=r"^x: expected memory apart from cos's, got an overlap"):
        backend.unexplained("norm_rope_", memory, cos, torch.ones(12))


def test_an_output_over_the_positions_is_refused(backend: Any) -> None:
    memory = torch.zeros(5, 2, 24)
    positions = memory[3:].flatten().view(torch.int64)[-5:]
    table = torch.ones(3, 12), torch.ones(3, 12)
    with pytest.raises(ValueError, match=r"^x: expected memory apart from positions's, got an ove"):
        backend.unexplained("norm_rope_", memory, *table, positions=positions)


def test_nan_and_infinity_stay_in_their_row(backend: Any) -> None:
    x, cos, sin, *_ = OP.tensors(made((4, 2, 24), F32, 12))
    clean = backend("norm_rope", x, cos, sin)
    for value in (math.nan, math.inf):
        spoilt = x.clone()
        spoilt[2, 1, 3] = value
        y = backend("norm_rope", spoilt, cos, sin)
        assert y[2, 1].isnan().any()
        y[2, 1] = clean[2, 1]
        assert_same_bits(y, clean)
