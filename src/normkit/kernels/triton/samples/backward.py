"""Triton kernels of the per-sample backward; see `passes` for how the work is cut.

With ``g = dz * weight`` a row's gradient is ``dx = rstd * (g - mean(g) - xhat * mean(g * xhat))``; a root mean square
has no ``mean(g)``.
"""

import triton
import triton.language as tl

from ..channels.backward import read, write
from ..channels.steps import backward_coefficients, coefficients, gradient, true_product
from ..tiles import share_of
from .steps import columns_of, lines_of, parameters, place_columns, standard


@triton.jit
def backward_lines(
    dy_ptr,
    x_ptr,
    dx_ptr,
    weight_ptr,
    bias_ptr,
    saved_ptr,
    partials_ptr,
    samples,
    groups,
    width,
    tiles,
    splits,
    CENTRE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DEPTH: tl.constexpr,
    RUN: tl.constexpr,
    WIDTH_STEP: tl.constexpr,
):
    """Backward of lines that fit one tile and have a weight for every element: dx, and a share's dweight and dbias."""
    width = width // WIDTH_STEP * WIDTH_STEP
    g = tl.program_id(0)
    i = tl.arange(0, RUN)
    weight, bias = parameters(weight_ptr, bias_ptr, g, i, width, 1)
    rows = tl.cast(samples, tl.int64) * groups
    dweight = tl.zeros((RUN,), tl.float32)
    dbias = tl.zeros((RUN,), tl.float32)
    low, high = share_of(tiles, splits)
    for t in range(low, high):
        line, inside = lines_of(t, g, samples, groups, DEPTH)
        at = line[None, :] * width + i[:, None]
        valid = (i < width)[:, None] & inside[None, :]
        mean = tl.load(saved_ptr + line, mask=inside, other=0.0)
        rstd = tl.load(saved_ptr + rows + line, mask=inside, other=0.0)
        centre, slope, lost = standard(mean, rstd)
        x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + at, mask=valid, other=0.0).to(tl.float32)
        xhat = tl.where(valid, tl.fma(x - centre, slope[None, :], lost[None, :]), 0.0)
        dz = gradient(dy, None, at, valid, xhat, weight[:, None], bias[:, None], ACTIVATION)
        dweight += tl.sum(dz * xhat, 1)
        dbias += tl.sum(dz, 1)
        scaled = dz * weight[:, None]
        along = -tl.sum(scaled * xhat, 0) / width
        shift = along * 0.0
        if CENTRE:
            shift = -tl.sum(scaled, 0) / width
        inner = scaled + tl.fma(xhat, along[None, :], shift[None, :])
        tl.store(dx_ptr + at, (inner * slope[None, :]).to(dx_ptr.dtype.element_ty), mask=valid)
    if partials_ptr is not None:
        channels = tl.cast(groups, tl.int64) * width
        where = tl.program_id(1) * channels + g * width + i
        tl.store(partials_ptr + where, dbias.to(tl.float64), mask=i < width)
        tl.store(partials_ptr + splits * channels + where, dweight.to(tl.float64), mask=i < width)


@triton.jit
def load_row(saved_ptr, k, inside, columns, size):
    """Mean and rstd of the row that each column is part of."""
    mean = tl.load(saved_ptr + k // size, mask=inside, other=0.0)
    rstd = tl.load(saved_ptr + columns // size + k // size, mask=inside, other=1.0)
    return mean, rstd


@triton.jit
def backward_partial_columns(
    dy_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    saved_ptr,
    partials_ptr,
    columns,
    channels,
    size,
    positions,
    tiles,
    splits,
    ACTIVATION: tl.constexpr,
    LAST: tl.constexpr,
    DEPTH: tl.constexpr,
    RUN: tl.constexpr,
    INNER_STEP: tl.constexpr,
    CHANNEL_STEP: tl.constexpr,
):
    """Sums of dz and of dz * xhat over one share of every column."""
    positions = positions // INNER_STEP * INNER_STEP
    channels = channels // CHANNEL_STEP * CHANNEL_STEP
    k, inside = columns_of(columns, RUN)
    mean, rstd = load_row(saved_ptr, k, inside, columns, size)
    centre, scale, offset = coefficients(k % channels, inside, mean, rstd, weight_ptr, bias_ptr)
    slope = rstd.to(tl.float32)
    total = k.to(tl.float64) * 0.0
    along = total
    low, high = share_of(tiles, splits)
    for t in range(low, high):
        at, valid, _ = place_columns(t, k, inside, channels, positions, LAST, DEPTH)
        distance, dz = read(dy_ptr, x_ptr, None, at, valid, centre, scale[None, :], offset[None, :], ACTIVATION)
        total += tl.sum(dz, 0).to(tl.float64)
        along += tl.sum(dz * (distance * slope), 0).to(tl.float64)
    where = tl.program_id(1).to(tl.int64) * columns + k
    tl.store(partials_ptr + where, total, mask=inside)
    product = true_product(total, along, mean, centre, rstd)
    tl.store(partials_ptr + tl.cast(splits, tl.int64) * columns + where, product, mask=inside)


@triton.jit
def apply_backward_columns(
    dy_ptr,
    x_ptr,
    dx_ptr,
    weight_ptr,
    bias_ptr,
    saved_ptr,
    exact_ptr,
    columns,
    channels,
    size,
    positions,
    tiles,
    splits,
    count: tl.float64,
    ACTIVATION: tl.constexpr,
    LAST: tl.constexpr,
    DEPTH: tl.constexpr,
    RUN: tl.constexpr,
    INNER_STEP: tl.constexpr,
    CHANNEL_STEP: tl.constexpr,
):
    """Write dx from the sums of each column's row, the tiles read last first."""
    positions = positions // INNER_STEP * INNER_STEP
    channels = channels // CHANNEL_STEP * CHANNEL_STEP
    k, inside = columns_of(columns, RUN)
    mean, rstd = load_row(saved_ptr, k, inside, columns, size)
    centre, scale, offset = coefficients(k % channels, inside, mean, rstd, weight_ptr, bias_ptr)
    slope = rstd.to(tl.float32)
    # The weights are in the sums already.
    total, product = load_row(exact_ptr, k, inside, columns, size)
    b, d = backward_coefficients(total, product, count, mean, centre, rstd, None, k, inside)
    low, high = share_of(tiles, splits)
    for t in range(low, high):
        at, valid, _ = place_columns(low + high - 1 - t, k, inside, channels, positions, LAST, DEPTH)
        distance, dz = read(dy_ptr, x_ptr, None, at, valid, centre, scale[None, :], offset[None, :], ACTIVATION)
        write(dx_ptr, None, at, valid, distance, dz, scale[None, :], slope, b, d[None, :], False)
