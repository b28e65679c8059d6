"""Kernels for channels-last ``(R, C)``: a channel is a column of R rows, and memory runs along the rows.

Rows are taken `ROWS` at a time, in tiles of `TILE` columns whose sums and coefficients stay in registers: four
vectors side by side, read downwards, are what processors fetch ahead best. The columns left over go by single vectors.
Few channels are folded: k rows of C are read as one row of k * C columns, which fills whole tiles or vectors, and the k
columns of a channel are merged at the end. A column is gathered over at most `ROWS` rows about a value near their mean
before it is merged in float64.

Working memory of a block, in WIDTH columns each: mean and sum of squares (float64), then first, sum and square (of the
type computed in).
"""

from .. import slots
from ..activations import activate
from ..arguments import (
    data,
    double,
    has_residual,
    integer,
    parameter,
    plain,
    working_doubles,
    working_lanes,
)
from ..moments import finish_channel, merge_moments, origin
from ..vectors import (
    fence,
    fma,
    inlined,
    load,
    narrow,
    not_below_zero,
    splat,
    vload,
    vstore,
    vstore_first,
    vstream,
    widen,
    zeros,
)
from .columns import TILE, column_origin, columns, origins, read
from .finish import finish_channels

ROWS = 64
REGION = 5  # float64 numbers of working memory per column of a block


@inlined
def gathered(x, at, left, first, total, square):
    """Add up to sixteen elements to sums about ``first``."""
    v = read(x, at, left, first) - first
    return total + v, fma(v, v, square)


@inlined
def gather_tile(a, x, lanes, width, column, low, high, stride):
    """Gather rows low to high of 64 columns about ``first``: two sums of each, in registers."""
    f0, f1 = vload(lanes, column), vload(lanes, column + 16)
    f2, f3 = vload(lanes, column + 32), vload(lanes, column + 48)
    s0 = s1 = s2 = s3 = t0 = t1 = t2 = t3 = zeros(a)
    q0 = q1 = q2 = q3 = r0 = r1 = r2 = r3 = zeros(a)
    at, rows = low * stride + column, high - low
    while rows >= 2:
        s0, q0 = gathered(x, at, 16, f0, s0, q0)
        s1, q1 = gathered(x, at + 16, 16, f1, s1, q1)
        s2, q2 = gathered(x, at + 32, 16, f2, s2, q2)
        s3, q3 = gathered(x, at + 48, 16, f3, s3, q3)
        at += stride
        t0, r0 = gathered(x, at, 16, f0, t0, r0)
        t1, r1 = gathered(x, at + 16, 16, f1, t1, r1)
        t2, r2 = gathered(x, at + 32, 16, f2, t2, r2)
        t3, r3 = gathered(x, at + 48, 16, f3, t3, r3)
        at += stride
        rows -= 2
    if rows > 0:
        s0, q0 = gathered(x, at, 16, f0, s0, q0)
        s1, q1 = gathered(x, at + 16, 16, f1, s1, q1)
        s2, q2 = gathered(x, at + 32, 16, f2, s2, q2)
        s3, q3 = gathered(x, at + 48, 16, f3, s3, q3)
    at = width + column
    vstore(lanes, at, s0 + t0)
    vstore(lanes, at + 16, s1 + t1)
    vstore(lanes, at + 32, s2 + t2)
    vstore(lanes, at + 48, s3 + t3)
    at += width
    vstore(lanes, at, q0 + r0)
    vstore(lanes, at + 16, q1 + r1)
    vstore(lanes, at + 32, q2 + r2)
    vstore(lanes, at + 48, q3 + r3)


@inlined
def gather_column(a, x, lanes, width, column, low, high, stride, left):
    """Gather rows low to high of up to sixteen columns about ``first``: four sums of each."""
    first = vload(lanes, column)
    s0 = s1 = s2 = s3 = q0 = q1 = q2 = q3 = zeros(a)
    at, rows = low * stride + column, high - low
    while rows >= 4:
        s0, q0 = gathered(x, at, left, first, s0, q0)
        s1, q1 = gathered(x, at + stride, left, first, s1, q1)
        s2, q2 = gathered(x, at + 2 * stride, left, first, s2, q2)
        s3, q3 = gathered(x, at + 3 * stride, left, first, s3, q3)
        at += 4 * stride
        rows -= 4
    while rows > 0:
        s0, q0 = gathered(x, at, left, first, s0, q0)
        at += stride
        rows -= 1
    vstore(lanes, width + column, (s0 + s1) + (s2 + s3))
    vstore(lanes, 2 * width + column, (q0 + q1) + (q2 + q3))


