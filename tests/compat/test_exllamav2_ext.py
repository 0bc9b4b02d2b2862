"""The norm functions of ExLlamaV2's extension, with its calls and without its defects."""

from __future__ import annotations

import inspect
import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import normkit
from compat.exllamav2_support import DTYPES, EPS, run
from conformance.support import Guarded, assert_same_bits, bits, needs_kernels
from normkit.compat import exllamav2_ext as ext_c
from normkit.testing import assert_accurate, make_inputs

CALLS = {
    "rms_norm": ["x", "w", "y", "epsilon"],
    "rms_norm_": ["x", "w", "epsilon"],
    "rms_norm_tp": ["x", "w", "y", "epsilon", "tp_context"],
    "layer_norm": ["x", "w", "b", "y", "epsilon"],
    "layer_norm_": ["x", "w", "b", "epsilon"],
    "head_norm": ["x", "w", "b", "y", "epsilon", "rms"],
    "head_norm_": ["x", "w", "b", "epsilon", "rms"],
}
OPS = ("rms_norm", "layer_norm", "head_norm rms", "head_norm layer")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ops = pytest.mark.parametrize("op", OPS)


def arguments(op: str, x: Tensor, w: Tensor, b: Any, *y: Tensor) -> list[Any]:
    """The arguments of a function, without y those of its in-place form."""
    if op == "rms_norm":
        return [x, w, *y, EPS]
    return [x, w, b, *y, EPS, *([op.endswith("rms")] if op.startswith("head") else [])]


def call(backend: Any, op: str, x: Tensor, w: Tensor, b: Any, y: Tensor) -> Tensor:
    function = getattr(ext_c, op.split()[0])
    assert run(backend, function, *arguments(op, x, w, b, y)) is None
    return y


def check(op: str, y: Tensor, x: Tensor, w: Tensor, b: Tensor | None) -> None:
    kind = "rms" if "rms" in op else "layer"
    bias = None if op == "rms_norm" else b
    assert_accurate(y, x, w, bias, EPS, kind=kind, clamp_inf=True)


def inputs(op: str, rows: int, n: int, *kinds: torch.dtype, heads: int = 3) -> list[Tensor]:
    """x, w and b of these dtypes."""
    per_head = op.startswith("head")
    shape = (rows, heads, n) if per_head else (rows, n)
    x, w, b = (*kinds, *kinds[-1:] * 2)[:3]
    made = make_inputs(shape, x, weight_dtype=w, bias_dtype=b, per_head=per_head)
    return [made.x, made.weight, made.bias]


# ---------------------------------------------------------------------------------------- the calls


@pytest.mark.parametrize("name", CALLS)
def test_names_and_order_of_arguments_are_exllamav2s(name: str) -> None:
    parameters = inspect.signature(getattr(ext_c, name)).parameters
    assert list(parameters) == CALLS[name]
    assert all(p.default is p.empty for p in parameters.values())


def test_arguments_may_be_named() -> None:
    x, w, b = inputs("head_norm", 2, 8, torch.float32)
    y, named = torch.empty_like(x), torch.empty_like(x)
    ext_c.head_norm(x, w, b, y, EPS, False)
    ext_c.head_norm(rms=False, epsilon=EPS, y=named, b=b, w=w, x=x)
    assert_same_bits(named, y)


def test_the_documented_examples_run() -> None:
    x = torch.randn(4, 4096, dtype=torch.float16)
    w, b = torch.ones(4096, dtype=torch.float16), torch.zeros(4096, dtype=torch.float16)
    y = torch.empty_like(x)
    ext_c.rms_norm(x, w, y, 1e-6)
    assert_accurate(y, x, w, eps=1e-6, kind="rms")
    ext_c.rms_norm_(x, w, 1e-6)
    assert torch.equal(x, y)
    ext_c.layer_norm(x, w, b, y, 1e-5)
    assert_accurate(y, x, w, b, 1e-5, kind="layer")
    x = torch.randn(4, 32, 128, dtype=torch.float16)
    w, b = torch.ones(32, 128, dtype=torch.float16), torch.empty(0, device="meta")
    y = torch.empty_like(x)
    ext_c.head_norm(x, w, b, y, 1e-6, True)
    assert_accurate(y, x, w, eps=1e-6, kind="rms")


@ops
@dtypes
def test_every_mix_of_dtypes_is_accurate(backend: Any, op: str, dtype: torch.dtype) -> None:
    """bfloat16 too, which ExLlamaV2 reads as if it were float16."""
    for w_dtype, b_dtype, y_dtype in product(DTYPES, DTYPES, DTYPES):
        x, w, b = inputs(op, 5, 100, dtype, w_dtype, b_dtype)
        before = [bits(t).clone() for t in (x, w, b)]
        y = call(backend, op, x, w, b, torch.empty(x.shape, dtype=y_dtype))
        check(op, y, x, w, b)
        for t, old in zip((x, w, b), before, strict=True):
            assert torch.equal(bits(t), old)


