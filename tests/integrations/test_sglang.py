"""`normkit.integrations.sglang` with SGLang's own classes."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from integrations.engine_layers import random, recorded
from normkit.integrations import sglang as plug_in

HOW = "`pip install --no-deps sglang`, and what its import then asks for"
layernorm = pytest.importorskip(
    "sglang.srt.layers.layernorm", reason=f"SGLang is not installed: {HOW}", exc_type=ImportError
)

from sglang.srt.plugins.hook_registry import HookRegistry  # noqa: E402

N = 96
EPS = 0.3
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Each class, with options that change where it rounds.
LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("RMSNorm", {}),
    ("RMSNorm", {"cast_x_before_out_mul": True}),
    ("RMSNorm", {"has_weight": False}),
    ("GemmaRMSNorm", {}),
    ("Gemma3RMSNorm", {}),
    ("Gemma4RMSNorm", {}),
    ("Gemma4RMSNorm", {"scale_shift": 1.0}),
    ("Gemma4RMSNorm", {"with_scale": False}),
    ("RMSNormWithoutScale", {}),
    ("LayerNorm", {}),
    ("LayerNorm", {"elementwise_affine": False, "bias": False}),
]
every_layer = pytest.mark.parametrize(("name", "options"), LAYERS, ids=str)
NAMES = tuple(dict.fromkeys(name for name, _ in LAYERS))
ADDING = [case for case in LAYERS if case[0] in ("RMSNorm", "GemmaRMSNorm", "Gemma3RMSNorm")]


@pytest.fixture(autouse=True)
def originals() -> Iterator[dict[str, type]]:
    """SGLang with normkit's layers; its own classes, which are put back."""
    classes = {name: getattr(layernorm, name) for name in NAMES}
    HookRegistry.reset()
    plug_in.register()
    yield classes
    HookRegistry.reset()
    for name, cls in classes.items():
        setattr(layernorm, name, cls)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions of normkit that the layers called."""
    from normkit.integrations import _sglang_layers

    return recorded(monkeypatch, _sglang_layers)


def layer_of(name: str, dtype: torch.dtype | None = None, **options: Any) -> Any:
    layer = getattr(layernorm, name)(N, eps=EPS, **options)
    if dtype is not None:
        layer = layer.to(dtype)
        if isinstance(getattr(layer, "weight", None), Tensor):
            layer.weight.data = layer.weight.data.to(dtype)
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data.copy_(random(N, dtype=parameter.dtype, seed=seed + 5))
    return layer


def near(got: Any, want: Any) -> None:
    """Nearly all of 16-bit elements have SGLang's bits; sums of float32 differ in their last."""
    pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
    for mine, other in pairs:
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other)
        if mine.dtype != torch.float32:
            assert (mine != other).sum() <= 0.005 * mine.numel()


@every_layer
@every_dtype
def test_layers_round_where_sglangs_own_formulas_do(
    calls: list[str],
    originals: dict[str, type],
    dtype: torch.dtype,
    name: str,
    options: dict[str, Any],
) -> None:
    layer = layer_of(name, None if name == "LayerNorm" else dtype, **options)
    assert isinstance(layer, originals[name])
    assert type(layer) is not originals[name]
    for shape in ((7, N), (2, 5, N), (0, N)):
        x = random(*shape, dtype=dtype)
        near(layer(x), layer.forward_native(x.clone()))
    assert calls == ["layer_norm" if name == "LayerNorm" else "rms_norm"] * 3


@pytest.mark.parametrize(("name", "options"), ADDING, ids=str)
@every_dtype
def test_residuals_are_added_in_place_and_as_sglangs_are(
    calls: list[str], dtype: torch.dtype, name: str, options: dict[str, Any]
) -> None:
    layer = layer_of(name, dtype, **options)
    x, residual = random(7, N, dtype=dtype), random(7, N, dtype=dtype, seed=1)
    want = layer.forward_native(x.clone(), residual.clone())
    got = layer(x, residual)
    assert got[0] is x
    assert got[1] is residual
    near(got, want)
    assert calls == ["add_rms_norm_"]


def test_a_float32_residual_stays_one(calls: list[str]) -> None:
    layer = layer_of("RMSNorm", torch.bfloat16, fp32_residual=True)
    x = random(7, N, dtype=torch.bfloat16)
    for dtype, served in ((torch.float32, 1), (torch.bfloat16, 0)):
        residual = random(7, N, dtype=dtype, seed=1)
        want = layer.forward_native(x.clone(), residual.clone())
        got = layer(x.clone(), residual.clone())
        assert got[1].dtype == torch.float32
        near(got, want)
        assert len(calls) == served
        calls.clear()


