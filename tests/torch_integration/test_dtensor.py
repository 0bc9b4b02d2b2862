"""Distributed tensors: sequence parallelism of norms, as torch's own norms have it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

if not (dist.is_available() and dist.is_gloo_available()):
    pytest.skip("torch without gloo", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

import normkit
from torch_integration.support import MODULES, loss_of, randomised, tensors


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    place = tmp_path_factory.mktemp("mesh") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", MODULES)
def test_modules_are_sequence_parallel_as_torchs_are(mesh: DeviceMesh, kind: str) -> None:
    plain, x = randomised(MODULES[kind](8)), torch.randn(2, 3, 8)
    model = nn.Sequential(randomised(MODULES[kind](8)))
    parallelize_module(model, mesh, {"0": SequenceParallel(sequence_dim=0)})
    y: Any = model(x)
    assert isinstance(y, DTensor)
    assert y.placements == (Shard(0),)
    torch.testing.assert_close(y.to_local(), plain(x))
    loss_of(y.to_local()).backward()
    loss_of(plain(x)).backward()
    for p, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert p.grad.placements == (Replicate(),) or p.grad.placements[0].is_partial()
        torch.testing.assert_close(p.grad.full_tensor(), expected.grad)


@pytest.mark.parametrize("place", [Shard(0), Shard(1), Replicate()])
def test_rows_may_be_sharded_over_any_dimension_but_the_last(mesh: DeviceMesh, place: Any) -> None:
    x, residual, weight, bias = tensors("add_rms_norm")
    both = [distribute_tensor(t, mesh, [place]) for t in (x, residual)]
    affine = [distribute_tensor(t, mesh, [Replicate()]) for t in (weight, bias)]
    made: Any = normkit.add_rms_norm(*both, *affine)
    assert [t.placements for t in made] == [(place,)] * 2
    expected = normkit.add_rms_norm(x, residual, weight, bias)
    torch.testing.assert_close([t.full_tensor() for t in made], list(expected))