@ops
@dtypes
def test_in_place_forms_give_the_bits_of_the_others(
    backend: Any, op: str, dtype: torch.dtype
) -> None:
    x, w, b = inputs(op, 4, 130, dtype, torch.float16)
    y = call(backend, op, x, w, b, torch.empty_like(x))
    written = x.clone()
    in_place = getattr(ext_c, op.split()[0] + "_")
    assert run(backend, in_place, *arguments(op, written, w, b)) is None
    assert_same_bits(written, y)
    aliased = x.clone()
    call(backend, op, aliased, w, b, aliased)
    assert_same_bits(aliased, y)


@pytest.mark.parametrize("op", OPS[1:])
@pytest.mark.parametrize("b", [ext_c.none_tensor, torch.empty(0, device="meta"), None])
def test_a_meta_tensor_means_no_bias(backend: Any, op: str, b: Any) -> None:
    x, w, _ = inputs(op, 4, 66, torch.float16)
    y = call(backend, op, x, w, b, torch.empty_like(x))
    check(op, y, x, w, None)
    zero = call(backend, op, x, w, torch.zeros_like(w), torch.empty_like(x))
    assert_same_bits(y, zero)


def test_none_tensor_is_that_of_exllamav2() -> None:
    assert ext_c.none_tensor.is_meta
    assert ext_c.none_tensor.shape == (1, 1)


@ops
def test_results_have_the_bits_of_normkits_functions(backend: Any, op: str) -> None:
    x, w, b = inputs(op, 6, 257, torch.float16)
    y = call(backend, op, x, w, b, torch.empty_like(x))
    name, *kind = op.split()
    options: dict[str, Any] = {"eps": EPS, "clamp_inf": True} | ({"kind": kind[0]} if kind else {})
    expected = backend(name, x, w, None if op == "rms_norm" else b, **options)
    assert_same_bits(y, expected)


def test_one_weight_may_serve_all_heads(backend: Any) -> None:
    x, w, b = inputs("head_norm", 4, 64, torch.float16)
    one = call(backend, "head_norm rms", x, w[0], b[0], torch.empty_like(x))
    each = call(
        backend, "head_norm rms", x, w[0].repeat(3, 1), b[0].repeat(3, 1), torch.empty_like(x)
    )
    assert_same_bits(one, each)


# ---------------------------------------------------------------------------------------- numerics


@pytest.mark.parametrize("op", OPS[1:])
def test_a_bias_is_added_before_the_only_rounding(backend: Any, op: str) -> None:
    """ExLlamaV2 rounds, adds the bias in float16, and rounds again."""
    x, w, b = inputs(op, 64, 64, torch.float16)
    y = call(backend, op, x, w, b, torch.empty_like(x))
    check(op, y, x, w, b)
    without = call(backend, op, x, w, None, torch.empty_like(x))
    assert not torch.equal(without + b, y)


@ops
def test_statistics_are_float32(backend: Any, op: str) -> None:
    x, w, b = inputs(op, 4, 512, torch.float16)
    x = x * 10000  # squares and sums are infinite in float16
    y = call(backend, op, x, w, b, torch.empty_like(x))
    assert y.isfinite().all()
    check(op, y, x, w, b)


@ops
def test_infinities_of_a_float16_x_count_as_65504(backend: Any, op: str) -> None:
    x, w, b = inputs(op, 3, 64, torch.float16)
    x[0, ..., 5], x[1, ..., 7] = math.inf, -math.inf
    y = call(backend, op, x, w, b, torch.empty_like(x))
    assert y.isfinite().all()
    check(op, y, x, w, b)
    clamped = x.clamp(-65504, 65504)
    assert_same_bits(y, call(backend, op, clamped, w, b, torch.empty_like(x)))


@ops
def test_infinities_of_a_float32_x_show(backend: Any, op: str) -> None:
    x, w, b = inputs(op, 3, 64, torch.float32)
    x[0, ..., 5] = math.inf
    y = call(backend, op, x, w, b, torch.empty_like(x))
    assert y[0, ..., 5].isnan().all()
    check(op, y, x, w, b)


@ops
@dtypes
def test_nan_shows_and_stays_in_its_row(backend: Any, op: str, dtype: torch.dtype) -> None:
    """ExLlamaV2 makes a finite number of it."""
    x, w, b = inputs(op, 3, 65, dtype)
    clean = call(backend, op, x, w, b, torch.empty_like(x))
    x[1, ..., 64] = math.nan
    y = call(backend, op, x, w, b, torch.empty_like(x))
    assert y[1].isnan().all()
    assert_same_bits(y[0], clean[0])
    assert_same_bits(y[2], clean[2])


