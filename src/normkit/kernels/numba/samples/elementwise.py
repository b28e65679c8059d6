"""Kernels for rows of memory with a weight for every element: layer and RMS norm, and group norm of ``(N, C)``.

A sample is one row of C elements, cut into GROUPS runs with statistics of their own. A task of the backward is a chunk
of samples, four at a time: what they add to dweight and dbias is fetched and put back once for the four.
"""

from .. import slots
from ..activations import activate, gate
from ..arguments import data, double, has_activation, integer, parameter, scratch
from ..channels.columns import read
from ..moments import CHUNK
from ..vectors import fma, inlined, load, narrow, splat, vload, vload_first, vstore, vstore_first, vsum, widen, zeros
from . import slots as sample_slots
from .statistics import RUN, run_statistics, standardize_by

STRIP = 4  # samples that the backward takes at a time
SHORT = 512  # elements of a run whose sums and parameters stay beside it in the nearest cache
HELD = 80  # five vectors: what the backward of a row needs


@inlined
def write_run(a, start, column, size, centre, scale, shift):
    """Write y of one run, whose first element has the weight of ``column``."""
    x, y, weight, bias = data(a, slots.X), data(a, slots.Y), parameter(a, slots.WEIGHT), parameter(a, slots.BIAS)
    j = 0
    while j + 32 <= size:
        first = fma(vload(x, start + j) - centre, scale, shift)
        second = fma(vload(x, start + j + 16) - centre, scale, shift)
        first = fma(first, vload(weight, column + j), vload(bias, column + j))
        second = fma(second, vload(weight, column + j + 16), vload(bias, column + j + 16))
        vstore(y, start + j, activate(a, first))
        vstore(y, start + j + 16, activate(a, second))
        j += 32
    while j < size:
        left = size - j
        xhat = fma(read(x, start + j, left, centre) - centre, scale, shift)
        z = fma(xhat, read(weight, column + j, left, zeros(a)), read(bias, column + j, left, zeros(a)))
        vstore_first(y, start + j, left, activate(a, z))
        j += 16


def forward(begin, end, a):
    """Forward of runs: task = sample * GROUPS + group."""
    groups = integer(a, sample_slots.GROUPS)
    size = integer(a, slots.CHANNELS) // groups
    for row in range(begin, end):
        mean, rstd = run_statistics(a, row, row * size, size)
        centre, scale, shift = standardize_by(a, mean, rstd)
        write_run(a, row * size, row % groups * size, size, centre, scale, shift)


@inlined
def gradient(a, x, dy, index, left, centre, scale, shift, weight, bias):
    """Up to sixteen elements of xhat and of dz, the gradient before the activation; past the end dz is zero."""
    xhat = fma(read(x, index, left, centre) - centre, scale, shift)
    dz = read(dy, index, left, zeros(a))
    if has_activation(a):
        dz = gate(a, dz, fma(xhat, weight, bias))
    return xhat, dz


@inlined
def run_sums(a, start, column, size, centre, scale, shift):
    """Sums of ``dz * weight`` and of ``dz * weight * xhat`` over a run."""
    x, dy, weight, bias = data(a, slots.X), data(a, slots.DY), parameter(a, slots.WEIGHT), parameter(a, slots.BIAS)
    total, along = 0.0, 0.0
    for low in range(0, size, CHUNK):
        high = min(size, low + CHUNK)
        s0 = s1 = q0 = q1 = zeros(a)
        j = low
        while j + 32 <= high:
            w, b = vload(weight, column + j), vload(bias, column + j)
            xhat, dz = gradient(a, x, dy, start + j, 16, centre, scale, shift, w, b)
            dz = dz * w
            s0, q0 = s0 + dz, fma(dz, xhat, q0)
            w, b = vload(weight, column + j + 16), vload(bias, column + j + 16)
            xhat, dz = gradient(a, x, dy, start + j + 16, 16, centre, scale, shift, w, b)
            dz = dz * w
            s1, q1 = s1 + dz, fma(dz, xhat, q1)
            j += 32
        while j < high:
            left = high - j
            w, b = read(weight, column + j, left, zeros(a)), read(bias, column + j, left, zeros(a))
            xhat, dz = gradient(a, x, dy, start + j, left, centre, scale, shift, w, b)
            dz = dz * w
            s0, q0 = s0 + dz, fma(dz, xhat, q0)
            j += 16
        total += vsum(s0 + s1)
        along += vsum(q0 + q1)
    return total, along


