"""What `torch.ops.normkit` promises the tracers of torch: schemas, mutation, autograd."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import normkit
from conformance.support import ROUNDINGS
from normkit._serving import operators
from normkit._spec import DEFAULT_OPTIONS, OPS
from torch_integration.support import (
    FORMS,
    FUNCTIONS,
    NAMES,
    adds,
    arguments_of,
    assert_equal_bits,
    clones,
    layouts,
    operator,
    per_head,
    tensors,
)

QUICK = ("test_schema", "test_faketensor", "test_autograd_registration")
EVERYTHING = (*QUICK, "test_aot_dispatch_dynamic")


def cases(name: str) -> Iterator[tuple[list[Tensor | None], dict[str, Any]]]:
    """Arguments that take every form of the operator: what they lack and mix, and options."""
    eps = {"eps": None}
    yield tensors(name), {}
    yield tensors(name, weight_dtype=torch.bfloat16, residual_dtype=torch.float16), eps
    x, *rest = tensors(name, dtype=torch.bfloat16, residual_dtype=torch.float32)
    yield [x, *rest[:-2], None, None], {"weight_offset": 1.0}
    for rounding in ROUNDINGS:
        yield [x, *rest[:-1], None], {rounding: True}
    yield tensors(name, (0, 3, 8), torch.float16), {"clamp_inf": True}
    yield tensors(name, dtype=torch.float64), {"eps": 0.3}
    if per_head(name):
        yield tensors(name, (3, 8)), {"kind": "layer"}
        x, *rest = tensors(name)
        yield [x, *rest[:-2], torch.rand(8), torch.rand(8)], {}
    if adds(name):
        yield tensors(name, dtype=torch.float16), {"round_sum": False}
    wide, tall = torch.randn(2, 3, 20)[..., 4:12], torch.randn(3, 2, 8).transpose(0, 1)
    yield [wide, *([tall] if adds(name) else []), *tensors(name)[-2:]], {}


@pytest.mark.parametrize("name", NAMES)
def test_every_norm_has_the_operators_of_its_name(name: str) -> None:
    for form in FORMS:
        assert str(operator(name, form)) == f"normkit.{name}{form}.default"
        assert torch.Tag.pt2_compliant_tag in operator(name, form).tags


def test_only_what_is_a_function_or_a_module_is_an_operator() -> None:
    ends = ("_norm", "norm_add", "norm_rope")
    functions = {name for name in normkit.__all__ if name.rstrip("_").endswith(ends)}
    functions -= {"load_norm", "qk_norm_rope"}  # which is several calls
    assert functions == {name + form for name in OPS for form in ("", "_")}
    assert set(NAMES) == set(FUNCTIONS) == {name for name, op in OPS.items() if op.is_plain}


@pytest.mark.parametrize("name", NAMES)
def test_schemas_have_the_arguments_and_defaults_of_the_functions(name: str) -> None:
    for form in FORMS:
        function = getattr(normkit, name + ("_" if form == "_" else ""))
        expected = {k: p.default for k, p in inspect.signature(function).parameters.items()}
        if form == "_out":
            for option in ("out_dtype", "memory_efficient"):
                del expected[option]
            expected["out"] = inspect.Parameter.empty
        else:
            expected.pop("out", None)
        if form == "_out" and adds(name):
            expected["residual_out"] = inspect.Parameter.empty
        else:
            expected.pop("residual_out", None)
        declared = {
            a.name: a.default_value if a.has_default_value() else inspect.Parameter.empty
            for a in operator(name, form)._schema.arguments
        }
        assert declared == expected
        positional = [k for k in declared if k in ("x", "residual", "weight", "bias", "eps")]
        assert positional == [k for k in expected if k in positional]


@pytest.mark.parametrize("name", NAMES)
def test_schemas_say_what_is_written_and_nothing_else(name: str) -> None:
    written = {
        "": set(),
        "_": {"x", "residual"} if adds(name) else {"x"},
        "_out": {"out", "residual_out"} if adds(name) else {"out"},
    }
    for form in FORMS:
        schema = operator(name, form)._schema
        marked = {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
        assert marked == written[form]
        assert schema.is_mutable == bool(written[form])
        assert all(r.alias_info is None for r in schema.returns)
        sums, means = ["residual_out"] * adds(name), ["mean"] * (OPS[name].layer is not False)
        returned = [] if form else ["y", *sums, "rstd", *means]
        assert [r.name for r in schema.returns] == returned
    assert not operator("norm_backward")._schema.is_mutable


@pytest.mark.parametrize("name", [name for name, *_ in operators.SHARDED])
def test_operators_for_sharded_tensors_begin_with_a_tensor(name: str) -> None:
    """DTensor of torch 2.10 asks the first argument for the mesh, and no other."""
    assert str(operator(name)._schema.arguments[0].type) == "Tensor"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_torch_finds_nothing_wrong_with_the_operators(name: str, form: str) -> None:
    for place, (given, options) in enumerate(cases(name)):
        arguments = clones(arguments_of(name, form, given))
        tested = EVERYTHING if place == 2 else QUICK
        torch.library.opcheck(operator(name, form), arguments, options, test_utils=tested)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck of 2.14 reads it
@pytest.mark.parametrize("name", NAMES)
def test_torch_finds_nothing_wrong_with_their_gradients(name: str) -> None:
    for place, (given, options) in enumerate(cases(name)):
        wanting = clones(given, grad=True)
        tested = EVERYTHING if place == 1 else QUICK
        torch.library.opcheck(operator(name), wanting, options, test_utils=tested)
    odd = [torch.randn(2, 3, 16)[..., ::2], torch.randn(8, 3, 2).permute(2, 1, 0)]
    wanting = [*clones(odd[: 1 + adds(name)], grad=True), *tensors(name, grad=True)[-2:]]
    torch.library.opcheck(operator(name), wanting, test_utils=EVERYTHING)
    some = clones(tensors(name, dtype=torch.bfloat16))
    some[-2].requires_grad_()
    for options in ({"memory_efficient": True}, {"out_dtype": torch.float32}):
        torch.library.opcheck(operator(name), some, options, test_utils=EVERYTHING)


def backward_arguments(
    layer: bool, per_head: bool, x: Tensor, residual: bool, weight: bool, wanted: tuple[bool, ...]
) -> list[Any]:
    """Write the arguments of norm_backward for one norm of x; y counts as x's copy."""
    shape = x.shape[-2:] if per_head else x.shape[-1:]
    affine = torch.rand(shape, dtype=torch.bfloat16) if weight else None
    rstd = torch.rand(x.shape[:-1])
    of_x, of_residual, of_weight, of_bias = wanted
    return [
        torch.randn(x.shape).to(x.dtype),
        torch.randn(x.shape) if residual else None,
        *(x, None, affine, affine, rstd, rstd.clone() if layer else None),
        *(layer, per_head, False, 1e-6, *DEFAULT_OPTIONS.values(), False, False),
        x.dtype if of_x else None,
        torch.float32 if of_residual else None,
        *(of_weight, of_bias),
    ]


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
def test_torch_finds_nothing_wrong_with_norm_backward(layer: bool, per_head: bool) -> None:
    for wanted in ((True,) * 4, (True, False, True, False), (False, True, False, True)):
        for name, x in layouts((2, 3, 8), torch.float32):
            if wanted[1] and name != "permuted":
                continue
            arguments = backward_arguments(layer, per_head, x, wanted[1], True, wanted)
            torch.library.opcheck(operator("norm_backward"), arguments, test_utils=QUICK)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_operators_give_the_bits_of_the_functions(name: str) -> None:
    for given, options in cases(name):
        made = getattr(normkit, name)(*given, **options)
        assert_equal_bits(operator(name)(*given, **options)[: 1 + adds(name)], made)
        in_place = clones(given)
        operator(name, "_")(*in_place, **options)
        assert_equal_bits(in_place[: 1 + adds(name)], made)
        outputs = arguments_of(name, "_out", list(given))
        operator(name, "_out")(*outputs, **options)
        assert_equal_bits(outputs[: 1 + adds(name)], made)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_operators_go_by_use_backend(kernels: Any, name: str) -> None:
    given = tensors(name, (5, 3, 96), torch.bfloat16)
    made = {}
    for backend in (kernels.name, "reference"):
        with normkit.use_backend(backend):
            made[backend] = getattr(normkit, name)(*given)
            assert_equal_bits(operator(name)(*given)[: 1 + adds(name)], made[backend])
    if kernels.name != "auto":
        wide = [t.double() for t in given]
        with normkit.use_backend(kernels.name), pytest.raises(ValueError, match="cannot serve"):
            operator(name)(*wide)


