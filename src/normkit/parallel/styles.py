"""Parallel styles of norms, for `torch.distributed.tensor.parallel.parallelize_module`.

A style says how a module's parameters, inputs and outputs lie on the ranks of a mesh.  Both styles
here take the modules as they are called: with x alone, or with a residual, which lies as x does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from normkit._spec import Result
from normkit.modules import HeadNorm, LayerNorm, RMSNorm
from normkit.parallel import _dtensor

Split = Callable[[Tensor], Shard]


class SequenceParallel(ParallelStyle):
    """Ranks have rows of their own: x is split along the sequence, the parameters are everywhere.

    The forward pass communicates nothing.  The backward pass adds up the gradients of weight and
    bias over the ranks, in one all-reduce each: afterwards every rank has the whole of them.

    Args:
        sequence_dim: the dimension of x along which it is split; not the last one.
        use_local_output: return this rank's part as a plain tensor; False: as a DTensor.

    x and residual may be plain tensors, this rank's part, or DTensors, which are redistributed if
    they are split otherwise.  Parameters are taken from the mesh's first rank.  The modules are
    those of normkit, with y or (y, residual_out) as what they return, and torch's norms.

    Raises:
        TypeError: from parallelize_module: the module is no norm of normkit or torch.

    Semantics: Korthikanti et al. 2022, arXiv:2205.05198; the style of the same name in
    `torch.distributed.tensor.parallel`, which knows neither residuals nor whole gradients.

    Example:
        >>> import normkit, torch, torch.distributed as dist
        >>> from normkit.parallel import SequenceParallel
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = dist.init_device_mesh("cpu", (1,))
        >>> norm = parallelize_module(normkit.RMSNorm(8), mesh, SequenceParallel())
        >>> y, residual_out = norm(torch.ones(2, 3, 8), torch.ones(2, 3, 8))
        >>> y.placements
        (Shard(dim=1),)
        >>> dist.destroy_process_group()
    """

    def __init__(self, sequence_dim: int = 1, use_local_output: bool = False) -> None:
        super().__init__()
        self.sequence_dim = sequence_dim
        self.use_local_output = use_local_output

    def __repr__(self) -> str:
        return (
            f"SequenceParallel(sequence_dim={self.sequence_dim},"
            f" use_local_output={self.use_local_output})"
        )

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        norms = (RMSNorm, LayerNorm, HeadNorm, nn.RMSNorm, nn.LayerNorm)
        if not isinstance(module, norms):
            raise TypeError(_expected("a norm of normkit or torch", module))
        _distribute(module, device_mesh, lambda _: Replicate(), self.src_data_rank)
        _split_inputs(module, device_mesh, self._split, self.use_local_output)
        return module

    def _split(self, x: Tensor) -> Shard:
        dim = self.sequence_dim + (x.ndim if self.sequence_dim < 0 else 0)
        if not 0 <= dim < x.ndim - 1:
            raise ValueError(
                f"sequence_dim: expected a dimension of x but its last, got {self.sequence_dim}"
                f" for x of shape {tuple(x.shape)}"
            )
        return Shard(dim)


class HiddenParallel(ParallelStyle):
    """Ranks have columns of their own: x, weight and bias are split along the hidden dimension.

    Each pass sends one small message, as `sharded_rms_norm` does; gradients of weight and bias
    stay where their columns are.  Of several normalised dimensions, as of (heads, head_dim) in a
    norm across heads, the first is split.  The heads of a `HeadNorm` are split, which sends
    nothing.

    Args:
        use_local_output: return this rank's part as a plain tensor; False: as a DTensor.

    x and residual may be plain tensors, this rank's part, or DTensors, which are redistributed if
    they are split otherwise.  Parameters are taken from the mesh's first rank, and each rank keeps
    its part; a weight that all heads share is on every rank, and its gradient is whole there.  How
    long a rank waits for the others is the timeout of the mesh's process group.

    Raises:
        TypeError: from parallelize_module: the module is no norm of normkit.
        ValueError: from parallelize_module: the columns or heads are no multiple of the ranks.

    Semantics: the norms over a hidden dimension that is split in tensor parallelism.

    Example:
        >>> import normkit, torch, torch.distributed as dist
        >>> from normkit.parallel import HiddenParallel
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = dist.init_device_mesh("cpu", (1,))
        >>> norm = parallelize_module(normkit.RMSNorm(8), mesh, HiddenParallel())
        >>> norm(torch.ones(2, 3, 8)).placements
        (Shard(dim=2),)
        >>> dist.destroy_process_group()
    """

    def __init__(self, use_local_output: bool = False) -> None:
        super().__init__()
        self.use_local_output = use_local_output

    def __repr__(self) -> str:
        return f"HiddenParallel(use_local_output={self.use_local_output})"

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, (RMSNorm, LayerNorm, HeadNorm)):
            raise TypeError(_expected("a norm of normkit", module))
        _check_parts(module, device_mesh.size())
        per_head = isinstance(module, HeadNorm)

        def place(p: Tensor) -> Shard | Replicate:
            return Replicate() if per_head and p.ndim == 1 else Shard(0)

        _distribute(module, device_mesh, place, self.src_data_rank)
        behind = 2 if isinstance(module, HeadNorm) else len(module.normalized_shape)
        _split_inputs(module, device_mesh, lambda x: Shard(x.ndim - behind), self.use_local_output)
        return module


def _expected(what: str, module: nn.Module) -> str:
    return f"module: expected {what}, got {type(module).__module__}.{type(module).__qualname__}"


def _check_parts(module: RMSNorm | LayerNorm | HeadNorm, ranks: int) -> None:
    if isinstance(module, HeadNorm):
        name, size = "num_heads", module.num_heads
    else:
        name, size = "normalized_shape[0]", module.normalized_shape[0]
    if size is not None and size % ranks:
        raise ValueError(f"{name}: expected a multiple of the {ranks} ranks, got {size}")


def _distribute(
    module: nn.Module,
    mesh: DeviceMesh,
    place: Callable[[Tensor], Shard | Replicate],
    source: int | None,
) -> None:
    _dtensor.register_once()
    for name, p in list(module.named_parameters(recurse=False)):
        placed = distribute_tensor(p.detach(), mesh, [place(p)], src_data_rank=source)
        module.register_parameter(name, nn.Parameter(placed, requires_grad=p.requires_grad))


def _placed_as(gradient: DTensor, placements: tuple[Placement, ...]) -> DTensor:
    """Redistribute a gradient as its parameter lies; of a replicated one each rank has a part."""
    return gradient.redistribute(placements=placements)


def _place_gradients(module: nn.Module) -> None:
    # Parameters that were cast, copied or loaded have lost the hook, or seem to have it.
    for p in module.parameters(recurse=False):
        hooks = p._backward_hooks or {}
        for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
            del hooks[key]
        if not hooks:
            p._backward_hooks = None
        if p.requires_grad and isinstance(p, DTensor):
            placed = partial(_placed_as, placements=p.placements)
            p.register_hook(placed)  # type: ignore[no-untyped-call]


def _is_ours(hook: object) -> bool:
    return isinstance(hook, partial) and hook.func is _placed_as


def _split_inputs(module: nn.Module, mesh: DeviceMesh, split: Split, local_output: bool) -> None:
    """Have forward take parts or DTensors, split so, and return what lies the same way."""

    def as_distributed(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        placements = [split(value)]
        if isinstance(value, DTensor):
            return value.redistribute(mesh, placements)
        return DTensor.from_local(value, mesh, placements, run_check=False)

    def before(
        module: nn.Module, args: tuple[object, ...], options: dict[str, object]
    ) -> tuple[tuple[object, ...], dict[str, object]]:
        if not torch.compiler.is_compiling():
            _place_gradients(module)
        given = {name: as_distributed(value) for name, value in options.items()}
        return tuple(as_distributed(value) for value in args), given

    def returned(t: Tensor) -> Tensor:
        # What torch.compile runs is redistributed by DTensor.
        placed = cast(DTensor, t).redistribute(mesh, [split(t)])
        return placed.to_local() if local_output else placed

    def after(_: nn.Module, args: tuple[object, ...], made: Result) -> Result:
        if isinstance(made, tuple):
            return returned(made[0]), returned(made[1])
        return returned(made)

    _place_gradients(module)
    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after)
