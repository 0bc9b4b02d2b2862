"""Channels-first norms of images, converted: no copy, the same values, in the same layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import normkit
from norm_models import BF16, F16, F32, calls, converted, near
from normkit.conversion import _plan

LAST = torch.channels_last


class PermutedNorm(nn.LayerNorm):
    """As LayerNorm2d of timm, and those of ConvNeXt and SAM."""

    def forward(self, x):
        x = nn.functional.layer_norm(
            x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps
        )
        return x.permute(0, 3, 1, 2)


class MeanNorm(nn.Module):
    """Of the mean and variance of dimension 1, in float32."""

    def __init__(self, n: int, *, layer: bool = True) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(n)), nn.Parameter(torch.zeros(n))
        self.eps, self.layer = 1e-6, layer

    def forward(self, x):
        y = x.float()
        if self.layer:
            y = y - y.mean(1, keepdim=True)
        y = y * torch.rsqrt(y.square().mean(1, keepdim=True) + self.eps)
        y = y * self.weight.float()[:, None, None] + self.bias.float()[:, None, None]
        return y.to(x.dtype)


class JointNorm(MeanNorm):
    """Of channels and height together: the same where the height is 1."""

    def forward(self, x):
        y = x - x.mean((1, 2), keepdim=True)
        y = y * torch.rsqrt(y.square().mean((1, 2), keepdim=True) + self.eps)
        return y * self.weight[:, None, None] + self.bias[:, None, None]


NORMS = {
    "permuted": lambda: PermutedNorm(48, eps=1e-6),
    "without a weight": lambda: PermutedNorm(48, elementwise_affine=False),
    "layer by means": lambda: MeanNorm(48),
    "rms by means": lambda: MeanNorm(48, layer=False),
}
every_norm = pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
every_dtype = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)


def norm_of(make, dtype=F32):
    m = make().to(dtype)
    with torch.no_grad():
        for p in m.parameters():
            p.copy_(torch.randn(p.shape) * 0.3 + 1)
    return m


def image(dtype=F32) -> Tensor:
    return (torch.randn(2, 48, 5, 7) + 0.5).to(dtype)


@every_norm
@every_dtype
def test_values_and_layout_are_those_of_the_module(make, dtype):
    m, x = norm_of(make, dtype), image(dtype)
    for given in (x, x.contiguous(memory_format=LAST)):
        expected = m(given)
        report = normkit.convert(m)
        (entry,) = report.converted
        assert entry.channels_first
        assert entry.summary().endswith("channels first")
        assert calls(m, given) == 1
        with torch.no_grad():
            assert calls(m, given) == 1
            made = m(given)
        for y in (made, m(given)):
            assert near(y, expected)
            assert y.stride() == expected.stride()
        report.revert()
        assert torch.equal(m(given), expected)


@every_norm
def test_nothing_is_copied(make, monkeypatch):
    m, x = converted(norm_of(make)), image()
    told = []
    quick = _plan.quick

    def watched(*call):
        told.append((call[1], call[13], made := quick(*call)))
        return made

    monkeypatch.setattr(_plan, "quick", watched)
    with torch.no_grad():
        y = m(x)
    ((rows, out, made),) = told
    assert rows.data_ptr() == x.data_ptr()
    assert made.data_ptr() == y.data_ptr()
    assert (out is not None) == y.is_contiguous()


@every_norm
def test_gradients_are_those_of_the_module(make):
    m, x = norm_of(make), image()
    given, of_y = [x.requires_grad_(), *m.parameters()], image()
    expected = torch.autograd.grad(m(x), given, of_y)
    converted(m)
    assert calls(m, x) == 1
    made = torch.autograd.grad(m(x), given, of_y)
    for got, e in zip(made, expected, strict=True):
        assert (got - e).abs().max() <= 2e-5 * e.abs().max()


def test_other_images_run_as_before():
    m, x = norm_of(NORMS["layer by means"]), image()
    part = torch.cat([x, x], 1)[:, :48]  # of which y lies in neither layout
    given = (part, x[0], x[:, :, None])  # the others are no images
    expected = [m(t) for t in given]
    converted(m)
    for t, e in zip(given, expected, strict=True):
        assert calls(m, t) == 0
        assert torch.equal(m(t), e)
        assert m(t).stride() == e.stride()
    permuted = converted(norm_of(NORMS["permuted"]))
    assert calls(permuted, part) == 1
    with pytest.raises(RuntimeError):
        permuted(x[0])
    with pytest.raises(RuntimeError):
        permuted(x[:, :40])


def test_a_convolution_behind_it_gets_the_layout_that_it_got():
    m = nn.Sequential(nn.Conv2d(3, 48, 3), norm_of(NORMS["permuted"]), nn.Conv2d(48, 8, 3))
    seen = []
    m[2].register_forward_pre_hook(lambda _, given: seen.append(given[0].stride()))
    x = torch.randn(2, 3, 9, 9)
    expected = m(x)
    converted(m)
    assert near(m(x), expected)
    assert seen[0] == seen[1]


def test_a_norm_of_channels_and_height_is_none():
    m = norm_of(lambda: JointNorm(48))
    report = normkit.convert(m)
    assert report.converted == []
    assert report.left[0].reason
