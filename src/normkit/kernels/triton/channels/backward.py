"""Triton kernels of the backward, for both layouts; see `passes` for how the work is cut.

With constant statistics (FROZEN) dx needs no sum, and the kernel that gathers dweight and dbias writes it on the way.
"""

import triton
import triton.language as tl

from ..tiles import channel, place, share_of
from .steps import backward_coefficients, coefficients, gradient, true_product


@triton.jit
def load_saved(c, inside, channels, saved_ptr):
    """Mean and rstd of this program's channels."""
    mean = tl.load(saved_ptr + c, mask=inside, other=0.0)
    rstd = tl.load(saved_ptr + channels + c, mask=inside, other=1.0)
    return mean, rstd


@triton.jit
def read(dy_ptr, x_ptr, other_ptr, at, valid, centre, scale, offset, ACTIVATION: tl.constexpr):
    """Return x - centre and dz of one tile."""
    distance = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32) - centre
    dy = tl.load(dy_ptr + at, mask=valid, other=0.0).to(tl.float32)
    return distance, gradient(dy, other_ptr, at, valid, distance, scale, offset, ACTIVATION)


@triton.jit
def write(dx_ptr, dresidual_ptr, at, valid, distance, dz, scale, slope, b, d, FROZEN: tl.constexpr):
    """Write dx, and the residual's gradient where an activation makes it differ from dy."""
    # Where x is infinite, a frozen dx still is finite.
    dx = dz * scale if FROZEN else tl.fma(dz, scale, tl.fma(distance * slope, b, d))
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=valid)
    if dresidual_ptr is not None:
        tl.store(dresidual_ptr + at, dz.to(dresidual_ptr.dtype.element_ty), mask=valid)


@triton.jit
def backward(
    dy_ptr,
    x_ptr,
    other_ptr,
    dx_ptr,
    dresidual_ptr,
    weight_ptr,
    bias_ptr,
    saved_ptr,
    sums_ptr,
    outer,
    channels,
    inner,
    chunks,
    count: tl.float64,
    FROZEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    RUN: tl.constexpr,
    INNER_STEP: tl.constexpr,
    CHANNEL_STEP: tl.constexpr,
):
    """Backward of channels that fit one tile: x and dy are read once."""
    inner = inner // INNER_STEP * INNER_STEP
    channels = channels // CHANNEL_STEP * CHANNEL_STEP
    c = channel(ROWS, RUN)
    inside = c < channels
    mean, rstd = load_saved(c, inside, channels, saved_ptr)
    centre, scale, offset = coefficients(c, inside, mean, rstd, weight_ptr, bias_ptr)
    slope = rstd.to(tl.float32)
    at, valid = place(0, c, outer, channels, inner, chunks, ROWS, DEPTH, RUN)
    distance, dz = read(dy_ptr, x_ptr, other_ptr, at, valid, centre, scale, offset, ACTIVATION)
    total = tl.sum(dz, 0).to(tl.float64)
    along = tl.sum(dz * (distance * slope), 0).to(tl.float64)
    product = true_product(total, along, mean, centre, rstd)
    tl.store(sums_ptr + c, product.to(tl.float32), mask=inside)
    tl.store(sums_ptr + channels + c, total.to(tl.float32), mask=inside)
    b, d = backward_coefficients(total, product, count, mean, centre, rstd, weight_ptr, c, inside)
    write(dx_ptr, dresidual_ptr, at, valid, distance, dz, scale, slope, b, d, FROZEN)


@triton.jit
def backward_partial(
    dy_ptr,
    x_ptr,
    other_ptr,
    dx_ptr,
    dresidual_ptr,
    weight_ptr,
    bias_ptr,
    saved_ptr,
    partials_ptr,
    outer,
    channels,
    inner,
    chunks,
    tiles,
    splits,
    FROZEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    RUN: tl.constexpr,
    INNER_STEP: tl.constexpr,
    CHANNEL_STEP: tl.constexpr,
):
    """Sums of dz and of dz * xhat over one share of a channel's tiles; FROZEN writes dx as well."""
    inner = inner // INNER_STEP * INNER_STEP
    channels = channels // CHANNEL_STEP * CHANNEL_STEP
    c = channel(ROWS, RUN)
    inside = c < channels
    mean, rstd = load_saved(c, inside, channels, saved_ptr)
    centre, scale, offset = coefficients(c, inside, mean, rstd, weight_ptr, bias_ptr)
    slope = rstd.to(tl.float32)
    total = c.to(tl.float64) * 0.0
    along = total
    low, high = share_of(tiles, splits)
    for t in range(low, high):
        at, valid = place(t, c, outer, channels, inner, chunks, ROWS, DEPTH, RUN)
        distance, dz = read(dy_ptr, x_ptr, other_ptr, at, valid, centre, scale, offset, ACTIVATION)
        total += tl.sum(dz, 0).to(tl.float64)
        along += tl.sum(dz * (distance * slope), 0).to(tl.float64)
        if FROZEN:
            write(dx_ptr, dresidual_ptr, at, valid, distance, dz, scale, slope, scale, scale, True)
    where = tl.program_id(1) * channels + c
    tl.store(partials_ptr + where, total, mask=inside)
    tl.store(partials_ptr + splits * channels + where, along, mask=inside)


@triton.jit
def apply_backward(
    dy_ptr,
    x_ptr,
    other_ptr,
    dx_ptr,
    dresidual_ptr,
    weight_ptr,
    bias_ptr,
    saved_ptr,
    exact_ptr,
    outer,
    channels,
    inner,
    chunks,
    tiles,
    splits,
    count: tl.float64,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    RUN: tl.constexpr,
    INNER_STEP: tl.constexpr,
    CHANNEL_STEP: tl.constexpr,
):
    """Write dx from the channel's sums, the tiles read last first."""
    inner = inner // INNER_STEP * INNER_STEP
    channels = channels // CHANNEL_STEP * CHANNEL_STEP
    c = channel(ROWS, RUN)
    inside = c < channels
    mean, rstd = load_saved(c, inside, channels, saved_ptr)
    centre, scale, offset = coefficients(c, inside, mean, rstd, weight_ptr, bias_ptr)
    slope = rstd.to(tl.float32)
    total = tl.load(exact_ptr + c, mask=inside, other=0.0)
    product = tl.load(exact_ptr + channels + c, mask=inside, other=0.0)
    b, d = backward_coefficients(total, product, count, mean, centre, rstd, weight_ptr, c, inside)
    low, high = share_of(tiles, splits)
    for k in range(low, high):
        at, valid = place(low + high - 1 - k, c, outer, channels, inner, chunks, ROWS, DEPTH, RUN)
        distance, dz = read(dy_ptr, x_ptr, other_ptr, at, valid, centre, scale, offset, ACTIVATION)
        write(dx_ptr, dresidual_ptr, at, valid, distance, dz, scale, slope, b, d, False)
