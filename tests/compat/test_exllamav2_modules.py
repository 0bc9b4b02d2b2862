"""The norm modules of ExLlamaV2: what its documents promise, and what it does wrong."""

from __future__ import annotations

import inspect
import math
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compat.exllamav2_support import (
    DTYPES,
    EPS,
    HEADS,
    all_norms,
    check,
    constant_of,
    loaded,
    make,
    row_norms,
    rows_for,
    run,
    shape_of,
    values,
)
from conformance.support import assert_same_bits, bits
from normkit import reference
from normkit.compat.exllamav2 import ExLlamaV2HeadNorm, ExLlamaV2LayerNorm, ExLlamaV2RMSNorm
from normkit.testing import assert_accurate

UNUSED = ["self", "hidden_states", "cache", "attn_params", "past_len", "intermediates", "loras"]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
headnorms = pytest.mark.parametrize("headnorm", ["rmsnorm", "layernorm"])


# ------------------------------------------------------------------------------------ the interface


@all_norms
def test_methods_and_arguments_are_exllamav2s(cls: Any) -> None:
    def names(method: Any) -> list[str]:
        return list(inspect.signature(method).parameters)

    heads = ["num_heads", "head_dim"] if cls is ExLlamaV2HeadNorm else []
    assert names(cls) == ["model", "key", *heads, "archparams"]
    for method in (cls.forward, cls.forward_torch, getattr(cls, "forward_tp", cls.forward)):
        assert names(method) == [*UNUSED, "output_fp32", "kwargs"]
    assert names(cls.load) == ["self", "device_context"]


@all_norms
def test_attributes_before_load_are_exllamav2s(cls: Any, tmp_path: Path) -> None:
    norm = make(cls, tmp_path)
    assert (norm.weight, norm.bias, norm.layernorm) == (None, None, None)
    assert norm.name == ("RMSNorm" if cls is ExLlamaV2RMSNorm else "LayerNorm")
    assert (norm.key, norm.alt_key, norm.footprint, norm.submodules) == ("model.norm", None, -1, [])
    assert norm.archparams is norm.model.config.arch.lm
    if cls is ExLlamaV2HeadNorm:
        assert (norm.num_heads, norm.head_dim) == HEADS
    if cls is ExLlamaV2RMSNorm:
        assert (norm.is_tp, norm.broadcast_type) == (False, None)


@all_norms
def test_eps_is_that_of_the_model_from_load_on(cls: Any, tmp_path: Path) -> None:
    norm = make(cls, tmp_path)
    assert norm.variance_epsilon == (EPS if cls is ExLlamaV2HeadNorm else 1e-6)
    norm.load()
    assert norm.variance_epsilon == EPS


@all_norms
def test_sizes_are_those_documented(cls: Any, tmp_path: Path) -> None:
    norm = make(cls, tmp_path)
    norm.model.config.hidden_size = 1000
    norm.model.tp_context = SimpleNamespace(num_devices=3)
    assert norm.weight_footprint() == (2 * 24 if cls is ExLlamaV2HeadNorm else 2000)
    assert (norm.numel(), norm.scratch_space(), norm.scratch_space_fixed()) == (0, 0, 0)
    assert not norm.is_quant()
    if cls is ExLlamaV2RMSNorm:
        assert norm.scratch_space_tp() == [0, 0, 0]


def test_footprint_of_a_head_norm_counts_its_bias(tmp_path: Path) -> None:
    norm = make(ExLlamaV2HeadNorm, tmp_path, values(8), values(8))
    assert norm.weight_footprint() == 2 * 2 * 24


@all_norms
@pytest.mark.parametrize("intermediates", [False, True])
@pytest.mark.parametrize("path", ["forward", "forward_torch"])
def test_intermediates_come_in_a_dict(
    cls: Any, tmp_path: Path, intermediates: bool, path: str
) -> None:
    norm = loaded(cls, tmp_path)
    x = rows_for(norm)
    y = norm.forward(x)
    got = getattr(norm, path)(x, intermediates=intermediates)
    if intermediates:
        assert list(got) == ["hidden_states"]
        got = got["hidden_states"]
    assert got.shape == x.shape
    assert_accurate_to_each_other(got, y)


def assert_accurate_to_each_other(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2**-8, atol=1e-6)


@all_norms
def test_what_only_other_modules_use_is_accepted(cls: Any, tmp_path: Path) -> None:
    norm = loaded(cls, tmp_path)
    x = rows_for(norm)
    unused = {"cache": object(), "attn_params": object(), "past_len": 3, "loras": [], "foo": 1}
    assert_same_bits(norm.forward(x, **unused), norm.forward(x))
    positional = norm.forward(x, object(), object(), 3, True, [], True)
    assert positional["hidden_states"].dtype == torch.float32


# ------------------------------------------------------------------------------------------ forward


