# The private extension; docs are in the module itself and in cpp/module.cpp.
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Final

import torch
from torch import Tensor

from normkit._serving.refusal import Refusal
from normkit._spec import Gradients, PartGradients, PartSaved, Result, Saved

fields: Final[tuple[str, ...]]

def bind_torch(torch: ModuleType, refusal: type[Refusal]) -> None: ...

# Calls are the values of what `fields` names, which normkit._spec.Call has, in that order.
def try_norm(*call: object) -> Result | None: ...
def norm(*call: object) -> Result | Refusal: ...
def norm_saving(*call: object) -> Saved | Refusal: ...
def plan(*call: object) -> tuple[str, str] | Refusal: ...
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
) -> Gradients | Refusal: ...

# kind, xs, weights, biases, the options of a call from eps on, out_dtype, outs and streams
def norm_tp(kind: int, xs: Sequence[Tensor], /, *rest: object) -> list[Tensor] | None: ...

# A tuple of all arguments of norm() for each; None in place of a y that only a cache gets
def try_norms(calls: tuple[tuple[object, ...], ...], /) -> list[Tensor | None] | None: ...
def norms(calls: tuple[tuple[object, ...], ...], /) -> list[Tensor | None] | Refusal: ...
def part_statistics(kind: int, x: Tensor, clamp_inf: bool, /) -> Tensor | Refusal: ...

# kind, x, weight, bias, the options of a call from eps on, out_dtype and gathered
def part_apply(kind: int, x: Tensor, /, *rest: object) -> PartSaved | Refusal: ...
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
) -> PartGradients | Refusal: ...
def implement(
    torch: ModuleType,
    name: str,
    types: Sequence[str],
    sources: Sequence[object],
    unless: Sequence[int],
    outputs: Sequence[int],
    x: int,
    empty_dtype: torch.dtype | None,
    function: object,
    implementation: object,
) -> bool: ...
def set_differentiate(apply: Callable[..., Result]) -> None: ...
def set_quick_path(on: bool) -> None: ...
def cuda_devices() -> tuple[list[tuple[str, str]], str]: ...
def cpu_instruction_sets() -> list[str]: ...
def cpu_instruction_set() -> str | None: ...
def use_cpu_instruction_set(name: str) -> None: ...
