"""DTensors whose rows are split in columns: normalised where they are."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch without gloo", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import normkit
from conformance.support import (
    ADD_LAYER,
    ADD_RMS,
    BARE,
    LAYER,
    RMS,
    ROUNDINGS,
    Op,
    assert_same_bits,
)
from normkit.parallel import sharded_rms_norm
from normkit.testing import Inputs, assert_accurate, make_inputs
from parallel.processes import GATHER, counted, on_ranks
from starting import loaded

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
ROWS = (RMS, LAYER, ADD_RMS, ADD_LAYER)
EPS = {"rms": 1e-6, "layer": 1e-5}


def leaves_of(op: Op, inputs: Inputs) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in op.tensors(inputs) if t is not None]


def distributed(op: Op, inputs: Inputs, mesh: Any, x: Any, affine: Any) -> list[Any]:
    places = [x] * (1 + op.adds) + [affine] * 2
    leaves = zip(leaves_of(op, inputs), places, strict=True)
    return [distribute_tensor(t.detach(), mesh, place).requires_grad_() for t, place in leaves]


def outputs_of(op: Op, leaves: list[Any], **options: Any) -> tuple[Any, ...]:
    made = getattr(normkit, op.name)(*leaves, **op.selected, **options)
    return made if isinstance(made, tuple) else (made,)


def loss_of(outputs: tuple[Any, ...]) -> Any:
    return sum((t.float() * (1 + i)).tanh().sum() for i, t in enumerate(outputs))


def check(op: Op, inputs: Inputs, leaves: list[Any], tolerance: float, **options: Any) -> Any:
    """Check outputs against the bound, gradients against one process; return the outputs."""
    outputs = outputs_of(op, leaves, **options)
    named = {"eps": EPS[op.kind], **options}
    named.pop("out_dtype", None)
    if op.adds:
        named |= {"residual": inputs.residual, "residual_out": outputs[1].full_tensor()}
    assert_accurate(
        outputs[0].full_tensor(), inputs.x, inputs.weight, inputs.bias, kind=op.kind, **named
    )
    alone = leaves_of(op, inputs)
    expected = outputs_of(op, alone, **options)
    assert [t.dtype for t in outputs] == [t.dtype for t in expected]
    loss_of(expected).backward()
    loss_of(outputs).backward()
    for leaf, plain in zip(leaves, alone, strict=True):
        assert isinstance(leaf.grad, DTensor)
        grad = leaf.grad.full_tensor()
        assert grad.dtype == plain.dtype
        torch.testing.assert_close(grad, plain.grad, rtol=tolerance, atol=tolerance)
    return outputs


@on_ranks(2, 4)
def test_columns_stay_where_they_are(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for op, affine in itertools.product(ROWS, (Replicate(), Shard(0))):
        inputs = make_inputs((3, 5, 16 * world))
        leaves = distributed(op, inputs, mesh, [Shard(2)], [affine])
        with CommDebugMode() as moved, counted() as sent:
            outputs = outputs_of(op, leaves)
        assert moved.get_total_counts() == 0
        assert sent == GATHER
        assert [t.placements for t in outputs] == [(Shard(2),)] * len(outputs)
        with CommDebugMode() as moved:
            loss_of(tuple(t.to_local() for t in outputs)).backward()
        # The gradients of weight and bias, where those are whole.
        assert moved.get_total_counts() == (2 if affine == Replicate() else 0)
        for leaf in leaves:
            leaf.grad = None
        outputs = check(op, inputs, leaves, 1e-5)
        for t in outputs:
            assert t.shape == inputs.x.shape
            assert t.stride() == inputs.x.stride()
        for leaf in leaves[1 + op.adds :]:
            assert leaf.grad.placements == (affine,)


@on_ranks(2)
def test_any_mix_of_dtypes_and_options_is_that_of_one_process(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    options: list[dict[str, Any]] = [
        {"weight_offset": 1.0},
        *({flag: True} for flag in ROUNDINGS),
        {"out_dtype": SINGLE},
        {"clamp_inf": True},
    ]
    for op, given, x, other in itertools.product(ROWS, options, (HALF, BRAIN), (SINGLE, HALF)):
        inputs = make_inputs((6, 32 * world), x, weight_dtype=other, residual_dtype=other)
        sums = [{}, {"round_sum": False}] if op.adds else [{}]
        for more in sums:
            leaves = distributed(op, inputs, mesh, [Shard(1)], [Replicate()])
            check(op, inputs, leaves, 4e-2, **given, **more)


@on_ranks(2)
def test_infinities_of_a_sum_are_clamped_as_in_one_process(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    inputs = make_inputs((3, 8 * world), HALF)
    inputs.x[0, 1], inputs.residual[1, -1] = torch.inf, -torch.inf
    inputs.x[2, 2] = inputs.residual[2, 2] = 60000
    for op, round_sum in itertools.product((ADD_RMS, ADD_LAYER), (True, False)):
        leaves = distributed(op, inputs, mesh, [Shard(1)], [Replicate()])
        alone = leaves_of(op, inputs)
        options: dict[str, Any] = {"clamp_inf": True, "round_sum": round_sum}
        made, expected = (outputs_of(op, given, **options) for given in (leaves, alone))
        for got, wanted in zip(made, expected, strict=True):
            torch.testing.assert_close(got.full_tensor(), wanted, equal_nan=True)
        made[0].sum().backward()
        expected[0].sum().backward()
        for got, plain in zip(leaves, alone, strict=True):
            torch.testing.assert_close(
                got.grad.full_tensor(), plain.grad, rtol=1e-2, atol=1e-2, equal_nan=True
            )


@on_ranks(4)
def test_rows_may_be_split_over_another_dimension_of_the_mesh(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    inputs = make_inputs((4, 3, 32))
    for op, place in itertools.product(ROWS, ([Shard(0), Shard(2)], [Shard(2), Replicate()])):
        hidden = place.index(Shard(2))
        split = [Shard(0) if dim == hidden else Replicate() for dim in range(2)]
        for affine in ([Replicate(), Replicate()], split):
            leaves = distributed(op, inputs, mesh, place, affine)
            with counted() as sent:
                outputs_of(op, leaves)
            assert sent == GATHER
            check(op, inputs, leaves, 1e-5)


@on_ranks(2)
def test_a_residual_that_is_split_otherwise_comes_to_x(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    inputs = make_inputs((4, 16))
    leaves = distributed(ADD_RMS, inputs, mesh, [Shard(1)], [Replicate()])
    leaves[1] = distribute_tensor(inputs.residual, mesh, [Replicate()]).requires_grad_()
    outputs = check(ADD_RMS, inputs, leaves, 1e-5)
    assert [t.placements for t in outputs] == [(Shard(1),)] * 2


@on_ranks(2)
def test_columns_that_are_still_on_their_way_are_waited_for(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(2))
    halves = DTensor.from_local(x / world, mesh, [Partial()])
    expected = normkit.rms_norm(distribute_tensor(x, mesh, [Shard(1)])).full_tensor()
    columns = halves.redistribute(placements=[Shard(1)], async_op=True)
    assert type(columns._local_tensor) is not Tensor
    served = "cpu" if normkit.backends()["cpu"].usable else "auto"
    with normkit.use_backend(served), counted() as sent:
        y = normkit.rms_norm(columns)
    assert sent == GATHER
    assert_same_bits(y.full_tensor(), expected)
    leaf = halves.detach().requires_grad_()
    y = normkit.rms_norm(leaf.redistribute(placements=[Shard(1)], async_op=True))
    y.redistribute(placements=[Replicate()], async_op=True).square().sum().backward()
    plain = x.requires_grad_()
    normkit.rms_norm(plain).square().sum().backward()
    torch.testing.assert_close(leaf.grad.full_tensor(), plain.grad)


@on_ranks(2)
def test_modules_take_columns(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    x = distribute_tensor(torch.randn(3, 16), mesh, [Shard(1)])
    for norm in (normkit.RMSNorm(16), normkit.LayerNorm(16, elementwise_affine=False)):
        expected = norm(x.full_tensor())
        if norm.weight is not None:
            norm.weight = torch.nn.Parameter(distribute_tensor(norm.weight, mesh, [Shard(0)]))
        with counted() as sent:
            y = norm(x)
        assert sent == GATHER
        torch.testing.assert_close(y.full_tensor(), expected)


@on_ranks(2)
def test_columns_that_cannot_be_split_evenly_are_redistributed(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for op, n in itertools.product(ROWS, (15, 1)):
        inputs = make_inputs((4, n))
        leaves = distributed(op, inputs, mesh, [Shard(1)], [Replicate()])
        with counted() as sent:
            check(op, inputs, leaves, 1e-5)
        assert sent == []


@on_ranks(2)
def test_what_parts_cannot_say_is_redistributed(rank: int, world: int) -> None:
    """Heads split inside, weights split otherwise, a sum that has no dtype to round xhat to."""
    mesh = init_device_mesh("cpu", (world,))
    for op in BARE:
        inputs = make_inputs((4, 2, 16), per_head=op.per_head)
        leaves = distributed(op, inputs, mesh, [Shard(2)], [Replicate()])
        if op.per_head:
            check(op, inputs, leaves, 1e-5, eps=1e-6)
        outputs = outputs_of(op, [t.detach() for t in leaves])
        alone = outputs_of(op, leaves_of(op, inputs))
        for t, whole in zip(outputs, alone, strict=True):
            torch.testing.assert_close(t.full_tensor(), whole.detach())
    inputs = make_inputs((4, 16), BRAIN, residual_dtype=SINGLE)
    for rounding in ROUNDINGS:
        leaves = distributed(ADD_RMS, inputs, mesh, [Shard(1)], [Replicate()])
        check(ADD_RMS, inputs, leaves, 4e-2, round_sum=False, **{rounding: True})


@on_ranks(2)
def test_in_place_forms_write_columns(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    x, residual, weight, bias = make_inputs((4, 16))
    for name in ("rms_norm_", "add_rms_norm_"):
        given = [x, residual] if name.startswith("add") else [x]
        inside = [distribute_tensor(t.clone(), mesh, [Shard(1)]) for t in given]
        affine = [distribute_tensor(t, mesh, [Replicate()]) for t in (weight, bias)]
        getattr(normkit, name)(*inside, *affine)
        expected = getattr(normkit, name.rstrip("_"))(*given, weight, bias)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for t, whole in zip(inside, expected, strict=True):
            torch.testing.assert_close(t.full_tensor(), whole)


@on_ranks(2)
def test_a_backend_asked_for_by_name_serves_the_parts(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    x = distribute_tensor(torch.randn(4, 16), mesh, [Shard(1)])
    expected = normkit.rms_norm(x).full_tensor()
    if normkit.backends()["cpu"].usable:
        with normkit.use_backend("cpu"):
            assert_same_bits(normkit.rms_norm(x).full_tensor(), expected)
    with normkit.use_backend("cuda"), pytest.raises(ValueError, match="cannot serve this rms_norm"):
        normkit.rms_norm(x)


@on_ranks(2)
def test_a_gradient_of_columns_is_not_differentiated_again(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    x = distribute_tensor(torch.randn(4, 16), mesh, [Shard(1)]).requires_grad_()
    with pytest.raises(RuntimeError, match="rms_norm: its gradient cannot be differentiated again"):
        torch.autograd.grad(normkit.rms_norm(x).to_local().sum(), x, create_graph=True)


@on_ranks(2)
def test_explain_speaks_of_the_columns_of_this_rank(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    inputs = make_inputs((4, 16))
    for op in ROWS:
        leaves = distributed(op, inputs, mesh, [Shard(1)], [Replicate()])
        parts = [t.to_local() for t in leaves[: 1 + op.adds]]
        affine = [t.to_local().chunk(world)[rank] for t in leaves[1 + op.adds :]]
        with counted() as sent:
            said = normkit.explain(getattr(normkit, op.name), *leaves)
        alone = RMS if op.kind == "rms" else LAYER
        expected = normkit.explain(getattr(normkit, alone.name), parts[0].detach(), *affine)
        assert sent == []
        assert said.backend == expected.backend
        if normkit.backends()["cpu"].usable:
            assert said.backend == "cpu"


@on_ranks(2)
def test_compiled_calls_give_the_norm(rank: int, world: int) -> None:
    """There, columns are redistributed."""
    mesh = init_device_mesh("cpu", (world,))
    inputs = make_inputs((4, 16))
    x, weight = (distribute_tensor(t, mesh, [Shard(t.ndim - 1)]) for t in (inputs.x, inputs.weight))
    compiled = torch.compile(lambda *given: normkit.rms_norm(*given) * 2, backend="aot_eager")
    expected = normkit.rms_norm(inputs.x, inputs.weight) * 2
    torch.testing.assert_close(compiled(x, weight).full_tensor(), expected)
    torch.compiler.reset()


@on_ranks(2)
def test_plain_parts_and_distributed_tensors_are_not_mixed_up(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    x = distribute_tensor(torch.ones(4, 16), mesh, [Shard(1)])
    with pytest.raises(TypeError, match="x: expected the plain tensor of this rank, got a DTensor"):
        sharded_rms_norm(x)


def test_importing_normkit_loads_nothing_of_this() -> None:
    late = ("torch.distributed.tensor", "normkit.parallel")
    assert {m for m in loaded()[0] if m.startswith(late)} == set()
