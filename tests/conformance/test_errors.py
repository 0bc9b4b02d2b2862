"""Bad input of every kind: an error that names the argument, and nothing written."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import normkit
import starting
from conformance import without_memory
from conformance.support import ADD_LAYER, ADD_RMS, HEAD_LAYER, HEAD_RMS, LAYER, RMS, Op, bits
from normkit.testing import make_inputs

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPE = (4, 6, 16)
Arguments = dict[str, Any]
Change = Callable[[Arguments], Any]


class Bad:
    """One wrong argument: how to make it from the right ones, and the error it must raise."""

    def __init__(self, what: str, error: type[Exception], change: Change, named: str = "") -> None:
        self.argument = what.split()[0]
        self.what, self.error, self.change = what, error, change
        self.named = named or self.argument

    def __str__(self) -> str:
        return self.what.replace(" ", "_")


def arguments(op: Op) -> Arguments:
    """Right arguments of op, with every output given; memory of their own for each."""
    inputs = make_inputs(SHAPE, F32, residual_dtype=BF16, per_head=op.per_head)
    made = inputs._asdict() | {"out": torch.full(SHAPE, 7.0)} | op.selected
    if op.adds:
        return made | {"residual_out": torch.full(SHAPE, 7.0, dtype=BF16)}
    del made["residual"]
    return made


def _overlapping(count: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.full((4 * 6 * 16 + count,), 7.0, dtype=dtype)


def _shift(a: Arguments, name: str, by: int) -> Tensor:
    """An output that is the argument moved by some elements, in memory for both."""
    memory = torch.randn(4 * 6 * 16 + abs(by)).to(a[name].dtype)
    a[name] = memory[: 4 * 6 * 16].view(SHAPE)
    return memory[by:].view(SHAPE)


def _inside(a: Arguments, name: str) -> Tensor:
    """An output that the small tensor `name` lies in."""
    memory = _overlapping(0, a[name].dtype)
    a[name] = memory[32 : 32 + a[name].numel()].view(a[name].shape).copy_(a[name])
    return memory.view(SHAPE)


def _same_memory(a: Arguments) -> Tensor:
    memory = torch.full(SHAPE, 7.0, dtype=BF16)
    a["out"] = memory
    return memory


def _apart(a: Arguments) -> Tensor:
    memory = _overlapping(16, BF16)
    a["out"] = memory[16:].view(SHAPE)
    return memory[:-16].view(SHAPE)


def _half_of_x(a: Arguments) -> Tensor:
    return a["x"].view(BF16)[..., :16]


def _in_the_gaps_of_x(a: Arguments) -> Tensor:
    """Begins where x does, with x's outer strides, but x takes every second element."""
    memory = torch.randn(2 * 4 * 6 * 16)
    a["x"] = memory.view(4, 6, 32)[..., ::2]
    return memory.view(4, 6, 32)[..., :16]


NOT_TENSORS = [
    ("a list", lambda a: [[1.0] * 16]),
    ("an array", lambda a: np.ones(SHAPE, np.float32)),
    ("a number", lambda a: 1.0),
    ("a string", lambda a: "x"),
    ("a dtype", lambda a: F32),
    ("a storage", lambda a: torch.ones(3).untyped_storage()),
    ("a class", lambda a: Tensor),
]
NOT_FLOATS = [torch.int32, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn]
TENSORS = ("x", "residual", "weight", "bias", "out", "residual_out")
OUTPUTS = ("out", "residual_out")