@inlined
def merge_columns(a, moments, lanes, width, begin, end, count, n):
    """Merge what columns gathered over n rows into their mean and sum of squares, over ``count`` rows before.

    The mean is told from `origins`.
    """
    part, share, weight = splat(1.0 / n), splat(n / (count + n)), splat(count * (n / (count + n)))
    for column in range(begin, end, 16):
        first, total = widen(vload(lanes, column)), widen(vload(lanes, width + column))
        square = widen(vload(lanes, 2 * width + column))
        mean, m2 = vload(moments, column), vload(moments, width + column)
        delta = first - origins(a, column) + total * part - mean
        spread = not_below_zero(square - total * total * part)
        vstore(moments, column, mean + delta * share)
        vstore(moments, width + column, m2 + spread + delta * delta * weight)


@inlined
def pivot(x, start, left, rows, stride, a):
    """Sixteen values near the columns' means: averages of a few rows, as `contiguous.pivot`."""
    few = 16 if rows >= 16 else 4 if rows >= 4 else 1
    total = zeros(a)
    for i in range(few):
        total = total + read(x, start + i * stride, left, zeros(a))
    return total * narrow(a, splat(1.0 / float(few)))


@inlined
def gather(a, moments, lanes, low, high, begin, end):
    """Moments of rows low to high of columns begin to end."""
    x, width, stride = data(a, slots.X), integer(a, slots.WIDTH), columns(a)
    zero = splat(0.0)
    for column in range(begin, end, 16):
        vstore(moments, column, zero)
        vstore(moments, width + column, zero)
    count, start = 0.0, low
    while start < high:
        stop = min(start + ROWS, high)
        for column in range(begin, end, 16):
            first = pivot(x, start * stride + column, stride - column, stop - start, stride, a)
            vstore(lanes, column, first)
        column = begin
        while column + TILE <= min(end, stride):
            gather_tile(a, x, lanes, width, column, start, stop, stride)
            column += TILE
        while column < end:
            gather_column(a, x, lanes, width, column, start, stop, stride, stride - column)
            column += 16
        merge_columns(a, moments, lanes, width, begin, end, count, float(stop - start))
        count += float(stop - start)
        start = stop


@inlined
def first_row(a, block):
    """The first folded row of a block."""
    return integer(a, slots.OUTER) // integer(a, slots.FOLD) * block // integer(a, slots.BLOCKS)


@inlined
def output(a, x, residual, index, left, centre, scale, offset):
    """Up to sixteen elements of y."""
    z = fma(read(x, index, left, centre) - centre, scale, offset)
    if has_residual(a):
        z = z + read(residual, index, left, centre)
    return activate(a, z)


@inlined
def write(address, index, left, value, stream):
    """Write up to sixteen elements. Only whole vectors are streamed."""
    if left < 16:
        vstore_first(address, index, left, value)
    elif stream:
        vstream(address, index, value)
    else:
        vstore(address, index, value)


@inlined
def write_tile(a, low, high, column):
    """Write y of rows low to high of 64 columns, whose coefficients stay in registers."""
    x, y, residual = data(a, slots.X), data(a, slots.Y), data(a, slots.RESIDUAL)
    coefficients, width, stream = parameter(a, slots.COEFFICIENTS), integer(a, slots.WIDTH), integer(a, slots.STREAM)
    stride = columns(a)
    c0, c1 = vload(coefficients, column), vload(coefficients, column + 16)
    c2, c3 = vload(coefficients, column + 32), vload(coefficients, column + 48)
    s0, s1 = vload(coefficients, width + column), vload(coefficients, width + column + 16)
    s2, s3 = vload(coefficients, width + column + 32), vload(coefficients, width + column + 48)
    t0, t1 = vload(coefficients, 2 * width + column), vload(coefficients, 2 * width + column + 16)
    t2, t3 = vload(coefficients, 2 * width + column + 32), vload(coefficients, 2 * width + column + 48)
    at = low * stride + column
    if stream:
        for _ in range(low, high):
            vstream(y, at, output(a, x, residual, at, 16, c0, s0, t0))
            vstream(y, at + 16, output(a, x, residual, at + 16, 16, c1, s1, t1))
            vstream(y, at + 32, output(a, x, residual, at + 32, 16, c2, s2, t2))
            vstream(y, at + 48, output(a, x, residual, at + 48, 16, c3, s3, t3))
            at += stride
    else:
        for _ in range(low, high):
            vstore(y, at, output(a, x, residual, at, 16, c0, s0, t0))
            vstore(y, at + 16, output(a, x, residual, at + 16, 16, c1, s1, t1))
            vstore(y, at + 32, output(a, x, residual, at + 32, 16, c2, s2, t2))
            vstore(y, at + 48, output(a, x, residual, at + 48, 16, c3, s3, t3))
            at += stride