@inlined
def add_row(a, x, dy, index, left, centre, scale, shift, weight, bias, total, along):
    """Add up to sixteen elements of a row to its sums of ``dz * weight`` and of ``dz * weight * xhat``."""
    xhat, dz = gradient(a, x, dy, index, left, centre, scale, shift, weight, bias)
    dz = dz * weight
    return total + dz, fma(dz, xhat, along)


@inlined
def strip_sums(a, held, start, stride, column, size):
    """The same for a run in each of four rows, side by side: one by one each would wait for its own sums."""
    x, dy, weight, bias = data(a, slots.X), data(a, slots.DY), parameter(a, slots.WEIGHT), parameter(a, slots.BIAS)
    c0, k0, h0 = vload(held, 0), vload(held, 16), vload(held, 32)
    c1, k1, h1 = vload(held, HELD), vload(held, HELD + 16), vload(held, HELD + 32)
    c2, k2, h2 = vload(held, 2 * HELD), vload(held, 2 * HELD + 16), vload(held, 2 * HELD + 32)
    c3, k3, h3 = vload(held, 3 * HELD), vload(held, 3 * HELD + 16), vload(held, 3 * HELD + 32)
    total0 = total1 = total2 = total3 = along0 = along1 = along2 = along3 = 0.0
    for low in range(0, size, RUN):
        high = min(size, low + RUN)
        s0 = s1 = s2 = s3 = q0 = q1 = q2 = q3 = zeros(a)
        j = low
        while j < high:
            left, at = high - j, start + j
            w, b = read(weight, column + j, left, zeros(a)), read(bias, column + j, left, zeros(a))
            s0, q0 = add_row(a, x, dy, at, left, c0, k0, h0, w, b, s0, q0)
            s1, q1 = add_row(a, x, dy, at + stride, left, c1, k1, h1, w, b, s1, q1)
            s2, q2 = add_row(a, x, dy, at + 2 * stride, left, c2, k2, h2, w, b, s2, q2)
            s3, q3 = add_row(a, x, dy, at + 3 * stride, left, c3, k3, h3, w, b, s3, q3)
            j += 16
        total0, along0 = total0 + vsum(s0), along0 + vsum(q0)
        total1, along1 = total1 + vsum(s1), along1 + vsum(q1)
        total2, along2 = total2 + vsum(s2), along2 + vsum(q2)
        total3, along3 = total3 + vsum(s3), along3 + vsum(q3)
    return (total0, total1, total2, total3), (along0, along1, along2, along3)


@inlined
def begin_run(a, held, at, row):
    """Keep centre, scale and shift of a run."""
    centre, scale, shift = standardize_by(a, load(double(a, slots.MEAN), row), load(double(a, slots.RSTD), row))
    vstore(held, at, centre)
    vstore(held, at + 16, scale)
    vstore(held, at + 32, shift)


@inlined
def finish_run(a, held, at, row, total, along, size):
    """Keep what makes ``dx = dz * weight * scale + xhat * p + q``."""
    share = -load(double(a, slots.RSTD), row) / size
    if not integer(a, sample_slots.CENTRED):
        total = 0.0
    vstore(held, at + 48, narrow(a, splat(share * along)))
    vstore(held, at + 64, narrow(a, splat(share * total)))


@inlined
def prepare_runs(a, held, rows, sample, group, size):
    """Keep what a run in each of ``rows`` rows is written from."""
    width, groups, column = integer(a, slots.CHANNELS), integer(a, sample_slots.GROUPS), group * size
    for row in range(rows):
        begin_run(a, held, HELD * row, (sample + row) * groups + group)
    start, first = sample * width + column, sample * groups + group
    if rows == STRIP:
        totals, alongs = strip_sums(a, held, start, width, column, size)
        for row in range(STRIP):
            finish_run(a, held, HELD * row, first + row * groups, totals[row], alongs[row], size)
    else:
        for row in range(rows):
            at = HELD * row
            centre, scale, shift = vload(held, at), vload(held, at + 16), vload(held, at + 32)
            total, along = run_sums(a, start + row * width, column, size, centre, scale, shift)
            finish_run(a, held, at, first + row * groups, total, along, size)


@inlined
def write_gradient(a, held, row, x, dy, dx, index, left, weight, bias, dweight, dbias):
    """Write up to sixteen elements of dx of one row; return dweight and dbias with what they add."""
    at = HELD * row
    scale = vload(held, at + 16)
    xhat, dz = gradient(a, x, dy, index, left, vload(held, at), scale, vload(held, at + 32), weight, bias)
    result = fma(dz * weight, scale, fma(xhat, vload(held, at + 48), vload(held, at + 64)))
    if left >= 16:
        vstore(dx, index, result)
    else:
        vstore_first(dx, index, left, result)
    return fma(dz, xhat, dweight), dbias + dz