BAD = [
    *(Bad(f"{t} is {what}", TypeError, make) for t in TENSORS for what, make in NOT_TENSORS),
    Bad("x is None", TypeError, lambda a: None),
    Bad("residual is None", TypeError, lambda a: None),
    *(
        Bad(f"{t} is {dtype}", TypeError, lambda a, t=t, dtype=dtype: a[t].to(dtype))
        for t in TENSORS
        for dtype in NOT_FLOATS
    ),
    *(Bad(f"{t} is float64", TypeError, lambda a, t=t: a[t].double()) for t in TENSORS[1:]),
    *(
        Bad(f"{t} is sparse", ValueError, lambda a, t=t: torch.ones(a[t].shape).to_sparse())
        for t in ("x", "weight", "bias", "out")
    ),
    *(
        Bad(f"{t} is on another device", ValueError, lambda a, t=t: a[t].to("meta"))
        for t in TENSORS[1:]
    ),
    # shapes
    Bad("x has no dimension", ValueError, lambda a: torch.ones(())),
    Bad("x has rows of nothing", ValueError, lambda a: torch.ones(4, 6, 0)),
    *(
        Bad(f"{t} has one row less", ValueError, lambda a, t=t: a[t][1:])
        for t in ("residual", *OUTPUTS)
    ),
    *(
        Bad(f"{t} could be broadcast", ValueError, lambda a, t=t: a[t][:1])
        for t in ("residual", *OUTPUTS)
    ),
    *(
        Bad(f"{t} has a dimension less", ValueError, lambda a, t=t: a[t].flatten(0, 1))
        for t in ("residual", *OUTPUTS)
    ),
    *(
        Bad(f"{t} has shape {shape}", ValueError, lambda a, shape=shape: torch.ones(shape))
        for t in ("weight", "bias")
        for shape in ((), (1,), (15,), (17,), (0,), (5, 16), (1, 16), (16, 6), (6, 1), (1, 6, 16))
    ),
    # options
    *(
        Bad(f"{option} is {value!r:.12}", error, lambda a, value=value: value)
        for option, values, error in (
            ("eps", (-1e-6, -math.inf, math.inf, math.nan, 10**400), ValueError),
            ("eps", (True, "1e-6", b"1", [1e-6], torch.tensor(1e-6), 1e-6j), TypeError),
            ("weight_offset", (math.nan, math.inf, -math.inf, 10**400), ValueError),
            ("weight_offset", (False, None, "1", torch.tensor(1.0)), TypeError),
            ("round_before_weight", (1, 0, None, "yes", np.True_), TypeError),
            ("clamp_inf", (1, None, "no"), TypeError),
            ("round_sum", (1, None, 0.0), TypeError),
            ("out_dtype", ("float32", np.float32, float, torch.int32, torch.float64), TypeError),
            ("kind", ("RMS", "", None, 0, "instance"), ValueError),
        )
        for value in values
    ),
    Bad("out_dtype is not out's", TypeError, lambda a: BF16, "out"),
    Bad("residual_out is not of residual's dtype", TypeError, lambda a: a["residual_out"].float()),
    # places
    *(
        Bad(
            f"{t} has a last stride of 2", ValueError, lambda a, t=t: a[t].repeat(1, 1, 2)[..., ::2]
        )
        for t in OUTPUTS
    ),
    *(
        Bad(f"{t} is transposed", ValueError, lambda a, t=t: a[t].mT.contiguous().mT)
        for t in OUTPUTS
    ),
    *(
        Bad(f"{t} is expanded", ValueError, lambda a, t=t: a[t][:1].clone().expand(SHAPE))
        for t in OUTPUTS
    ),
    *(
        Bad(
            f"{t} has rows that overlap",
            ValueError,
            lambda a, t=t: _overlapping(0, a[t].dtype).as_strided(SHAPE, (96, 15, 1)),
        )
        for t in OUTPUTS
    ),
    *(
        Bad(
            f"{t} lies on {other} moved by {by}",
            ValueError,
            lambda a, o=other, by=by: _shift(a, o, by),
        )
        for t, other in (("out", "x"), ("residual_out", "residual"))
        for by in (1, 16, 96, 4 * 96 - 1)
    ),
    *(
        Bad(f"{t} lies round {other}", ValueError, lambda a, other=other: _inside(a, other))
        for t in ("out",)
        for other in ("weight", "bias")
    ),
    Bad("out is x of another dtype", ValueError, _half_of_x),
    Bad("out is in the gaps of x", ValueError, _in_the_gaps_of_x),
    Bad("residual_out is out", ValueError, _same_memory, "out"),
    Bad("residual_out overlaps out", ValueError, _apart, "out"),
]


STEPPED = ("last stride of 2", "transposed")  # which a norm with nothing around it may write


