"""Under autocast the norms go by torch's rules for its own norms."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

import normkit
from conformance.support import DTYPES
from normkit._serving import serve
from torch_integration.support import (
    FUNCTIONS,
    MODULES,
    adds,
    assert_equal_bits,
    compiled,
    listed,
    loss_of,
    needs_cuda,
    randomised,
    results_and_gradients,
    tensors,
)

HALVES = (torch.float16, torch.bfloat16)
TORCHS = {"rms_norm": F.rms_norm, "layer_norm": F.layer_norm}


def mixes(name: str) -> Iterator[list[Tensor]]:
    for dtype, other in itertools.product(DTYPES, DTYPES):
        yield tensors(name, dtype=dtype, residual_dtype=other, weight_dtype=other, bias_dtype=other)


def torchs(name: str, given: list[Tensor]) -> Tensor:
    """What torch's norm returns; its rms norm has no bias."""
    x, weight, bias = given
    rest = [weight, bias, 1e-5] if name == "layer_norm" else [weight, 1e-6]
    made: Tensor = TORCHS[name](x, (x.shape[-1],), *rest)
    return made


def mixed_is_refused(name: str, given: list[Tensor]) -> bool:
    """Whether torch's layer norm has no kernel for these dtypes on the CPU."""
    return name == "layer_norm" and len({t.dtype for t in given}) > 1


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("low", HALVES)
@pytest.mark.parametrize("name", TORCHS)
def test_on_the_cpu_the_dtype_is_that_of_torchs_norms(name: str, low: torch.dtype) -> None:
    for given in mixes(name):
        if mixed_is_refused(name, given):
            continue
        with torch.autocast("cpu", low):
            y = getattr(normkit, name)(*given)
            assert y.dtype == torchs(name, given).dtype == given[0].dtype
        assert_equal_bits(y, getattr(normkit, name)(*given))


@pytest.mark.parametrize("low", HALVES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast_on_the_cpu_changes_no_bit(name: str, low: torch.dtype) -> None:
    given = tensors(name, dtype=torch.float32, weight_dtype=low)
    expected = results_and_gradients(getattr(normkit, name), given)
    with torch.autocast("cpu", low):
        got = results_and_gradients(getattr(normkit, name), given)
    for a, b in zip(got, expected, strict=True):
        assert_equal_bits(a, b)


@contextmanager
def fake_device(device: str) -> Iterator[Callable[[Tensor], Tensor]]:
    """Give what moves tensors to a device that is not there, on which autocast is enabled.

    Fake tensors go through the dispatcher as tensors of the device do, with autocast's own keys.
    """
    torch.set_autocast_enabled(device, True)
    try:
        with FakeTensorMode():
            yield lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
    finally:
        torch.set_autocast_enabled(device, False)


def under_autocast(layer: bool, dtype: torch.dtype) -> torch.dtype:
    """What y is on a device: float32, but where torch is 2.10 and has no such rule for rms_norm."""
    assert ("cuda", True) in serve.AUTOCAST_TO_FLOAT32
    has_rule = ("cuda", layer) in serve.AUTOCAST_TO_FLOAT32
    assert has_rule or torch.__version__ < "2.13"
    return torch.float32 if has_rule else dtype


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("device", ["cuda", "xpu"])
@pytest.mark.parametrize("name", TORCHS)
def test_on_other_devices_the_dtype_is_that_of_torchs_norms(name: str, device: str) -> None:
    for given in (*mixes(name), tensors(name, dtype=torch.float64)):
        with fake_device(device) as to:
            there = [to(t) for t in given]
            y = getattr(normkit, name)(*there)
            assert y.dtype == torchs(name, there).dtype
            if given[0].dtype != torch.float64:
                assert y.dtype == under_autocast("layer" in name, given[0].dtype)
            torch.set_autocast_enabled(device, False)
            assert getattr(normkit, name)(*there).dtype == given[0].dtype


@pytest.mark.parametrize("name", FUNCTIONS)
def test_sums_keep_the_dtype_of_the_residual_under_autocast(name: str) -> None:
    for given in mixes(name):
        with fake_device("cuda") as to:
            made = listed(getattr(normkit, name)(*(to(t) for t in given)))
        assert made[0].dtype == under_autocast("layer" in name, given[0].dtype)
        if adds(name):
            assert made[1].dtype == given[1].dtype


def test_who_asks_for_a_dtype_gets_it_under_autocast() -> None:
    with fake_device("cuda") as to:
        x, weight, _ = (to(t) for t in tensors("rms_norm", dtype=torch.bfloat16))
        assert normkit.rms_norm(x, weight, out_dtype=torch.float16).dtype == torch.float16
        out = torch.empty_like(x)
        assert normkit.rms_norm(x, weight, out=out) is out
        assert normkit.rms_norm_(x, weight).dtype == torch.bfloat16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), randomised(normkit.RMSNorm(8))

    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            y = self.linear(x)
            return self.norm(y, x)


def test_autocast_inside_a_compiled_function_is_that_of_eager() -> None:
    torch._dynamo.reset()
    block, given = Block(), tensors("rms_norm", (4, 8))[:1]
    eager = results_and_gradients(block, given)
    assert [t.dtype for t in eager[0]] == [torch.bfloat16, torch.float32]
    ours = results_and_gradients(compiled(block), given)
    for a, b in zip(ours, eager, strict=True):
        assert_equal_bits(a, b)


def test_autocast_around_a_compiled_function_is_that_of_eager() -> None:
    torch._dynamo.reset()
    norm = randomised(normkit.LayerNorm(8))
    model = nn.Sequential(nn.Linear(8, 8), norm)
    call, x = compiled(model), torch.randn(4, 8)
    for low in HALVES:
        with torch.autocast("cpu", low):
            assert_equal_bits(call(x), model(x))
            assert call(x).dtype == low


def test_the_backward_pass_is_run_outside_of_autocast() -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.rand(8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = normkit.rms_norm(x, weight)
    loss_of(y).backward()
    expected = results_and_gradients(normkit.rms_norm, [x.detach(), weight.detach()])[1]
    assert_equal_bits([x.grad, weight.grad], expected)


@needs_cuda
@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("low", HALVES)
@pytest.mark.parametrize("name", TORCHS)
def test_on_cuda_the_dtype_is_that_of_torchs_norms(name: str, low: torch.dtype) -> None:
    for given in mixes(name):
        on_device = [t.cuda() for t in given]
        with torch.autocast("cuda", low):
            y = getattr(normkit, name)(*on_device)
            assert y.dtype == torchs(name, on_device).dtype
        with torch.autocast("cuda", low), torch.inference_mode():
            assert getattr(normkit, name)(*on_device).dtype == y.dtype


@needs_cuda
@pytest.mark.gpu
@pytest.mark.parametrize("kind", MODULES)
def test_gradients_have_the_dtypes_of_their_tensors_under_autocast(kind: str) -> None:
    module = MODULES[kind](8).cuda()
    given = tensors("add_rms_norm", dtype=torch.bfloat16)[:2]
    x, residual = (t.cuda().requires_grad_() for t in given)
    with torch.autocast("cuda", torch.bfloat16):
        y, total = module(x, residual)
    assert y.dtype == under_autocast(kind != "RMSNorm", torch.bfloat16)
    assert total.dtype == torch.bfloat16
    loss_of([y, total]).backward()
    assert (x.grad.dtype, residual.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert {p.grad.dtype for p in module.parameters()} == {torch.float32}
