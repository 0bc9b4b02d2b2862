"""What an op is stands in normkit._spec; what is written by hand elsewhere agrees with it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import normkit
from normkit._serving import backends, dispatch, native, operators
from normkit._serving.formula import OF_STATISTICS
from normkit._spec import (
    FIELDS,
    FUSED,
    MODULATORS,
    NATIVE,
    NEXT,
    OPS,
    OPTIONS,
    PLAIN_OPTIONS,
    ROTATED,
    Call,
    Field,
    Op,
    PlainOptions,
)

ROOT = Path(__file__).parents[1]
SHOWN = [name for name, field in FIELDS.items() if field.type not in ("Tensor", "Tensor?")] + [
    "out",
    "residual_out",
]


def expected_of(op: Op, *, in_place: bool) -> dict[str, object]:
    """Arguments and defaults of a function, in its order but for options."""
    taken = {name: field.default for name, field in op.fields.items()}
    if op.gated:
        taken["group_size"] = None  # a view of the tensors, of which a call knows nothing
    if in_place:
        return taken
    return taken | {name: field.default for name, field in op.results.items()}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_signatures_are_those_of_the_table(op: Op, in_place: bool) -> None:
    function = getattr(normkit, op.name + "_" * in_place)
    parameters = inspect.signature(function).parameters
    found = {name: ... if p.default is p.empty else p.default for name, p in parameters.items()}
    assert found == expected_of(op, in_place=in_place)
    positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    operands = ("x", "residual", *MODULATORS, "z", "cos", "sin")
    affine = ("weight", "next_weight", "bias", "next_bias")
    taken = [name for name in (*operands, *affine, "eps", "next_eps") if name in op.fields]
    assert positional == taken


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_modules_and_operators_have_the_defaults_of_the_table(op: Op) -> None:
    schema = getattr(torch.ops.normkit, op.name).default._schema
    for argument in schema.arguments:
        field = op.fields.get(argument.name, FIELDS[argument.name])
        assert argument.has_default_value() == (field.default is not ...)
        if argument.has_default_value():
            assert argument.default_value == field.default
    assert [a.name for a in schema.arguments][: len(op.fields)] == list(op.fields)


def test_a_call_is_the_arguments_of_the_extension() -> None:
    if backends._missing:
        pytest.skip("no extension")
    assert normkit._C.fields == NATIVE + FUSED
    assert tuple(field.name for field in fields(Call))[: len(NATIVE)] == NATIVE


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("form", ["", "_", "_out"])
def test_operators_hand_the_extension_what_a_call_does(
    op: Op, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(operators, "quick", lambda *native: asked.append(native))
    monkeypatch.setattr(dispatch, "save_quickly", asked.append)
    x, residual, weight = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.rand(8)
    given = {
        name: example_of(name, field)
        for name, field in op.fields.items()
        if not field.type.startswith("Tensor")
    }
    tensors = {"x": x, "weight": weight, "residual": residual}
    given |= {name: t for name, t in tensors.items() if name in op.fields}
    given |= {name: torch.rand(8) for name in (*MODULATORS, *NEXT) if name in op.fields}
    given |= {"z": torch.randn(2, 3, 8)} if op.gated else {}
    given |= dict.fromkeys(("cos", "sin"), torch.rand(4)) if op.rotated else {}
    outputs = {"out": torch.empty_like(x)} if form == "_out" else {}
    outputs |= {"residual_out": torch.empty_like(x)} if outputs and op.adds else {}
    with torch.no_grad(), normkit.use_backend("reference"):  # which no kernel of torch's runs
        getattr(torch.ops.normkit, op.name + form)(**outputs, **given)
    expected = op.call(outputs | given, in_place=form == "_").native()
    assert_same_arguments(asked[0], expected)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
@pytest.mark.parametrize("form", ["", "_", "_out"])
def test_kernels_of_operators_hand_the_extension_what_a_call_does(op: Op, form: str) -> None:
    schema = getattr(torch.ops.normkit, op.name + form).default._schema
    known = {**op.fields, **op.results}
    arguments = {argument.name: known[argument.name] for argument in schema.arguments}
    given = {
        name: torch.ones(3) if field.type.startswith("Tensor") else example_of(name, field)
        for name, field in arguments.items()
    }
    kernel = native.kernel_of(op, arguments, () if form else [r.name for r in schema.returns])
    values = tuple(given.values())

    def read(source: object) -> object:
        if isinstance(source, tuple):
            bits, flags = source
            return bits | sum(
                bit for place, bit in flags if values[place] in (True, "layer", "sigmoid")
            )
        return values[source] if type(source) is int else source

    assert kernel.function == ("try_norm" if form else "norm_saving")
    expected = op.call(given, in_place=form == "_").native()
    assert_same_arguments([read(source) for source in kernel.sources], expected)


def assert_same_arguments(native: Sequence[object], expected: Sequence[object]) -> None:
    assert len(native) == len(expected)
    for mine, theirs in zip(native, expected, strict=True):
        if isinstance(theirs, torch.Tensor):
            assert isinstance(mine, torch.Tensor)
            assert mine.data_ptr() == theirs.data_ptr()
        else:
            assert type(mine) is type(theirs)
            assert mine == theirs


def takes_residual(op: Op) -> bool:
    return op.adds or op.post


def example_of(name: str, field: Field) -> object:
    """A value of an argument that is no tensor, and not its default."""
    words = {"kind": "layer", "activation": "sigmoid"}
    values = {"bool": True, "float": 0.25, "str": words.get(name), "ScalarType": torch.float16}
    return values[field.type.rstrip("?")]


@pytest.mark.parametrize("name", ["norm_tp", "part_apply"])
def test_other_calls_of_the_extension_have_the_options_in_the_same_order(name: str) -> None:
    if backends._missing:
        pytest.skip("no extension")
    signature = getattr(normkit._C, name).__text_signature__
    assert ", ".join(("eps", *OPTIONS, "out_dtype")) in signature


def test_every_list_of_options_has_the_same_ones_in_the_same_order() -> None:
    assert tuple(PlainOptions.__annotations__) == PLAIN_OPTIONS
    for op in OPS.values():
        taken = ("clamp_inf",) if op.of_sum else PLAIN_OPTIONS
        assert tuple(name for name in op.fields if name in PLAIN_OPTIONS) == taken
    assert set(OF_STATISTICS) < set(OPTIONS)


def option_table() -> str:
    lines = ["| option | default | |", "|---|---|---|"]
    for name in SHOWN:
        default = FIELDS[name].default
        shown = f'"{default}"' if isinstance(default, str) else default
        if name == "eps":
            shown = "1e-6 for rms, 1e-5 for layer"
        lines.append(f"| `{name}` | {shown} | {FIELDS[name].meaning} |")
    return "\n".join(lines)


def test_the_table_of_options_in_the_docs_is_that_of_the_fields() -> None:
    page = ROOT / "docs" / "api.md"
    if not page.is_file():
        pytest.skip("the docs are not part of this tree")
    assert option_table() in page.read_text()


def test_kinds_name_every_op_once() -> None:
    x = torch.ones(2, 2, 4)
    for op in OPS.values():
        given = {"x": x} | ({"residual": x} if takes_residual(op) else {})
        given |= {"z": x} if op.gated else {}
        given |= {"cos": x, "sin": x} if op.rotated else {}
        for kind in ("rms", "layer") if op.layer is None else (None,):
            call = op.call(given | ({} if kind is None else {"kind": kind}))
            assert call.op == op.name
            alone = "l2" if op.of_sum else "layer" if op.layer else "rms"
            assert call.statistic == (kind or alone)
            in_place = op.call(given, in_place=True)
            assert in_place.op == op.name + "_"
            assert in_place.out is x
    outside = OPS["l2_norm"].call({"x": x, "eps_outside": True})
    assert outside.op == "l2_norm"
    assert outside.eps_outside
    assert max(op.bits for op in OPS.values()) < 2 * ROTATED
