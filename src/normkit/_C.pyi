# The private extension; docs are in the module itself and in cpp/module.cpp.
from collections.abc import Sequence
from types import ModuleType
from typing import Final, TypeAlias

import torch
from torch import Tensor
from typing_extensions import Unpack

from normkit._serving.refusal import Refusal

# A call: what `fields` names, in that order.
_Call: TypeAlias = tuple[
    int,  # kind
    Tensor,  # x
    Tensor | None,  # residual
    Tensor | None,  # weight
    Tensor | None,  # bias
    float | None,  # eps
    float,  # weight_offset
    bool,  # round_before_weight
    bool,  # round_sum
    bool,  # clamp_inf
    torch.dtype | None,  # out_dtype
    Tensor | None,  # out
    Tensor | None,  # residual_out
]
_Made: TypeAlias = Tensor | tuple[Tensor, Tensor]

fields: Final[tuple[str, ...]]

def bind_torch(torch: ModuleType, refusal: type[Refusal]) -> None: ...
def try_norm(*call: Unpack[_Call]) -> _Made | None: ...
def norm(*call: Unpack[_Call]) -> _Made | Refusal: ...
def norm_saving(
    *call: Unpack[_Call],
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None] | Refusal: ...
def plan(*call: Unpack[_Call]) -> tuple[str, str] | Refusal: ...
def norm_backward(
    kind: int,
    grad_y: Tensor,
    grad_residual_out: Tensor | None,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor,
    mean: Tensor | None,
    weight_offset: float,
    round_before_weight: bool,
    x_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
    wanted: int,
    /,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] | Refusal: ...
def norm_tp(
    kind: int,
    xs: Sequence[Tensor],
    weights: Sequence[Tensor | None] | None,
    biases: Sequence[Tensor | None] | None,
    eps: float | None,
    weight_offset: float,
    round_before_weight: bool,
    clamp_inf: bool,
    out_dtype: torch.dtype | None,
    outs: Sequence[Tensor | None] | None,
    streams: tuple[int | None, ...],
    /,
) -> list[Tensor] | None: ...
def part_statistics(kind: int, x: Tensor, clamp_inf: bool, /) -> Tensor | Refusal: ...
def part_apply(
    kind: int,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    weight_offset: float,
    round_before_weight: bool,
    clamp_inf: bool,
    out_dtype: torch.dtype | None,
    gathered: Tensor,
    /,
) -> tuple[Tensor, Tensor, Tensor | None] | Refusal: ...
def part_backward_statistics(
    kind: int,
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    mean: Tensor | None,
    weight_offset: float,
    /,
) -> Tensor | Refusal: ...
def part_backward_apply(
    kind: int,
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor,
    mean: Tensor | None,
    weight_offset: float,
    round_before_weight: bool,
    x_dtype: torch.dtype | None,
    wanted: int,
    gathered: Tensor,
    /,
) -> tuple[Tensor | None, Tensor | None, Tensor | None] | Refusal: ...
def set_quick_path(on: bool) -> None: ...
def cuda_devices() -> tuple[list[tuple[str, str]], str]: ...
def cpu_instruction_sets() -> list[str]: ...
def cpu_instruction_set() -> str | None: ...
def use_cpu_instruction_set(name: str) -> None: ...