def _applies(bad: Bad, op: Op) -> bool:
    if bad.argument == "out" and bad.what.endswith(STEPPED):
        return op.adds
    if bad.argument == "kind":
        return op.per_head
    if bad.argument in ("residual", "residual_out", "round_sum"):
        return op.adds
    return True


def _snapshot(values: Arguments) -> dict[str, Tensor]:
    """Everything that could be written: whole storages, so also what lies round a view."""
    return {
        name: torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).clone()
        for name, t in values.items()
        if type(t) is Tensor and t.layout == torch.strided and t.device.type == "cpu"
    }


def _assert_raises(call: Callable[[], Any], bad: Bad, values: Arguments) -> None:
    before = _snapshot(values)
    with pytest.raises(bad.error, match=rf"^{bad.named}\b"):
        call()
    after = _snapshot(values)
    for name, memory in before.items():
        assert torch.equal(memory, after[name]), f"{name} was written"


def _wrong_arguments(op: Op, bad: Bad, without: tuple[str, ...] = ()) -> Arguments:
    values = {k: v for k, v in arguments(op).items() if k not in without}
    values[bad.argument] = bad.change(values)
    if op.adds and bad.what.startswith("x has"):  # let x's own shape be what is wrong
        values["residual"] = values["x"].to(BF16)
    return values


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_bad_argument_is_named_and_nothing_is_written(backend: Any, bad: Bad) -> None:
    ops = [op for op in (RMS, HEAD_LAYER, ADD_RMS) if _applies(bad, op)]
    assert ops
    for op in ops:
        values = _wrong_arguments(op, bad)
        _assert_raises(partial(backend.unexplained, op.name, **values), bad, values)


@pytest.mark.parametrize("bad", [b for b in BAD if "out" not in b.argument], ids=str)
def test_a_bad_argument_in_place_is_named_and_nothing_is_written(backend: Any, bad: Bad) -> None:
    ops = [op for op in (LAYER, HEAD_RMS, ADD_LAYER) if _applies(bad, op)]
    assert ops
    for op in ops:
        values = _wrong_arguments(op, bad, without=OUTPUTS)
        _assert_raises(partial(backend.unexplained, f"{op.name}_", **values), bad, values)


@pytest.mark.parametrize(
    "bad", [b for b in BAD if b.argument in ("x", "residual", "weight", "bias")], ids=str
)
def test_a_bad_argument_is_named_where_a_gradient_is_needed(backend: Any, bad: Bad) -> None:
    for op in (op for op in (RMS, HEAD_LAYER, ADD_RMS) if _applies(bad, op)):
        values = _wrong_arguments(op, bad, without=OUTPUTS)
        leaf = "bias" if bad.argument == "weight" else "weight"
        values[leaf].requires_grad_()
        _assert_raises(partial(backend.unexplained, op.name, **values), bad, values)


@pytest.mark.parametrize("name", ["x", "residual", "weight", "bias", "out", "residual_out"])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("needs_gradient", [False, True])
def test_a_nested_tensor_is_refused_by_name(
    backend: Any, name: str, layout: torch.layout, needs_gradient: bool
) -> None:
    """torch's own error is "Internal error: NestedTensorImpl doesn't support sizes"."""
    if (name, layout) == ("x", torch.jagged):
        return  # which is a norm of its values
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([torch.ones(2, 16), torch.ones(3, 16)], layout=layout)
    values = arguments(ADD_RMS) | {name: nested}
    if needs_gradient:
        values = {k: v for k, v in values.items() if k not in OUTPUTS or k == name}
        values["bias" if name == "weight" else "weight"].requires_grad_()
    with pytest.raises(ValueError, match=rf"^{name}: expected a dense .*nested"):
        backend.unexplained("add_rms_norm", **values)


