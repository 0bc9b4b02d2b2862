"""Modules in what torch and its users do with modules."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import normkit
from normkit import HeadNorm, LayerNorm, RMSNorm
from torch_integration.support import (
    FUNCTIONS,
    MODULES,
    adds,
    assert_equal_bits,
    compiled,
    listed,
    loss_of,
    randomised,
    tensors,
)


def trained(module: nn.Module, x: Tensor) -> list[Tensor | None]:
    module.zero_grad()
    y = module(x)
    loss_of(y).backward()
    return [y, *(p.grad for p in module.parameters())]


# ---------------------------------------------------------------------------- parameters replaced


@pytest.mark.parametrize("kind", MODULES)
def test_gradients_reach_the_originals_of_parametrised_weights(kind: str) -> None:
    module, x = randomised(MODULES[kind](8)), torch.randn(2, 3, 8)
    plain = copy.deepcopy(module)

    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    with torch.no_grad():
        plain.weight.mul_(2)
    parametrize.register_parametrization(module, "weight", Doubled())
    y, *_ = trained(module, x)
    expected, *_ = trained(plain, x)
    assert_equal_bits(y, expected)
    original = module.parametrizations.weight.original
    assert_equal_bits(original.grad, 2 * plain.weight.grad)
    with parametrize.cached():
        assert_equal_bits(module(x), expected)
    torch._dynamo.reset()
    assert_equal_bits(compiled(module)(x), expected)


def test_weight_norm_splits_the_weight_of_a_head_norm() -> None:
    module, x = randomised(HeadNorm(3, 8)), torch.randn(2, 3, 8)
    expected = module(x)
    parametrizations.weight_norm(module, "weight")
    torch.testing.assert_close(module(x), expected)
    loss_of(module(x)).backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("kind", MODULES)
def test_pruned_weights_get_no_gradient_where_they_are_cut(kind: str) -> None:
    module, x = randomised(MODULES[kind](8)), torch.randn(2, 3, 8)
    prune.random_unstructured(module, "weight", amount=0.5)
    loss_of(module(x)).backward()
    cut = module.weight_mask == 0
    assert cut.any()
    assert not module.weight_orig.grad[cut].any()
    assert module.weight_orig.grad[~cut].all()
    prune.remove(module, "weight")
    assert not module.weight[cut].any()


# ------------------------------------------------------------------------------------- grad modes


@pytest.mark.parametrize("kind", MODULES)
def test_inference_mode_gives_the_bits_of_training(kind: str) -> None:
    module, x = randomised(MODULES[kind](8)), torch.randn(2, 3, 8)
    with torch.inference_mode():
        made = module(x, x)
        assert all(t.is_inference() for t in made)
        again = module(*made)
        in_place = normkit.rms_norm_(made[0].clone())
        assert in_place.is_inference()
    assert_equal_bits(made, module(x, x))
    assert_equal_bits(again, module(made[0].clone(), made[1].clone()))


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if not adds(name)])
def test_tensors_of_inference_mode_are_refused_where_they_would_be_kept(name: str) -> None:
    with torch.inference_mode():
        given = tensors(name)
    weight = given[-2].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        getattr(normkit, name)(*given[:-2], weight, None)


# ----------------------------------------------------------------------------- copies and pickles


@pytest.mark.parametrize("kind", MODULES)
def test_copied_modules_train_apart(kind: str) -> None:
    module, x = randomised(MODULES[kind](8, memory_efficient=True)), torch.randn(2, 3, 8)
    expected = trained(module, x)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert type(twin) is type(module)
        assert_equal_bits(trained(twin, x), expected)
        with torch.no_grad():
            twin.weight.zero_()
        assert module.weight.any()


@pytest.mark.parametrize("name", [name + form for name in FUNCTIONS for form in ("", "_")])
def test_functions_can_be_pickled(name: str) -> None:
    function = getattr(normkit, name)
    assert pickle.loads(pickle.dumps(function)) is function
    assert copy.deepcopy(function) is function
    part = functools.partial(function, weight_offset=1.0)
    loaded = pickle.loads(pickle.dumps(part))
    assert (loaded.func, loaded.keywords) == (function, {"weight_offset": 1.0})
    given = tensors(name.rstrip("_"))
    expected = listed(part(*(t.clone() for t in given)))
    assert_equal_bits(listed(loaded(*(t.clone() for t in given))), expected)


# ------------------------------------------------------------------------------------ state dicts

TWINS: list[tuple[Callable[..., nn.Module], Callable[..., nn.Module]]] = [
    (RMSNorm, nn.RMSNorm),
    (LayerNorm, nn.LayerNorm),
    (functools.partial(LayerNorm, bias=False), functools.partial(nn.LayerNorm, bias=False)),
]


@pytest.mark.parametrize(("ours", "torchs"), TWINS)
@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_of_models_go_both_ways(ours: Any, torchs: Any, assign: bool) -> None:
    def model(norm: Any) -> nn.Module:
        return randomised(nn.Sequential(nn.Linear(8, 8), norm(8), nn.Sequential(norm((2, 4)))))

    for source, target in ((model(ours), model(torchs)), (model(torchs), model(ours))):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        missing = target.load_state_dict(torch.load(file), strict=True, assign=assign)
        assert not missing.missing_keys
        assert not missing.unexpected_keys
        assert_equal_bits(list(target.state_dict().values()), list(source.state_dict().values()))


@pytest.mark.parametrize("kind", MODULES)
def test_modules_made_without_memory_get_it_later(kind: str) -> None:
    stored, x = randomised(MODULES[kind](8)), torch.randn(2, 3, 8)
    with torch.device("meta"):
        assigned, filled = MODULES[kind](8), MODULES[kind](8)
    assigned.load_state_dict(stored.state_dict(), assign=True)
    filled.to_empty(device="cpu").load_state_dict(stored.state_dict())
    for module in (assigned, filled):
        assert all(not p.is_meta and p.requires_grad for p in module.parameters())
        assert_equal_bits(trained(module, x), trained(stored, x))
    other = MODULES[kind](8, device="meta").to_empty(device="cpu")
    other.reset_parameters()
    assert_equal_bits(other(x), MODULES[kind](8)(x))


def test_modules_save_the_weights_that_an_optimiser_trained() -> None:
    model = nn.Sequential(nn.Linear(8, 8), LayerNorm(8), RMSNorm(8, bias=True))
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 8)
    losses = []
    for _ in range(20):
        optimiser.zero_grad()
        loss = (model(x) - x).pow(2).mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(not torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_modules_of_many_dtypes_train_as_plain_torch_does() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        ours, torchs = RMSNorm(8, dtype=dtype), nn.RMSNorm(8, eps=1e-6, dtype=dtype)
        x = torch.randn(4, 8, dtype=dtype)
        mine, theirs = trained(randomised(ours), x), trained(randomised(torchs), x)
        rest = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(mine, theirs, **rest)


def test_transformers_of_torch_take_our_norms() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    twin = copy.deepcopy(layer)
    for name in ("norm1", "norm2"):
        norm = LayerNorm(8)
        norm.load_state_dict(getattr(layer, name).state_dict())
        setattr(twin, name, norm)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(trained(twin, x), trained(layer, x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(twin.eval()(x), layer.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MODULES)
def test_hooks_of_modules_see_what_goes_in_and_out(kind: str) -> None:
    module, x = randomised(MODULES[kind](8)), torch.randn(2, 3, 8, requires_grad=True)
    seen: list[Any] = []
    module.register_forward_pre_hook(lambda m, args: seen.append(("pre", len(args))))
    module.register_full_backward_hook(lambda m, gi, go: seen.append(("backward", gi[0].shape)))
    module(x, x)[0].sum().backward()
    assert seen == [("pre", 2), ("backward", (2, 3, 8))]
