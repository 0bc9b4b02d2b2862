"""`normkit.integrations.hf_kernels` in the package `kernels` itself, and in transformers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkit

kernels = pytest.importorskip(
    "kernels", reason="kernels is not installed; the extra `integrations` brings it"
)

from normkit.integrations import hf_kernels  # noqa: E402

N = 64
DTYPES = (torch.float32, torch.bfloat16)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class _Layer(nn.Module):
    def __init__(self, dtype: torch.dtype, n: int = N) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter((torch.randn(n, generator=generator) + 1).to(dtype))
        self.variance_epsilon = 0.3

    def normalised(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@kernels.use_kernel_forward_from_hub("RMSNorm")
class RoundsFirst(_Layer):
    """As Llama's."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.weight * self.normalised(hidden_states).to(hidden_states.dtype)


@kernels.use_kernel_forward_from_hub("RMSNorm")
class RoundsOnce(_Layer):
    """As OLMo 2's."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * self.normalised(x)).to(x.dtype)


@kernels.use_kernel_forward_from_hub("RMSNormZeroCentered")
class ZeroCentered(_Layer):
    """As Qwen3.5's."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.normalised(x) * (1.0 + self.weight.float())).type_as(x)


@kernels.use_kernel_forward_from_hub("RMSNorm")
class NoNorm(_Layer):
    """Named as one, and another function."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.normalised(x) * self.weight).tanh()


@kernels.use_kernel_forward_from_hub("RMSNormGated")
class GatedEachRounded(_Layer):
    """As Qwen3-Next's."""

    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
        x = self.weight * self.normalised(hidden_states).to(hidden_states.dtype)
        return (x * nn.functional.silu(gate.float())).to(hidden_states.dtype)


@kernels.use_kernel_forward_from_hub("RMSNormGated")
class GatedOnceRounded(_Layer):
    """As Kimi-Linear's."""

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        assert gate is not None
        x = self.weight.float() * self.normalised(hidden_states)
        return (x * gate.float().sigmoid()).to(hidden_states.dtype)


@kernels.use_kernel_forward_from_hub("RMSNormGated")
class GatedFirst(_Layer):
    """As Mamba-2's, of which transformers does not say so."""

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        x = hidden_states.float()
        x = x if gate is None else x * nn.functional.silu(gate.float())
        return self.weight * self.normalised(x).to(hidden_states.dtype)


GATED = (GatedEachRounded, GatedOnceRounded, GatedFirst)
GATED_OPTIONS: dict[type, dict[str, Any]] = {
    GatedEachRounded: {"round_before_weight": True, "round_each": True},
    GatedOnceRounded: {"activation": "sigmoid"},
    GatedFirst: {"round_before_weight": True, "norm_before_gate": False},
}
every_gated = pytest.mark.parametrize("cls", GATED, ids=lambda cls: cls.__name__)


NORMS = (RoundsFirst, RoundsOnce, ZeroCentered)
OPTIONS: dict[type, dict[str, Any]] = {
    RoundsFirst: {"round_before_weight": True},
    RoundsOnce: {},
    ZeroCentered: {"weight_offset": 1.0},
}
every_norm = pytest.mark.parametrize("cls", NORMS, ids=lambda cls: cls.__name__)