def test_writing_to_an_inference_tensor_is_refused_as_torch_refuses_it(backend: Any) -> None:
    with torch.inference_mode():
        made = [torch.full((2, 8), 2.0) for _ in range(2)]
    normal = torch.ones(2, 8)
    for op, named, given, outputs in (
        ("rms_norm_", "x", made[:1], {}),
        ("add_rms_norm_", "x", [made[0], torch.ones(2, 8)], {}),
        ("add_rms_norm_", "residual", [normal, made[0]], {}),
        ("rms_norm", "out", [torch.ones(2, 8)], {"out": made[0]}),
        ("add_rms_norm", "out", [torch.ones(2, 8)] * 2, {"out": made[0], "residual_out": normal}),
        ("add_rms_norm", "residual_out", [torch.ones(2, 8)] * 2, {"residual_out": made[0]}),
    ):
        with pytest.raises(RuntimeError, match=f"^{named}: expected a normal tensor"):
            backend.unexplained(op, *given, **outputs)
    assert all((t == 2).all() for t in made)
    assert (normal == 1).all()
    assert normal._version == 0  # nor has autograd been told of a write
    assert torch.allclose(backend("rms_norm", made[0]), torch.ones(2, 8))
    with torch.inference_mode():
        backend("add_rms_norm_", *made)
    assert (made[1] == 4).all()


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_sum_is_not_written_over_weight_or_bias(backend: Any, name: str) -> None:
    """Of one row they may be one memory exactly; the sum is written before they are read."""
    x, residual, affine = torch.randn(31), torch.randn(31), torch.randn(31)
    before = affine.clone()
    with pytest.raises(ValueError, match=f"^residual_out: expected memory apart from {name}'s"):
        backend.unexplained("add_rms_norm", x, residual, **{name: affine}, residual_out=affine)
    with pytest.raises(ValueError, match=f"^residual: expected memory apart from {name}'s"):
        backend.unexplained("add_rms_norm_", x, affine, **{name: affine})
    assert torch.equal(affine, before)


def test_a_missing_residual_is_named(backend: Any) -> None:
    """Without the outputs that would give it away."""
    x = torch.ones(2, 4)
    for needs_gradient in (False, True):
        x.requires_grad_(needs_gradient)
        for name in ("add_rms_norm", "add_layer_norm"):
            with pytest.raises(TypeError, match=r"^residual: expected a torch.Tensor, got None"):
                backend.unexplained(name, x, None)
    x.requires_grad_(False)
    for name in ("add_rms_norm", "add_layer_norm", "add_rms_norm_", "add_layer_norm_"):
        with pytest.raises(TypeError, match=r"^residual: expected a torch.Tensor, got NoneType"):
            backend.unexplained(name, x, None)
    assert (x == 1).all()


CHANGES: list[Callable[[Tensor], Tensor]] = [
    lambda t: t.repeat(1, 1, 2)[..., ::2],
    lambda t: t.mT.contiguous().mT,
    lambda t: t[:1].clone().expand(SHAPE),
    lambda t: t.reshape(-1).clone().as_strided(SHAPE, (90, 15, 1)),
]


@pytest.mark.parametrize("op", [RMS, HEAD_LAYER, ADD_RMS], ids=str)
@pytest.mark.parametrize("change", CHANGES, ids=[*STEPPED, "expanded", "overlapping"])
def test_in_place_needs_elements_of_their_own(
    backend: Any, op: Op, change: Callable[[Tensor], Tensor]
) -> None:
    for name in ("x", *(["residual"] if op.adds else [])):
        if change in CHANGES[:2] and not op.adds:
            continue  # test_columns.py
        values = {k: v for k, v in arguments(op).items() if k not in OUTPUTS}
        values[name] = change(values[name])
        bad = Bad(name, ValueError, lambda a: None)
        _assert_raises(lambda v=values: backend.unexplained(f"{op.name}_", **v), bad, values)


@pytest.mark.parametrize("op", [ADD_RMS, ADD_LAYER], ids=str)
def test_in_place_x_and_residual_may_not_share_memory(backend: Any, op: Op) -> None:
    x = torch.ones(3, 8)
    before = x.clone()
    memory = torch.ones(32)
    for given in ((x, x), (memory[:24].view(3, 8), memory[8:].view(3, 8))):
        with pytest.raises(ValueError, match="^x: expected .*residual's.*overlap"):
            backend.unexplained(f"{op.name}_", *given)
    assert torch.equal(x, before)
    assert (memory == 1).all()


