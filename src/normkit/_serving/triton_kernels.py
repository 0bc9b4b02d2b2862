"""The row norms in Triton, for devices without kernels of their own.

`normkit._triton` launches them, and says what the arguments are.  This module imports Triton, and
so is itself imported by the first call that wants it.

Which column is added to which is a function of the block alone: the sum of a row is a tree of
additions of two numbers each, written out here.  `tl.sum` of a row would leave the order to the
layout that the compiler picks for a tensor, which follows dtypes, strides and the alignment of
pointers; then the bits of a row would follow them too, and a fused add would not equal an unfused
one.  For the same reason the launcher has products and sums not contracted.

Only functions that are built into `triton.language` are used: Triton's interpreter, with which the
tests run these kernels on the CPU, takes no others if Triton was imported before it was asked for.
"""

# No `from __future__ import annotations`: the compiler looks for tl.constexpr, not for its name.

import torch
import triton
import triton.language as tl

# Blocks between two additions to the sum of a streamed row, so that its error grows with the root
# of the row's length.
BLOCKS_PER_PART = tl.constexpr(16)


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _sum_rows(t, ROWS: tl.constexpr, LOG2_BLOCK: tl.constexpr):
    """Sums of the rows of t (ROWS, 2^LOG2_BLOCK), of shape (ROWS, 1).

    First neighbours are added, which a thread that loads 16 bytes at a time has both of, and then
    half to half.
    """
    for level in tl.static_range(LOG2_BLOCK):
        if level < 3:
            pairs = tl.reshape(t, (ROWS, 1 << (LOG2_BLOCK - level - 1), 2))
            t = tl.reduce(pairs, 2, _add)
        else:
            halves = tl.reshape(t, (ROWS, 2, 1 << (LOG2_BLOCK - level - 1)))
            t = tl.reduce(halves, 1, _add)
    return tl.reshape(t, (ROWS, 1))


@triton.jit
def _row_offsets(row, sizes, strides, DIMS: tl.constexpr):
    """Where rows begin, in elements: sizes and strides are of the outer dimensions, int64."""
    offset = row * 0
    for d in tl.static_range(DIMS - 1):  # the last dimension runs fastest
        offset += row % sizes[DIMS - 1 - d] * strides[DIMS - 1 - d]
        row = row // sizes[DIMS - 1 - d]
    return offset + row * strides[0]


@triton.jit
def _clamped(t, CLAMPS: tl.constexpr):
    """Infinities are made the largest float16; NaN stays."""
    if CLAMPS:
        t = tl.where(t > 65504.0, 65504.0, t)
        t = tl.where(t < -65504.0, -65504.0, t)
    return t


@triton.jit
def _total(
    x,
    residual,
    x_at,
    residual_at,
    mask,
    CLAMP_X: tl.constexpr,
    ROUND_SUM: tl.constexpr,
):
    """What residual_out is to hold, or x where there is no residual; 0 outside the mask."""
    total = _clamped(tl.load(x + x_at, mask=mask, other=0.0).to(tl.float32), CLAMP_X)
    if residual is not None:
        total += tl.load(residual + residual_at, mask=mask, other=0.0).to(tl.float32)
        if ROUND_SUM:
            total = total.to(residual.dtype.element_ty).to(tl.float32)
    return total


@triton.jit
def _scaled(
    centred,
    rstd,
    weight,
    bias,
    weight_at,
    bias_at,
    mask,
    weight_offset,
    HAS_OFFSET: tl.constexpr,
    ROUND_WEIGHT: tl.constexpr,
    XHAT_DTYPE: tl.constexpr,
):
    """What is rounded to y."""
    y = (centred * rstd).to(XHAT_DTYPE).to(tl.float32)
    if weight is not None:
        scale = tl.load(weight + weight_at, mask=mask, other=0.0).to(tl.float32)
        if HAS_OFFSET:  # adding 0.0 would turn a weight of -0.0 into +0.0
            scale += weight_offset
            if ROUND_WEIGHT:
                scale = scale.to(weight.dtype.element_ty).to(tl.float32)
        y *= scale
    if bias is not None:
        y += tl.load(bias + bias_at, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def _rstd(sum_of_squares, count, eps, RSTD_DTYPE: tl.constexpr):
    """Rounded to the nearest at every step, as `1 / sqrt` and `/` are not on every device."""
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(sum_of_squares, count) + eps))
    return rstd.to(RSTD_DTYPE).to(tl.float32)


