"""Kernels for channels-last ``(R, C)``: a channel is a column of R rows, and memory runs along the rows.

Rows are taken in strips, so that what a column gathers is fetched and put back once a strip. Few channels are folded: k
rows of C are read as one row of k * C columns, which fills whole vectors, and the k columns of a channel are merged at
the end. A column is gathered over at most `ROWS` rows about a value near their mean before it is merged in float64.

Working memory of a block, in WIDTH columns each: mean and sum of squares (float64), then first, sum and square (of the
type computed in).
"""

from .. import slots
from ..activations import activate, gate, invert
from ..arguments import (
    data,
    double,
    gates_by_output,
    has_activation,
    has_residual,
    integer,
    parameter,
    working_doubles,
    working_lanes,
)
from ..moments import finish_backward, finish_channel, merge_moments, origin
from ..vectors import (
    fence,
    fma,
    inlined,
    load,
    narrow,
    not_below_zero,
    splat,
    vload,
    vload_first,
    vstore,
    vstore_first,
    vstream,
    widen,
    zeros,
)
from .columns import column_origin, columns, origins, read
from .finish import finish_channels, finish_channels_backward, restore_channels

ROWS = 64
REGION = 5  # float64 numbers of working memory per column of a block


@inlined
def gather_column(x, lanes, width, column, low, high, stride, left):
    """Add rows low to high of sixteen columns to their sums about ``first``."""
    first = vload(lanes, column)
    s0, q0 = vload(lanes, width + column), vload(lanes, 2 * width + column)
    at, rows = low * stride + column, high - low
    s1 = s2 = s3 = q1 = q2 = q3 = first - first
    if left >= 16:
        while rows >= 4:
            v = vload(x, at) - first
            s0, q0 = s0 + v, fma(v, v, q0)
            v = vload(x, at + stride) - first
            s1, q1 = s1 + v, fma(v, v, q1)
            v = vload(x, at + 2 * stride) - first
            s2, q2 = s2 + v, fma(v, v, q2)
            v = vload(x, at + 3 * stride) - first
            s3, q3 = s3 + v, fma(v, v, q3)
            at += 4 * stride
            rows -= 4
    # Four sums for the last columns too: over 64 rows a single one lost more than two units in the last place.
    while rows >= 4:
        v = vload_first(x, at, left, first) - first
        s0, q0 = s0 + v, fma(v, v, q0)
        v = vload_first(x, at + stride, left, first) - first
        s1, q1 = s1 + v, fma(v, v, q1)
        v = vload_first(x, at + 2 * stride, left, first) - first
        s2, q2 = s2 + v, fma(v, v, q2)
        v = vload_first(x, at + 3 * stride, left, first) - first
        s3, q3 = s3 + v, fma(v, v, q3)
        at += 4 * stride
        rows -= 4
    s0, q0 = (s0 + s1) + (s2 + s3), (q0 + q1) + (q2 + q3)
    while rows > 0:
        v = read(x, at, left, first) - first
        s0, q0 = s0 + v, fma(v, v, q0)
        at += stride
        rows -= 1
    vstore(lanes, width + column, s0)
    vstore(lanes, 2 * width + column, q0)


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
    x, width, stride, strip = data(a, slots.X), integer(a, slots.WIDTH), columns(a), integer(a, slots.STRIP)
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
            vstore(lanes, width + column, zeros(a))
            vstore(lanes, 2 * width + column, zeros(a))
        i = start
        while i < stop:
            upto = min(i + strip, stop)
            for column in range(begin, end, 16):
                gather_column(x, lanes, width, column, i, upto, stride, stride - column)
            i = upto
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
def write_rows(a, low, high, begin, end, valid):
    """Write y of rows low to high, last first, over columns begin to end; a row has ``valid`` columns."""
    x, y, residual = data(a, slots.X), data(a, slots.Y), data(a, slots.RESIDUAL)
    coefficients, width, stream = parameter(a, slots.COEFFICIENTS), integer(a, slots.WIDTH), integer(a, slots.STREAM)
    stride, strip, i = columns(a), integer(a, slots.STRIP), high
    while i > low:
        start = max(low, i - strip)
        for column in range(begin, min(end, valid), 16):
            centre = vload(coefficients, column)
            scale, offset = vload(coefficients, width + column), vload(coefficients, 2 * width + column)
            at, left, rows = start * stride + column, valid - column, i - start
            if left >= 16 and not stream:
                while rows >= 2:
                    first = output(a, x, residual, at, 16, centre, scale, offset)
                    second = output(a, x, residual, at + stride, 16, centre, scale, offset)
                    vstore(y, at, first)
                    vstore(y, at + stride, second)
                    at += 2 * stride
                    rows -= 2
            while rows > 0:
                write(y, at, left, output(a, x, residual, at, left, centre, scale, offset), stream)
                at += stride
                rows -= 1
        i = start