@pytest.mark.parametrize("name", NAMES)
def test_operators_return_what_their_gradients_keep(name: str) -> None:
    given = tensors(name)
    statistics = operator(name)(*given)[1 + adds(name) :]
    layer = OPS[name].layer is True
    total = given[0] + given[1] if adds(name) else given[0]
    centred = total - total.mean(-1, keepdim=True) if layer else total
    eps = 1e-5 if layer else 1e-6
    torch.testing.assert_close(statistics[0], torch.rsqrt((centred**2).mean(-1) + eps))
    if per_head(name):
        assert statistics[1].numel() == 0
        torch.testing.assert_close(
            operator(name)(*given, kind="layer")[2 + adds(name)], total.mean(-1)
        )
    elif layer:
        torch.testing.assert_close(statistics[1], total.mean(-1))
    assert not any(t.requires_grad for t in operator(name)(*tensors(name, grad=True))[-1:])


def test_gradients_that_nobody_wants_are_empty_in_plain_torch_too() -> None:
    """As the fakes have announced them: a compiled graph goes by that."""
    x, grad_y = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    weight = torch.rand(8, dtype=torch.float64)
    rstd = torch.ops.normkit.rms_norm(x, weight)[1]
    formula = (False, False, False, 1e-6, *DEFAULT_OPTIONS.values(), False, False)
    wanted = (x.dtype, None, False, False)
    tensors = (grad_y, None, x, None, weight, weight, rstd, None)
    made = torch.ops.normkit.norm_backward(*tensors, *formula, *wanted)
    assert [t.numel() for t in made] == [x.numel(), 0, 0, 0]


@pytest.mark.parametrize("name", NAMES)
def test_operators_refuse_by_the_name_of_the_argument(name: str) -> None:
    given = tensors(name)
    given[-2] = torch.ones(7)
    for form in FORMS:
        with pytest.raises(ValueError, match="weight: expected shape"):
            operator(name, form)(*arguments_of(name, form, list(given)))