@triton.jit
def norm_rows(
    x,
    residual,
    weight,
    bias,
    out,
    residual_out,
    saved_rstd,
    saved_mean,
    sizes,
    x_strides,
    residual_strides,
    out_strides,
    residual_out_strides,
    weight_stride,
    bias_stride,
    rows,
    heads,
    n,
    count,
    eps,
    weight_offset,
    LAYER: tl.constexpr,
    PER_HEAD: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    NORMALISED: tl.constexpr,
    ROUND_BEFORE_WEIGHT: tl.constexpr,
    ROUND_SUM: tl.constexpr,
    CLAMP_INF: tl.constexpr,
    ROUND_RSTD: tl.constexpr,
    ROUND_WEIGHT: tl.constexpr,
    IN_PLACE: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    LOG2_BLOCK: tl.constexpr,
):
    """Normalise ROWS rows that fit into a block each, and stay in registers."""
    CLAMP_X: tl.constexpr = CLAMP_INF and x.dtype.element_ty == tl.float16
    CLAMP_SUM: tl.constexpr = (
        CLAMP_INF and ROUND_SUM and residual is not None and tl.float16 == NORMALISED
    )
    XHAT_DTYPE: tl.constexpr = NORMALISED if ROUND_BEFORE_WEIGHT else tl.float32
    RSTD_DTYPE: tl.constexpr = NORMALISED if ROUND_RSTD else tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, 1 << LOG2_BLOCK)[None, :]
    mask = (row < rows) & (column < n)
    x_at = _row_offsets(row, sizes, x_strides, DIMS) + column
    residual_at = _row_offsets(row, sizes, residual_strides, DIMS) + column
    total = _total(x, residual, x_at, residual_at, mask, CLAMP_X, ROUND_SUM)
    centred = _clamped(total, CLAMP_SUM)
    if LAYER:
        mean = tl.div_rn(_sum_rows(centred, ROWS, LOG2_BLOCK), count)
        centred = tl.where(mask, centred - mean, 0.0)
    rstd = _rstd(_sum_rows(centred * centred, ROWS, LOG2_BLOCK), count, eps, RSTD_DTYPE)
    if PER_HEAD:
        weight_at = row % heads * weight_stride + column
        bias_at = row % heads * bias_stride + column
        affine_mask = mask
    else:
        weight_at = column
        bias_at = column
        affine_mask = column < n
    y = _scaled(
        centred, rstd, weight, bias, weight_at, bias_at, affine_mask, weight_offset, HAS_OFFSET,
        ROUND_WEIGHT, XHAT_DTYPE,
    )  # fmt: skip
    if IN_PLACE:  # an element may be loaded by another thread than the one that stores it
        tl.debug_barrier()
    if residual is not None:
        residual_out_at = _row_offsets(row, sizes, residual_out_strides, DIMS) + column
        stored = total.to(residual_out.dtype.element_ty)
        tl.store(residual_out + residual_out_at, stored, mask=mask)
    out_at = _row_offsets(row, sizes, out_strides, DIMS) + column
    tl.store(out + out_at, y.to(out.dtype.element_ty), mask=mask)
    if saved_rstd is not None:
        tl.store(saved_rstd + row, rstd, mask=row < rows)
        if LAYER:
            tl.store(saved_mean + row, mean, mask=row < rows)


@triton.jit
def _streamed_sum(
    x,
    residual,
    x_at,
    residual_at,
    mean,
    n,
    CENTRED_SQUARES: tl.constexpr,
    SQUARES: tl.constexpr,
    ROUND_SUM: tl.constexpr,
    CLAMP_X: tl.constexpr,
    CLAMP_SUM: tl.constexpr,
    LOG2_BLOCK: tl.constexpr,
):
    """The sum of a row's elements, their squares, or the squares of their distances from mean."""
    block: tl.constexpr = 1 << LOG2_BLOCK
    columns = tl.arange(0, block)[None, :]
    sums = tl.full((1, block), 0.0, tl.float32)
    for first in range(0, n, block * BLOCKS_PER_PART):
        part = tl.full((1, block), 0.0, tl.float32)
        for start in range(first, tl.minimum(first + block * BLOCKS_PER_PART, n), block):
            column = start + columns
            mask = column < n
            at = x_at + column
            t = _total(x, residual, at, residual_at + column, mask, CLAMP_X, ROUND_SUM)
            t = _clamped(t, CLAMP_SUM)
            if CENTRED_SQUARES:
                t = tl.where(mask, t - mean, 0.0)
            if SQUARES:
                t = t * t
            part += t
        sums += part
    return _sum_rows(sums, 1, LOG2_BLOCK)


