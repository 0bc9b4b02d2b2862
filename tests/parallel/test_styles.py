"""Parallel styles: a parallelised norm does what the norm of one process does."""

from __future__ import annotations

import itertools
import subprocess
import sys
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch without gloo", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module

import normkit
from normkit.parallel import HiddenParallel, SequenceParallel
from parallel.processes import GATHER, counted, on_ranks, part_of

NORMS: dict[str, Any] = {
    "rms": lambda: normkit.RMSNorm(8, bias=True, weight_offset=1.0),
    "layer": lambda: normkit.LayerNorm(8),
    "all heads": lambda: normkit.RMSNorm((4, 8), bias=True),
    "heads": lambda: normkit.HeadNorm(4, 8, bias=True),
    "shared heads": lambda: normkit.HeadNorm(None, 8, kind="layer", bias=True),
}
TORCHS: dict[str, Any] = {
    "torch rms": lambda: nn.RMSNorm(8),
    "torch layer": lambda: nn.LayerNorm(8),
}


def made(kind: str, seed: int = 0) -> Any:
    """A norm with weights that matter, the same for the same seed."""
    norm = {**NORMS, **TORCHS}[kind]()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) + 0.5)
    return norm


def rows(kind: str, world: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    shape = (2, 3 * world, 4, 8) if "heads" in kind else (2, 3 * world, 8)
    x, residual = torch.randn((2, *shape), generator=generator)
    return x, residual


def loss_of(outputs: Any) -> Tensor:
    tensors = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.stack([(t * torch.linspace(-1, 1, 8)).tanh().sum() for t in tensors]).sum()


def one_process(kind: str, *given: Tensor) -> tuple[Any, list[Tensor], Any]:
    """Outputs, gradients of what was given, and the module with its own."""
    norm, leaves = made(kind), [t.detach().clone().requires_grad_() for t in given]
    outputs = norm(*leaves)
    loss_of(outputs).backward()
    return outputs, [t.grad for t in leaves], norm


def dtensors_own(mode: CommDebugMode) -> dict[str, int]:
    """The collectives that DTensor ran by itself."""
    counts = {
        tuple(str(op).split(".")): count for op, count in mode.get_comm_counts().items() if count
    }
    return {name: count for (space, name), count in counts.items() if "functional" in space}


def as_tuple(outputs: Any) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def check_whole_gradients(norm: nn.Module, expected: nn.Module) -> None:
    for p, whole in zip(norm.parameters(), expected.parameters(), strict=True):
        assert isinstance(p.grad, DTensor)
        assert p.grad.placements == p.placements  # type: ignore[attr-defined]
        torch.testing.assert_close(p.grad.full_tensor(), whole.grad)


@on_ranks(2, 4)
def test_rows_of_a_sequence_are_normalised_where_they_are(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for kind, adds in itertools.product((*NORMS, *TORCHS), (False, True)):
        if adds and kind in TORCHS:
            continue
        given = rows(kind, world)[: 1 + adds]
        expected, grads, alone = one_process(kind, *given)
        norm = parallelize_module(made(kind, seed=rank), mesh, SequenceParallel())
        for p in norm.parameters():  # those of the first rank are what all have
            assert p.placements == (Replicate(),)
        leaves = [part_of(t, rank, world, 1).detach().requires_grad_() for t in given]
        with CommDebugMode() as forward:
            outputs = norm(*leaves)
        assert forward.get_total_counts() == 0, kind
        for y, whole in zip(as_tuple(outputs), as_tuple(expected), strict=True):
            assert y.placements == (Shard(1),)
            torch.testing.assert_close(y.to_local(), part_of(whole, rank, world, 1))
        loss = loss_of(tuple(t.to_local() for t in as_tuple(outputs)))
        with CommDebugMode() as backward:
            loss.backward()
        assert dtensors_own(backward) == {"all_reduce": len(list(norm.parameters()))}
        for leaf, grad in zip(leaves, grads, strict=True):
            torch.testing.assert_close(leaf.grad, part_of(grad, rank, world, 1))
        check_whole_gradients(norm, alone)
        assert all(p.grad.placements == (Replicate(),) for p in norm.parameters())


@on_ranks(2, 4)
def test_columns_are_normalised_where_they_are(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for kind, adds in itertools.product(NORMS, (False, True)):
        dim = -2 if "heads" in kind else -1
        given = rows(kind, world)[: 1 + adds]
        expected, grads, alone = one_process(kind, *given)
        norm = parallelize_module(made(kind, seed=rank), mesh, HiddenParallel())
        shared = kind == "shared heads"
        assert {p.placements for p in norm.parameters()} == {(Replicate() if shared else Shard(0),)}
        leaves = [part_of(t, rank, world, dim).detach().requires_grad_() for t in given]
        sent = GATHER if kind in ("rms", "layer", "all heads") else []
        with counted() as forward:
            outputs = norm(*leaves)
        assert forward == sent
        for y, whole in zip(as_tuple(outputs), as_tuple(expected), strict=True):
            assert y.placements == (Shard(y.ndim + dim),)
            assert y.shape == whole.shape
            torch.testing.assert_close(y.to_local(), part_of(whole, rank, world, dim))
        weights = torch.linspace(-1, 1, 8)
        weights = weights if "heads" in kind else part_of(weights, rank, world)
        loss = sum((t.to_local() * weights).tanh().sum() for t in as_tuple(outputs))
        with counted() as backward, CommDebugMode() as moved:
            loss.backward()  # type: ignore[union-attr]
        assert backward == sent
        # One for each parameter that all heads share.
        assert dtensors_own(moved) == ({"all_reduce": 2} if shared else {}), (kind, adds)
        for leaf, grad in zip(leaves, grads, strict=True):
            torch.testing.assert_close(leaf.grad, part_of(grad, rank, world, dim))
        check_whole_gradients(norm, alone)


def _mesh_and_parts(rank: int, world: int, dim: int) -> tuple[DeviceMesh, list[Tensor]]:
    return init_device_mesh("cpu", (world,)), [
        part_of(t, rank, world, dim) for t in rows("", world)
    ]


@on_ranks(2)
def test_outputs_are_local_where_asked_and_a_residual_may_be_named(rank: int, world: int) -> None:
    for dim, style in ((1, SequenceParallel(1, True)), (-1, HiddenParallel(True))):
        mesh, (x, residual) = _mesh_and_parts(rank, world, dim)
        norm = parallelize_module(made("rms"), mesh, style)
        y, total = norm(x, residual=residual)
        assert type(y) is type(total) is Tensor
        expected = made("rms")(*rows("", world))
        torch.testing.assert_close(y, part_of(expected[0], rank, world, dim))
        torch.testing.assert_close(total, part_of(expected[1], rank, world, dim))
        assert type(norm(x)) is Tensor


@on_ranks(2)
def test_what_is_split_otherwise_is_redistributed(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    x, _ = rows("layer", world)
    for style, place in ((SequenceParallel(-2), Shard(1)), (HiddenParallel(), Shard(2))):
        norm = parallelize_module(made("layer"), mesh, style)
        for given in (Replicate(), Shard(0), Shard(1), Shard(2)):
            y = norm(distribute_tensor(x, mesh, [given]))
            assert y.placements == (place,)
            torch.testing.assert_close(y.full_tensor(), made("layer")(x))


@on_ranks(2)
def test_frozen_parameters_stay_frozen(rank: int, world: int) -> None:
    for dim, style in ((1, SequenceParallel()), (-1, HiddenParallel())):
        mesh, (x, _) = _mesh_and_parts(rank, world, dim)
        norm = parallelize_module(made("rms").requires_grad_(False), mesh, style)
        assert not any(p.requires_grad for p in norm.parameters())
        assert not norm(x).requires_grad


@on_ranks(2)
def test_a_style_names_what_it_cannot_take(rank: int, world: int) -> None:
    mesh, (x, _) = _mesh_and_parts(rank, world, 1)
    wrong: list[tuple[type[Exception], str, nn.Module, Any]] = [
        (
            TypeError,
            "a norm of normkit or torch, got torch.*Linear",
            nn.Linear(8, 8),
            SequenceParallel(),
        ),
        (TypeError, "a norm of normkit, got torch.*RMSNorm", nn.RMSNorm(8), HiddenParallel()),
        (ValueError, "a multiple of the 2 ranks, got 7", normkit.RMSNorm(7), HiddenParallel()),
        (ValueError, "num_heads: .* got 3", normkit.HeadNorm(3, 8), HiddenParallel()),
        (ValueError, "got 3", normkit.LayerNorm((3, 4)), HiddenParallel()),
    ]
    for error, said, module, style in wrong:
        with pytest.raises(error, match=said):
            parallelize_module(module, mesh, style)
    for dim in (2, -1, 3, -4):
        norm = parallelize_module(normkit.RMSNorm(8), mesh, SequenceParallel(dim))
        with pytest.raises(ValueError, match=f"sequence_dim: .* got {dim}"):
            norm(x)
    assert repr(SequenceParallel(0)) == "SequenceParallel(sequence_dim=0, use_local_output=False)"
    assert repr(HiddenParallel(True)) == "HiddenParallel(use_local_output=True)"


@on_ranks(2)
def test_parameters_may_be_cast_copied_thawed_or_loaded(rank: int, world: int) -> None:
    def loaded(norm: nn.Module) -> nn.Module:
        state = {name: t.clone() for name, t in norm.state_dict().items()}
        norm.load_state_dict(state, assign=True)
        return norm

    def used(norm: nn.Module) -> nn.Module:
        norm(x).to_local().sum().backward()
        norm.zero_grad()
        return norm

    def emptied(norm: nn.Module) -> nn.Module:
        return norm.to("meta").to_empty(device="cpu").requires_grad_()

    changes: dict[str, Any] = {
        "cast": lambda norm: norm.double(),
        "used and cast": lambda norm: used(norm).double(),
        "copied": deepcopy,
        "thawed": lambda norm: norm.requires_grad_(False).requires_grad_(),
        "loaded": loaded,
        "emptied": emptied,
    }
    mesh, (x, _) = _mesh_and_parts(rank, world, 1)
    whole_x = rows("", world)[0]
    for name, change in changes.items():
        given = made("rms").requires_grad_(name != "thawed")
        norm = change(parallelize_module(given, mesh, SequenceParallel()))
        dtype = next(norm.parameters()).dtype
        alone = made("rms").to(dtype)
        with torch.no_grad():
            for p, plain in zip(norm.parameters(), alone.parameters(), strict=True):
                p.copy_(distribute_tensor(plain.detach(), mesh, [Replicate()]))
        norm(x.to(dtype)).to_local().square().sum().backward()
        alone(whole_x.to(dtype)).square().sum().backward()
        check_whole_gradients(norm, alone)


def gradients_of(norm: nn.Module, leaves: list[Tensor], outputs: Any) -> list[Tensor]:
    tensors = [t.to_local() if isinstance(t, DTensor) else t for t in as_tuple(outputs)]
    loss = torch.stack([(t * (t + 1 + i)).sum() for i, t in enumerate(tensors)]).sum()
    return list(torch.autograd.grad(loss, [*leaves, *norm.parameters()]))


@on_ranks(2)
def test_a_compiled_style_is_the_eager_one(rank: int, world: int) -> None:
    for dim, style in ((1, SequenceParallel()), (-1, HiddenParallel(True))):
        mesh, parts = _mesh_and_parts(rank, world, dim)
        leaves = [t.detach().requires_grad_() for t in parts]
        norm = parallelize_module(made("rms"), mesh, style)
        eager = norm(*leaves)

        def called(*given: Tensor, norm: nn.Module = norm) -> Any:
            return norm(*given)

        compiled = torch.compile(called, fullgraph=True, backend="aot_eager")(*leaves)
        for y, expected in zip(compiled, eager, strict=True):
            assert type(y) is type(expected)
            assert y.shape == expected.shape
            torch.testing.assert_close(y, expected)
        made_by = [gradients_of(norm, leaves, outputs) for outputs in (compiled, eager)]
        for got, expected in zip(*made_by, strict=True):
            assert got.shape == expected.shape
            assert getattr(got, "placements", None) == getattr(expected, "placements", None)
            torch.testing.assert_close(got, expected)
        torch.compiler.reset()


def test_a_style_needs_no_eager_call_before_a_compiled_one() -> None:
    """Which runs the operators on DTensors, that may have been imported after normkit."""
    code = """
import normkit, torch, torch.distributed as dist
from normkit.parallel import HiddenParallel
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = dist.init_device_mesh("cpu", (1,))
parallelize_module(normkit.RMSNorm(8), mesh, HiddenParallel())
x = distribute_tensor(torch.ones(2, 8), mesh, [Replicate()])
print(torch.ops.normkit.rms_norm(x)[0].placements)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("(Replicate(),)\n"), done.stderr  # gloo may speak before