# ----------------------------------------------------------------------------------- sizes, strides


@ops
@pytest.mark.parametrize("n", [1, 2, 3, 31, 33, 80, 127, 129, 513, 1000, 4097])
def test_odd_and_small_dimensions_are_whole(backend: Any, op: str, n: int) -> None:
    """ExLlamaV2 leaves out the last column of an odd number, and heads above 512."""
    x, w, b = inputs(op, 4, n, torch.float16)
    x[..., -1] = 30.0
    y = call(backend, op, x, w, b, torch.full_like(x, math.nan))
    check(op, y, x, w, b)


@ops
def test_dimensions_above_32768_are_served(backend: Any, op: str) -> None:
    x, w, b = inputs(op, 2, 33001, torch.float16)
    check(op, call(backend, op, x, w, b, torch.empty_like(x)), x, w, b)


@ops
def test_rows_above_65535_are_served(backend: Any, op: str) -> None:
    x, w, b = inputs(op, 65537, 4, torch.float16, heads=1)
    check(op, call(backend, op, x, w, b, torch.empty_like(x)), x, w, b)


@ops
def test_no_rows_are_nothing_to_do(backend: Any, op: str) -> None:
    x, w, b = inputs(op, 0, 64, torch.float16)
    call(backend, op, x, w, b, torch.empty_like(x))


@ops
def test_rows_of_slices_are_served_and_nothing_else_is_written(backend: Any, op: str) -> None:
    x, w, b = inputs(op, 3, 40, torch.float16)
    packed = torch.zeros(*x.shape[:-1], 100, dtype=torch.float16)
    packed[..., 30:70] = x
    strides = torch.empty(*x.shape[:-1], 50, device="meta").stride()
    guarded = Guarded(tuple(x.shape), torch.float32, strides)
    call(backend, op, packed[..., 30:70], w, b, guarded.tensor)
    guarded.assert_only_elements_written()
    check(op, guarded.tensor, x, w, b)


@ops
def test_x_may_have_more_dimensions(backend: Any, op: str) -> None:
    x, w, b = inputs(op, 6, 40, torch.float16)
    flat = call(backend, op, x, w, b, torch.empty_like(x))
    folded = x.view(2, 3, *x.shape[1:])
    y = call(backend, op, folded, w, b, torch.empty_like(folded))
    assert_same_bits(y.view(x.shape), flat)


# ------------------------------------------------------------------------------------------- errors


def half(*shape: int) -> Tensor:
    return torch.full(shape, 2.0, dtype=torch.float16)


def fitting(name: str) -> dict[str, Any]:
    shape = (4, 3, 8) if name.startswith("head") else (4, 8)
    made = {"x": half(*shape), "w": half(8), "b": None, "y": half(*shape), "epsilon": EPS}
    made["rms"] = True
    return {key: made[key] for key in CALLS[name]}


def overlapping() -> dict[str, Any]:
    memory = half(5, 8)
    return {"x": memory[:4], "y": memory[1:]}


