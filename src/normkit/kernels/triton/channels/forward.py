"""Triton kernels of the forward, for both layouts.

INNER_STEP and CHANNEL_STEP are powers of two that divide S and C: said in the code, they let the compiler load 16 bytes
at a time. Nothing is added atomically, and the work is cut by shape alone: results are the same in every run.
"""

import triton
import triton.language as tl

from ..tiles import channel, first_of, place, share_of, size_of
from .steps import INFINITY, SHRINK, activate, coefficients, is_any, merge, save, settle, tile_moments


@triton.jit
def gather(
    x_ptr,
    c,
    low,
    high,
    outer,
    channels,
    inner,
    chunks,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    RUN: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Count, mean and sum of squares of tiles low to high."""
    mean = c.to(tl.float64) * 0.0
    m2 = mean
    count = tl.sum(tl.zeros((1,), tl.float64), 0)
    for t in range(low, high):
        at, valid = place(t, c, outer, channels, inner, chunks, ROWS, DEPTH, RUN)
        values = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
        begin = first_of(t, c, channels, inner, chunks, ROWS, DEPTH, RUN)
        first = tl.load(x_ptr + begin, mask=c < channels, other=0.0).to(tl.float32)
        n = size_of(t, outer, inner, chunks, ROWS, DEPTH, RUN)
        tile_mean, tile_m2 = tile_moments(values, valid, first, n, FACTOR)
        size = n.to(tl.float64)
        mean, m2 = merge(count, mean, m2, size, tile_mean, tile_m2)
        count += size
    return count, mean, m2


@triton.jit
def forward(
    x_ptr,
    y_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    saved_ptr,
    outer,
    channels,
    inner,
    chunks,
    count: tl.float64,
    momentum: tl.float64,
    eps: tl.float64,
    UNBIASED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    RUN: tl.constexpr,
    INNER_STEP: tl.constexpr,
    CHANNEL_STEP: tl.constexpr,
):
    """Training forward of channels that fit one tile: x is read once."""
    inner = inner // INNER_STEP * INNER_STEP
    channels = channels // CHANNEL_STEP * CHANNEL_STEP
    c = channel(ROWS, RUN)
    inside = c < channels
    at, valid = place(0, c, outer, channels, inner, chunks, ROWS, DEPTH, RUN)
    x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
    begin = first_of(0, c, channels, inner, chunks, ROWS, DEPTH, RUN)
    first = tl.load(x_ptr + begin, mask=inside, other=0.0).to(tl.float32)
    n = tl.cast(count, tl.float32)
    mean, m2 = tile_moments(x, valid, first, n, 1.0)
    finite = m2 < INFINITY
    if is_any(finite == 0, ROWS):
        shrunk_mean, shrunk_m2 = tile_moments(x, valid, first, n, SHRINK)
        mean = tl.where(finite, mean, shrunk_mean)
        m2 = tl.where(finite, m2, shrunk_m2)
    rstd = settle(
        c, inside, channels, mean, m2, count, saved_ptr, running_mean_ptr, running_var_ptr, momentum, eps, UNBIASED
    )
    centre, scale, offset = coefficients(c, inside, mean, rstd, weight_ptr, bias_ptr)
    z = tl.fma(x - centre, scale, offset)
    if residual_ptr is not None:
        z += tl.load(residual_ptr + at, mask=valid, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, activate(z, ACTIVATION).to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit
def partial(
    x_ptr,
    partials_ptr,
    outer,
    channels,
    inner,
    chunks,
    tiles,
    splits,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    RUN: tl.constexpr,
    INNER_STEP: tl.constexpr,
    CHANNEL_STEP: tl.constexpr,
):
    """Moments of one share of a channel's tiles: (count, mean, m2) by share and channel."""
    inner = inner // INNER_STEP * INNER_STEP
    channels = channels // CHANNEL_STEP * CHANNEL_STEP
    c = channel(ROWS, RUN)
    inside = c < channels
    low, high = share_of(tiles, splits)
    count, mean, m2 = gather(x_ptr, c, low, high, outer, channels, inner, chunks, ROWS, DEPTH, RUN, 1.0)
    finite = m2 < INFINITY
    if is_any(finite == 0, ROWS):
        _, shrunk_mean, shrunk_m2 = gather(
            x_ptr, c, low, high, outer, channels, inner, chunks, ROWS, DEPTH, RUN, SHRINK
        )
        mean = tl.where(finite, mean, shrunk_mean)
        m2 = tl.where(finite, m2, shrunk_m2)
    where = tl.program_id(1) * channels + c
    tl.store(partials_ptr + where, tl.where(inside, count, 0.0), mask=inside)
    tl.store(partials_ptr + splits * channels + where, mean, mask=inside)
    tl.store(partials_ptr + 2 * splits * channels + where, m2, mask=inside)


@triton.jit
def apply(
    x_ptr,
    y_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    saved_ptr,
    outer,
    channels,
    inner,
    chunks,
    tiles,
    splits,
    eps: tl.float64,
    STORED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    RUN: tl.constexpr,
    INNER_STEP: tl.constexpr,
    CHANNEL_STEP: tl.constexpr,
):
    """Write y from the saved mean and rstd, or with STORED from the running statistics, which are then saved."""
    inner = inner // INNER_STEP * INNER_STEP
    channels = channels // CHANNEL_STEP * CHANNEL_STEP
    c = channel(ROWS, RUN)
    inside = c < channels
    if STORED:
        mean = tl.load(running_mean_ptr + c, mask=inside, other=0.0).to(tl.float64)
        rstd = 1.0 / tl.sqrt(tl.load(running_var_ptr + c, mask=inside, other=1.0).to(tl.float64) + eps)
        if tl.program_id(1) == 0:
            save(c, inside, channels, mean, rstd, saved_ptr)
    else:
        mean = tl.load(saved_ptr + c, mask=inside, other=0.0)
        rstd = tl.load(saved_ptr + channels + c, mask=inside, other=1.0)
    centre, scale, offset = coefficients(c, inside, mean, rstd, weight_ptr, bias_ptr)
    low, high = share_of(tiles, splits)
    # The tiles read last by the pass before are the ones still in the cache.
    for k in range(low, high):
        at, valid = place(low + high - 1 - k, c, outer, channels, inner, chunks, ROWS, DEPTH, RUN)
        x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
        z = tl.fma(x - centre, scale, offset)
        if residual_ptr is not None:
            z += tl.load(residual_ptr + at, mask=valid, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, activate(z, ACTIVATION).to(y_ptr.dtype.element_ty), mask=valid)