@dtypes
@headnorms
@all_norms
def test_forward_is_accurate_for_every_mix_of_dtypes(
    backend: Any, tmp_path: Path, cls: Any, dtype: torch.dtype, headnorm: str
) -> None:
    for stored, constant in product(DTYPES, (0, 1)):
        weight = values(*shape_of(cls), dtype=stored, seed=1)
        norm = make(cls, tmp_path, weight, norm_constant_bias=constant, headnorm=headnorm)
        norm.set_device_idx(0 if backend.name == "cuda" else -1)
        norm.load()
        x = rows_for(norm, dtype)
        before = bits(x).clone()
        check(norm, run(backend, norm.forward, x), x, weight)
        in_float32 = run(backend, partial(norm.forward, output_fp32=True), x)
        check(norm, in_float32, x, weight)
        assert torch.equal(bits(x), before)


@all_norms
@pytest.mark.parametrize("path", ["forward", "forward_torch"])
def test_output_dtype_is_as_documented(cls: Any, tmp_path: Path, path: str) -> None:
    norm = loaded(cls, tmp_path)
    for dtype in DTYPES:
        x = rows_for(norm, dtype)
        expected = torch.float16 if cls is ExLlamaV2RMSNorm else dtype
        assert getattr(norm, path)(x).dtype == expected
        assert getattr(norm, path)(x, output_fp32=True).dtype == torch.float32


@all_norms
@dtypes
@headnorms
def test_forward_torch_is_accurate_with_the_same_eps_and_bias(
    cls: Any, tmp_path: Path, dtype: torch.dtype, headnorm: str
) -> None:
    """ExLlamaV2's has an eps of 1e-5 for LayerNorm, and loses the bias of head norms."""
    weight, bias = values(*shape_of(cls), seed=1), values(*shape_of(cls), seed=2)
    norm = loaded(cls, tmp_path, weight, bias, norm_constant_bias=1, headnorm=headnorm)
    x = rows_for(norm, dtype) * 0.01  # so small that eps decides
    for y in (norm.forward(x), norm.forward_torch(x)):
        check(norm, y, x, weight, bias)


