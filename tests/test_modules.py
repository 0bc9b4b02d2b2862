"""The modules are torch's, with more options."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import normkit
from normkit import HeadNorm, LayerNorm, RMSNorm, modules, reference
from normkit._serving.serve import serve

TORCHS = [(RMSNorm, nn.RMSNorm), (LayerNorm, nn.LayerNorm)]
SHAPE = (2, 3, 8)  # of an x that each of these takes


@pytest.fixture(params=["several dimensions", "one dimension", "heads"])
def module(request):
    made = {
        "several dimensions": lambda: RMSNorm((3, 8), bias=True, weight_offset=1.0),
        "one dimension": lambda: LayerNorm(8, round_before_weight=True),
        "heads": lambda: HeadNorm(3, 8, kind="layer", bias=True, weight_offset=1.0),
    }
    return randomised(made[request.param]())


def rand(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * 1.5 + 0.5).to(dtype)


def randomised(module):
    for seed, parameter in enumerate(module.parameters(), 1):
        parameter.data = rand(*parameter.shape, dtype=parameter.dtype, seed=seed)
    return module.requires_grad_(False)


def equal_share(a, b):
    return (a == b).double().mean().item()


def ulps_apart(a, b):
    """Steps between two bfloat16 tensors, on the line of all bfloat16 numbers."""

    def place(t):
        bits = t.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return (place(a) - place(b)).abs().max().item()


# ------------------------------------------------------------------------------ drop-ins of torch's


@pytest.mark.parametrize(("ours", "torchs"), TORCHS)
def test_is_a_torch_module_with_the_same_arguments_in_the_same_places(ours, torchs):
    places = ((3, 5), 0.25, True, "cpu", torch.float16)
    if ours is LayerNorm:
        places = (*places[:3], False, *places[3:])
    module, other = ours(*places), torchs(*places)
    assert isinstance(module, torchs)
    assert module.normalized_shape == other.normalized_shape == (3, 5)
    assert module.eps == other.eps == 0.25
    assert module.weight.dtype == other.weight.dtype == torch.float16
    assert str(module) == str(other)
    assert list(module.state_dict()) == list(other.state_dict())


@pytest.mark.parametrize(("ours", "torchs"), TORCHS)
def test_state_dicts_go_both_ways(ours, torchs):
    for source, target in ((ours(7), torchs(7)), (torchs(7), ours(7))):
        stored = randomised(source).state_dict()
        target.load_state_dict(stored)
        assert all(torch.equal(stored[k], v) for k, v in target.state_dict().items())


def test_a_bias_of_rms_norm_is_one_more_key():
    assert list(RMSNorm(4).state_dict()) == ["weight"]
    assert list(RMSNorm(4, bias=True).state_dict()) == ["weight", "bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*bias"):
        RMSNorm(4, bias=True).load_state_dict(nn.RMSNorm(4).state_dict())


def test_default_eps():
    assert (RMSNorm(4).eps, LayerNorm(4).eps, HeadNorm(2, 4).eps) == (1e-6, 1e-5, 1e-6)


@pytest.mark.parametrize(("ours", "torchs"), TORCHS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(96,), (4, 24), (2, 3, 16)])
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_agrees_with_torch(ours, torchs, affine, shape, eps):
    other = randomised(torchs(shape, eps, affine))
    module = ours(shape, eps, affine).requires_grad_(False)
    module.load_state_dict(other.state_dict())
    x = rand(5, 2, *shape)
    torch.testing.assert_close(module(x), other(x), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(("ours", "torchs"), TORCHS)
def test_eps_none_follows_torch(ours, torchs):
    x = 1e-4 * rand(3, 64)
    y = ours(64, eps=None)(x)
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(y, torchs(64, eps=eps)(x), rtol=2e-6, atol=2e-6)
    assert not torch.allclose(y, torchs(64, eps=1e-6)(x), rtol=1e-3)


@pytest.mark.parametrize(("ours", "torchs"), TORCHS)
def test_gradients_are_those_of_torch(ours, torchs):
    module, other = ours(12), torchs(12, eps=ours(12).eps)
    grads = []
    for m in (module, other):
        x = rand(4, 12).requires_grad_()
        (m(x) * rand(4, 12, seed=3)).sum().backward()
        grads.append([x.grad, *(p.grad for p in m.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", [RMSNorm, LayerNorm])
def test_without_affine_the_shape_of_x_is_still_checked(cls):
    with pytest.raises(ValueError, match=r"x: expected a shape that ends in \(4,\), got \(2, 5\)"):
        cls(4, elementwise_affine=False)(torch.ones(2, 5))
    with pytest.raises(TypeError, match=r"x: expected a torch.Tensor, got list"):
        cls(4, elementwise_affine=False)([1.0] * 4)
    with pytest.raises(ValueError, match="weight"):
        cls(4)(torch.ones(2, 5))


def test_elementwise_affine_false_has_no_parameters():
    for module in (
        RMSNorm(4, elementwise_affine=False, bias=True),
        LayerNorm(4, elementwise_affine=False),
        HeadNorm(2, 4, elementwise_affine=False, bias=True),
    ):
        assert list(module.parameters()) == []
        assert "elementwise_affine=False" in str(module)


# -------------------------------------------------------------------- several normalised dimensions


@pytest.mark.parametrize("cls", [RMSNorm, LayerNorm])
def test_several_dimensions_are_one_row(cls):
    module = randomised(cls((3, 8), bias=True, weight_offset=1.0))
    x, residual = rand(5, 3, 8), rand(5, 3, 8, seed=9)
    row = cls(24, bias=True, weight_offset=1.0).requires_grad_(False)
    row.load_state_dict({k: v.flatten() for k, v in module.state_dict().items()})
    assert module.weight.shape == (3, 8)
    assert torch.equal(module(x), row(x.flatten(1)).view(5, 3, 8))
    for ours, flat in zip(module(x, residual), row(x.flatten(1), residual.flatten(1)), strict=True):
        assert torch.equal(ours, flat.view(5, 3, 8))


@pytest.mark.parametrize("cls", [RMSNorm, LayerNorm])
def test_strided_outer_dimensions_are_not_copied(cls, monkeypatch):
    module = randomised(cls((3, 8)))
    packed = rand(5, 4, 2, 3, 8)
    x = packed[:, ::2, 1]
    seen = []
    monkeypatch.setattr(modules, "serve", lambda call: seen.append(call) or serve(call))
    assert torch.equal(module(x), module(x.clone()))
    assert seen[0].x.shape == (5, 2, 24)
    assert seen[0].x.data_ptr() == x.data_ptr()
    assert seen[0].weight.data_ptr() == module.weight.data_ptr()


def test_permuted_normalised_dimensions_are_right():
    module = randomised(LayerNorm((3, 8)))
    x = rand(5, 8, 3).transpose(1, 2)
    assert torch.equal(module(x), module(x.contiguous()))


def test_a_residual_of_another_shape_is_refused():
    x, residual = torch.ones(5, 3, 8), torch.ones(5, 8, 3)
    with pytest.raises(ValueError, match=r"residual: expected a shape that ends in \(5, 3, 8\)"):
        RMSNorm((3, 8))(x, residual)
    with pytest.raises(ValueError, match="residual: expected x's shape"):
        HeadNorm(3, 8)(x, residual)
    with pytest.raises(TypeError, match=r"residual: expected a torch\.Tensor, got float"):
        RMSNorm((3, 8))(x, 1.0)


# -------------------------------------------------------------------------------- what they compute


def test_round_before_weight_is_the_llama_of_hugging_face():
    module = RMSNorm(256, dtype=torch.bfloat16, round_before_weight=True)
    weight = randomised(module).weight
    x = rand(64, 256, dtype=torch.bfloat16)
    wide = x.float()
    xhat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    llama = weight * xhat.to(torch.bfloat16)
    y = module(x)
    assert equal_share(y, llama) >= 0.999
    assert ulps_apart(y, llama) <= 1
    module.round_before_weight = False
    assert equal_share(module(x), llama) < 0.95  # or this test could not fail


def test_weight_offset_is_the_gemma_of_hugging_face():
    module = RMSNorm(256, dtype=torch.bfloat16, weight_offset=1.0)
    weight = randomised(module).weight.mul_(0.01)
    x = rand(64, 256, dtype=torch.bfloat16)
    wide = x.float()
    xhat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    gemma = (xhat * (1.0 + weight.float())).to(torch.bfloat16)
    y = module(x)
    assert equal_share(y, gemma) >= 0.999
    assert ulps_apart(y, gemma) <= 1
    in_bfloat16 = (xhat * (1.0 + weight).float()).to(torch.bfloat16)
    assert equal_share(y, in_bfloat16) < 0.9  # or this test could not fail


@pytest.mark.parametrize("cls", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
def test_a_residual_is_added_and_returned(cls, residual_dtype):
    module = randomised(cls(96))
    x, residual = rand(5, 96, dtype=torch.bfloat16), rand(5, 96, dtype=residual_dtype, seed=9)
    y, residual_out = module(x, residual)
    assert torch.equal(residual_out, (x.float() + residual.float()).to(residual_dtype))
    assert torch.equal(y, module(residual_out, out_dtype=torch.bfloat16))


def test_out_dtype(module):
    x = rand(*SHAPE)
    assert module(x, out_dtype=torch.float16).dtype == torch.float16
    y, residual = module(x, x, out_dtype=torch.bfloat16)
    assert (y.dtype, residual.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("num_heads", [3, None])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_head_norm_normalises_each_head(num_heads, kind):
    module = randomised(HeadNorm(num_heads, 8, 0.3, kind, bias=True, weight_offset=1.0))
    q = rand(2, 7, 4 * 3 * 8)[..., 24:48].unflatten(-1, (3, 8))  # a slice of a packed qkv
    options = {"kind": kind, "weight_offset": 1.0, "compute_dtype": torch.float64}
    expected = reference.norm(q, module.weight, module.bias, 0.3, **options)
    torch.testing.assert_close(module(q), expected, rtol=2e-6, atol=2e-6)
    residual = rand(2, 7, 3, 8, seed=9)
    y, residual_out = module(q, residual)
    assert torch.equal(residual_out, q + residual)
    assert torch.equal(y, module(residual_out))


@pytest.mark.parametrize("num_heads", [3, None])
def test_head_norm_stores_a_weight_per_head_or_one(num_heads):
    module = HeadNorm(num_heads, 8, bias=True)
    shape = (8,) if num_heads is None else (3, 8)
    assert module.weight.shape == module.bias.shape == shape
    assert list(module.state_dict()) == ["weight", "bias"]


def test_head_norm_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="kind: expected"):
        HeadNorm(3, 8, kind="batch")
    with pytest.raises(ValueError, match="weight: expected shape"):
        HeadNorm(3, 8)(torch.ones(2, 4, 8))
    with pytest.raises(ValueError, match=r"x: expected a shape that ends in \(3, 8\)"):
        HeadNorm(3, 8, elementwise_affine=False)(torch.ones(2, 4, 8))


def test_inference_reaches_the_kernels(module):
    with torch.no_grad(), normkit.use_backend("cpu"):  # which raises for what it cannot serve
        module(rand(*SHAPE))
        module(rand(*SHAPE), rand(*SHAPE))


# -------------------------------------------------------------------------------- life of a module


@pytest.mark.parametrize("offset", [0.0, 1.0, 0.25])
@pytest.mark.parametrize(
    ("cls", "shape"), [(RMSNorm, ((3, 8),)), (LayerNorm, ((3, 8),)), (HeadNorm, (3, 8))]
)
def test_reset_makes_the_effective_weight_one(cls, shape, offset):
    module = cls(*shape, bias=True, weight_offset=offset)
    without = cls(*shape, elementwise_affine=False)
    for _ in range(2):
        assert (module.weight + offset == 1).all()
        assert (module.bias == 0).all()
        assert torch.equal(module(rand(*SHAPE)), without(rand(*SHAPE)))
        randomised(module)
        assert not torch.allclose(module(rand(*SHAPE)), without(rand(*SHAPE)))
        module.reset_parameters()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_compute_the_same(module, copied):
    twin = copied(module)
    assert str(twin) == str(module)
    assert torch.equal(twin(rand(*SHAPE)), module(rand(*SHAPE)))
    assert twin.weight.data_ptr() != module.weight.data_ptr()


def test_repr_shows_the_options_that_are_not_defaults():
    assert str(RMSNorm(4, bias=True, weight_offset=1.0, round_before_weight=True)) == (
        "RMSNorm((4,), eps=1e-06, elementwise_affine=True, weight_offset=1.0,"
        " round_before_weight=True, bias=True)"
    )
    assert str(HeadNorm(2, 4, weight_offset=1.0)) == (
        "HeadNorm(2, 4, eps=1e-06, kind='rms', weight_offset=1.0)"
    )


@pytest.mark.parametrize("cls", [RMSNorm, LayerNorm])
def test_device_and_dtype_of_the_factory(cls):
    module = cls(8, device="meta", dtype=torch.bfloat16, bias=True)
    for parameter in module.parameters():
        assert parameter.is_meta
        assert parameter.dtype == torch.bfloat16
    module = module.to_empty(device="cpu")
    module.reset_parameters()
    assert torch.equal(module.weight, torch.ones(8, dtype=torch.bfloat16))
    with torch.device("meta"):
        assert cls(8, bias=True).bias.is_meta


def test_half_converts_the_parameters():
    module = randomised(RMSNorm(8, bias=True)).half()
    assert {p.dtype for p in module.parameters()} == {torch.float16}
    assert module(rand(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


class _Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_parametrised_weights_are_used(module):
    x = rand(*SHAPE)
    doubled = copy.deepcopy(module)
    doubled.weight.mul_(2)
    parametrize.register_parametrization(module, "weight", _Doubled())
    assert torch.equal(module(x), doubled(x))
    parametrize.remove_parametrizations(module, "weight")
    assert torch.equal(module(x), doubled(x))


def test_pruned_weights_are_used():
    module = randomised(RMSNorm(8))
    prune.l1_unstructured(module, "weight", amount=3)
    assert (module(rand(2, 8)) == 0).sum() == 6


def test_functional_call_uses_the_tensors_it_is_given():
    module, x = RMSNorm(8), rand(2, 8)
    y = torch.func.functional_call(module, {"weight": torch.full((8,), 3.0)}, (x,))
    torch.testing.assert_close(y, 3 * module(x))


def test_hooks_run():
    module, seen = LayerNorm(8), []
    module.register_forward_hook(lambda m, args, y: seen.append(y.shape))
    module(rand(2, 8))
    assert seen == [(2, 8)]


@pytest.mark.parametrize("parametrised", [False, True])
def test_compiles_in_one_graph(module, parametrised):
    torch.compiler.reset()
    if parametrised:
        parametrize.register_parametrization(module, "weight", _Doubled())
    x = rand(*SHAPE)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), module(x), rtol=2e-6, atol=2e-6)
    for ours, eager in zip(compiled(x, x), module(x, x), strict=True):
        torch.testing.assert_close(ours, eager, rtol=2e-6, atol=2e-6)


def test_norms_of_several_eps_compile():
    torch.compiler.reset()
    x = rand(*SHAPE)
    for eps in (1e-6, 1e-5, 0.3):  # from the second on, eps is a symbol of the graph
        module = RMSNorm(8, eps)
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), module(x), rtol=2e-6, atol=2e-6)


def test_saves_and_loads_as_torch_does():
    module, file = randomised(RMSNorm(8, bias=True)), io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = RMSNorm(8, bias=True)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other.weight, module.weight)
    assert torch.equal(other.bias, module.bias)


def test_subclasses_need_nothing_else():
    class Mine(modules.RMSNorm):
        pass

    stored = {"norm.weight": torch.arange(4.0)}
    assert type(Mine.from_checkpoint(stored, "norm")) is Mine


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: RMSNorm(()), ValueError, "normalized_shape: expected at least one dimension"),
        (lambda: LayerNorm((4, 0)), ValueError, "normalized_shape: expected at least 1, got 0"),
        (lambda: LayerNorm(-3), ValueError, "normalized_shape: expected at least 1, got -3"),
        (lambda: RMSNorm(4.0), TypeError, "normalized_shape: expected an int, got float"),
        (lambda: RMSNorm("8"), TypeError, "normalized_shape: expected an int, got str"),
        (lambda: HeadNorm(0, 4), ValueError, "num_heads: expected at least 1, got 0"),
        (lambda: HeadNorm(2, None), TypeError, "head_dim: expected an int, got NoneType"),
        (lambda: HeadNorm(True, 4), TypeError, "num_heads: expected an int, got bool"),
        *(
            (lambda cls=cls, value=value: cls(8, eps=value), error, "eps: expected a")
            for cls in (RMSNorm, LayerNorm)
            for value, error in (("x", TypeError), (float("nan"), ValueError), (-1.0, ValueError))
        ),
        (lambda: HeadNorm(2, 4, eps=float("inf")), ValueError, "eps: expected a finite number"),
        (lambda: LayerNorm(8, weight_offset="1"), TypeError, "weight_offset: expected a number"),
        (lambda: RMSNorm(8, weight_offset=None), TypeError, "weight_offset: expected a number"),
    ],
)
def test_a_constructor_refuses_what_no_call_can_use(make: Any, error: Any, text: str) -> None:
    """It would fail in the first call, far from where the mistake is."""
    with pytest.raises(error, match=f"^{text}"):
        make()