# What is wrong in a call that is right otherwise.
WRONG = [
    ("rms_norm", {"w": half(9)}, ValueError, r"w: .*\(8,\).*\(9,\)"),
    ("layer_norm", {"w": half(1, 8)}, ValueError, r"w: .*\(8,\).*\(1, 8\)"),
    ("layer_norm", {"b": half(9)}, ValueError, r"b: .*\(8,\).*\(9,\)"),
    ("rms_norm", {"y": half(5, 8)}, ValueError, r"y: expected x's shape \(4, 8\), got \(5, 8\)"),
    ("layer_norm", {"y": half(4, 9)}, ValueError, r"y: .*\(4, 8\).*\(4, 9\)"),
    ("head_norm", {"w": half(2, 8)}, ValueError, r"w: .*\(3, 8\).*\(2, 8\)"),
    ("head_norm", {"w": half(3, 7)}, ValueError, r"w: .*\(3, 8\).*\(3, 7\)"),
    ("head_norm", {"b": half(2, 8)}, ValueError, r"b: .*\(3, 8\).*\(2, 8\)"),
    ("head_norm", {"x": half(8), "y": half(8)}, ValueError, r"x: .*heads, head_dim"),
    ("rms_norm", {"x": half(4, 8).int()}, TypeError, r"x: .*int32"),
    ("rms_norm", {"w": half(8).int()}, TypeError, r"w: .*int32"),
    ("layer_norm", {"b": half(8).long()}, TypeError, r"b: .*int64"),
    ("rms_norm", {"y": half(4, 8).int()}, TypeError, r"y: .*int32"),
    ("rms_norm", {"x": None}, TypeError, r"x: .*NoneType"),
    ("rms_norm", {"w": None}, TypeError, r"w: .*NoneType"),
    ("layer_norm", {"w": None}, TypeError, r"w: .*NoneType"),
    ("head_norm", {"w": None}, TypeError, r"w: .*NoneType"),
    ("rms_norm", {"y": None}, TypeError, r"y: .*NoneType"),
    ("layer_norm", {"y": None}, TypeError, r"y: .*NoneType"),
    ("head_norm", {"y": None}, TypeError, r"y: .*NoneType"),
    ("layer_norm", {"b": 0.0}, TypeError, r"b: .*float"),
    ("rms_norm", {"epsilon": None}, TypeError, r"epsilon: .*NoneType"),
    ("layer_norm", {"epsilon": None}, TypeError, r"epsilon: .*NoneType"),
    ("head_norm", {"epsilon": None}, TypeError, r"epsilon: .*NoneType"),
    ("rms_norm", {"epsilon": "1e-6"}, TypeError, r"epsilon: .*str"),
    ("layer_norm", {"epsilon": -1.0}, ValueError, r"epsilon: .*-1\.0"),
    ("rms_norm", {"epsilon": math.nan}, ValueError, r"epsilon: .*nan"),
    ("head_norm", {"rms": 1}, TypeError, r"rms: .*got 1"),
    ("rms_norm", {"y": half(4, 8).to("meta")}, ValueError, r"y: expected x's device cpu, got meta"),
    ("rms_norm", {"w": half(8).to("meta")}, ValueError, r"w: expected x's device cpu, got meta"),
    ("rms_norm", overlapping(), ValueError, r"y: expected x's memory or none of it"),
    ("rms_norm", {"y": half(1, 8).expand(4, 8)}, ValueError, r"y: expected rows of their own"),
    ("rms_norm", {"x": half(4, 8).to_sparse()}, ValueError, r"x: .*sparse"),
]


@pytest.mark.parametrize(("name", "changed", "error", "message"), WRONG)
def test_what_does_not_fit_is_an_error_before_anything_is_written(
    backend: Any, name: str, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    args = fitting(name) | changed
    tensors = [t for t in args.values() if isinstance(t, Tensor) and t.device.type == "cpu"]
    before = [t.clone() for t in tensors]
    with pytest.raises(error, match=message):
        run(backend, getattr(ext_c, name), *args.values())
    for t, old in zip(tensors, before, strict=True):
        assert torch.equal(t.to_dense(), old.to_dense())


def test_errors_of_a_backend_asked_for_by_name_show() -> None:
    x = torch.ones(2, 4, dtype=torch.float64)
    with normkit.use_backend("cpu"), pytest.raises(ValueError, match="float64"):
        ext_c.rms_norm(x, torch.ones(4), torch.ones_like(x), 1e-6)


# ---------------------------------------------------------------------------------------- in torch


@ops
def test_no_gradient_is_recorded(backend: Any, op: str) -> None:
    x, w, b = inputs(op, 3, 64, torch.float32)
    expected = call(backend, op, x, w, b, torch.empty_like(x))
    w, b = torch.nn.Parameter(w), torch.nn.Parameter(b)
    y = call(backend, op, x.requires_grad_(), w, b, torch.empty_like(x))
    assert not y.requires_grad
    assert_same_bits(y, expected)
    assert torch.is_grad_enabled()


@ops
def test_inference_tensors_are_served(backend: Any, op: str) -> None:
    x, w, b = inputs(op, 3, 64, torch.float16)
    expected = call(backend, op, x, w, b, torch.empty_like(x))
    with torch.inference_mode():
        w, b = torch.nn.Parameter(w.clone(), False), torch.nn.Parameter(b.clone(), False)
        got = call(backend, op, x.clone(), w, b, torch.empty_like(x))
    assert_same_bits(got, expected)


@needs_kernels
@ops
def test_plain_calls_take_the_quick_path(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, b = inputs(op, 3, 64, torch.float16)
    w = torch.nn.Parameter(w, requires_grad=False)
    y = torch.empty_like(x)
    monkeypatch.setattr(ext_c, "_serve", None)
    function = getattr(ext_c, op.split()[0])
    for bias in (b, None, ext_c.none_tensor, torch.empty(0, device="meta")):
        function(*arguments(op, x, w, bias, y))
        check(op, y, x, w, b if bias is b else None)


@ops
def test_compiled_calls_give_the_same_results(op: str) -> None:
    x, w, b = inputs(op, 3, 64, torch.float16)
    function = getattr(ext_c, op.split()[0])
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    for bias in (b, ext_c.none_tensor):
        y, expected = torch.empty_like(x), torch.empty_like(x)
        function(*arguments(op, x, w, bias, expected))
        compiled(*arguments(op, x, w, bias, y))
        assert_same_bits(y, expected)