@inlined
def write_column(a, low, high, column, left):
    """Write y of rows low to high of the last ``left`` columns, up to sixteen of them."""
    x, y, residual = data(a, slots.X), data(a, slots.Y), data(a, slots.RESIDUAL)
    coefficients, width, stream = parameter(a, slots.COEFFICIENTS), integer(a, slots.WIDTH), integer(a, slots.STREAM)
    centre = vload(coefficients, column)
    scale, offset = vload(coefficients, width + column), vload(coefficients, 2 * width + column)
    stride = columns(a)
    at = low * stride + column
    for _ in range(low, high):
        write(y, at, left, output(a, x, residual, at, left, centre, scale, offset), stream)
        at += stride


@inlined
def write_rows(a, low, high, begin, end, valid):
    """Write y of rows low to high over columns begin to end; a row has ``valid`` columns."""
    start, last = low, min(end, valid)
    while start < high:
        i, column = min(high, start + ROWS), begin
        while column + TILE <= last:
            write_tile(a, start, i, column)
            column += TILE
        while column < last:
            write_column(a, start, i, column, valid - column)
            column += 16
        start = i


def forward(begin, end, a):
    """Training forward of few rows: a task is a tile of GROUP columns, from statistics to output."""
    common = plain(a)
    width, tile, rows = integer(a, slots.WIDTH), integer(a, slots.GROUP), integer(a, slots.OUTER)
    moments, lanes, channels = double(a, slots.PARTIALS), region_lanes(common, 0), integer(a, slots.CHANNELS)
    for task in range(begin, end):
        low, high = task * tile, min((task + 1) * tile, width)
        gather(common, moments, lanes, 0, rows, low, high)
        for column in range(low, high, 16):
            finish_channels(common, column, moments, width)
        write_rows(a, 0, rows, low, high, channels)
    fence()


@inlined
def region(a, block):
    """The float64 columns of a block: mean and sum of squares, or the two sums of the backward."""
    return working_doubles(a, slots.PARTIALS, block * REGION * integer(a, slots.WIDTH))


@inlined
def region_lanes(a, block):
    """The lanes of a block, which follow its float64 columns."""
    return working_lanes(a, slots.PARTIALS, (block * REGION + 2) * integer(a, slots.WIDTH))


def partial(begin, end, a):
    """Moments of blocks of rows."""
    for block in range(begin, end):
        low, high = first_row(a, block), first_row(a, block + 1)
        gather(a, region(a, block), region_lanes(a, block), low, high, 0, integer(a, slots.WIDTH))


@inlined
def merge_blocks(a, column):
    """Merge sixteen columns of every block, in the blocks' order, into those of the first."""
    width, blocks, into = integer(a, slots.WIDTH), integer(a, slots.BLOCKS), region(a, 0)
    mean, m2 = vload(into, column), vload(into, width + column)
    count = float(first_row(a, 1))
    for block in range(1, blocks):
        n, other = float(first_row(a, block + 1) - first_row(a, block)), region(a, block)
        share = n / (count + n)
        delta = vload(other, column) - mean
        mean = mean + delta * splat(share)
        m2 = m2 + vload(other, width + column) + delta * delta * splat(count * share)
        count += n
    vstore(into, column, mean)
    vstore(into, width + column, m2)


def finish(begin, end, a):
    """Merge blocks and columns in order, and finish the channels: a task is sixteen channels, or all if folded."""
    x, rows, channels = data(a, slots.X), integer(a, slots.OUTER), integer(a, slots.CHANNELS)
    width, fold, moments = integer(a, slots.WIDTH), integer(a, slots.FOLD), region(a, 0)
    if fold == 1:
        for task in range(begin, end):
            merge_blocks(a, 16 * task)
            finish_channels(a, 16 * task, moments, width)
        return
    for column in range(0, width, 16):
        merge_blocks(a, column)
    n = float(rows // fold)
    for k in range(channels):
        count, mean, m2, base = 0.0, 0.0, 0.0, origin(a, k)
        for column in range(k, fold * channels, channels):
            other = column_origin(a, column) - base + load(moments, column)
            mean, m2 = merge_moments(count, mean, m2, n, other, load(moments, width + column))
            count += n
        for row in range(rows // fold * fold, rows):
            mean, m2 = merge_moments(count, mean, m2, 1.0, float(load(x, row * channels + k)) - base, 0.0)
            count += 1.0
        finish_channel(a, k, base + mean, m2)


def apply(begin, end, a):
    """Write y of blocks of rows, from the coefficients."""
    width, fold, rows = integer(a, slots.WIDTH), integer(a, slots.FOLD), integer(a, slots.OUTER)
    # The last first: what was gathered last may still lie in a cache.
    for block in range(end - 1, begin - 1, -1):
        write_rows(a, first_row(a, block), first_row(a, block + 1), 0, width, columns(a))
        if block == integer(a, slots.BLOCKS) - 1 and rows % fold:
            write_rows(a, rows // fold, rows // fold + 1, 0, width, rows % fold * integer(a, slots.CHANNELS))
    fence()
