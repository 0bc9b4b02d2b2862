"""The model that is trained sharded, and the processes that do it."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import normkit


class Model(nn.Module):
    """Two blocks whose norms take and return a residual."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.first = nn.ModuleDict({"norm": normkit.RMSNorm(n), "linear": nn.Linear(n, n)})
        self.second = nn.ModuleDict({"norm": normkit.LayerNorm(n), "linear": nn.Linear(n, n)})
        self.last = normkit.RMSNorm(n, memory_efficient=True)

    def forward(self, x: Tensor) -> Tensor:
        residual = torch.zeros_like(x)
        for block in (self.first, self.second):
            y, residual = block["norm"](x, residual)
            x = block["linear"](y).tanh()
        y, _ = self.last(x, residual)
        return y  # type: ignore[no-any-return]


def data(rank: int, world: int, n: int) -> Tensor:
    whole = torch.randn(4 * world, n, generator=torch.Generator().manual_seed(5))
    return whole.chunk(world)[rank]


def train(model: nn.Module, x: Tensor, steps: int = 2) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimiser.zero_grad()
        (model(x) * torch.linspace(-1, 1, x.shape[-1])).mean().backward()
        optimiser.step()


def initialised(n: int) -> Model:
    torch.manual_seed(11)
    return Model(n)


def leave() -> None:
    """End the process when all are done: gloo may abort one that shuts down without another."""
    dist.barrier()
    os._exit(0)


def shard_and_train(rank: int, world: int, n: int, folder: str) -> None:
    """Be one process of FSDP; the first saves what it trained, and how precisely."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    mesh = init_device_mesh("cpu", (world,))
    for precision in (torch.float32, torch.bfloat16):
        model = initialised(n)
        shard = partial(
            fully_shard, mesh=mesh, mp_policy=MixedPrecisionPolicy(precision, torch.float32)
        )
        for block in (model.first, model.second):
            for part in block.values():
                shard(part)
        shard(model)
        train(model, data(rank, world, n))
        whole = {name: p.full_tensor() for name, p in model.state_dict().items()}
        if rank == 0:
            torch.save(whole, f"{folder}/{precision}.pt")
    leave()


AFFINE = {"rms_norm": False, "layer_norm": False, "head_norm": True}


def split_calls(name: str) -> tuple[list[Tensor], dict[str, str]]:
    """x, weight, bias and a gradient of y for a call whose rows are split."""
    made = torch.Generator().manual_seed(3)
    shape = (4, 6, 2, 8)
    affine = shape[-2:] if AFFINE[name] else shape[-1:]
    shapes = (shape, affine, affine, shape)
    return [torch.randn(s, generator=made) for s in shapes], {"kind": "layer"} if AFFINE[
        name
    ] else {}


def split_rows(rank: int, world: int, folder: str) -> None:
    """Be one process of calls on split rows; the first saves outputs and gradients."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rows",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for name, per_head in AFFINE.items():
        for dim in range(3):
            (x, weight, bias, grad_y), options = split_calls(name)
            place = [Shard(dim)]
            affine = [Shard(0)] if per_head and dim == 2 else [Replicate()]
            leaves = [
                distribute_tensor(t, mesh, where).requires_grad_()
                for t, where in ((x, place), (weight, affine), (bias, affine))
            ]
            y = getattr(normkit, name)(*leaves, **options)
            y.backward(distribute_tensor(grad_y, mesh, place))
            assert y.placements == tuple(place)
            found[name, dim] = [y.full_tensor(), *(t.grad.full_tensor() for t in leaves)]
            inside = distribute_tensor(x.clone(), mesh, place)
            getattr(normkit, f"{name}_")(inside, *(t.detach() for t in leaves[1:]), **options)
            found[name, dim].append(inside.full_tensor())
    if rank == 0:
        torch.save(found, f"{folder}/rows.pt")
    leave()
