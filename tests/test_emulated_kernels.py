"""What the CUDA kernels promise beyond the conformance suite: the same bits from every plan."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import normkit
from conformance.support import DTYPES, OPS, Op, assert_same_bits, inputs_for, run
from emulation import emulate_device

if "emu" not in os.environ.get("NORMKIT_TEST_BACKENDS", "emu"):
    pytest.skip("NORMKIT_TEST_BACKENDS leaves out emu", allow_module_level=True)

SIZES = (8, 100, 128, 256, 512, 1000, 2048, 4096, 5120, 8192, 16384)
LONG = (16392, 32768, 65544, 131072, 131080)


@pytest.fixture(autouse=True)
def the_usual_device_afterwards(emu: Any) -> Iterator[None]:
    yield
    emulate_device()


def plan_of(op: str, *tensors: Any, **options: Any) -> str:
    with normkit.use_backend("emu"):
        return normkit.explain(op, *tensors, **options).plan


def unaligned(t: Tensor) -> Tensor:
    """The same values, one element off an aligned address."""
    memory = torch.empty(t.numel() + 1, dtype=t.dtype)
    return memory[1:].view(t.shape).copy_(t)


@pytest.mark.parametrize("n", SIZES + LONG)
@pytest.mark.parametrize("op", OPS, ids=str)
def test_bits_do_not_depend_on_rows_alignment_or_processors(emu: Any, op: Op, n: int) -> None:
    rows = 40 if n <= 1000 else 3
    inputs = inputs_for(op, (rows, 2), n, torch.bfloat16)
    emulate_device(1)
    expected = run(emu, op, inputs, out_dtype=torch.float32)
    plans = {plan_of(op.name, *op.tensors(inputs), **op.selected)}
    for processors in (4, 200):
        emulate_device(processors)
        got = run(emu, op, inputs, out_dtype=torch.float32)
        assert_same_bits(got.y, expected.y)
        plans.add(plan_of(op.name, *op.tensors(inputs), **op.selected))
    narrow = inputs._replace(x=unaligned(inputs.x))
    assert_same_bits(run(emu, op, narrow, out_dtype=torch.float32).y, expected.y)
    uniform = run(emu, op, inputs)
    assert_same_bits(run(emu, op, narrow).y, uniform.y)
    assert_same_bits(uniform.y, expected.y.bfloat16())
    alone = inputs._replace(x=inputs.x[-1:], residual=inputs.residual[-1:])
    assert_same_bits(run(emu, op, alone).y, uniform.y[-1:])
    if n == 4096 and not op.fused:  # which have one kernel
        assert len(plans) > 1, "few and many rows are to be met"


@pytest.mark.parametrize("n", SIZES + LONG)
def test_bits_do_not_depend_on_the_dtype_that_holds_a_value(emu: Any, n: int) -> None:
    x = inputs_for(OPS[0], 3, n, torch.bfloat16).x
    for op in ("rms_norm", "layer_norm"):
        narrow = emu(op, x, out_dtype=torch.float32)
        assert_same_bits(emu(op, x.float()), narrow)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_clusters_where_rows_fit_without(
    emu: Any, n: int, dtype: torch.dtype
) -> None:
    x = inputs_for(OPS[0], 2, n, dtype).x
    for op in ("rms_norm", "layer_norm"):
        emulate_device(clusters=True)
        expected = emu(op, x)
        emulate_device(clusters=False)
        assert_same_bits(emu(op, x), expected)


def test_clusters_and_streaming_begin_where_the_docs_say(emu: Any) -> None:
    def plan(n: int, dtype: torch.dtype = torch.bfloat16) -> str:
        return plan_of("rms_norm", torch.ones(1, dtype=dtype).expand(1, n).contiguous())

    assert "clusters" not in plan(16384)
    assert "clusters of 2" in plan(16392)
    assert "clusters of 2" in plan(8200, torch.float32)
    assert "clusters of 8" in plan(131072)
    assert "read again" in plan(131080)
    emulate_device(clusters=False)
    assert "registers" in plan(16384)
    assert "read again" in plan(16392)
