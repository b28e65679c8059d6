"""Kernels for channels-last ``(R, C)``: a channel is a column of R rows, and memory runs along the rows.

Rows are taken eight at a time, so that what a column gathers is fetched and put back once for eight values. Few
channels are folded: k rows of C are read as one row of k * C columns, which fills whole vectors, and the k columns of a
channel are merged at the end. A column is gathered over at most `ROWS` rows about its own first value before it is
merged in float64.

Working memory of a block, in WIDTH columns each: mean and sum of squares (float64), then first, sum and square (of the
type computed in).
"""

from . import slots
from .activations import activate, gate
from .arguments import (
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
from .moments import finish_backward, finish_channel, merge_moments
from .simd import (
    fence,
    fma,
    inlined,
    load,
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

ROWS = 128
REGION = 5  # float64 numbers of working memory per column of a block


@inlined
def columns(a):
    """How many columns a folded row has."""
    return integer(a, slots.CHANNELS) * integer(a, slots.FOLD)


@inlined
def read(address, index, left, rest):
    """Sixteen elements, or the ``left`` that the row still has."""
    return vload(address, index) if left >= 16 else vload_first(address, index, left, rest)


@inlined
def gather_column(x, lanes, width, column, low, high, stride, left):
    """Add rows low to high, at most eight, of sixteen columns to their sums about ``first``."""
    first = vload(lanes, column)
    s, q = vload(lanes, width + column), vload(lanes, 2 * width + column)
    at = low * stride + column
    if high - low == 8 and left >= 16:
        t = p = first - first
        for _ in range(4):
            v = vload(x, at) - first
            s, q = s + v, fma(v, v, q)
            v = vload(x, at + stride) - first
            t, p = t + v, fma(v, v, p)
            at += 2 * stride
        s, q = s + t, q + p
    else:
        for _ in range(low, high):
            v = read(x, at, left, first) - first
            s, q = s + v, fma(v, v, q)
            at += stride
    vstore(lanes, width + column, s)
    vstore(lanes, 2 * width + column, q)


@inlined
def merge_columns(moments, lanes, width, begin, end, count, n):
    """Merge what columns gathered over n rows into their mean and sum of squares, over ``count`` rows before."""
    part, share, weight = splat(1.0 / n), splat(n / (count + n)), splat(count * (n / (count + n)))
    for column in range(begin, end, 16):
        first, total = widen(vload(lanes, column)), widen(vload(lanes, width + column))
        square = widen(vload(lanes, 2 * width + column))
        mean, m2 = vload(moments, column), vload(moments, width + column)
        delta = first + total * part - mean
        spread = not_below_zero(square - total * total * part)
        vstore(moments, column, mean + delta * share)
        vstore(moments, width + column, m2 + spread + delta * delta * weight)


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
            first = read(x, start * stride + column, stride - column, zeros(a))
            vstore(lanes, column, first)
            vstore(lanes, width + column, zeros(a))
            vstore(lanes, 2 * width + column, zeros(a))
        i = start
        while i < stop:
            upto = min(i + 8, stop)
            for column in range(begin, end, 16):
                gather_column(x, lanes, width, column, i, upto, stride, stride - column)
            i = upto
        merge_columns(moments, lanes, width, begin, end, count, float(stop - start))
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
    stride, i = columns(a), high
    while i > low:
        start = max(low, i - 4)
        for column in range(begin, min(end, valid), 16):
            centre = vload(coefficients, column)
            scale, offset = vload(coefficients, width + column), vload(coefficients, 2 * width + column)
            at = start * stride + column
            for _ in range(start, i):
                value = output(a, x, residual, at, valid - column, centre, scale, offset)
                write(y, at, valid - column, value, stream)
                at += stride
        i = start


def forward(begin, end, a):
    """Training forward of few rows: a task is a tile of GROUP columns, from statistics to output."""
    width, tile, rows = integer(a, slots.WIDTH), integer(a, slots.GROUP), integer(a, slots.OUTER)
    moments, lanes, channels = double(a, slots.PARTIALS), region_lanes(a, 0), integer(a, slots.CHANNELS)
    for task in range(begin, end):
        low, high = task * tile, min((task + 1) * tile, width)
        gather(a, moments, lanes, 0, rows, low, high)
        for k in range(low, min(high, channels)):
            finish_channel(a, k, load(moments, k), load(moments, width + k))
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


def finish(begin, end, a):
    """Merge the columns and blocks of each channel in their order, and finish the channel."""
    x, rows, channels = data(a, slots.X), integer(a, slots.OUTER), integer(a, slots.CHANNELS)
    width, fold, blocks = integer(a, slots.WIDTH), integer(a, slots.FOLD), integer(a, slots.BLOCKS)
    for k in range(begin, end):
        count, mean, m2 = 0.0, 0.0, 0.0
        for block in range(blocks):
            n, moments = float(first_row(a, block + 1) - first_row(a, block)), region(a, block)
            for column in range(k, fold * channels, channels):
                mean, m2 = merge_moments(count, mean, m2, n, load(moments, column), load(moments, width + column))
                count += n
        for row in range(rows // fold * fold, rows):
            mean, m2 = merge_moments(count, mean, m2, 1.0, float(load(x, row * channels + k)), 0.0)
            count += 1.0
        finish_channel(a, k, mean, m2)


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
    zero = scale - scale
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
    start = low
    while start < high:
        stop = min(start + ROWS, high)
        i = start
        while i < stop:
            upto = min(i + 8, stop)
            for column in range(begin, min(end, valid), 16):
                centre = vload(coefficients, column)
                scale, offset = vload(coefficients, width + column), vload(coefficients, 2 * width + column)
                s = q = centre - centre
                if i > start:
                    s, q = vload(lanes, column), vload(lanes, width + column)
                at, left = i * stride + column, valid - column
                for _ in range(i, upto):
                    distance = read(x, at, left, centre) - centre
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
    i = high
    while i > low:
        start = max(low, i - 4)
        for column in range(begin, min(end, valid), 16):
            centre = vload(coefficients, column)
            scale, offset = vload(coefficients, width + column), vload(coefficients, 2 * width + column)
            b, d = vload(coefficients, 3 * width + column), vload(coefficients, 4 * width + column)
            at, left = start * stride + column, valid - column
            for _ in range(start, i):
                distance = read(x, at, left, centre) - centre
                dz = gradient(a, dy, other, distance, at, left, scale, offset)
                write(dx, at, left, fma(dz, scale, fma(distance, b, d)), stream)
                if has_residual(a) and has_activation(a):
                    write(dr, at, left, dz, stream)
                at += stride
        i = start


def backward(begin, end, a):
    """Backward of few rows: a task is a tile of GROUP columns. Centre, scale and offset are set."""
    width, tile, rows = integer(a, slots.WIDTH), integer(a, slots.GROUP), integer(a, slots.OUTER)
    sums, lanes, channels = double(a, slots.PARTIALS), region_lanes(a, 0), integer(a, slots.CHANNELS)
    for task in range(begin, end):
        low, high = task * tile, min((task + 1) * tile, width)
        clear(sums, width, low, high)
        gather_backward(a, sums, lanes, 0, rows, low, high, channels)
        for k in range(low, min(high, channels)):
            finish_backward(a, k, load(sums, k), load(sums, width + k))
        write_backward(a, 0, rows, low, high, channels)
    fence()


def backward_partial(begin, end, a):
    """Sums of blocks of rows."""
    width, fold, rows = integer(a, slots.WIDTH), integer(a, slots.FOLD), integer(a, slots.OUTER)
    for block in range(begin, end):
        sums, lanes = region(a, block), region_lanes(a, block)
        clear(sums, width, 0, width)
        gather_backward(a, sums, lanes, first_row(a, block), first_row(a, block + 1), 0, width, columns(a))
        if block == integer(a, slots.BLOCKS) - 1 and rows % fold:
            valid = rows % fold * integer(a, slots.CHANNELS)
            gather_backward(a, sums, lanes, rows // fold, rows // fold + 1, 0, width, valid)


def finish_sums(begin, end, a):
    """Add the columns and blocks of each channel in their order, and set what the backward writes from."""
    channels, width = integer(a, slots.CHANNELS), integer(a, slots.WIDTH)
    fold, blocks = integer(a, slots.FOLD), integer(a, slots.BLOCKS)
    for k in range(begin, end):
        total, along = 0.0, 0.0
        for block in range(blocks):
            sums = region(a, block)
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
