"""What the worker processes of these tests run; they import it by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import normkit

# Big enough that the kernels want threads.
LARGE = (512, 1024)
Made = dict[str, Tensor]


def norms(shape: tuple[int, ...] = LARGE) -> Made:
    """Run every way through a norm: forward, in place, backward."""
    x = torch.linspace(-3, 5, shape[0] * shape[1]).view(shape)
    weight = torch.linspace(0.5, 2, shape[1]).requires_grad_()
    y, total = normkit.add_rms_norm(x, x, weight)
    (y * x).sum().backward()
    assert weight.grad is not None
    plain = weight.detach()
    in_place = normkit.layer_norm_(x.clone(), plain)
    made = {"y": y, "total": total, "grad": weight.grad, "in place": in_place}
    return {name: t.detach() for name, t in made.items()}


def send_norms(connection: Any, intraop_threads: int) -> None:
    torch.set_num_threads(intraop_threads)
    connection.send({name: t.numpy() for name, t in norms().items()})
    connection.close()


def send_module(connection: Any, module: nn.Module, x: Tensor) -> None:
    connection.send(module(x).detach().numpy())
    connection.close()


class Normed(Dataset[Tensor]):
    """Normalise every sample where the loader asks for it."""

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        self.count, self.shape = count, shape
        self.norm = normkit.LayerNorm(shape[-1])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        if index >= self.count:
            raise IndexError(index)
        x = torch.linspace(-3, 5 + index, self.shape[0] * self.shape[1]).view(self.shape)
        return self.norm(x).detach()  # type: ignore[no-any-return]