def test_a_float32_weight_is_read_as_it_is(calls: list[str]) -> None:
    x = random(7, N, dtype=torch.bfloat16)
    for name in ("RMSNorm", "GemmaRMSNorm", "Gemma3RMSNorm", "Gemma4RMSNorm"):
        layer = layer_of(name, torch.float32)
        near(layer(x), layer.forward_native(x.clone()))
    assert calls == ["rms_norm"] * 4


def test_what_is_more_or_rounds_otherwise_is_left_to_sglang(
    monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    x, residual = random(7, N, dtype=torch.bfloat16), random(7, N, dtype=torch.bfloat16, seed=1)
    plain = layer_of("RMSNorm", torch.bfloat16)
    cases: list[tuple[Any, tuple[Any, ...]]] = [
        (plain, (x, residual, x)),
        (plain, (x, residual.float())),
        (layer_of("GemmaRMSNorm", torch.bfloat16), (x, residual, x)),
        (layer_of("Gemma3RMSNorm", torch.bfloat16), (x, residual.float())),
        (layer_of("RMSNorm", torch.bfloat16, var_hidden_size=N // 2), (x,)),
        (layer_of("RMSNorm", torch.bfloat16, override_orig_dtype=torch.float32), (x,)),
        (layer_of("RMSNorm", torch.float32, cast_x_before_out_mul=True), (x,)),
        (layer_of("RMSNorm", torch.bfloat16, force_native=True), (x,)),
        (layernorm.LayerNorm(N, eps=EPS, dtype=torch.bfloat16), (x.float(),)),
    ]
    quantised = layer_of("RMSNorm", torch.bfloat16)
    quantised.fuse_input_quant(nn.Linear(N, N))
    cases.append((quantised, (x,)))
    for layer, given in cases:
        want = layer.forward_native(*(t.clone() for t in given))
        got = layer(*(t.clone() for t in given))
        for mine, other in zip(got, want, strict=True):
            assert torch.equal(mine, other)
    from normkit.integrations import _sglang_layers

    monkeypatch.setattr(_sglang_layers, "is_batch_invariant_mode_enabled", lambda: True)
    layer_of("RMSNorm", torch.bfloat16)(x)
    assert calls == []


def test_a_wrong_size_raises_sglangs_error() -> None:
    with pytest.raises(ValueError, match="Expected hidden_size to be 96, but found: 95"):
        layer_of("RMSNorm", torch.float32)(random(3, N - 1, dtype=torch.float32))


def test_sglangs_switches_still_choose_its_own_formula(calls: list[str]) -> None:
    from sglang.kernels.spec import KernelBackend

    layer, x = layer_of("RMSNorm", torch.float32), random(7, N, dtype=torch.float32)
    layer(x, backend=KernelBackend.TORCH)
    layer.enter_torch_compile(num_tokens=7)
    layer(x)
    assert calls == []
    layer.leave_torch_compile()
    layer(x)
    assert calls == ["rms_norm"]


def test_the_state_dict_is_sglangs(originals: dict[str, type]) -> None:
    for name, cls in originals.items():
        assert list(layer_of(name).state_dict()) == list(cls(N, eps=EPS).state_dict())


def test_a_second_registration_changes_nothing() -> None:
    before = [getattr(layernorm, name) for name in NAMES]
    plug_in.register()
    assert [getattr(layernorm, name) for name in NAMES] == before


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("0", False), ("1", True)])
def test_the_entry_point_hooks_in_where_the_environment_says_so(
    monkeypatch: pytest.MonkeyPatch, originals: dict[str, type], value: str | None, expected: bool
) -> None:
    for name, cls in originals.items():
        setattr(layernorm, name, cls)
    HookRegistry.reset()
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    group = project.split('[project.entry-points."sglang.srt.plugins"]\n')[1]
    name, target = group.splitlines()[0].replace('"', "").split(" = ")
    monkeypatch.delenv("NORMKIT_SGLANG", raising=False)
    if value is not None:
        monkeypatch.setenv("NORMKIT_SGLANG", value)
    EntryPoint(name, target, "sglang.srt.plugins").load()()
    HookRegistry.apply_hooks()
    assert (layernorm.RMSNorm is not originals["RMSNorm"]) == expected