@triton.jit
def norm_streamed_row(
    x,
    residual,
    weight,
    bias,
    out,
    residual_out,
    saved_rstd,
    saved_mean,
    sizes,
    x_strides,
    residual_strides,
    out_strides,
    residual_out_strides,
    weight_stride,
    bias_stride,
    rows,
    heads,
    n,
    count,
    eps,
    weight_offset,
    LAYER: tl.constexpr,
    PER_HEAD: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    NORMALISED: tl.constexpr,
    ROUND_BEFORE_WEIGHT: tl.constexpr,
    ROUND_SUM: tl.constexpr,
    CLAMP_INF: tl.constexpr,
    ROUND_RSTD: tl.constexpr,
    ROUND_WEIGHT: tl.constexpr,
    IN_PLACE: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    LOG2_BLOCK: tl.constexpr,
):
    """Normalise a row that is read again for each statistic, and for y.

    residual_out is written in the last pass only, so that it may be x or residual.
    """
    CLAMP_X: tl.constexpr = CLAMP_INF and x.dtype.element_ty == tl.float16
    CLAMP_SUM: tl.constexpr = (
        CLAMP_INF and ROUND_SUM and residual is not None and tl.float16 == NORMALISED
    )
    XHAT_DTYPE: tl.constexpr = NORMALISED if ROUND_BEFORE_WEIGHT else tl.float32
    RSTD_DTYPE: tl.constexpr = NORMALISED if ROUND_RSTD else tl.float32
    block: tl.constexpr = 1 << LOG2_BLOCK
    row = tl.program_id(0).to(tl.int64) + tl.full((1, 1), 0, tl.int64)
    x_at = _row_offsets(row, sizes, x_strides, DIMS)
    residual_at = _row_offsets(row, sizes, residual_strides, DIMS)
    residual_out_at = _row_offsets(row, sizes, residual_out_strides, DIMS)
    out_at = _row_offsets(row, sizes, out_strides, DIMS)
    weight_at = row * 0
    bias_at = row * 0
    if PER_HEAD:
        weight_at = row % heads * weight_stride
        bias_at = row % heads * bias_stride
    mean = tl.full((1, 1), 0.0, tl.float32)
    if LAYER:
        of_row = _streamed_sum(
            x, residual, x_at, residual_at, mean, n, False, False, ROUND_SUM, CLAMP_X, CLAMP_SUM,
            LOG2_BLOCK,
        )  # fmt: skip
        mean = tl.div_rn(of_row, count)
    of_squares = _streamed_sum(
        x, residual, x_at, residual_at, mean, n, LAYER, True, ROUND_SUM, CLAMP_X, CLAMP_SUM,
        LOG2_BLOCK,
    )  # fmt: skip
    rstd = _rstd(of_squares, count, eps, RSTD_DTYPE)
    columns = tl.arange(0, block)[None, :]
    for start in range(0, n, block):
        column = start + columns
        mask = column < n
        at = x_at + column
        total = _total(x, residual, at, residual_at + column, mask, CLAMP_X, ROUND_SUM)
        centred = _clamped(total, CLAMP_SUM)
        if LAYER:
            centred -= mean
        y = _scaled(
            centred, rstd, weight, bias, weight_at + column, bias_at + column, mask, weight_offset,
            HAS_OFFSET, ROUND_WEIGHT, XHAT_DTYPE,
        )  # fmt: skip
        if IN_PLACE:
            tl.debug_barrier()
        if residual is not None:
            stored = total.to(residual_out.dtype.element_ty)
            tl.store(residual_out + residual_out_at + column, stored, mask=mask)
        tl.store(out + out_at + column, y.to(out.dtype.element_ty), mask=mask)
    if saved_rstd is not None:
        tl.store(saved_rstd + row, rstd)
        if LAYER:
            tl.store(saved_mean + row, mean)


DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

# The decorator has seen TRITON_INTERPRET: the kernels run on the CPU, and slowly.
INTERPRETED = not isinstance(norm_rows, triton.JITFunction)