@pytest.fixture(autouse=True)
def mapped() -> Iterator[None]:
    with kernels.use_kernel_mapping(hf_kernels.mapping(), inherit_mapping=False):
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What normkit was called with."""
    given: list[Tensor] = []

    def counted(x: Tensor, *args: Any, **options: Any) -> Tensor:
        given.append(x)
        return normkit.rms_norm(x, *args, **options)

    def counted_too(x: Tensor, *args: Any, **options: Any) -> Tensor:
        given.append(x)
        return normkit.gated_norm(x, *args, **options)

    monkeypatch.setattr(hf_kernels, "rms_norm", counted)
    monkeypatch.setattr(hf_kernels, "gated_norm", counted_too)
    return given


def kernelized(model: nn.Module, mode: Any = None, device: str = "cpu") -> nn.Module:
    mode = kernels.Mode.INFERENCE if mode is None else mode
    done: nn.Module = kernels.kernelize(model, mode=mode, device=device, use_fallback=False)
    return done


def rows(dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(shape or (2, 5, N), generator=generator) * 3).to(dtype)


def expected(layer: _Layer, x: Tensor) -> Tensor:
    options = OPTIONS[type(layer)]
    return normkit.rms_norm(x, layer.weight, None, layer.variance_epsilon, **options)


@every_norm
@both_dtypes
def test_a_layer_runs_the_norm_that_it_computes(
    calls: list[Tensor], dtype: torch.dtype, cls: type[_Layer]
) -> None:
    layer = cls(dtype)
    x = rows(dtype)
    own = layer(x)
    y = kernelized(layer)(x)
    assert len(calls) == 1
    assert torch.equal(y, expected(layer, x))
    if dtype == torch.bfloat16:
        assert (y == own).double().mean() > 0.998
    torch.testing.assert_close(y, own)


def gates(dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return (torch.randn(shape or (2, 5, N), generator=generator) * 2).to(dtype)


@every_gated
@pytest.mark.parametrize("own", DTYPES, ids=str)
@pytest.mark.parametrize("of_x", DTYPES, ids=str)
@pytest.mark.parametrize("of_gate", DTYPES, ids=str)
def test_a_layer_with_a_gate_runs_the_gated_norm_that_it_computes(
    calls: list[Tensor],
    own: torch.dtype,
    of_x: torch.dtype,
    of_gate: torch.dtype,
    cls: type[_Layer],
) -> None:
    layer = cls(own)
    x, z = rows(of_x, 200, N), gates(of_gate, 200, N)
    want = layer(x, z)
    y = kernelized(layer)(x, gate=z)
    assert len(calls) == 1
    options = GATED_OPTIONS[cls] | {"out_dtype": want.dtype}
    if own != of_x or of_x == torch.float32:  # torch's product with the weight is float32 then
        options["round_each"] = False
    assert torch.equal(
        y, normkit.gated_norm(x, z, layer.weight, None, layer.variance_epsilon, **options)
    )
    if want.dtype == torch.bfloat16:
        assert (y == want).double().mean() > 0.998
    torch.testing.assert_close(y, want, rtol=1e-2 if of_x == torch.bfloat16 else 1e-5, atol=1e-5)


def test_without_a_gate_a_layer_is_the_norm_or_fails_as_it_did(calls: list[Tensor]) -> None:
    layer = GatedFirst(torch.float32)
    want = layer(rows(torch.float32))
    torch.testing.assert_close(kernelized(layer)(rows(torch.float32)), want)
    assert len(calls) == 1
    for cls, error in ((GatedOnceRounded, AssertionError), (GatedEachRounded, AttributeError)):
        with pytest.raises(error):
            kernelized(cls(torch.float32))(rows(torch.float32), None)
    assert len(calls) == 1


def test_a_gate_that_broadcasts_runs_the_layers_own_forward(calls: list[Tensor]) -> None:
    layer = GatedOnceRounded(torch.float32)
    x, z = rows(torch.float32), gates(torch.float32, N)
    want = layer(x, z)
    assert torch.equal(kernelized(layer)(x, z), want)
    assert calls == []


@every_gated
def test_gradients_with_a_gate_are_those_of_the_layer(
    calls: list[Tensor], cls: type[_Layer]
) -> None:
    def gradients(layer: nn.Module) -> list[Tensor]:
        x, z = rows(torch.float32).requires_grad_(), gates(torch.float32).requires_grad_()
        return list(torch.autograd.grad(layer(x, z).sin().sum(), [x, z, layer.weight]))

    layer = cls(torch.float32)
    want = gradients(layer)
    got = gradients(kernelized(layer, kernels.Mode.TRAINING))
    assert len(calls) == 1
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@every_gated
def test_compiled_layers_with_a_gate_have_the_bits_of_eager_ones(cls: type[_Layer]) -> None:
    torch.compiler.reset()
    mode = kernels.Mode.INFERENCE | kernels.Mode.TORCH_COMPILE
    layer = kernelized(cls(torch.bfloat16), mode)
    x, z = rows(torch.bfloat16), gates(torch.bfloat16)
    with torch.no_grad():
        want = copy.deepcopy(layer)(x, z)
        y = torch.compile(layer, backend="eager", fullgraph=True)(x, z)
    assert torch.equal(y, want)
    torch.compiler.reset()


def test_what_is_no_norm_runs_its_own_forward(calls: list[Tensor]) -> None:
    layer = NoNorm(torch.float32)
    own = layer(rows(torch.float32))
    assert torch.equal(kernelized(layer)(rows(torch.float32)), own)
    assert calls == []


def test_a_dtype_of_x_that_is_not_known_runs_the_layers_own_forward(calls: list[Tensor]) -> None:
    layer = RoundsFirst(torch.float32)
    x = rows(torch.float64)
    own = layer(x)
    assert torch.equal(kernelized(layer)(x), own)
    assert calls == []


def test_a_float32_weight_makes_a_float32_y_as_the_layer_does() -> None:
    layer = RoundsFirst(torch.float32)
    x = rows(torch.bfloat16)
    own = layer(x)
    y = kernelized(layer)(x)
    assert y.dtype == own.dtype == torch.float32
    torch.testing.assert_close(y, own, rtol=1e-2, atol=1e-2)


def test_a_layer_that_is_cast_is_measured_again() -> None:
    layer = kernelized(RoundsFirst(torch.float32))
    x = rows(torch.bfloat16)
    assert layer(x).dtype == torch.float32
    layer.bfloat16()
    assert torch.equal(layer(x), expected(layer, x))
    assert layer(x).dtype == torch.bfloat16


@every_norm
def test_gradients_are_those_of_the_layer(calls: list[Tensor], cls: type[_Layer]) -> None:
    def gradients(layer: nn.Module) -> list[Tensor]:
        x = rows(torch.float32).requires_grad_()
        return list(torch.autograd.grad(layer(x).sin().sum(), [x, layer.weight]))

    layer = cls(torch.float32)
    want = gradients(layer)
    got = gradients(kernelized(layer, kernels.Mode.TRAINING))
    assert len(calls) == 1
    for mine, other in zip(got, want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("called_before", [False, True])
@every_norm
def test_compiled_models_have_the_bits_of_eager_ones(
    cls: type[_Layer], called_before: bool
) -> None:
    torch.compiler.reset()
    dtype = torch.bfloat16
    model = nn.Sequential(cls(dtype), nn.Linear(N, N, dtype=dtype), cls(dtype))
    mode = kernels.Mode.INFERENCE | kernels.Mode.TORCH_COMPILE
    kernelized(model, mode)
    x = rows(dtype)
    want = copy.deepcopy(model)(x)
    if called_before:
        model(x)
    operators: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad():
        y = torch.compile(model, backend=backend, fullgraph=True)(x)
    assert sum("normkit" in name for name in operators) == 2
    assert torch.equal(y, want)
    torch.compiler.reset()


def test_the_first_call_may_be_in_inference_mode_or_of_fake_tensors(calls: list[Tensor]) -> None:
    from torch._subclasses import FakeTensorMode

    layer = RoundsFirst(torch.float32)
    kernelized(layer)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.empty(2, N)).shape == (2, N)
    assert calls == []
    with torch.inference_mode():
        y = layer(rows(torch.float32))
    assert len(calls) == 1
    assert torch.equal(y, expected(layer, rows(torch.float32)))


def test_copies_and_state_dicts_are_as_before() -> None:
    layer = RoundsFirst(torch.float32)
    keys = list(layer.state_dict())
    kernelized(layer)
    y = layer(rows(torch.float32))
    assert list(layer.state_dict()) == keys
    assert torch.equal(copy.deepcopy(layer)(rows(torch.float32)), y)


@pytest.mark.parametrize("capability", [(7, 5), (9, 0), (12, 1)], ids=str)
def test_on_cuda_normkit_wins_over_what_is_registered_for_all_devices_later(
    monkeypatch: pytest.MonkeyPatch, calls: list[Tensor], capability: tuple[int, int]
) -> None:
    """As transformers registers its own whenever a model is told to use kernels."""
    from kernels.layer import repos

    class Unwanted:
        layer_name = "Unwanted"

        def load(self) -> type[nn.Module]:
            raise AssertionError("the later mapping was taken")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    repos._find_capability.cache_clear()
    kernels.register_kernel_mapping({"RMSNorm": {"cuda": Unwanted()}})
    layer = RoundsFirst(torch.float32)
    kernelized(layer, device="cuda")(rows(torch.float32))
    repos._find_capability.cache_clear()
    assert len(calls) == 1


# ---------------------------------------------------------------- transformers


def tiny(name: str, dtype: torch.dtype, **arguments: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if not transformers.utils.is_kernels_available():
        pytest.skip(
            f"transformers {transformers.__version__} does not take kernels {kernels.__version__}"
        )
    config = transformers.AutoConfig.for_model(
        name,
        hidden_size=N,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=99,
        pad_token_id=0,
        **arguments,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("name", ["qwen3", "olmo2"])
def test_models_of_transformers_keep_their_logits(calls: list[Tensor], name: str) -> None:
    model = tiny(name, torch.bfloat16)
    ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(input_ids=ids).logits
        kernels.register_kernel_mapping(hf_kernels.mapping())
        model.set_use_kernels(True)
        got = model(input_ids=ids).logits
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    assert len(calls) == len(norms) > 0
    assert torch.equal(got, want)


def test_a_model_with_gated_norms_keeps_its_logits(calls: list[Tensor]) -> None:
    sizes = dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16)
    sizes |= dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 4)
    sizes |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4}
    layers = ["linear_attention", "full_attention"]
    model = tiny("qwen3_next", torch.bfloat16, layer_types=layers, num_experts_per_tok=2, **sizes)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))
    gated = [m for m in model.modules() if type(m).__name__.endswith("RMSNormGated")]
    with torch.no_grad():
        want = model(input_ids=ids).logits
        kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")
        got = model(input_ids=ids).logits
    assert len(gated) > 0
    assert all(vars(m)["forward"].__func__ is hf_kernels.GatedNorm.forward for m in gated)
    assert len(calls) >= len(gated)
    assert torch.equal(got, want)
