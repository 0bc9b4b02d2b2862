"""What the functions of `normkit.compat.dropout_layer_norm` check and compute."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from normkit._serving import dispatch
from normkit._serving.backends import wanted_backend
from normkit._serving.dispatch import Wanted
from normkit._serving.formula import Formula
from normkit._spec import ADD, DEFAULT_OPTIONS, FLOATS, FLOATS_TEXT, LAYER, Call

# ---------------------------------------------------------------- checks

INDEX = (torch.int32,)
MASK = (torch.uint8,)
KEPT = (torch.float32,)


def check_matrix(name: str, t: Tensor) -> tuple[int, int]:
    """Check the tensor to which all others are held; return its shape."""
    _check_tensor(name, t, FLOATS)
    if t.ndim != 2 or t.shape[1] == 0:
        raise ValueError(f"{name}: expected shape (rows, n) with n > 0, got {tuple(t.shape)}")
    return t.shape[0], t.shape[1]


def count(name: str, t: Tensor | None, without: int) -> int:
    """Return how many rows a tensor says there are, or what holds without it."""
    if t is None:
        return without
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    if t.ndim == 0:
        raise ValueError(f"{name}: expected at least one dimension, got a scalar")
    return t.shape[0]


def _check_tensor(name: str, t: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(t).__name__}")
    if t.dtype not in dtypes:
        text = FLOATS_TEXT if dtypes is FLOATS else str(dtypes[0]).removeprefix("torch.")
        raise TypeError(f"{name}: expected {text}, got {t.dtype}")
    if t.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense (strided) tensor, got {t.layout}")


def check(
    name: str,
    t: Tensor,
    like: Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> None:
    """Check a tensor that has to be there, and to be where `like` is."""
    _check_tensor(name, t, dtypes)
    if t.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(t.shape)}")
    if t.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {t.device}")


def check_floats(like: Tensor, *expected: tuple[str, Tensor | None, tuple[int, ...]]) -> None:
    """Check those of (name, tensor, shape) that were given."""
    for name, t, shape in expected:
        if t is not None:
            check(name, t, like, shape)


def check_numbers(dropout_p: float, epsilon: float = 0.0) -> None:
    """Check what is no tensor."""
    for name, value in (("dropout_p", dropout_p), ("epsilon", epsilon)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: expected a number from 0 to below 1, got {dropout_p}")
    if not 0.0 <= epsilon < float("inf"):
        raise ValueError(f"epsilon: expected a finite number >= 0, got {epsilon}")


def check_subsets(
    like: Tensor,
    x0_subset: Tensor | None,
    x0_rows: int,
    z_subset: Tensor | None,
    z_rows: int,
    rowscale: Tensor | None,
    given: str,
) -> None:
    """Check that both are given or none, and what they name; `given` is a number of rows."""
    if x0_subset is None and z_subset is None:
        return
    for name, t in (("x0_subset_", x0_subset), ("z_subset_", z_subset)):
        if t is None:
            raise ValueError(
                f"{name}: expected a tensor, since the other subset is given, got None"
            )
    assert x0_subset is not None
    assert z_subset is not None
    if rowscale is not None:
        raise ValueError("rowscale_: expected None with subsets, which take rowscale_const")
    numrows = z_rows if given == "z_numrows" else x0_rows
    if isinstance(numrows, bool) or not isinstance(numrows, int):
        raise TypeError(f"{given}: expected an int, got {type(numrows).__name__}")
    if numrows < 0:
        raise ValueError(f"{given}: expected a number of rows, got {numrows}")
    rows = (x0_subset.shape[0],)
    for name, t, limit in (("x0_subset_", x0_subset, x0_rows), ("z_subset_", z_subset, z_rows)):
        check(name, t, like, rows, INDEX)
        if t.is_cpu and t.numel() and int(t.max()) > limit:
            raise ValueError(f"{name}: expected numbers up to {limit}, got {int(t.max())}")


def check_kept(x: Tensor, mu: Tensor, rsigma: Tensor, dropout_p: float) -> None:
    """Check what the forward function hands over to the backward function."""
    check("mu", mu, x, x.shape[:1], KEPT)
    check("rsigma", rsigma, x, x.shape[:1], KEPT)
    check_numbers(dropout_p)


def check_mask(
    name: str, dmask: Tensor | None, like: Tensor, shape: tuple[int, ...], dropout_p: float
) -> Tensor | None:
    """Check a mask if there was dropout; return it then only."""
    if dropout_p == 0.0:
        return None
    if dmask is None:
        raise ValueError(f"{name}: expected a tensor, since dropout_p is {dropout_p}, got None")
    check(name, dmask, like, shape, MASK)
    return dmask


# ---------------------------------------------------------------- what comes before the norm


def drop(x0: Tensor, dropout_p: float, generator: torch.Generator | None) -> Tensor | None:
    """Choose what is kept: 1, else 0; None for everything."""
    if dropout_p == 0.0:
        return None
    dmask = torch.empty(x0.shape, dtype=torch.uint8, device=x0.device)
    return dmask.bernoulli_(1.0 - dropout_p, generator=generator)


def scale(
    x0: Tensor,
    rowscale: Tensor | float | None,
    dmask: Tensor | None,
    dropout_p: float,
    colscale: Tensor | None = None,
) -> Tensor:
    """Apply what x0 goes through before the sum, in float32; its gradient is the same map."""
    scaled = x0.float()
    if rowscale is not None:
        factor = rowscale.unsqueeze(1) if isinstance(rowscale, Tensor) else rowscale
        scaled = scaled * factor
    if dmask is not None:
        scaled = torch.where(dmask != 0, scaled * (1.0 / (1.0 - dropout_p)), 0.0)
    return scaled if colscale is None else scaled * colscale


def take(t: Tensor, numbers: Tensor) -> Tensor:
    """Gather the rows of these numbers, which count from 1; 0 stands for a row of zeros."""
    if t.shape[0] == 0:
        return t.new_zeros(numbers.shape[0], t.shape[1])
    taken = t.index_select(0, (numbers - 1).clamp(min=0))
    return taken.masked_fill_((numbers <= 0).unsqueeze(1), 0.0)


def inverse(numbers: Tensor, rows: int) -> Tensor:
    """For each row that numbers may name, say which of them, from 1 on, names it; 0 for none."""
    places = torch.arange(1, numbers.shape[0] + 1, device=numbers.device)
    named = places.new_zeros(rows + 1)
    return named.scatter_reduce_(0, numbers.clamp(min=0).long(), places, "amax")[1:]


# ---------------------------------------------------------------- the norm


def norm(
    summand: Tensor,
    residual: Tensor | None,
    gamma: Tensor,
    beta: Tensor | None,
    epsilon: float,
    z_dtype: torch.dtype,
    is_rms_norm: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Add and normalise in one pass over memory: z, the sum if there is one, mu and rsigma."""
    kind = (not is_rms_norm) * LAYER | (residual is not None) * ADD
    call = Call(
        kind, summand, residual, gamma, beta, float(epsilon), round_sum=False, out_dtype=z_dtype
    )
    z, x, rsigma, mu = dispatch.save(call)
    return z, x, torch.zeros_like(rsigma) if mu is None else mu, rsigma


