"""Rows whose columns are split over ranks: what each rank gets is its part of the norm."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch without gloo", allow_module_level=True)

import emulation
import normkit
from conformance.gradients import Case, Gradients, case_of
from conformance.gradients import check as check_gradients
from conformance.support import LAYER, RMS, ROUNDINGS, Op, assert_same_bits
from normkit import testing
from normkit._spec import PLAIN_OPTIONS
from normkit.parallel import sharded_layer_norm, sharded_rms_norm
from normkit.testing import Inputs
from parallel.processes import GATHER, counted, on_ranks, part_of, whole

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
FUNCTIONS: dict[Op, Callable[..., Tensor]] = {RMS: sharded_rms_norm, LAYER: sharded_layer_norm}
EPS = {RMS: 1e-6, LAYER: 1e-5}


def backends() -> list[str]:
    """Those of the environment that serve tensors of the CPU."""
    names = os.environ.get("NORMKIT_TEST_BACKENDS", "reference,cpu,auto,emu").split(",")
    if "emu" in names and emulation.extension() is None:
        raise RuntimeError(f"{emulation.BUILD} has no emulated kernels; `make emu` builds them")
    return [name for name in names if name in ("reference", "cpu", "auto", "emu")]


def run_parts(op: Op, inputs: Inputs, rank: int, world: int, **options: Any) -> list[Any]:
    """The part of this rank of y, and the leaves that made it."""
    leaves = [part_of(t, rank, world) for t in (inputs.x, inputs.weight, inputs.bias)]
    leaves = [None if t is None else t.detach().requires_grad_() for t in leaves]
    return [FUNCTIONS[op](*leaves, **options), *leaves]


def check_whole(op: Op, case: Case, rank: int, world: int) -> None:
    """Check forward and backward pass, put together from all ranks, against float64."""
    y, x, weight, bias = run_parts(op, case.inputs, rank, world, **case.options)
    assert y.dtype == (case.options.get("out_dtype") or case.inputs.x.dtype)
    options = {"eps": EPS[op], **case.options}
    options.pop("out_dtype", None)
    testing.assert_accurate(
        whole(y), case.inputs.x, case.inputs.weight, case.inputs.bias, kind=op.kind, **options
    )
    y.backward(part_of(case.grad_y.to(y.dtype), rank, world))
    made = [None if t is None else whole(t.grad) for t in (x, weight, bias)]
    check_gradients(case, Gradients(made[0], None, *made[1:]))


@on_ranks(2, 4)
def test_parts_of_all_ranks_are_the_norm_within_its_bound(rank: int, world: int) -> None:
    shapes = [(3,), (), (2, 5), (0,)]
    sizes = [1, 3, 64, 1000]
    for op, n, shape in itertools.product(FUNCTIONS, sizes, shapes):
        inputs = testing.make_inputs((*shape, n * world), SINGLE, seed=n)
        check_whole(op, case_of(op, inputs), rank, world)


@on_ranks(2, 4)
def test_any_mix_of_dtypes_and_options_is_within_the_bound(rank: int, world: int) -> None:
    options: list[dict[str, Any]] = [
        {},
        {"weight_offset": 1.0, "eps": 0.3},
        *({flag: True} for flag in ROUNDINGS),
        {"out_dtype": SINGLE, "eps": None},
        {"clamp_inf": True},
    ]
    mixes = [(HALF, SINGLE, BRAIN), (BRAIN, BRAIN, BRAIN), (SINGLE, HALF, SINGLE)]
    for op, given, (x, w, b), backend in itertools.product(FUNCTIONS, options, mixes, backends()):
        inputs = testing.make_inputs((5, 40 * world), x, weight_dtype=w, bias_dtype=b)
        eps = given.get("eps", EPS[op])
        # The oracle's None is float64's.
        eps = torch.finfo(SINGLE).eps if eps is None else eps
        if given.get("eps", 0.0) is None:
            y, *_ = run_parts(op, inputs, rank, world, **given)
            again, *_ = run_parts(op, inputs, rank, world, **{**given, "eps": eps})
            assert_same_bits(y, again)
        with normkit.use_backend(backend):
            check_whole(op, case_of(op, inputs, **{**given, "eps": eps}), rank, world)


@on_ranks(2)
def test_weight_and_bias_may_each_be_missing(rank: int, world: int) -> None:
    for op, has_weight, has_bias in itertools.product(FUNCTIONS, (True, False), (True, False)):
        inputs = testing.make_inputs((4, 32 * world))
        inputs = inputs._replace(
            weight=inputs.weight if has_weight else None, bias=inputs.bias if has_bias else None
        )
        check_whole(op, case_of(op, inputs), rank, world)


@on_ranks(2)
def test_float64_is_served_in_float64(rank: int, world: int) -> None:
    x = testing.make_inputs((6, 10 * world), torch.float64).x
    for op, function in FUNCTIONS.items():
        y = function(part_of(x, rank, world), eps=0.1)
        expected = getattr(normkit, op.name)(x, eps=0.1)
        torch.testing.assert_close(whole(y), expected, rtol=1e-13, atol=1e-13)


@on_ranks(2, 4)
def test_a_mean_far_above_the_deviation_loses_no_digits(rank: int, world: int) -> None:
    """E[x^2] - E[x]^2 in float32 would have none left of the variance."""
    x = 1000 + torch.randn(8, 256 * world, generator=torch.Generator().manual_seed(4))
    x[:, : 128 * world] -= 0.5  # so the means of the parts are not all the same
    inputs = testing.make_inputs(tuple(x.shape))._replace(x=x)
    check_whole(LAYER, case_of(LAYER, inputs), rank, world)


@on_ranks(2, 4)
def test_a_norm_across_heads_spans_the_heads_of_all_ranks(rank: int, world: int) -> None:
    for op, function in FUNCTIONS.items():
        x, _, weight, bias = testing.make_inputs((2, 5, 2 * world, 8), BRAIN, per_head=True)
        parts = [part_of(t, rank, world, -2).detach().requires_grad_() for t in (x, weight, bias)]
        y = function(*parts)
        assert y.shape == parts[0].shape
        testing.assert_accurate(
            whole(y, -2).flatten(-2),
            x.flatten(-2),
            weight.flatten(),
            bias.flatten(),
            eps=EPS[op],
            kind=op.kind,
        )
        y.float().square().sum().backward()
        flat = [t.flatten(-2).detach().requires_grad_() for t in (x, weight, bias)]
        getattr(normkit, op.name)(*flat).float().square().sum().backward()
        for part, expected in zip(parts, flat, strict=True):
            grad = whole(part.grad, -2).flatten(-2)
            torch.testing.assert_close(grad, expected.grad, rtol=2e-2, atol=2e-2)


@on_ranks(2)
def test_one_weight_of_two_dimensions_makes_rows_of_all_heads(rank: int, world: int) -> None:
    x, _, weight, _ = testing.make_inputs((5, 2 * world, 8), per_head=True)
    shared = torch.linspace(-1, 1, 8)
    y = sharded_rms_norm(part_of(x, rank, world, -2), part_of(weight, rank, world, 0), shared)
    bias = shared.expand(2 * world, 8).flatten()
    testing.assert_accurate(
        whole(y, -2).flatten(-2), x.flatten(-2), weight.flatten(), bias, kind="rms"
    )


@on_ranks(2)
def test_norms_of_single_heads_need_nothing_from_other_ranks(rank: int, world: int) -> None:
    x, _, weight, bias = testing.make_inputs((3, 2 * world, 16), per_head=True)
    with counted() as made:
        part = normkit.head_norm(
            part_of(x, rank, world, -2),
            part_of(weight, rank, world, 0),
            part_of(bias, rank, world, 0),
        )
    assert made == []
    assert_same_bits(whole(part, -2), normkit.head_norm(x, weight, bias))


@on_ranks(2)
def test_strides_do_not_change_the_result(rank: int, world: int) -> None:
    packed = testing.make_inputs((6, 3, 48 * world)).x
    sliced = part_of(packed[:, 1], rank, world)
    laid_out = {
        "sliced": sliced,
        "transposed": sliced.t().contiguous().t(),
        "expanded": sliced[:1].expand(6, -1),
        "negated": torch._neg_view(-sliced),
    }
    assert not sliced.is_contiguous()
    for op, (name, x) in itertools.product(FUNCTIONS, laid_out.items()):
        plain, leaf = (t.detach().requires_grad_() for t in (x.clone().contiguous(), x))
        y, expected = FUNCTIONS[op](leaf), FUNCTIONS[op](plain)
        assert torch.equal(y, expected), name
        y.sum().backward()
        expected.sum().backward()
        assert torch.equal(leaf.grad, plain.grad), name


@on_ranks(2, 4)
def test_all_ranks_get_the_same_statistics_bit_for_bit(rank: int, world: int) -> None:
    inputs = testing.make_inputs((4096, 24 * world))
    inputs.x[:, ::24] = 1.0  # the first column of each part
    for function in FUNCTIONS.values():
        x = part_of(inputs.x, rank, world).clone().requires_grad_()
        y = function(x)
        seen = whole(y[:, :1])
        assert_same_bits(seen, seen[:, :1].expand(-1, world).contiguous())
        # With a constant gradient, that of this column differs by the gathered means only.
        (y * 1.5).sum().backward()
        seen = whole(x.grad[:, :1])
        assert_same_bits(seen, seen[:, :1].expand(-1, world).contiguous())


@on_ranks(4)
def test_a_row_does_not_depend_on_the_number_of_rows(rank: int, world: int) -> None:
    """Neither on its place, nor on whether its statistics went in a first or a second message."""
    _, *affine = testing.make_inputs((1, 24 * world))[1:]
    affine = [part_of(t, rank, world) for t in affine]
    many = part_of(testing.make_inputs((9000, 24 * world)).x, rank, world)
    for function in FUNCTIONS.values():

        def both(x: Tensor, function: Callable[..., Tensor] = function) -> tuple[Tensor, Tensor]:
            x = x.detach().requires_grad_()
            y = function(x, *affine)
            y.backward(x.detach() - 0.25)
            return y.detach(), x.grad

        y, grad = both(many)
        for rows in (slice(0, 1), slice(8999, 9000), slice(2030, 2050), slice(4070, 4099)):
            some, some_grad = both(many[rows])
            assert_same_bits(some, y[rows])
            assert_same_bits(some_grad, grad[rows])


@on_ranks(4)
def test_two_runs_give_the_same_bits(rank: int, world: int) -> None:
    case = case_of(LAYER, testing.make_inputs((700, 40 * world), HALF))
    runs = []
    for _ in range(2):
        y, *leaves = run_parts(LAYER, case.inputs, rank, world)
        y.backward(part_of(case.grad_y, rank, world))
        runs.append([y.detach(), *(t.grad for t in leaves)])
    for first, second in zip(*runs, strict=True):
        assert_same_bits(first, second)


@on_ranks(2, 4)
def test_a_nan_stays_in_its_row_and_shows_on_every_rank(rank: int, world: int) -> None:
    inputs = testing.make_inputs((4, 8 * world))
    inputs.x[1, 3] = torch.nan  # on the first rank
    for function in FUNCTIONS.values():
        y = function(part_of(inputs.x, rank, world))
        assert y[1].isnan().all()
        assert y[[0, 2, 3]].isfinite().all()


@on_ranks(2)
def test_infinities_are_clamped_where_asked(rank: int, world: int) -> None:
    inputs = testing.make_inputs((3, 8 * world), HALF)
    inputs.x[1, 3], inputs.x[2, -1] = torch.inf, -torch.inf
    for op in FUNCTIONS:
        options = {"clamp_inf": True, "eps": EPS[op]}
        y, x, *_ = run_parts(op, inputs, rank, world, **options)
        testing.assert_accurate(
            whole(y), inputs.x, inputs.weight, inputs.bias, kind=op.kind, **options
        )
        y.backward(torch.ones_like(y))
        grad = whole(x.grad)
        assert grad[1, 3] == 0
        assert grad[2, -1] == 0
        assert grad.isfinite().all()


@on_ranks(2, 4)
def test_each_pass_sends_one_message(rank: int, world: int) -> None:
    for function in FUNCTIONS.values():
        x = torch.randn(64, 16, requires_grad=True)
        weight = torch.ones(16, requires_grad=True)
        with counted() as forward:
            y = function(x, weight)
        with counted() as backward:
            y.sum().backward()
        assert forward == backward == GATHER


@on_ranks(2)
def test_many_rows_take_a_second_message(rank: int, world: int) -> None:
    with counted() as made:
        sharded_rms_norm(torch.ones(5000, 2))
    assert made == GATHER * 2


@on_ranks(2)
def test_whether_a_gradient_is_wanted_may_differ_between_ranks(rank: int, world: int) -> None:
    inputs = testing.make_inputs((4, 8 * world))
    x, weight = (part_of(t, rank, world).clone() for t in (inputs.x, inputs.weight))
    x.requires_grad_(rank == 0)
    weight.requires_grad_(rank == 1)
    sharded_rms_norm(x, weight).square().sum().backward()
    leaves = [inputs.x.clone().requires_grad_(), inputs.weight.clone().requires_grad_()]
    normkit.rms_norm(*leaves).square().sum().backward()
    got, expected = (x, leaves[0]) if rank == 0 else (weight, leaves[1])
    torch.testing.assert_close(got.grad, part_of(expected.grad, rank, world))
    assert (weight if rank == 0 else x).grad is None


@on_ranks(2)
def test_a_gradient_is_not_differentiated_again(rank: int, world: int) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    y = sharded_rms_norm(x)
    with pytest.raises(RuntimeError, match="sharded_rms_norm: its gradient cannot be different"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@on_ranks(4)
def test_groups_share_rows_apart_from_each_other(rank: int, world: int) -> None:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = pairs[rank // 2]
    x = testing.make_inputs((5, 32), seed=rank // 2).x
    y = sharded_layer_norm(part_of(x, rank % 2, 2), group=mine)
    torch.testing.assert_close(whole(y, group=mine), normkit.layer_norm(x))
    with pytest.raises(ValueError, match="group: expected a process group with this rank in it"):
        sharded_layer_norm(x, group=pairs[1 - rank // 2])


@on_ranks(2)
def test_a_compiled_call_gives_the_bits_of_an_eager_one(rank: int, world: int) -> None:
    for op, function in FUNCTIONS.items():

        def scaled(
            *tensors: Tensor, function: Callable[..., Tensor] = function, **options: Any
        ) -> Tensor:
            return function(*(t * 2 for t in tensors), weight_offset=1.0, **options) * 0.5

        compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
        runs = []
        for call in (scaled, compiled):
            inputs = testing.make_inputs((6, 16 * world), BRAIN)
            leaves = [part_of(t, rank, world) for t in (inputs.x, inputs.weight, inputs.bias)]
            leaves = [t.detach().requires_grad_() for t in leaves]
            y = call(*leaves, eps=EPS[op])
            y.backward(leaves[0].detach())
            runs.append([y.detach(), *(t.grad for t in leaves)])
        for eager, made in zip(*runs, strict=True):
            assert_same_bits(made, eager)
    with counted() as sent:
        compiled(*leaves)
    assert sent == GATHER

    group = dist.new_group()
    named = torch.compile(
        lambda x: sharded_rms_norm(x, group=group, timeout=0.5), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(3, 8)
    assert_same_bits(named(x), sharded_rms_norm(x))
    if rank == 1:
        with pytest.raises(
            RuntimeError, match="sharded_rms_norm: rank 1 of the 2 .* within 0.[5-9]"
        ):
            named(x)
    torch.compiler.reset()


@on_ranks(2)
def test_operators_are_what_torch_expects_of_operators(rank: int, world: int) -> None:
    inputs = testing.make_inputs((6, 16), BRAIN)
    for layer, weight in ((True, inputs.weight), (False, None)):
        leaves = [inputs.x, weight, inputs.bias]
        leaves = [None if t is None else t.detach().requires_grad_() for t in leaves]
        chosen = {"weight_offset": 1.0, "round_before_weight": True}
        options = [chosen.get(name, False) for name in PLAIN_OPTIONS]
        group = dist.group.WORLD.group_name
        given = (*leaves, 1e-6, SINGLE, layer, "sharded_norm", group, None, *options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own
            torch.library.opcheck(torch.ops.normkit.sharded_norm.default, given)


@on_ranks(2)
def test_what_is_recomputed_for_the_backward_pass_is_gathered_again(rank: int, world: int) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    sharded_rms_norm(x).square().sum().backward()
    expected, x.grad = x.grad, None
    y = checkpoint(sharded_rms_norm, x, use_reentrant=False)
    with counted() as sent:
        y.square().sum().backward()
    assert sent == GATHER * 2
    assert_same_bits(x.grad, expected)