@inlined
def add_columns(a, at, left, first, dweight, dbias):
    """Add to the sums of sixteen columns, or write them where they are the first."""
    weights, biases = parameter(a, slots.DWEIGHT), parameter(a, slots.DBIAS)
    if left >= 16:
        if not first:
            dweight, dbias = dweight + vload(weights, at), dbias + vload(biases, at)
        vstore(weights, at, dweight)
        vstore(biases, at, dbias)
    else:
        if not first:
            dweight = dweight + vload_first(weights, at, left, zeros(a))
            dbias = dbias + vload_first(biases, at, left, zeros(a))
        vstore_first(weights, at, left, dweight)
        vstore_first(biases, at, left, dbias)


@inlined
def write_columns(a, held, rows, start, stride, table, column, left, first):
    """Write dx of sixteen columns of ``rows`` rows, and add to the sums of the columns."""
    x, dy, dx = data(a, slots.X), data(a, slots.DY), data(a, slots.DX)
    w = read(parameter(a, slots.WEIGHT), column, left, zeros(a))
    b = read(parameter(a, slots.BIAS), column, left, zeros(a))
    dw = db = zeros(a)
    if rows == STRIP:
        dw, db = write_gradient(a, held, 0, x, dy, dx, start, left, w, b, dw, db)
        dw, db = write_gradient(a, held, 1, x, dy, dx, start + stride, left, w, b, dw, db)
        dw, db = write_gradient(a, held, 2, x, dy, dx, start + 2 * stride, left, w, b, dw, db)
        dw, db = write_gradient(a, held, 3, x, dy, dx, start + 3 * stride, left, w, b, dw, db)
    else:
        for row in range(rows):
            dw, db = write_gradient(a, held, row, x, dy, dx, start + row * stride, left, w, b, dw, db)
    if integer(a, sample_slots.WANTED):
        add_columns(a, table + column, left, first, dw, db)


@inlined
def write_short_runs(a, held, rows, sample, table, column, size, first):
    """Write dx of a run in each of ``rows`` rows, one row after the other, and add to the sums of its columns.

    The sums of short runs stay in the cache nearest the core, and memory is written in its order.
    """
    x, dy, dx, width = data(a, slots.X), data(a, slots.DY), data(a, slots.DX), integer(a, slots.CHANNELS)
    weight, bias, wanted = parameter(a, slots.WEIGHT), parameter(a, slots.BIAS), integer(a, sample_slots.WANTED)
    for row in range(rows):
        start, is_first = (sample + row) * width + column, first and row == 0
        j = 0
        while j < size:
            left = size - j
            w, b = read(weight, column + j, left, zeros(a)), read(bias, column + j, left, zeros(a))
            dw, db = write_gradient(a, held, row, x, dy, dx, start + j, left, w, b, zeros(a), zeros(a))
            if wanted:
                add_columns(a, table + column + j, left, is_first, dw, db)
            j += 16


def backward(begin, end, a):
    """Backward of chunks of samples: dx, and the sums of a chunk for dweight and dbias."""
    samples, width, groups = integer(a, slots.OUTER), integer(a, slots.CHANNELS), integer(a, sample_slots.GROUPS)
    chunk, strip = integer(a, slots.GROUP), integer(a, slots.STRIP)
    size, held = width // groups, scratch(a)
    for task in range(begin, end):
        low, high = task * chunk, min(samples, (task + 1) * chunk)
        for sample in range(low, high, strip):
            rows = min(strip, high - sample)
            for group in range(groups):
                column = group * size
                prepare_runs(a, held, rows, sample, group, size)
                if size <= SHORT:
                    write_short_runs(a, held, rows, sample, task * width, column, size, sample == low)
                    continue
                j = 0
                while j < size:
                    at = sample * width + column + j
                    left = size - j
                    write_columns(a, held, rows, at, width, task * width, column + j, left, sample == low)
                    j += 16


def total(begin, end, a):
    """Add the chunks' sums of sixteen columns to a task, in their order: dweight and dbias. X and Y are the tables."""
    chunks, width = integer(a, slots.OUTER), integer(a, slots.CHANNELS)
    for task in range(begin, end):
        left = min(16, width - 16 * task)
        for which in range(2):
            table = parameter(a, slots.DWEIGHT + which)
            into = parameter(a, slots.WEIGHT + which)
            sums = splat(0.0)
            for chunk in range(chunks):
                sums = sums + widen(read(table, chunk * width + 16 * task, left, zeros(a)))
            vstore_first(into, 16 * task, left, narrow(a, sums))
