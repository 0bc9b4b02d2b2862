"""The functions of flash-attention's extension `dropout_layer_norm`, by its names and arguments.

They are what `flash_attn.ops.layer_norm`, `flash_attn.ops.rms_norm`, LoRAX and Text Generation
Inference call.  Here every hidden size, number of rows, mix of float32, float16 and bfloat16, and
device is served; nothing has to be contiguous or aligned.

    xf = x0 * rowscale * dropout * colscale + residual        float32, not rounded
    z = xhat(xf) * gamma + beta                               rounded once, to x0's dtype

xhat is that of `normkit.layer_norm` or, with is_rms_norm, of `normkit.rms_norm`.  A forward
function also returns xf, rounded to the residual's dtype, and what the backward function reads.
Autograd records none of them.  Tensors that the extension leaves undefined are None.

A subset names rows by numbers from 1 on, 0 for none.  No row may be named twice, and a number too
large raises on the CPU only: elsewhere a look at it would have to wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from normkit.compat._dropout_add import (
    check,
    check_floats,
    check_kept,
    check_mask,
    check_matrix,
    check_numbers,
    check_subsets,
    count,
    drop,
    gradients,
    inverse,
    norm,
    rounded,
    scale,
    take,
)

__all__ = [
    "dropout_add_ln_bwd",
    "dropout_add_ln_fwd",
    "dropout_add_ln_parallel_residual_bwd",
    "dropout_add_ln_parallel_residual_fwd",
]


@torch.no_grad()
def dropout_add_ln_fwd(
    x0: Tensor,
    residual: Tensor | None,
    gamma: Tensor,
    beta_: Tensor | None,
    rowscale_: Tensor | None,
    colscale_: Tensor | None,
    x0_subset_: Tensor | None,
    z_subset_: Tensor | None,
    dropout_p: float,
    epsilon: float,
    rowscale_const: float,
    z_numrows: int,
    gen_: torch.Generator | None,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> list[Tensor | None]:
    """Scale and drop x0, add the residual, and normalise each row of the sum.

        xf = x0 * rowscale * dropout * colscale + residual,  z = xhat(xf) * gamma + beta

    Args:
        x0: (x0_rows, n) in float32, float16 or bfloat16, as all that follow unless it is said.
        residual: (rows, n); None for zeros.  rows is x0_rows, or the length of x0_subset_.
        gamma: (n,), the weight.
        beta_: (n,), the bias; None for zeros.
        rowscale_: (rows,), a factor for each row of x0; None for 1.  Not with subsets.
        colscale_: (n,), a factor for each column of x0; None for 1.
        x0_subset_: (rows,) int32: which row of x0 enters the sum.  None: each its own.
        z_subset_: (rows,) int32: which row of z is made of the sum.  Given with x0_subset_ only.
        dropout_p: probability, from 0 to below 1, that an element of x0 counts as 0; the others
            are multiplied by 1 / (1 - dropout_p).
        epsilon: added to the variance or the mean of squares.
        rowscale_const: the factor for x0 where there are subsets; else not read.
        z_numrows: rows of z where there are subsets; else not read.
        gen_: generator of the dropout; None for the default one of x0's device.
        residual_in_fp32: without a residual, return x in float32.
        is_rms_norm: normalise by the root mean square.

    Returns:
        [z, x, dmask, mu, rsigma].  z: of x0's dtype, (rows, n) or (z_numrows, n); rows that no
        number names are zeros.  x: xf in residual's dtype, without one in x0's or float32; None
        where it would be x0 itself.  dmask: uint8 of x0's shape, 0 where dropped; None without
        dropout.  mu and rsigma: (rows,) float32, the mean of xf, zeros with is_rms_norm, which
        needs none, and 1 / sqrt(statistic + epsilon).

    Raises:
        TypeError: an argument is no tensor, or of the wrong dtype.
        ValueError: a shape, device or number is wrong, or one of the subsets is missing.

    Rounded are z and x, once each, from the float32 xf.  Semantics: dropout_layer_norm of
    flash-attention 2.

    Example:
        >>> import torch
        >>> from normkit.compat.dropout_layer_norm import dropout_add_ln_fwd
        >>> x0, residual, gamma = torch.ones(2, 4), torch.ones(2, 4), torch.ones(4)
        >>> none = None, None, None, None, None
        >>> z, x, *_ = dropout_add_ln_fwd(x0, residual, gamma, *none, 0.0, 1e-6, 1.0, 0, None)
        >>> x[0]
        tensor([2., 2., 2., 2.])
    """
    x0_rows, n = check_matrix("x0", x0)
    rows = count("x0_subset_", x0_subset_, x0_rows)
    check_floats(
        x0,
        ("residual", residual, (rows, n)),
        ("beta_", beta_, (n,)),
        ("rowscale_", rowscale_, (rows,)),
        ("colscale_", colscale_, (n,)),
    )
    check("gamma", gamma, x0, (n,))
    check_subsets(x0, x0_subset_, x0_rows, z_subset_, z_numrows, rowscale_, "z_numrows")
    check_numbers(dropout_p, epsilon)
    dmask = drop(x0, dropout_p, gen_)
    summand = x0
    scaled = any(t is not None for t in (rowscale_, colscale_, x0_subset_, dmask))
    if scaled:
        rowscale = rowscale_ if x0_subset_ is None else rowscale_const
        summand = scale(x0, rowscale, dmask, dropout_p, colscale_)
    if x0_subset_ is not None:
        summand = take(summand, x0_subset_)
    z, x, mu, rsigma = norm(summand, residual, gamma, beta_, epsilon, x0.dtype, is_rms_norm)
    if z_subset_ is not None:
        z = take(z, inverse(z_subset_, z_numrows))
    x_dtype = torch.float32 if residual_in_fp32 else x0.dtype
    if residual is None and (scaled or x_dtype != x0.dtype):
        x = summand.to(x_dtype)
    return [z, x, dmask, mu, rsigma]


@torch.no_grad()
def dropout_add_ln_bwd(
    dz: Tensor,
    dx_: Tensor | None,
    x: Tensor,
    x0_: Tensor | None,
    dmask_: Tensor | None,
    mu: Tensor,
    rsigma: Tensor,
    gamma: Tensor,
    rowscale_: Tensor | None,
    colscale_: Tensor | None,
    x0_subset_: Tensor | None,
    z_subset_: Tensor | None,
    dropout_p: float,
    rowscale_const: float,
    x0_numrows: int,
    has_residual: bool,
    is_rms_norm: bool = False,
) -> list[Tensor | None]:
    """Make the gradients of `dropout_add_ln_fwd`.

        dxf = rsigma * (g - xhat * mean(g * xhat) - mean(g)) + dx,  g = dz * gamma
        dx0 = dxf * rowscale * dropout * colscale,  dresidual = dxf

    Without mean(g) if is_rms_norm.

    Args:
        dz: gradient of z, of z's shape.
        dx_: gradient of x, (rows, n); None for zeros.
        x: what the forward function returned, or x0 where that is None.
        x0_: as given to it; needed with colscale_ only.
        dmask_: what it returned; needed if dropout_p is not 0, and else not read.
        mu: what it returned.
        rsigma: what it returned.
        gamma: as given to it, like all that follow.
        rowscale_: see there.
        colscale_: see there.
        x0_subset_: see there.
        z_subset_: see there.
        dropout_p: see there.
        rowscale_const: see there.
        x0_numrows: rows of x0 where there are subsets; else not read.
        has_residual: whether there was a residual.
        is_rms_norm: see there.

    Returns:
        [dx0, dresidual, dgamma, dbeta, dgamma_part, dbeta_part], and with colscale_ also dcolscale
        and dcolscale_part.  dx0: of x0's shape and dz's dtype; rows of x0 that no number names get
        zeros.  dresidual: of x's shape and dtype; None without a residual.  dgamma, dbeta and
        dcolscale: (n,), of gamma's or colscale_'s dtype.  The parts: float32 (1, n), the same
        before they were rounded.

    Raises:
        TypeError: an argument is no tensor, or of the wrong dtype.
        ValueError: a shape, device or number is wrong, or a tensor is missing.

    Each is rounded once; sums have a fixed order.  Semantics: dropout_layer_norm of
    flash-attention 2.

    Example:
        >>> import torch
        >>> from normkit.compat.dropout_layer_norm import dropout_add_ln_bwd
        >>> dz, x, gamma = torch.ones(1, 2), torch.tensor([[-1.0, 1.0]]), torch.ones(2)
        >>> mu, rsigma, none = torch.zeros(1), torch.ones(1), (None, None, None, None)
        >>> made = dropout_add_ln_bwd(
        ...     dz, None, x, None, None, mu, rsigma, gamma, *none, 0.0, 1.0, 0, False
        ... )
        >>> made[2]  # dgamma
        tensor([-1.,  1.])
    """
    rows, n = check_matrix("x", x)
    x0_rows = rows if x0_subset_ is None else x0_numrows
    z_rows = count("dz", dz, rows) if z_subset_ is not None else rows
    check_floats(
        x,
        ("dx_", dx_, (rows, n)),
        ("x0_", x0_, (x0_rows, n)),
        ("rowscale_", rowscale_, (rows,)),
        ("colscale_", colscale_, (n,)),
    )
    check("dz", dz, x, (z_rows, n))
    check("gamma", gamma, x, (n,))
    check_subsets(x, x0_subset_, x0_rows, z_subset_, z_rows, rowscale_, "x0_numrows")
    check_kept(x, mu, rsigma, dropout_p)
    dmask = check_mask("dmask_", dmask_, x, (x0_rows, n), dropout_p)
    if colscale_ is not None and x0_ is None:
        raise ValueError("x0_: expected a tensor, since there is a colscale_, got None")
    of_x0 = dz.dtype
    if z_subset_ is not None:
        dz = take(dz, z_subset_)
        # 0 times a NaN would reach the sums over rows.
        unnamed = z_subset_ <= 0
        x = x.masked_fill(unnamed.unsqueeze(1), 0.0)
        mu, rsigma = mu.masked_fill(unnamed, 0.0), rsigma.masked_fill(unnamed, 0.0)
    scaled = any(t is not None for t in (rowscale_, colscale_, x0_subset_, dmask))
    dtypes = torch.float32 if scaled else of_x0, x.dtype if has_residual else None
    dx0, dresidual, *of_affine = gradients(dz, dx_, x, mu, rsigma, gamma, dtypes, is_rms_norm)
    if not scaled:
        return [dx0, dresidual, *of_affine]
    rowscale: Tensor | float | None = rowscale_
    if x0_subset_ is not None:
        rowscale, origins = rowscale_const, inverse(x0_subset_, x0_numrows)
        dx0 = take(dx0, origins)
        if x0_ is not None:
            x0_ = x0_.masked_fill((origins == 0).unsqueeze(1), 0.0)
    of_colscale: tuple[Tensor, ...] = ()
    if colscale_ is not None and x0_ is not None:
        total = scale(dx0 * x0_, rowscale, dmask, dropout_p).sum(0)
        of_colscale = rounded(total, colscale_)
    dx0 = scale(dx0, rowscale, dmask, dropout_p, colscale_).to(of_x0)
    return [dx0, dresidual, *of_affine, *of_colscale]


@torch.no_grad()
def dropout_add_ln_parallel_residual_fwd(
    x0: Tensor,
    x1_: Tensor | None,
    residual: Tensor | None,
    gamma0: Tensor,
    beta0_: Tensor | None,
    gamma1_: Tensor | None,
    beta1_: Tensor | None,
    dropout_p: float,
    epsilon: float,
    gen_: torch.Generator | None,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> list[Tensor | None]:
    """Drop from x0 and x1, add them and the residual, and normalise the sum with two weights.

        xf = x0 * dropout + x1 * dropout + residual
        z0 = xhat(xf) * gamma0 + beta0,  z1 = xhat(xf) * gamma1 + beta1

    Args:
        x0: (rows, n) in float32, float16 or bfloat16, as all that follow.
        x1_: (rows, n); None for zeros.
        residual: (rows, n); None for zeros.
        gamma0: (n,), the weight of z0.
        beta0_: (n,), its bias; None for zeros.
        gamma1_: (n,), the weight of z1; None for no z1.
        beta1_: (n,), its bias; None for zeros.
        dropout_p: as in `dropout_add_ln_fwd`; x0 and x1 are dropped each by itself, x0 first.
        epsilon: as there, like all that follow.
        gen_: see there.
        residual_in_fp32: see there.
        is_rms_norm: see there.

    Returns:
        [z0, z1, x, dmask0, dmask1, mu, rsigma]: z1 is None without gamma1_, dmask1 without x1_ or
        dropout; else as there, with z1 of x0's dtype too.

    Raises:
        TypeError: an argument is no tensor, or of the wrong dtype.
        ValueError: a shape, device or number is wrong.

    Rounded are z0, z1 and x, once each, from the float32 xf.  Semantics: dropout_layer_norm of
    flash-attention 2.

    Example:
        >>> import torch
        >>> from normkit.compat import dropout_layer_norm
        >>> forward = dropout_layer_norm.dropout_add_ln_parallel_residual_fwd
        >>> x0, x1, gamma = torch.ones(2, 4), torch.ones(2, 4), torch.ones(4)
        >>> z0, z1, x, *_ = forward(x0, x1, None, gamma, None, None, None, 0.0, 1e-6, None)
        >>> x[0]
        tensor([2., 2., 2., 2.])
    """
    rows, n = check_matrix("x0", x0)
    check_floats(
        x0,
        ("x1_", x1_, (rows, n)),
        ("residual", residual, (rows, n)),
        ("beta0_", beta0_, (n,)),
        ("gamma1_", gamma1_, (n,)),
        ("beta1_", beta1_, (n,)),
    )
    check("gamma0", gamma0, x0, (n,))
    check_numbers(dropout_p, epsilon)
    dmask0 = drop(x0, dropout_p, gen_)
    dmask1 = None if x1_ is None else drop(x1_, dropout_p, gen_)
    made = x1_ is not None or dmask0 is not None
    summand = scale(x0, None, dmask0, dropout_p) if made else x0
    if x1_ is not None:
        summand = summand + scale(x1_, None, dmask1, dropout_p)
    statistics = epsilon, x0.dtype, is_rms_norm
    z0, x, mu, rsigma = norm(summand, residual, gamma0, beta0_, *statistics)
    z1 = None
    if gamma1_ is not None:
        z1 = norm(summand, residual, gamma1_, beta1_, *statistics)[0]
    x_dtype = torch.float32 if residual_in_fp32 else x0.dtype
    if residual is None and (made or x_dtype != x0.dtype):
        x = summand.to(x_dtype)
    return [z0, z1, x, dmask0, dmask1, mu, rsigma]


@torch.no_grad()
def dropout_add_ln_parallel_residual_bwd(
    dz0: Tensor,
    dz1_: Tensor | None,
    dx_: Tensor | None,
    x: Tensor,
    dmask0_: Tensor | None,
    dmask1_: Tensor | None,
    mu: Tensor,
    rsigma: Tensor,
    gamma0: Tensor,
    gamma1_: Tensor | None,
    dropout_p: float,
    has_x1: bool,
    has_residual: bool,
    is_rms_norm: bool = False,
) -> list[Tensor | None]:
    """Make the gradients of `dropout_add_ln_parallel_residual_fwd`.

        dxf = rsigma * (g - xhat * mean(g * xhat) - mean(g)) + dx,  g = dz0 * gamma0 + dz1 * gamma1
        dx0 = dxf * dropout,  dx1 = dxf * dropout,  dresidual = dxf

    Without mean(g) if is_rms_norm.

    Args:
        dz0: gradient of z0, (rows, n).
        dz1_: gradient of z1; given if and only if gamma1_ is.
        dx_: gradient of x, (rows, n); None for zeros.
        x: what the forward function returned, or x0 where that is None.
        dmask0_: what it returned; needed if dropout_p is not 0, and else not read.
        dmask1_: likewise, if has_x1.
        mu: what it returned.
        rsigma: what it returned.
        gamma0: as given to it, like all that follow.
        gamma1_: see there.
        dropout_p: see there.
        has_x1: whether there was an x1.
        has_residual: whether there was a residual.
        is_rms_norm: see there.

    Returns:
        [dx0, dx1, dresidual, dgamma0, dbeta0, dgamma1, dbeta1, dgamma0_part, dbeta0_part,
        dgamma1_part, dbeta1_part], in shapes and dtypes as in `dropout_add_ln_bwd`; None for what
        there was not.

    Raises:
        TypeError: an argument is no tensor, or of the wrong dtype.
        ValueError: a shape, device or number is wrong, or a tensor is missing.

    Each is rounded once; sums have a fixed order.  Semantics: dropout_layer_norm of
    flash-attention 2.

    Example:
        >>> import torch
        >>> from normkit.compat import dropout_layer_norm
        >>> backward = dropout_layer_norm.dropout_add_ln_parallel_residual_bwd
        >>> dz0, x, gamma = torch.ones(1, 2), torch.tensor([[-1.0, 1.0]]), torch.ones(2)
        >>> none, mu, rsigma = (None, None), torch.zeros(1), torch.ones(1)
        >>> made = backward(dz0, *none, x, *none, mu, rsigma, gamma, None, 0.0, False, False)
        >>> made[3]  # dgamma0
        tensor([-1.,  1.])
    """
    rows, n = check_matrix("x", x)
    check_floats(x, ("dz1_", dz1_, (rows, n)), ("dx_", dx_, (rows, n)), ("gamma1_", gamma1_, (n,)))
    check("dz0", dz0, x, (rows, n))
    check("gamma0", gamma0, x, (n,))
    if (dz1_ is None) != (gamma1_ is None):
        given, missing = ("gamma1_", "dz1_") if dz1_ is None else ("dz1_", "gamma1_")
        raise ValueError(f"{missing}: expected a tensor, since there is a {given}, got None")
    check_kept(x, mu, rsigma, dropout_p)
    of_second: list[Tensor | None] = [None] * 4
    dmask0 = check_mask("dmask0_", dmask0_, x, (rows, n), dropout_p)
    dmask1 = check_mask("dmask1_", dmask1_, x, (rows, n), dropout_p) if has_x1 else None
    if dz1_ is not None and gamma1_ is not None:
        dx_, _, *of_second = gradients(
            dz1_, dx_, x, mu, rsigma, gamma1_, (torch.float32, None), is_rms_norm
        )
    dropped = dmask0 is not None
    dtypes = torch.float32 if dropped else dz0.dtype, x.dtype if has_residual else None
    dx0, dresidual, *of_first = gradients(dz0, dx_, x, mu, rsigma, gamma0, dtypes, is_rms_norm)
    dx1 = None
    if has_x1:
        dx1 = scale(dx0, None, dmask1, dropout_p).to(dz0.dtype) if dropped else dx0.clone()
    if dropped:
        dx0 = scale(dx0, None, dmask0, dropout_p).to(dz0.dtype)
    dgamma0, dbeta0, *parts0 = of_first
    dgamma1, dbeta1, *parts1 = of_second
    return [dx0, dx1, dresidual, dgamma0, dbeta0, dgamma1, dbeta1, *parts0, *parts1]
