"""The layers of `normkit.compat.lorax`, and what `install` changes."""

from __future__ import annotations

import copy
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import normkit
from compat.dropout_calls import Options, call, forward, random
from conformance.support import assert_same_bits, bits
from normkit.compat import dropout_layer_norm, lorax
from normkit.compat.lorax import FastLayerNorm, FastRMSNorm
from normkit.testing import assert_accurate

EPS = 1e-3
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = ("layer", "rms")
# Where LoRAX changes its rounding, its dtype and what it returns, and on both sides of it.
SIZES = (64, 8192, 8193, 16384)
both_kinds = pytest.mark.parametrize("kind", KINDS)


class Weights:
    """Gives tensors as LoRAX's own class does: by name, in a dtype that may be set."""

    def __init__(self, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
        self.tensors = tensors
        self.dtype = dtype

    def get_tensor(self, name: str) -> Tensor:
        return self.tensors[name].to(self.dtype)


def stored(n: int, dtype: torch.dtype = torch.float32) -> Weights:
    return Weights({"ln.weight": random(n, seed=1), "ln.bias": random(n, seed=2)}, dtype)


def layer_of(kind: str, n: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    cls: Any = FastLayerNorm if kind == "layer" else FastRMSNorm
    return cls.load("ln", stored(n, dtype), EPS).requires_grad_(False)


def weights_of(layer: Any) -> tuple[Tensor, Tensor | None]:
    return layer.weight, getattr(layer, "bias", None)


def run(backend: Any, layer: torch.nn.Module, *tensors: Tensor) -> Any:
    """On the backend: its own layer, of which the parameters go along to the device."""
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def on_device(*moved: Tensor) -> Any:
        there = dict(zip(names, moved[: len(names)], strict=True))
        return torch.func.functional_call(layer, there, tuple(moved[len(names) :]))

    values = [*(p.data for p in parameters), *tensors]
    return call(backend, on_device, *values)


# ---------------------------------------------------------------- the layers


@both_kinds
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", [None, torch.float32], ids=["", "float32 weight"])
def test_the_sum_is_rounded_to_be_stored_only_at_every_size(
    backend: Any, weight_dtype: torch.dtype | None, dtype: torch.dtype, n: int, kind: str
) -> None:
    layer = layer_of(kind, n, weight_dtype or dtype)
    x, residual = random(3, n, dtype=dtype), random(3, n, dtype=dtype, seed=3)
    y, total = run(backend, layer, x, residual)
    assert y.dtype == dtype
    added = {"residual": residual, "residual_out": total, "round_sum": False}
    assert_accurate(y, x, *weights_of(layer), EPS, kind=kind, **added)


@both_kinds
@pytest.mark.parametrize("n", SIZES)
def test_without_a_residual_the_input_itself_is_returned(backend: Any, n: int, kind: str) -> None:
    layer = layer_of(kind, n, torch.bfloat16)
    x = random(3, n, dtype=torch.bfloat16)
    y, total = run(backend, layer, x)
    assert total is x
    assert y.dtype == x.dtype
    assert_accurate(y, x, *weights_of(layer), EPS, kind=kind)


@both_kinds
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("has_residual", [False, True])
def test_nothing_given_is_written(kind: str, n: int, has_residual: bool) -> None:
    layer: Any = layer_of(kind, n)
    x, residual = random(3, n), random(3, n, seed=3)
    given = [x, *([residual] if has_residual else [])]
    before = [bits(t).clone() for t in given]
    y, total = layer(*given)
    y.fill_(7)
    if has_residual:
        total.fill_(7)
    assert all(torch.equal(bits(t), old) for t, old in zip(given, before, strict=True))


@both_kinds
@pytest.mark.parametrize("n", SIZES)
def test_a_layer_is_served_where_there_are_no_kernels(n: int, kind: str) -> None:
    layer = layer_of(kind, n, torch.float16).to("meta")
    x, residual = (torch.empty(3, n, dtype=torch.float16, device="meta") for _ in range(2))
    y, total = layer(x, residual)
    assert y.shape == total.shape == x.shape
    assert total is not x
    assert layer(x)[1] is x


@both_kinds
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_any_mix_of_dtypes_gives_xs_and_the_residuals(
    x_dtype: torch.dtype, residual_dtype: torch.dtype, weight_dtype: torch.dtype, kind: str
) -> None:
    layer = layer_of(kind, 40, weight_dtype)
    x, residual = random(3, 40, dtype=x_dtype), random(3, 40, dtype=residual_dtype, seed=3)
    y, total = layer(x, residual)
    assert (y.dtype, total.dtype) == (x_dtype, residual_dtype)
    assert layer(x)[0].dtype == x_dtype


@both_kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_layers_are_what_the_extension_makes(
    backend: Any, dtype: torch.dtype, kind: str
) -> None:
    layer = layer_of(kind, 200, dtype)
    x, residual = random(3, 200, dtype=dtype), random(3, 200, dtype=dtype, seed=3)
    options = Options(epsilon=EPS, is_rms_norm=kind == "rms")
    z, total, *_ = forward(backend, x, residual, *weights_of(layer), options)
    y, residual_out = run(backend, layer, x, residual)
    assert_same_bits(y, z)
    assert_same_bits(residual_out, total)


@both_kinds
@pytest.mark.parametrize("n", [64, 8200])
def test_a_chain_of_layers_is_that_of_plain_torch(kind: str, n: int) -> None:
    """As a transformer has them: each layer's output and the residual go on to the next."""
    x: Tensor = random(4, n)
    residual: Tensor | None = None
    expected, sums = x.double(), torch.zeros(4, n, dtype=torch.float64)
    for index in range(6):
        weights = Weights(
            {"ln.weight": random(n, seed=10 + index), "ln.bias": random(n, seed=20 + index)}
        )
        layer: Any = FastLayerNorm if kind == "layer" else FastRMSNorm
        layer = layer.load("ln", weights, EPS).requires_grad_(False)
        x, residual = layer(x, residual)
        sums = sums + expected
        weight, bias = (None if t is None else t.double() for t in weights_of(layer))
        if kind == "layer":
            expected = torch.nn.functional.layer_norm(sums, (n,), weight, bias, EPS)
        else:
            expected = torch.nn.functional.rms_norm(sums, (n,), weight, EPS)
    assert residual is not None
    torch.testing.assert_close(residual, sums.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x, expected.float(), rtol=1e-5, atol=1e-5)


@both_kinds
def test_gradients_reach_x_the_residual_and_the_parameters(kind: str) -> None:
    layer: Any = layer_of(kind, 40).requires_grad_()
    x, residual = random(3, 40).requires_grad_(), random(3, 40, seed=3).requires_grad_()
    y, total = layer(x, residual)
    (y.sin().sum() + total.cos().sum()).backward()
    wide = copy.deepcopy(layer).double()
    leaves = [t.detach().double().requires_grad_() for t in (x, residual)]
    sums = leaves[0] + leaves[1]
    if kind == "layer":
        expected = torch.nn.functional.layer_norm(sums, (40,), wide.weight, wide.bias, EPS)
    else:
        expected = torch.nn.functional.rms_norm(sums, (40,), wide.weight, EPS)
    wide.zero_grad()
    (expected.sin().sum() + sums.cos().sum()).backward()
    pairs = [*zip((x, residual), leaves, strict=True)]
    pairs += zip(layer.parameters(), wide.parameters(), strict=True)
    for got, leaf in pairs:
        torch.testing.assert_close(got.grad, leaf.grad.float(), rtol=1e-5, atol=1e-5)


@both_kinds
def test_the_layers_compile_whole(kind: str) -> None:
    layer: Any = layer_of(kind, 40)
    x, residual = random(3, 40), random(3, 40, seed=3)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for got, expected in zip(compiled(x, residual), layer(x, residual), strict=True):
        assert_same_bits(got, expected)


# ---------------------------------------------------------------- what LoRAX expects of the classes


def test_classes_and_state_dicts_are_those_of_lorax() -> None:
    norm, rms = FastLayerNorm(8, eps=1e-4), FastRMSNorm(torch.ones(8), 1e-4)
    assert isinstance(norm, torch.nn.LayerNorm)
    assert isinstance(rms, torch.nn.Module)
    assert list(norm.state_dict()) == ["weight", "bias"]
    assert list(rms.state_dict()) == ["weight"]
    assert isinstance(rms.weight, torch.nn.Parameter)
    assert rms.variance_epsilon == norm.eps == 1e-4
    x = random(3, 8)
    for layer in (norm, rms):
        by_name = layer(hidden_states=x, residual=x)
        for got, expected in zip(by_name, layer(x, x), strict=True):
            assert_same_bits(got, expected)


def test_load_takes_what_is_stored_bit_for_bit() -> None:
    weights = stored(8, torch.bfloat16)
    norm = FastLayerNorm.load(prefix="ln", weights=weights, eps=1e-4)
    bare = FastLayerNorm.load_no_bias(prefix="ln", weights=weights, eps=1e-4)
    rms = FastRMSNorm.load(prefix="ln", weights=weights, eps=1e-4)
    assert type(norm) is type(bare) is FastLayerNorm
    assert norm.normalized_shape == (8,)
    assert norm.eps == bare.eps == rms.variance_epsilon == 1e-4
    for layer in (norm, bare, rms):
        assert_same_bits(layer.weight, weights.get_tensor("ln.weight"))
    assert_same_bits(norm.bias, weights.get_tensor("ln.bias"))
    assert bare.bias is None
    assert FastRMSNorm.load("ln", weights).variance_epsilon == 1e-6
    x = random(3, 8)
    expected = normkit.layer_norm(x, bare.weight, None, 1e-4)
    assert_same_bits(bare(x)[0].detach(), expected.detach())


class Gemma(FastRMSNorm):
    """As LoRAX's Gemma 2 has it: the weight plus 1, in float32."""

    @classmethod
    def load(cls, prefix: str, weights: Any, eps: float = 1e-6) -> Any:
        dtype = weights.dtype
        weights.dtype = torch.float32
        weight = weights.get_tensor(f"{prefix}.weight") + 1
        weights.dtype = dtype
        layer: Any = cls(weight, eps)
        layer.dtype = dtype
        return layer


def test_subclasses_that_store_the_weight_plus_1_in_float32_work() -> None:
    layer = Gemma.load("ln", stored(64, torch.bfloat16), EPS).requires_grad_(False)
    assert type(layer) is Gemma
    assert layer.weight.dtype == torch.float32
    x, residual = (random(3, 64, dtype=torch.bfloat16, seed=seed) for seed in (3, 4))
    y, total = layer(x, residual)
    assert y.dtype == torch.bfloat16
    added = {"residual": residual, "residual_out": total, "round_sum": False}
    weight = random(64, seed=1) + 1
    assert_accurate(y, x, weight, None, EPS, kind="rms", **added)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (Weights({}), KeyError, r"expected a tensor 'ln\.weight'"),
        (Weights({"ln.weight": torch.ones(4)}), KeyError, r"'ln\.bias', got none; load_no_bias is"),
        ({"ln.weight": torch.ones(4)}, TypeError, "weights: expected an object with get_tensor"),
        (
            Weights({"ln.weight": torch.ones(4), "ln.bias": torch.ones(3)}),
            ValueError,
            r"ln\.bias: expected the weight's shape \(4,\), got \(3,\)",
        ),
    ],
)
def test_load_says_what_is_missing(weights: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FastLayerNorm.load("ln", weights, EPS)


def test_what_get_tensor_raises_is_passed_on() -> None:
    class Missing:
        def get_tensor(self, name: str) -> Tensor:
            raise RuntimeError(f"weight {name} does not exist")

    with pytest.raises(RuntimeError, match=r"weight ln\.weight does not exist"):
        FastRMSNorm.load("ln", Missing())


def test_a_wrong_call_says_so() -> None:
    layer = FastRMSNorm(torch.ones(8), EPS)
    with pytest.raises(ValueError, match=r"residual: expected x's shape \(3, 8\), got \(3, 9\)"):
        layer(torch.ones(3, 8), torch.ones(3, 9))
    with pytest.raises(ValueError, match=r"weight: expected shape \(9,\), got \(8,\)"):
        layer(torch.ones(3, 9))


# ---------------------------------------------------------------- install


NAMES = ("load", "load_no_bias")


@pytest.fixture
def clean() -> Iterator[None]:
    lorax.uninstall()
    yield
    lorax.uninstall()
    assert "dropout_layer_norm" not in sys.modules
    assert not any(hasattr(torch.nn.LayerNorm, name) for name in NAMES)


def test_importing_changes_nothing() -> None:
    code = (
        "import sys, torch; before = dict(vars(torch.nn.LayerNorm))\n"
        "import normkit.compat.lorax, normkit.compat.dropout_layer_norm\n"
        "assert dict(vars(torch.nn.LayerNorm)) == before\n"
        "assert 'dropout_layer_norm' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_install_gives_torchs_layer_norm_its_loaders(clean: None) -> None:
    class Own(torch.nn.LayerNorm):
        pass

    lorax.install()
    for cls in (torch.nn.LayerNorm, Own, normkit.LayerNorm):
        norm = cls.load("ln", stored(8), EPS)  # type: ignore[attr-defined]
        assert type(norm) is cls
        assert norm.eps == EPS
        assert_same_bits(norm.bias, random(8, seed=2))
        assert norm(torch.ones(3, 8)).shape == (3, 8)
        bare = cls.load_no_bias("ln", stored(8), EPS)  # type: ignore[attr-defined]
        assert type(bare) is cls
        assert bare.bias is None
        assert_same_bits(bare.weight, random(8, seed=1))


def test_install_serves_the_extension_by_its_name(clean: None) -> None:
    lorax.install()
    import dropout_layer_norm as found  # type: ignore[import-not-found]

    assert found is dropout_layer_norm


def test_install_twice_is_install_once(clean: None) -> None:
    lorax.install()
    before = {name: vars(torch.nn.LayerNorm)[name] for name in NAMES}
    lorax.install()
    assert before == {name: vars(torch.nn.LayerNorm)[name] for name in NAMES}
    lorax.uninstall()
    assert not any(hasattr(torch.nn.LayerNorm, name) for name in NAMES)


def test_uninstall_brings_back_what_was_there(clean: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("dropout_layer_norm")
    method = classmethod(lambda cls, *_: cls)
    monkeypatch.setitem(sys.modules, "dropout_layer_norm", module)
    monkeypatch.setattr(torch.nn.LayerNorm, "load", method, raising=False)
    lorax.install()
    assert sys.modules["dropout_layer_norm"] is dropout_layer_norm
    assert vars(torch.nn.LayerNorm)["load"] is not method
    lorax.uninstall()
    assert sys.modules["dropout_layer_norm"] is module
    assert vars(torch.nn.LayerNorm)["load"] is method
    monkeypatch.undo()


def test_uninstall_leaves_what_it_did_not_install(
    clean: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dropout_layer_norm", dropout_layer_norm)
    lorax.install()
    method = classmethod(lambda cls, *_: cls)
    torch.nn.LayerNorm.load = method  # type: ignore[attr-defined]
    lorax.uninstall()
    assert sys.modules["dropout_layer_norm"] is dropout_layer_norm
    assert vars(torch.nn.LayerNorm)["load"] is method
    del torch.nn.LayerNorm.load  # type: ignore[attr-defined]
    monkeypatch.undo()
