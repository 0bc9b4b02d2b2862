"""Calls of `normkit.compat.dropout_layer_norm` as flash-attention's wrappers make them.

And the same in float64 and plain torch, which autograd differentiates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import normkit
from devices import call_on
from normkit.compat import dropout_layer_norm
from normkit.testing import assert_accurate

EPS = 1e-3
FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
# Of x0, residual and gamma, as the extension supports them, and one that it does not.
DTYPES = (
    (FLOAT32, FLOAT32, FLOAT32),
    (FLOAT16, FLOAT32, FLOAT32),
    (FLOAT16, FLOAT16, FLOAT16),
    (BFLOAT16, FLOAT32, FLOAT32),
    (BFLOAT16, BFLOAT16, BFLOAT16),
    (FLOAT32, BFLOAT16, FLOAT16),
)


class Options(NamedTuple):
    """What is neither x0, residual, gamma nor beta."""

    rowscale: Tensor | None = None
    colscale: Tensor | None = None
    x0_subset: Tensor | None = None
    z_subset: Tensor | None = None
    dropout_p: float = 0.0
    epsilon: float = EPS
    rowscale_const: float = 1.0
    z_numrows: int = 0
    generator: torch.Generator | None = None
    residual_in_fp32: bool = False
    is_rms_norm: bool = False


class Named(NamedTuple):
    """A backend, for tests that need not run on each."""

    name: str


AUTO = Named("auto")


def call(backend: Any, function: Callable[..., Any], *values: Any) -> Any:
    """Call a function that returns a list; what a backend asked for cannot serve raises."""

    def as_tuple(*moved: Any) -> tuple[Any, ...]:
        return tuple(function(*moved))

    with normkit.use_backend(backend.name):
        if backend.name == "cuda":
            return call_on("cuda", as_tuple, *values)
        return as_tuple(*values)


def forward(
    backend: Any,
    x0: Tensor,
    residual: Tensor | None,
    gamma: Tensor,
    beta: Tensor | None,
    options: Options,
) -> tuple[Any, ...]:
    given = x0, residual, gamma, beta, *options
    made: tuple[Any, ...] = call(backend, dropout_layer_norm.dropout_add_ln_fwd, *given)
    return made


def backward(
    backend: Any,
    dz: Tensor,
    dx: Tensor | None,
    made: tuple[Any, ...],
    x0: Tensor,
    residual: Tensor | None,
    gamma: Tensor,
    options: Options,
) -> tuple[Any, ...]:
    """Of a forward call, of which `made` came."""
    _, x, dmask, mu, rsigma = made
    gradients: tuple[Any, ...] = call(
        backend,
        dropout_layer_norm.dropout_add_ln_bwd,
        dz,
        dx,
        x0 if x is None else x,
        x0 if options.colscale is not None else None,
        dmask,
        mu,
        rsigma,
        gamma,
        *options[:5],
        options.rowscale_const,
        x0.shape[0],
        residual is not None,
        options.is_rms_norm,
    )
    return gradients


def normalised(xf: Tensor, is_rms_norm: bool) -> Tensor:
    """xhat of a sum in float64."""
    centred = xf if is_rms_norm else xf - xf.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()


def summed(x0: Tensor, residual: Tensor | None, dmask: Tensor | None, options: Options) -> Tensor:
    """xf in float64, of float64 tensors."""
    scaled = x0
    if options.x0_subset is not None:
        scaled = scaled * options.rowscale_const
    elif options.rowscale is not None:
        scaled = scaled * options.rowscale.double().unsqueeze(1)
    if dmask is not None:
        scaled = torch.where(dmask.bool(), scaled / (1 - options.dropout_p), 0.0)
    if options.colscale is not None:
        scaled = scaled * options.colscale
    if options.x0_subset is not None:
        nothing = scaled.new_zeros(1, scaled.shape[1])
        scaled = torch.cat([nothing, scaled])[options.x0_subset.long()]
    return scaled if residual is None else scaled + residual


def assert_norm_of(
    z: Tensor,
    summand: Tensor,
    residual: Tensor | None,
    x: Tensor | None,
    gamma: Tensor,
    beta: Tensor | None = None,
    *,
    is_rms_norm: bool = False,
) -> None:
    """Hold z to the norm of the sum before it was rounded, and x to the rounded sum."""
    kind = "rms" if is_rms_norm else "layer"
    added = {"residual": residual, "residual_out": x, "round_sum": False}
    options: dict[str, Any] = {} if residual is None else added
    assert_accurate(z, summand, gamma, beta, EPS, kind=kind, **options)


def subset(flags: list[int]) -> Tensor:
    """Number the rows that are flagged from 1 on; 0 for the others."""
    numbers = torch.tensor(flags, dtype=torch.int32)
    return numbers.cumsum(0, dtype=torch.int32) * numbers


def random(*shape: int, dtype: torch.dtype = FLOAT32, seed: int = 0) -> Tensor:
    """Values round 0.5, so that a mean that is lost shows."""
    generator = torch.Generator().manual_seed(seed)
    return (0.5 + 1.5 * torch.randn(*shape, generator=generator)).to(dtype)
