"""What the Triton kernels of per-sample normalization are made of: where values lie, and what follows from statistics.

A line is the run of memory of one group of one sample, in contiguous memory. A column is one channel of one sample, in
both memory layouts: its positions lie side by side, or C apart. A tile holds positions along axis 0 and lines or
columns along axis 1; everything per line or column is a float64 vector. LAST says that the channels lie last.
"""

import triton
import triton.language as tl

from ..channels.steps import INFINITY, SHRINK, combine, is_any, merge, tile_moments


@triton.jit
def lines_of(t, g, samples, groups, DEPTH: tl.constexpr):
    """The lines of tile t, one group of DEPTH samples, and which of them exist."""
    sample = t * DEPTH + tl.arange(0, DEPTH)
    return sample.to(tl.int64) * groups + g, sample < samples


@triton.jit
def columns_of(columns, RUN: tl.constexpr):
    """The columns of this program, and which of them exist."""
    k = tl.program_id(0).to(tl.int64) * RUN + tl.arange(0, RUN)
    return k, k < columns


@triton.jit
def place_columns(t, k, inside, channels, positions, LAST: tl.constexpr, DEPTH: tl.constexpr):
    """Where DEPTH positions of each column lie, which of them exist, and where the first lies."""
    s = t * DEPTH + tl.arange(0, DEPTH)
    begin = tl.cast(t, tl.int64) * DEPTH
    if LAST:
        base = k // channels * positions * channels + k % channels
        at = base[None, :] + s.to(tl.int64)[:, None] * channels
        first = base + begin * channels
    else:
        at = k[None, :] * positions + s[:, None]
        first = k * positions + begin
    return at, (s < positions)[:, None] & inside[None, :], first


@triton.jit
def parameters(weight_ptr, bias_ptr, g, i, width, inner):
    """Weight and bias of the elements of a line: one for ``inner`` neighbours."""
    at = (g * width + i) // inner
    weight = tl.full(i.shape, 1.0, tl.float32)
    bias = tl.full(i.shape, 0.0, tl.float32)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + at, mask=i < width, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + at, mask=i < width, other=0.0)
    return weight, bias


@triton.jit
def settle_row(mean, m2, count, eps, CENTRE: tl.constexpr):
    """What is removed and what is multiplied by: mean and 1 / deviation, or 0 and 1 / root mean square."""
    var = m2 / count
    if CENTRE:
        return mean, 1.0 / tl.sqrt(var + eps)
    else:
        return mean * 0.0, 1.0 / tl.sqrt(var + mean * mean + eps)


@triton.jit
def line_moments(x, valid, first, n):
    """Mean and sum of squares of every line of a tile; huge values are shrunk where their squares overflow."""
    mean, m2 = tile_moments(x, valid, first, n, 1.0)
    finite = m2 < INFINITY
    if is_any(finite == 0, True):
        shrunk_mean, shrunk_m2 = tile_moments(x, valid, first, n, SHRINK)
        mean = tl.where(finite, mean, shrunk_mean)
        m2 = tl.where(finite, m2, shrunk_m2)
    return mean, m2


@triton.jit
def standard(mean, rstd):
    """What makes ``xhat = (x - centre) * slope + lost``, float32: ``lost`` is what rounding the mean took away."""
    centre = mean.to(tl.float32)
    lost = (centre.to(tl.float64) - mean) * rstd
    return centre, rstd.to(tl.float32), lost.to(tl.float32)


@triton.jit
def finish_rows(
    partials_ptr,
    saved_ptr,
    rows,
    columns,
    size,
    splits,
    count: tl.float64,
    eps: tl.float64,
    variance_ptr,
    CENTRE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Merge the parts of all columns of one row, in a fixed order, and save what normalizes it."""
    row = tl.program_id(0).to(tl.int64)
    plane = tl.cast(splits, tl.int64) * columns
    total = tl.sum(tl.zeros((1,), tl.float64), 0)
    mean = total
    m2 = total
    for low in range(0, splits * size, CHUNK):
        e = low + tl.arange(0, CHUNK)
        at = (e // size).to(tl.int64) * columns + row * size + e % size
        valid = e < splits * size
        n = tl.load(partials_ptr + at, mask=valid, other=0.0)
        means = tl.load(partials_ptr + plane + at, mask=valid, other=0.0)
        squares = tl.load(partials_ptr + 2 * plane + at, mask=valid, other=0.0)
        begin = tl.cast(low // size, tl.int64) * columns + row * size + low % size
        part = tl.sum(n, 0)
        part_mean, part_m2 = combine(n, means, squares, valid, tl.load(partials_ptr + plane + begin), part)
        mean, m2 = merge(total, mean, m2, part, part_mean, part_m2)
        total += part
    if variance_ptr is not None:
        tl.store(variance_ptr + row, m2 / count)
    mean, rstd = settle_row(mean, m2, count, eps, CENTRE)
    tl.store(saved_ptr + row, mean)
    tl.store(saved_ptr + columns // size + row, rstd)


@triton.jit
def finish_row_sums(partials_ptr, exact_ptr, weight_ptr, rows, columns, channels, size, splits, CHUNK: tl.constexpr):
    """Add the sums of all columns of one row, each times its weight: of dz and of dz * xhat."""
    row = tl.program_id(0).to(tl.int64)
    plane = tl.cast(splits, tl.int64) * columns
    total = tl.sum(tl.zeros((1,), tl.float64), 0)
    product = total
    for low in range(0, splits * size, CHUNK):
        e = low + tl.arange(0, CHUNK)
        column = row * size + e % size
        at = (e // size).to(tl.int64) * columns + column
        valid = e < splits * size
        sums = tl.load(partials_ptr + at, mask=valid, other=0.0)
        along = tl.load(partials_ptr + plane + at, mask=valid, other=0.0)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + column % channels, mask=valid, other=0.0).to(tl.float64)
            sums *= weight
            along *= weight
        total += tl.sum(sums, 0)
        product += tl.sum(along, 0)
    tl.store(exact_ptr + row, total)
    tl.store(exact_ptr + rows + row, product)


@triton.jit
def add_parts(partials_ptr, sums_ptr, channels, parts, DEPTH: tl.constexpr, WIDTH: tl.constexpr):
    """Add the parts' sums of WIDTH channels, in a fixed order: sums is (dweight, dbias)."""
    c = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = c < channels
    plane = tl.cast(parts, tl.int64) * channels
    total = tl.zeros((WIDTH,), tl.float64)
    product = tl.zeros((WIDTH,), tl.float64)
    for low in range(0, parts, DEPTH):
        part = low + tl.arange(0, DEPTH)
        at = part.to(tl.int64)[:, None] * channels + c[None, :]
        valid = (part < parts)[:, None] & inside[None, :]
        total += tl.sum(tl.load(partials_ptr + at, mask=valid, other=0.0), 0)
        product += tl.sum(tl.load(partials_ptr + plane + at, mask=valid, other=0.0), 0)
    tl.store(sums_ptr + c, product.to(tl.float32), mask=inside)
    tl.store(sums_ptr + channels + c, total.to(tl.float32), mask=inside)
