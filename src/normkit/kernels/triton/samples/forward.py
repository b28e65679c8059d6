"""Triton kernels of the per-sample forward; see `passes` for how the work is cut.

WIDTH_STEP, INNER_STEP and CHANNEL_STEP are powers of two that divide the sizes they are named after: said in the code,
they let the compiler load 16 bytes at a time. Nothing is added atomically.
"""

import triton
import triton.language as tl

from ..channels.steps import INFINITY, SHRINK, activate, coefficients, is_any, merge, save, tile_moments
from ..tiles import share_of
from .steps import columns_of, line_moments, lines_of, parameters, place_columns, settle_row, standard


@triton.jit
def forward_lines(
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    saved_ptr,
    variance_ptr,
    samples,
    groups,
    width,
    inner,
    tiles,
    splits,
    eps: tl.float64,
    CENTRE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DEPTH: tl.constexpr,
    RUN: tl.constexpr,
    WIDTH_STEP: tl.constexpr,
):
    """Forward of lines that fit one tile: x is read once. A program has one group of its share of the samples."""
    width = width // WIDTH_STEP * WIDTH_STEP
    g = tl.program_id(0)
    i = tl.arange(0, RUN)
    weight, bias = parameters(weight_ptr, bias_ptr, g, i, width, inner)
    rows = tl.cast(samples, tl.int64) * groups
    low, high = share_of(tiles, splits)
    for t in range(low, high):
        line, inside = lines_of(t, g, samples, groups, DEPTH)
        at = line[None, :] * width + i[:, None]
        valid = (i < width)[:, None] & inside[None, :]
        x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
        first = tl.load(x_ptr + line * width, mask=inside, other=0.0).to(tl.float32)
        mean, m2 = line_moments(x, valid, first, width)
        if variance_ptr is not None:
            tl.store(variance_ptr + line, m2 / width, mask=inside)
        mean, rstd = settle_row(mean, m2, width, eps, CENTRE)
        save(line, inside, rows, mean, rstd, saved_ptr)
        centre, slope, lost = standard(mean, rstd)
        z = tl.fma(tl.fma(x - centre, slope[None, :], lost[None, :]), weight[:, None], bias[:, None])
        tl.store(y_ptr + at, activate(z, ACTIVATION).to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit
def gather_columns(
    x_ptr, k, inside, low, high, channels, positions, LAST: tl.constexpr, DEPTH: tl.constexpr, FACTOR: tl.constexpr
):
    """Count, mean and sum of squares of tiles low to high of every column."""
    mean = k.to(tl.float64) * 0.0
    m2 = mean
    count = tl.sum(tl.zeros((1,), tl.float64), 0)
    for t in range(low, high):
        at, valid, begin = place_columns(t, k, inside, channels, positions, LAST, DEPTH)
        values = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
        first = tl.load(x_ptr + begin, mask=inside, other=0.0).to(tl.float32)
        n = tl.minimum(positions - t * DEPTH, DEPTH)
        tile_mean, tile_m2 = tile_moments(values, valid, first, n, FACTOR)
        size = n.to(tl.float64)
        mean, m2 = merge(count, mean, m2, size, tile_mean, tile_m2)
        count += size
    return count, mean, m2


@triton.jit
def partial_columns(
    x_ptr,
    partials_ptr,
    columns,
    channels,
    positions,
    tiles,
    splits,
    LAST: tl.constexpr,
    DEPTH: tl.constexpr,
    RUN: tl.constexpr,
    INNER_STEP: tl.constexpr,
    CHANNEL_STEP: tl.constexpr,
):
    """Moments of one share of every column: (count, mean, m2) by share and column."""
    positions = positions // INNER_STEP * INNER_STEP
    channels = channels // CHANNEL_STEP * CHANNEL_STEP
    k, inside = columns_of(columns, RUN)
    low, high = share_of(tiles, splits)
    count, mean, m2 = gather_columns(x_ptr, k, inside, low, high, channels, positions, LAST, DEPTH, 1.0)
    finite = m2 < INFINITY
    if is_any(finite == 0, True):
        _, shrunk_mean, shrunk_m2 = gather_columns(
            x_ptr, k, inside, low, high, channels, positions, LAST, DEPTH, SHRINK
        )
        mean = tl.where(finite, mean, shrunk_mean)
        m2 = tl.where(finite, m2, shrunk_m2)
    plane = tl.cast(splits, tl.int64) * columns
    where = tl.program_id(1).to(tl.int64) * columns + k
    tl.store(partials_ptr + where, tl.where(inside, count, 0.0), mask=inside)
    tl.store(partials_ptr + plane + where, mean, mask=inside)
    tl.store(partials_ptr + 2 * plane + where, m2, mask=inside)


@triton.jit
def apply_columns(
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    saved_ptr,
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
    """Write y from the saved mean and rstd of the row that each column is part of, the tiles read last first."""
    positions = positions // INNER_STEP * INNER_STEP
    channels = channels // CHANNEL_STEP * CHANNEL_STEP
    k, inside = columns_of(columns, RUN)
    mean = tl.load(saved_ptr + k // size, mask=inside, other=0.0)
    rstd = tl.load(saved_ptr + columns // size + k // size, mask=inside, other=1.0)
    centre, scale, offset = coefficients(k % channels, inside, mean, rstd, weight_ptr, bias_ptr)
    low, high = share_of(tiles, splits)
    for t in range(low, high):
        at, valid, _ = place_columns(low + high - 1 - t, k, inside, channels, positions, LAST, DEPTH)
        x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
        z = tl.fma(x - centre, scale[None, :], offset[None, :])
        tl.store(y_ptr + at, activate(z, ACTIVATION).to(y_ptr.dtype.element_ty), mask=valid)