@all_norms
def test_forward_torch_is_plain_torch(
    cls: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = loaded(cls, tmp_path)
    x = rows_for(norm)
    in_plain_torch = []
    plain = reference.norm

    def record(*args: Any, **options: Any) -> Tensor:
        in_plain_torch.append(plain(*args, **options))
        return in_plain_torch[-1]

    monkeypatch.setattr(reference, "norm", record)
    assert norm.forward_torch(x) is in_plain_torch[0]


@all_norms
def test_infinities_of_float16_are_clamped_and_nan_shows(cls: Any, tmp_path: Path) -> None:
    norm = loaded(cls, tmp_path, headnorm="rmsnorm")
    x = rows_for(norm)
    x[0, 0, ..., 3], x[1, 1, ..., 3] = math.inf, math.nan
    for y in (norm.forward(x), norm.forward_torch(x)):
        assert y[1, 1].isnan().all()
        assert y[0].isfinite().all()
        check(norm, y, x, norm.get_weight())


@all_norms
def test_strided_states_are_served(cls: Any, tmp_path: Path) -> None:
    norm = loaded(cls, tmp_path)
    x = rows_for(norm)
    assert_same_bits(norm.forward(x.transpose(0, 1)).transpose(0, 1), norm.forward(x))


@all_norms
def test_errors_name_hidden_states(cls: Any, tmp_path: Path) -> None:
    norm = loaded(cls, tmp_path)
    for path in (norm.forward, norm.forward_torch):
        with pytest.raises(TypeError, match="hidden_states: expected a torch.Tensor, got NoneType"):
            path(None)
        with pytest.raises(TypeError, match=r"hidden_states: .*int64"):
            path(rows_for(norm).long())
        with pytest.raises(ValueError, match=r"weight: expected shape|hidden_states: expected"):
            path(values(2, 5))


@all_norms
def test_gradients_reach_the_states(cls: Any, tmp_path: Path) -> None:
    norm = loaded(cls, tmp_path)
    x = rows_for(norm, torch.bfloat16).requires_grad_()
    norm.forward(x).float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------ weights


@all_norms
@dtypes
@pytest.mark.parametrize("constant", [0, 1])
@pytest.mark.parametrize("has_bias", [False, True])
def test_get_weight_returns_what_was_stored_bit_for_bit(
    cls: Any, tmp_path: Path, dtype: torch.dtype, constant: int, has_bias: bool
) -> None:
    """ExLlamaV2 stores weight + 1 in float16, subtracts again, and loses a head norm's bias."""
    shape = shape_of(cls)
    weight, bias = values(*shape, dtype=dtype), values(*shape, dtype=dtype, seed=3)
    weight.view(-1)[:4] = torch.tensor([3e-4, -0.0, 1e-7, math.nan])
    norm = loaded(cls, tmp_path, weight, bias if has_bias else None, norm_constant_bias=constant)
    norm.forward(rows_for(norm))
    assert norm.weight is not None
    got = norm.get_weight()
    assert isinstance(got, tuple) == has_bias
    for t, stored in zip(got if has_bias else [got], (weight, bias), strict=False):
        assert_same_bits(t, stored)


@pytest.mark.parametrize("cls", [ExLlamaV2RMSNorm, ExLlamaV2HeadNorm])
def test_the_constant_of_gemma_is_added_in_float32(cls: Any, tmp_path: Path) -> None:
    """weight + 1 in float16 would lose all of these weights."""
    shape = shape_of(cls)
    weight = torch.full(shape, 3e-4)
    norm = loaded(cls, tmp_path, weight, norm_constant_bias=1, headnorm="rmsnorm")
    x = rows_for(norm, torch.float32)
    y = norm.forward(x, output_fp32=True)
    check(norm, y, x, weight)
    in_float16 = weight.half() + 1
    with pytest.raises(AssertionError):
        assert_accurate(y, x, in_float16, None, EPS, kind="rms")


@all_norms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("constant", [0, 1])
def test_weight_and_bias_are_what_exllamav2s_kernels_read(
    cls: Any, tmp_path: Path, dtype: torch.dtype, constant: int
) -> None:
    shape = shape_of(cls)
    weight, bias = values(*shape, dtype=dtype), values(*shape, dtype=dtype, seed=3)
    norm = loaded(cls, tmp_path, weight, bias, norm_constant_bias=constant)
    with_constant = weight.float() + constant_of(norm)
    for shown, expected in ((norm.weight, with_constant), (norm.bias, bias)):
        assert isinstance(shown, nn.Parameter)
        assert not shown.requires_grad
        assert_same_bits(shown.data, expected.half())
    assert norm.weight is norm.weight


@all_norms
def test_a_float16_weight_is_shown_without_a_copy(cls: Any, tmp_path: Path) -> None:
    norm = loaded(cls, tmp_path)
    assert norm.weight is norm.layernorm.weight
    assert norm.bias is None


@row_norms
def test_a_stored_bias_is_added(cls: Any, tmp_path: Path) -> None:
    """Optional in a LayerNorm; an RMSNorm with one is an error in ExLlamaV2."""
    weight, bias = values(24), values(24, seed=3)
    norm = loaded(cls, tmp_path, weight, bias)
    x = rows_for(norm)
    check(norm, norm.forward(x), x, weight, bias)


def test_layernorm_is_a_torch_layer_norm(tmp_path: Path) -> None:
    norm = loaded(ExLlamaV2LayerNorm, tmp_path, values(24), values(24, seed=3))
    assert isinstance(norm.layernorm, nn.LayerNorm)
    assert norm.layernorm.elementwise_affine
    assert norm.layernorm.eps == EPS
    assert norm.layernorm.bias is norm.bias
    x = rows_for(norm)
    assert_same_bits(norm.layernorm(x), norm.forward(x))


# --------------------------------------------------------------------------------------- head norms


@headnorms
def test_one_weight_is_repeated_for_all_heads(tmp_path: Path, headnorm: str) -> None:
    weight, bias = values(8), values(8, seed=3)
    norm = loaded(ExLlamaV2HeadNorm, tmp_path, weight, bias, headnorm=headnorm)
    assert norm.weight.shape == norm.bias.shape == HEADS
    assert_same_bits(norm.weight.data, weight.repeat(3, 1))
    x = rows_for(norm)
    check(norm, norm.forward(x), x, weight, bias)


@pytest.mark.parametrize("path", ["forward", "forward_torch"])
def test_heads_may_be_flat(tmp_path: Path, path: str) -> None:
    norm = loaded(ExLlamaV2HeadNorm, tmp_path)
    x = rows_for(norm)
    flat = getattr(norm, path)(x.flatten(-2))
    assert flat.shape == (2, 5, 24)
    assert_same_bits(flat.view(x.shape), getattr(norm, path)(x))
    packed = values(2, 5, 72)
    expected = getattr(norm, path)(packed[..., 24:48].contiguous())
    assert_same_bits(getattr(norm, path)(packed[..., 24:48]), expected)


def test_forward_of_a_head_norm_leaves_its_input_alone(tmp_path: Path) -> None:
    norm = loaded(ExLlamaV2HeadNorm, tmp_path)
    x = rows_for(norm)
    before = bits(x).clone()
    y = norm.forward(x)
    assert torch.equal(bits(x), before)
    assert y.data_ptr() != x.data_ptr()


def test_states_of_other_heads_are_an_error(tmp_path: Path) -> None:
    norm = loaded(ExLlamaV2HeadNorm, tmp_path)
    with pytest.raises(ValueError, match=r"hidden_states: .*\(\.\.\., 3, 8\).*\(2, 4, 8\)"):
        norm.forward(values(2, 4, 8))
