"""Offsets beyond 2^31 and 2^32 elements."""

from __future__ import annotations

import pytest
import torch
from gpu_support import EVERY, call, inputs_on, tensors_of

import normkit
from conformance.support import BARE, RMS, Inputs, Op

BF16 = torch.bfloat16
CHUNK = 1 << 28


def _random(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=BF16, device="cuda").normal_(0.5, 1.5)


@pytest.mark.parametrize("n", [64, 4096, 65536])
@pytest.mark.parametrize("exponent", [31, 32])
def test_rows_beyond_2_to_the(exponent: int, n: int, needs_memory) -> None:
    """Each row has the bits that it has alone; rows are as many as go past the limit by five."""
    rows = (1 << exponent) // n + 5
    needs_memory(2 * (2 * rows * n) + 4 * CHUNK)
    x, weight = _random(rows, n), _random(n)
    y = torch.full_like(x, float("nan"))
    with normkit.use_backend("cuda"):
        normkit.rms_norm(x, weight, out=y)
        step = CHUNK // n
        for first in range(0, rows, step):
            part = slice(first, min(first + step, rows))
            assert torch.equal(y[part], normkit.rms_norm(x[part], weight)), f"rows {part}"


def test_a_fused_add_beyond_2_to_the_32(needs_memory) -> None:
    n = 8192
    rows = (1 << 32) // n + 3
    needs_memory(2 * (2 * rows * n) + 8 * CHUNK)
    x, residual, weight = _random(rows, n), _random(rows, n), _random(n)
    places = [slice(0, 4), slice((1 << 31) // n - 2, (1 << 31) // n + 3), slice(rows - 4, rows)]
    before = [(x[p].clone(), residual[p].clone()) for p in places]
    with normkit.use_backend("cuda"):
        normkit.add_rms_norm_(x, residual, weight)
        for place, (old_x, old_residual) in zip(places, before, strict=True):
            y, total = normkit.add_rms_norm(old_x, old_residual, weight)
            assert torch.equal(x[place], y)
            assert torch.equal(residual[place], total)


@pytest.mark.parametrize("op", [op for op in EVERY if op not in BARE], ids=str)
def test_whatever_stands_around_a_norm_beyond_2_to_the_31(op: Op, needs_memory) -> None:
    """The last rows have the bits that they have alone."""
    n = 4096
    rows = (1 << 31) // n + 3
    shape = (rows // 4 + 1, 4, n) if op.per_head else (rows, n)
    needs_memory(5 * 2 * (rows + 4) * n + 2 * CHUNK)  # x, residual, z, and two results
    few = inputs_on(op, 3, n)
    whole = few._replace(**{name: _random(*shape) for name in ("x", "residual")})
    if op.gated:
        whole = whole._replace(z=_random(*shape))
    result = call(op, whole)
    last = {
        name: t[-3:] for name, t in whole._asdict().items() if t is not None and t.shape == shape
    }
    expected = call(op, whole._replace(**last))
    for got, want in zip(tensors_of(result), tensors_of(expected), strict=True):
        assert torch.equal(got[-3:], want)


def test_strides_beyond_2_to_the_32(needs_memory) -> None:
    """Few rows, far apart: it is the offset that is long, not the work."""
    stride, n = (1 << 31) + 24, 4096
    needs_memory(2 * (2 * stride + n))
    memory = torch.zeros(2 * stride + n, dtype=BF16, device="cuda")
    x = memory.as_strided((3, n), (stride, 1))
    x.copy_(_random(3, n))
    weight = _random(n)
    with normkit.use_backend("cuda"):
        expected = normkit.rms_norm(x.contiguous(), weight)
        assert torch.equal(normkit.rms_norm(x, weight), expected)
        normkit.rms_norm_(x, weight)
    assert torch.equal(x, expected)


def test_one_row_beyond_2_to_the_31(needs_memory) -> None:
    """Against the statistic in float64, summed in parts."""
    n = (1 << 31) + 8
    needs_memory(2 * 2 * n + 40 * CHUNK)
    x = _random(1, n)
    y = call(RMS, Inputs(x, x, None, None)).y
    squares = sum(part.double().square().sum().item() for part in x.split(CHUNK, dim=1))
    rstd = (squares / n + 1e-6) ** -0.5
    for got, part in zip(y.split(CHUNK, dim=1), x.split(CHUNK, dim=1), strict=True):
        expected = part.float() * rstd
        assert ((got.float() - expected).abs() <= 2**-8 * expected.abs()).all()


def test_more_rows_than_a_grid_has_blocks_in_y_or_z() -> None:
    """2^26 + 1 rows of 8: far beyond 65535 blocks, and no multiple of anything."""
    rows, n = (1 << 26) + 1, 8
    x, weight = _random(rows, n), _random(n)
    with normkit.use_backend("cuda"):
        y = normkit.rms_norm(x, weight)
        for part in (slice(0, 100), slice(rows // 2, rows // 2 + 100), slice(rows - 100, rows)):
            assert torch.equal(y[part], normkit.rms_norm(x[part], weight))
