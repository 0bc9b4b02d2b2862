"""Gated norms: on which side of the norm, of which activation, in which groups, rounded where."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import normkit
from conformance.support import DTYPES, assert_same_bits
from normkit import reference, testing

F32, F16, BF16 = DTYPES
ACTIVATIONS = ("silu", "sigmoid")
FORMS = tuple(
    {"kind": kind, "activation": activation, "norm_before_gate": first}
    for kind, activation, first in itertools.product(("rms", "layer"), ACTIVATIONS, (True, False))
)


def made(
    shape: tuple[int, ...], dtype: torch.dtype, z_dtype: torch.dtype | None = None, **rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, z, weight and bias."""
    x, _, weight, bias = testing.make_inputs(shape, dtype, **rest)
    _, z, *_ = testing.make_inputs(shape, residual_dtype=z_dtype or dtype, seed=3)
    return x, z * 2, weight, bias


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
@pytest.mark.parametrize("n", [1, 7, 64, 100, 1000, 4104])
def test_every_form_is_accurate_in_any_dtypes(backend: Any, form: dict[str, Any], n: int) -> None:
    for dtype, z_dtype in itertools.product(DTYPES, DTYPES):
        x, z, weight, bias = made((3, 2, n), dtype, z_dtype)
        for affine in ((weight, bias), (weight, None), (None, None)):
            y = backend("gated_norm", x, z, *affine, **form)
            testing.assert_accurate(y, x, *affine, z=z, **form)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
def test_round_each_rounds_the_norm_before_the_gate_multiplies(
    backend: Any, form: dict[str, Any]
) -> None:
    for dtype, n in itertools.product((F16, BF16), (40, 300)):
        x, z, weight, bias = made((5, n), dtype)
        for affine in ((weight, bias), (weight, None), (None, None)):
            options = {"round_before_weight": True}
            y = backend("gated_norm", x, z, *affine, round_each=True, **options, **form)
            if not form["norm_before_gate"]:
                options |= {"out_dtype": F32, **form}
                y = backend("gated_norm", x, z, *affine, round_each=True, **options)
                assert_same_bits(y, backend("gated_norm", x, z, *affine, **options))
                continue
            norm = backend("head_norm", x, *affine, kind=form["kind"], **options)
            a = backend("gated_norm", torch.ones_like(x), z, eps=0.0, out_dtype=F32,
                        activation=form["activation"])  # fmt: skip
            assert_same_bits(y, (norm.float() * a).to(dtype))


def test_groups_are_norms_of_their_own(backend: Any) -> None:
    packed = testing.make_inputs((2, 5, 400), BF16).x
    x, z = packed[..., 8:200], packed[..., 200:392]  # slices, as of a packed projection
    weight, bias = testing.make_inputs((192,), BF16)[2:]
    for form, size in itertools.product(FORMS, (1, 24, 64, 192)):
        y = backend("gated_norm", x, z, weight, bias, group_size=size, **form)
        alone = [
            backend("gated_norm", x[..., at], z[..., at], weight[at], bias[at], **form)
            for at in (slice(i, i + size) for i in range(0, 192, size))
        ]
        assert_same_bits(y, torch.cat(alone, -1))
        out = torch.empty_like(x)
        assert backend("gated_norm", x, z, weight, bias, group_size=size, out=out, **form) is out
        assert_same_bits(out, y)
        again = x.clone()
        given = (again, z, weight, bias)
        assert backend("gated_norm_", *given, group_size=size, **form) is again
        assert_same_bits(again, y)


def test_rows_may_be_heads_with_a_weight_each(backend: Any) -> None:
    x, z, weight, bias = made((4, 3, 40), BF16, per_head=True)
    for form in FORMS:
        y = backend("gated_norm", x, z, weight, bias, **form)
        testing.assert_accurate(y, x, weight, bias, z=z, **form)


def test_z_of_any_strides_is_read_where_it_is(backend: Any) -> None:
    x, z, weight, _ = made((3, 4, 5, 24), BF16)
    expected = backend("gated_norm", x, z, weight)
    moved = z.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    wide = torch.stack([z, -z], -2)[..., 0, :]
    for given in (moved, wide):
        assert_same_bits(backend("gated_norm", x, given, weight), expected)
        assert "copied" not in normkit.explain("gated_norm", x, given, weight).reason


def test_x_and_z_may_be_one_memory_and_the_output_too(backend: Any) -> None:
    for n, form in itertools.product((24, 65), FORMS):
        x, z, weight, _ = made((4, n), BF16)
        expected = backend("gated_norm", x, z, weight, **form)
        out = z.clone()
        backend("gated_norm", x, out, weight, out=out, **form)
        assert_same_bits(out, expected)
        itself = x.clone()
        backend("gated_norm_", itself, itself, weight, **form)
        assert_same_bits(itself, backend("gated_norm", x, x, weight, **form))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_gate_at_its_ends(backend: Any, activation: str) -> None:
    ends = (math.inf, 200.0, 89.0, 88.0, 1e-30, 0.0, -1e-30, -87.0, -200.0, -math.inf, math.nan)
    z = torch.tensor([ends, ends])
    y = backend("gated_norm", torch.ones_like(z), z, eps=0.0, activation=activation)
    expected = reference.activated(z, activation, F32)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())
    torch.testing.assert_close(y, expected, rtol=2**-21, atol=2.0**-126, equal_nan=True)