def test_the_error_says_what_was_expected_and_what_came() -> None:
    x, w = torch.ones(2, 4), torch.ones(5)
    for call, text in (
        (lambda: normkit.rms_norm(x, w), r"^weight: expected shape \(4,\), got \(5,\)$"),
        (lambda: normkit.rms_norm(x.int()), r"^x: expected float32, .*, got torch.int32$"),
        (lambda: normkit.rms_norm([1.0]), r"^x: expected a torch.Tensor, got list$"),
        (lambda: normkit.rms_norm(x, eps=-1), r"^eps: expected a number >= 0, got -1"),
        (lambda: normkit.rms_norm(x, out=torch.ones(4, 4)[::2].T[:2]), r"^out: expected .*shape"),
        (
            lambda: normkit.add_rms_norm(x, x, out=torch.ones(4, 2).T),
            r"^out: expected a last stride of 1 .*, got 2$",
        ),
        (
            lambda: normkit.head_norm(x[None], torch.ones(3, 4)),
            r"^weight: expected shape \(2, 4\) or \(4,\), got \(3, 4\)$",
        ),
        (lambda: normkit.head_norm(x, kind="x"), r"^kind: expected \"rms\" or \"layer\", got 'x'$"),
    ):
        with pytest.raises((TypeError, ValueError), match=text):
            call()


def test_unknown_and_missing_arguments_are_errors_of_python() -> None:
    x = torch.ones(2, 4)
    with pytest.raises(TypeError, match="residual"):
        normkit.add_rms_norm(x)
    with pytest.raises(TypeError, match="'x'"):
        normkit.rms_norm(weight=x)
    with pytest.raises(TypeError, match="gamma"):
        normkit.rms_norm(x, gamma=x)
    for option in ("out", "residual_out", "out_dtype"):
        with pytest.raises(TypeError, match=option):
            normkit.add_rms_norm_(x, x.clone(), **{option: None})


@pytest.mark.parametrize("make", ["fake", "meta"])
def test_tensors_without_data_are_refused_by_name_and_served_by_the_reference(make: str) -> None:
    with FakeTensorMode() as mode:
        pass
    x, residual, weight, bias = (
        mode.from_tensor(t) if make == "fake" else t.to("meta") for t in make_inputs((3, 8), BF16)
    )
    for op in (RMS, LAYER):
        y = getattr(normkit, op.name)(x, weight, bias)
        assert (y.shape, y.dtype, y.device) == (x.shape, x.dtype, x.device)
    y, total = normkit.add_rms_norm(x, residual, weight, bias, out_dtype=F32)
    assert (y.shape, y.dtype, total.dtype) == (x.shape, F32, BF16)
    assert normkit.explain("rms_norm", x, weight).backend == "reference"
    if normkit.backends()["cpu"].usable:
        with normkit.use_backend("cpu"), pytest.raises(ValueError, match=r'use_backend\("cpu"\)'):
            normkit.rms_norm(x, weight)


@pytest.mark.parametrize("kinds", ["fake zero nested uninitialized deleted", "freed"])
def test_tensors_without_memory_raise_and_do_not_crash(
    backend: Any, kinds: str, tmp_path: Path
) -> None:
    """In a process of its own: a crash shows as one, and the file how far it came."""
    said = tmp_path / "said"
    code = starting.run(without_memory.call_with, kinds.split(), backend.name, said)
    lines = said.read_text().splitlines()
    assert code == 0, f"ended with {code} {lines[-1]}"
    made = [line for line in lines if not line.startswith("calling")]
    assert len(made) == len(without_memory.NAMES) * len(kinds.split())
    for line in made:
        readable_zeros = line.startswith("zero") and not line.split()[1].endswith("out")
        assert "raised" in line or (readable_zeros and backend.name != "cpu"), line


def test_a_failed_call_leaves_the_backend_usable(backend: Any) -> None:
    x = torch.randn(3, 8)
    expected = backend("rms_norm", x)
    for _ in range(3):
        with pytest.raises(ValueError, match="weight"):
            backend.unexplained("rms_norm", x, torch.ones(3))
        assert torch.equal(bits(backend("rms_norm", x)), bits(expected))
