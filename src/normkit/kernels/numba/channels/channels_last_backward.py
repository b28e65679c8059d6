"""Kernels for the backward of channels-last ``(R, C)``, in the tiles of the forward."""

from .. import slots
from ..activations import gate, invert
from ..arguments import (
    data,
    double,
    gates_by_output,
    has_activation,
    has_residual,
    integer,
    parameter,
    plain,
)
from ..moments import finish_backward
from ..processor import has_avx512
from ..vectors import (
    fence,
    fma,
    inlined,
    load,
    splat,
    vload,
    vstore,
    widen,
    zeros,
)
from .channels_last import ROWS, first_row, region, write
from .columns import TILE, columns, read
from .finish import finish_channels_backward, restore_channels


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
def gathered_backward(a, at, left, centre, scale, offset, total, along):
    """Add up to sixteen elements to the sums of dz and of dz * (x - centre)."""
    x, dy, other = data(a, slots.X), data(a, slots.DY), data(a, slots.RESIDUAL)
    distance = invert(a, read(x, at, left, centre)) - centre
    dz = gradient(a, dy, other, distance, at, left, scale, offset)
    return total + dz, fma(dz, distance, along)


@inlined
def gather_backward_tile(a, sums, low, high, column):
    """Add rows low to high of 64 columns to their sums, two of each in registers."""
    k, w, stride = parameter(a, slots.COEFFICIENTS), integer(a, slots.WIDTH), columns(a)
    c0, c1, c2, c3 = vload(k, column), vload(k, column + 16), vload(k, column + 32), vload(k, column + 48)
    at = w + column
    m0, m1, m2, m3 = vload(k, at), vload(k, at + 16), vload(k, at + 32), vload(k, at + 48)
    at = 2 * w + column
    o0, o1, o2, o3 = vload(k, at), vload(k, at + 16), vload(k, at + 32), vload(k, at + 48)
    s0 = s1 = s2 = s3 = q0 = q1 = q2 = q3 = zeros(a)
    at = low * stride + column
    for _ in range(low, high):
        s0, q0 = gathered_backward(a, at, 16, c0, m0, o0, s0, q0)
        s1, q1 = gathered_backward(a, at + 16, 16, c1, m1, o1, s1, q1)
        s2, q2 = gathered_backward(a, at + 32, 16, c2, m2, o2, s2, q2)
        s3, q3 = gathered_backward(a, at + 48, 16, c3, m3, o3, s3, q3)
        at += stride
    add_sums(sums, w, column, s0, q0)
    add_sums(sums, w, column + 16, s1, q1)
    add_sums(sums, w, column + 32, s2, q2)
    add_sums(sums, w, column + 48, s3, q3)


@inlined
def gather_backward_half(a, sums, low, high, column):
    """The same for 32 columns."""
    k, w, stride = parameter(a, slots.COEFFICIENTS), integer(a, slots.WIDTH), columns(a)
    c0, c1 = vload(k, column), vload(k, column + 16)
    m0, m1 = vload(k, w + column), vload(k, w + column + 16)
    o0, o1 = vload(k, 2 * w + column), vload(k, 2 * w + column + 16)
    s0 = s1 = q0 = q1 = zeros(a)
    at = low * stride + column
    for _ in range(low, high):
        s0, q0 = gathered_backward(a, at, 16, c0, m0, o0, s0, q0)
        s1, q1 = gathered_backward(a, at + 16, 16, c1, m1, o1, s1, q1)
        at += stride
    add_sums(sums, w, column, s0, q0)
    add_sums(sums, w, column + 16, s1, q1)


# The sixteen registers of AVX2 hold the sums of 32 columns, the 32 of AVX-512 those of 64. Each sum has the same bits.
GATHERED = TILE if has_avx512() else TILE // 2
_gather_backward_wide = gather_backward_tile if GATHERED == TILE else gather_backward_half


@inlined
def gather_backward_column(a, sums, low, high, column, left):
    """Add rows low to high of up to sixteen columns to their sums."""
    k, w, stride = parameter(a, slots.COEFFICIENTS), integer(a, slots.WIDTH), columns(a)
    centre, scale, offset = vload(k, column), vload(k, w + column), vload(k, 2 * w + column)
    s = q = zeros(a)
    at = low * stride + column
    for _ in range(low, high):
        s, q = gathered_backward(a, at, left, centre, scale, offset, s, q)
        at += stride
    add_sums(sums, w, column, s, q)


@inlined
def add_sums(sums, width, column, total, along):
    """Add to the float64 sums of sixteen columns."""
    vstore(sums, column, vload(sums, column) + widen(total))
    vstore(sums, width + column, vload(sums, width + column) + widen(along))