def test_the_gate_is_as_near_to_the_truth_as_stated(backend: Any) -> None:
    z = torch.linspace(-87.3, 87.3, 1 << 15).view(-1, 64)
    for activation in ACTIVATIONS:
        y = backend("gated_norm", torch.ones_like(z), z, eps=0.0, activation=activation)
        truth = reference.activated(z, activation, torch.float64)
        assert ((y.double() - truth) / truth).abs().max() < 3.5 * 2.0**-24


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
def test_gradients_are_those_of_the_formula(backend: Any, form: dict[str, Any]) -> None:
    for n, affine in itertools.product((5, 40, 1100), (True, False)):
        leaves = [t.requires_grad_() for t in made((3, 2, n), F32)[: 4 if affine else 2]]
        y = backend("gated_norm", *leaves, **form)
        grad_y = testing.make_inputs(tuple(y.shape), seed=9).x
        got = torch.autograd.grad(y, leaves, grad_y)
        x, z, *rest = (t.detach().double().requires_grad_() for t in leaves)
        truth = reference.norm(x, *rest, z=z, eps=1e-6, **form)
        expected = torch.autograd.grad(truth, [x, z, *rest], grad_y.double())
        for name, t, t64 in zip(("x", "z", "weight", "bias"), got, expected, strict=False):
            size = t64.abs().max().item()
            torch.testing.assert_close(t.double(), t64, rtol=2e-5, atol=2e-5 * size, msg=name)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
def test_gradients_can_be_differentiated_again(form: dict[str, Any]) -> None:
    leaves = [t.double().requires_grad_() for t in made((2, 6), F32)]
    assert torch.autograd.gradgradcheck(
        lambda *given: normkit.gated_norm(*given, eps=0.3, **form), leaves
    )


def test_a_single_row_has_the_gradients_of_one_of_several(backend: Any) -> None:
    x, z, weight, bias = made((2, 24), F32)
    results = []
    for row in (slice(0, 1), 0):
        leaves = [t.clone().requires_grad_() for t in (x[row], z[row], weight, bias)]
        y = backend("gated_norm", *leaves)
        results.append(torch.autograd.grad(y.sum(), leaves))
    for several, one in zip(*results, strict=True):
        assert_same_bits(one, several.view(24))


def test_what_clamp_inf_clamped_is_a_constant(backend: Any) -> None:
    x, z, weight, _ = made((3, 40), F16)
    x[1, 2] = math.inf
    x.requires_grad_()
    for form in FORMS:
        y = backend("gated_norm", x, z, weight, clamp_inf=True, **form)
        testing.assert_accurate(y.detach(), x.detach(), weight, z=z, clamp_inf=True, **form)
        (of_x,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert of_x[1, 2] == 0
        assert of_x.isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"z": None}, TypeError, r"^z: expected a torch.Tensor, got NoneType"),
        ({"z": torch.ones(4, 23)}, ValueError, r"^z: expected x's shape \(4, 24\), got \(4, 23\)"),
        ({"z": torch.ones(4, 24).int()}, TypeError, r"^z: expected float32.*got torch.int32"),
        ({"activation": "gelu"}, ValueError, r"^activation: expected .silu. or .sigmoid., got"),
        ({"norm_before_gate": 1}, TypeError, r"^norm_before_gate: expected True or False, got int"),
        ({"group_size": 5}, ValueError, r"^group_size: expected a divisor .* got 5 for x of"),
        ({"group_size": 0}, ValueError, r"^group_size: expected at least 1, got 0"),
        ({"group_size": 2.0}, TypeError, r"^group_size: expected an int, got float"),
        ({"weight": torch.ones(23), "group_size": 8}, ValueError, r"^weight: expected x's last"),
        (
            {"weight": torch.ones(4, 23)},
            ValueError,
            r"^weight: expected shape \(4, 24\) or \(24,\)",
        ),
        ({"z": torch.ones(4, 24).to_sparse()}, ValueError, r"^z: expected a dense"),
        *(
            ({name: t, "group_size": 8}, ValueError, rf"^{name}: expected {expected}")
            for name, t, expected in (
                ("weight", torch.ones(4, 24), r"shape \(24,\) with group_size, got \(4, 24\)"),
                ("bias", torch.ones(24).to_sparse(), r"a dense \(strided\) tensor"),
                ("z", torch.nested.nested_tensor([torch.ones(24)], layout=torch.jagged), "a dense"),
            )
        ),
    ],
)
def test_errors_name_the_argument_and_nothing_is_written(
    backend: Any, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    x = torch.randn(4, 24)
    before = x.clone()
    with pytest.raises(error, match=message):
        backend.unexplained("gated_norm_", **({"x": x, "z": torch.ones(4, 24)} | change))
    assert_same_bits(x, before)


def test_an_output_that_crosses_z_is_refused(backend: Any) -> None:
    memory = torch.randn(5, 24)
    with pytest.raises(ValueError, match=r"^out: expected z's memory or none of it"):
        backend.unexplained("gated_norm", torch.randn(4, 24), memory[:4], out=memory[1:])