def forward(begin, end, a):
    """Training forward of few rows: a task is a tile of GROUP columns, from statistics to output."""
    width, tile, rows = integer(a, slots.WIDTH), integer(a, slots.GROUP), integer(a, slots.OUTER)
    moments, lanes, channels = double(a, slots.PARTIALS), region_lanes(a, 0), integer(a, slots.CHANNELS)
    for task in range(begin, end):
        low, high = task * tile, min((task + 1) * tile, width)
        gather(a, moments, lanes, 0, rows, low, high)
        for column in range(low, high, 16):
            finish_channels(a, column, moments, width)
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
    for block in range(begin, end):
        write_rows(a, first_row(a, block), first_row(a, block + 1), 0, width, columns(a))
        if block == integer(a, slots.BLOCKS) - 1 and rows % fold:
            write_rows(a, rows // fold, rows // fold + 1, 0, width, rows % fold * integer(a, slots.CHANNELS))
    fence()


@inlined
def gradient(a, dy, other, distance, index, left, scale, offset):
    """Up to sixteen elements of dz, the gradient before the activation; lanes past the row's end are zero."""
    zero = zeros(a)
    dz = read(dy, index, left, zero)
    if gates_by_output(a):
        dz = gate(a, dz, read(other, index, left, zero))
    elif has_activation(a):
        z = fma(distance, scale, offset)
        if has_residual(a):
            z = z + read(other, index, left, zero)
        dz = gate(a, dz, z)
    return dz


@inlined
def gather_backward(a, sums, lanes, low, high, begin, end, valid):
    """Add rows low to high of columns begin to end to their sums of dz and of dz * (x - centre)."""
    x, dy, other = data(a, slots.X), data(a, slots.DY), data(a, slots.RESIDUAL)
    coefficients, width, stride = parameter(a, slots.COEFFICIENTS), integer(a, slots.WIDTH), columns(a)
    start, strip = low, integer(a, slots.STRIP)
    while start < high:
        stop = min(start + ROWS, high)
        i = start
        while i < stop:
            upto = min(i + strip, stop)
            for column in range(begin, min(end, valid), 16):
                centre = vload(coefficients, column)
                scale, offset = vload(coefficients, width + column), vload(coefficients, 2 * width + column)
                s = q = zeros(a)
                if i > start:
                    s, q = vload(lanes, column), vload(lanes, width + column)
                at, left, rows = i * stride + column, valid - column, upto - i
                if left >= 16:
                    t = p = zeros(a)
                    while rows >= 2:
                        distance = invert(a, vload(x, at)) - centre
                        dz = gradient(a, dy, other, distance, at, 16, scale, offset)
                        s, q = s + dz, fma(dz, distance, q)
                        distance = invert(a, vload(x, at + stride)) - centre
                        dz = gradient(a, dy, other, distance, at + stride, 16, scale, offset)
                        t, p = t + dz, fma(dz, distance, p)
                        at += 2 * stride
                        rows -= 2
                    s, q = s + t, q + p
                for _ in range(rows):
                    distance = invert(a, read(x, at, left, centre)) - centre
                    dz = gradient(a, dy, other, distance, at, left, scale, offset)
                    s, q = s + dz, fma(dz, distance, q)
                    at += stride
                vstore(lanes, column, s)
                vstore(lanes, width + column, q)
            i = upto
        for column in range(begin, min(end, valid), 16):
            vstore(sums, column, vload(sums, column) + widen(vload(lanes, column)))
            vstore(sums, width + column, vload(sums, width + column) + widen(vload(lanes, width + column)))
        start = stop


@inlined
def clear(sums, width, begin, end):
    """Set the sums of columns to zero."""
    for column in range(begin, end, 16):
        vstore(sums, column, splat(0.0))
        vstore(sums, width + column, splat(0.0))


@inlined
def write_backward(a, low, high, begin, end, valid):
    """Write dx of rows low to high, last first, and the residual's gradient where it differs from dy."""
    x, dy, other = data(a, slots.X), data(a, slots.DY), data(a, slots.RESIDUAL)
    dx, dr, stream = data(a, slots.DX), data(a, slots.DRESIDUAL), integer(a, slots.STREAM)
    coefficients, width, stride = parameter(a, slots.COEFFICIENTS), integer(a, slots.WIDTH), columns(a)
    strip, i = integer(a, slots.STRIP), high
    while i > low:
        start = max(low, i - strip)
        for column in range(begin, min(end, valid), 16):
            centre = vload(coefficients, column)
            scale, offset = vload(coefficients, width + column), vload(coefficients, 2 * width + column)
            b, d = vload(coefficients, 3 * width + column), vload(coefficients, 4 * width + column)
            at, left = start * stride + column, valid - column
            for _ in range(start, i):
                distance = invert(a, read(x, at, left, centre)) - centre
                dz = gradient(a, dy, other, distance, at, left, scale, offset)
                write(dx, at, left, fma(dz, scale, fma(distance, b, d)), stream)
                if has_residual(a) and has_activation(a):
                    write(dr, at, left, dz, stream)
                at += stride
        i = start


def backward(begin, end, a):
    """Backward of few rows: a task is a tile of GROUP columns."""
    width, tile, rows = integer(a, slots.WIDTH), integer(a, slots.GROUP), integer(a, slots.OUTER)
    sums, lanes, channels = double(a, slots.PARTIALS), region_lanes(a, 0), integer(a, slots.CHANNELS)
    for task in range(begin, end):
        low, high = task * tile, min((task + 1) * tile, width)
        for column in range(low, high, 16):
            restore_channels(a, column)
        clear(sums, width, low, high)
        gather_backward(a, sums, lanes, 0, rows, low, high, channels)
        for column in range(low, high, 16):
            finish_channels_backward(a, column, sums, width)
        write_backward(a, 0, rows, low, high, channels)
    fence()


def backward_partial(begin, end, a):
    """Sums of blocks of rows. The coefficients are set."""
    width, fold, rows = integer(a, slots.WIDTH), integer(a, slots.FOLD), integer(a, slots.OUTER)
    for block in range(begin, end):
        sums, lanes = region(a, block), region_lanes(a, block)
        clear(sums, width, 0, width)
        gather_backward(a, sums, lanes, first_row(a, block), first_row(a, block + 1), 0, width, columns(a))
        if block == integer(a, slots.BLOCKS) - 1 and rows % fold:
            valid = rows % fold * integer(a, slots.CHANNELS)
            gather_backward(a, sums, lanes, rows // fold, rows // fold + 1, 0, width, valid)


@inlined
def add_blocks(a, column):
    """Add the sums of sixteen columns of every block, in the blocks' order, to those of the first."""
    width, into = integer(a, slots.WIDTH), region(a, 0)
    total, along = vload(into, column), vload(into, width + column)
    for block in range(1, integer(a, slots.BLOCKS)):
        total = total + vload(region(a, block), column)
        along = along + vload(region(a, block), width + column)
    vstore(into, column, total)
    vstore(into, width + column, along)


def finish_sums(begin, end, a):
    """Add blocks and columns in their order, and set what the backward writes from: tasks as for `finish`."""
    channels, width = integer(a, slots.CHANNELS), integer(a, slots.WIDTH)
    fold, sums = integer(a, slots.FOLD), region(a, 0)
    if fold == 1:
        for task in range(begin, end):
            add_blocks(a, 16 * task)
            finish_channels_backward(a, 16 * task, sums, width)
        return
    for column in range(0, width, 16):
        add_blocks(a, column)
    for k in range(channels):
        total, along = 0.0, 0.0
        for column in range(k, fold * channels, channels):
            total += load(sums, column)
            along += load(sums, width + column)
        finish_backward(a, k, total, along)


def apply_backward(begin, end, a):
    """Write dx of blocks of rows, from the coefficients."""
    width, fold, rows = integer(a, slots.WIDTH), integer(a, slots.FOLD), integer(a, slots.OUTER)
    for block in range(begin, end):
        write_backward(a, first_row(a, block), first_row(a, block + 1), 0, width, columns(a))
        if block == integer(a, slots.BLOCKS) - 1 and rows % fold:
            write_backward(a, rows // fold, rows // fold + 1, 0, width, rows % fold * integer(a, slots.CHANNELS))
    fence()