@inlined
def gather_backward(a, sums, low, high, begin, end, valid):
    """Add rows low to high of columns begin to end to their sums of dz and of dz * (x - centre)."""
    start, last = low, min(end, valid)
    while start < high:
        # Half as many rows as a forward gathers, for there is one sum where that has two or four.
        stop, column = min(start + ROWS // 2, high), begin
        while column + GATHERED <= last:
            _gather_backward_wide(a, sums, start, stop, column)
            column += GATHERED
        while column < last:
            gather_backward_column(a, sums, start, stop, column, valid - column)
            column += 16
        start = stop


@inlined
def clear(sums, width, begin, end):
    """Set the sums of columns to zero."""
    for column in range(begin, end, 16):
        vstore(sums, column, splat(0.0))
        vstore(sums, width + column, splat(0.0))


@inlined
def backward_vector(a, x, dy, other, dx, dr, at, left, stream, centre, scale, offset, b, d):
    """Write up to sixteen elements of dx, and of the residual's gradient where it differs from dy."""
    distance = invert(a, read(x, at, left, centre)) - centre
    dz = gradient(a, dy, other, distance, at, left, scale, offset)
    write(dx, at, left, fma(dz, scale, fma(distance, b, d)), stream)
    if has_residual(a) and has_activation(a):
        write(dr, at, left, dz, stream)


@inlined
def backward_tile(a, low, high, column, stream):
    """Write dx of rows low to high of 64 columns, whose coefficients stay in registers."""
    # Read once: a store through any address might have changed them, for all that LLVM knows.
    x, dy, other = data(a, slots.X), data(a, slots.DY), data(a, slots.RESIDUAL)
    dx, dr = data(a, slots.DX), data(a, slots.DRESIDUAL)
    k, w, stride = parameter(a, slots.COEFFICIENTS), integer(a, slots.WIDTH), columns(a)
    c0, c1, c2, c3 = vload(k, column), vload(k, column + 16), vload(k, column + 32), vload(k, column + 48)
    at = w + column
    s0, s1, s2, s3 = vload(k, at), vload(k, at + 16), vload(k, at + 32), vload(k, at + 48)
    at = 2 * w + column
    t0, t1, t2, t3 = vload(k, at), vload(k, at + 16), vload(k, at + 32), vload(k, at + 48)
    at = 3 * w + column
    b0, b1, b2, b3 = vload(k, at), vload(k, at + 16), vload(k, at + 32), vload(k, at + 48)
    at = 4 * w + column
    d0, d1, d2, d3 = vload(k, at), vload(k, at + 16), vload(k, at + 32), vload(k, at + 48)
    at = low * stride + column
    for _ in range(low, high):
        backward_vector(a, x, dy, other, dx, dr, at, 16, stream, c0, s0, t0, b0, d0)
        backward_vector(a, x, dy, other, dx, dr, at + 16, 16, stream, c1, s1, t1, b1, d1)
        backward_vector(a, x, dy, other, dx, dr, at + 32, 16, stream, c2, s2, t2, b2, d2)
        backward_vector(a, x, dy, other, dx, dr, at + 48, 16, stream, c3, s3, t3, b3, d3)
        at += stride


@inlined
def backward_column(a, low, high, column, left):
    """Write dx of rows low to high of the last ``left`` columns, up to sixteen of them."""
    x, dy, other = data(a, slots.X), data(a, slots.DY), data(a, slots.RESIDUAL)
    dx, dr, stream = data(a, slots.DX), data(a, slots.DRESIDUAL), integer(a, slots.STREAM)
    coefficients, width, stride = parameter(a, slots.COEFFICIENTS), integer(a, slots.WIDTH), columns(a)
    centre = vload(coefficients, column)
    scale, offset = vload(coefficients, width + column), vload(coefficients, 2 * width + column)
    b, d = vload(coefficients, 3 * width + column), vload(coefficients, 4 * width + column)
    at = low * stride + column
    for _ in range(low, high):
        backward_vector(a, x, dy, other, dx, dr, at, left, stream, centre, scale, offset, b, d)
        at += stride


@inlined
def write_backward(a, low, high, begin, end, valid):
    """Write dx of rows low to high over columns begin to end, and the residual's gradient where it differs from dy."""
    start, last = low, min(end, valid)
    while start < high:
        i, column = min(high, start + ROWS), begin
        while column + TILE <= last:
            if integer(a, slots.STREAM):
                backward_tile(a, start, i, column, True)
            else:
                backward_tile(a, start, i, column, False)
            column += TILE
        while column < last:
            backward_column(a, start, i, column, valid - column)
            column += 16
        start = i


def backward(begin, end, a):
    """Backward of few rows: a task is a tile of GROUP columns."""
    common = plain(a)
    width, tile, rows = integer(a, slots.WIDTH), integer(a, slots.GROUP), integer(a, slots.OUTER)
    sums, channels = double(a, slots.PARTIALS), integer(a, slots.CHANNELS)
    for task in range(begin, end):
        low, high = task * tile, min((task + 1) * tile, width)
        for column in range(low, high, 16):
            restore_channels(common, column)
        clear(sums, width, low, high)
        gather_backward(a, sums, 0, rows, low, high, channels)
        for column in range(low, high, 16):
            finish_channels_backward(common, column, sums, width)
        write_backward(a, 0, rows, low, high, channels)
    fence()


def backward_partial(begin, end, a):
    """Sums of blocks of rows. The coefficients are set."""
    width, fold, rows = integer(a, slots.WIDTH), integer(a, slots.FOLD), integer(a, slots.OUTER)
    for block in range(begin, end):
        sums = region(a, block)
        clear(sums, width, 0, width)
        gather_backward(a, sums, first_row(a, block), first_row(a, block + 1), 0, width, columns(a))
        if block == integer(a, slots.BLOCKS) - 1 and rows % fold:
            valid = rows % fold * integer(a, slots.CHANNELS)
            gather_backward(a, sums, rows // fold, rows // fold + 1, 0, width, valid)


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
    # The last first: what was gathered last may still lie in a cache.
    for block in range(end - 1, begin - 1, -1):
        write_backward(a, first_row(a, block), first_row(a, block + 1), 0, width, columns(a))
        if block == integer(a, slots.BLOCKS) - 1 and rows % fold:
            write_backward(a, rows // fold, rows // fold + 1, 0, width, rows % fold * integer(a, slots.CHANNELS))
    fence()