def gradients(
    dz: Tensor,
    dx: Tensor | None,
    x: Tensor,
    mu: Tensor,
    rsigma: Tensor,
    gamma: Tensor,
    dtypes: tuple[torch.dtype, torch.dtype | None],
    is_rms_norm: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """Make the gradients of the sum, in both dtypes, and of gamma and beta, and their parts."""
    formula = Formula((not is_rms_norm) * LAYER, 0.0, tuple(DEFAULT_OPTIONS.values()))
    weight = gamma.float()  # exact, and makes its gradient float32
    first, second, of_gamma, of_beta = dispatch.backward(
        formula,
        Wanted(*dtypes, weight=True, bias=True),
        wanted_backend(),
        dz,
        dx,
        x,
        None,
        weight,
        weight,
        rsigma,
        None if is_rms_norm else mu,
    )
    assert first is not None
    assert of_gamma is not None
    assert of_beta is not None
    if second is first:  # each has to be the caller's own
        second = first.clone()
    dgamma, dgamma_part = rounded(of_gamma, gamma)
    dbeta, dbeta_part = rounded(of_beta, gamma)
    return first, second, dgamma, dbeta, dgamma_part, dbeta_part


def rounded(total: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return a sum over rows in the dtype of `like`, and as it was, as the only row of parts."""
    return total.to(like.dtype, copy=True), total.unsqueeze(0)
