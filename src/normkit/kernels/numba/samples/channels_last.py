"""Kernels for channels-last ``(N, S, C)`` with statistics per sample: group and instance norm.

A sample is S rows of C channels, gathered and written column by column as `channels.channels_last` does a batch; in
between, the columns of a group are merged. One group of all channels is one run of memory, and its moments are gathered
as such. A task takes a sample through everything, or blocks of its rows in three launches.
"""

from .. import slots
from ..arguments import data, double, integer, is_null, parameter
from ..channels.channels_last import first_row, gather, merge_blocks, region, region_lanes, write_rows
from ..channels.channels_last_backward import add_blocks, clear, gather_backward, write_backward
from ..channels.columns import column_origin, columns
from ..channels.finish import set_vector_coefficients
from ..moments import merge_moments, set_coefficient, set_coefficients, store_as
from ..vectors import called, fence, inlined, load, narrow, splat, store, vload, vstore, vsum, widen
from . import slots as sample_slots
from .arguments import own_copy, put
from .statistics import keep_statistics, needs_care, run_moments


@inlined
def enter(own, a, sample):
    """Let a kernel's own arguments stand for one sample, as if it were a whole channels-last tensor."""
    rows, blocks = integer(a, slots.OUTER), integer(a, slots.BLOCKS)
    size, width = rows * integer(a, slots.CHANNELS) * integer(a, sample_slots.ITEMSIZE), integer(a, slots.WIDTH)
    put(own, slots.X, integer(a, slots.X) + sample * size)
    put(own, slots.Y, integer(a, slots.Y) + sample * size)
    put(own, slots.DY, integer(a, slots.DY) + sample * size)
    put(own, slots.DX, integer(a, slots.DX) + sample * size)
    put(own, slots.COEFFICIENTS, integer(a, slots.COEFFICIENTS) + sample * 40 * width)
    put(own, slots.PARTIALS, integer(a, slots.PARTIALS) + sample * 40 * width * blocks)
    skipped = 8 * sample * integer(a, sample_slots.GROUPS)
    put(own, slots.MEAN, integer(a, slots.MEAN) + skipped)
    put(own, slots.RSTD, integer(a, slots.RSTD) + skipped)
    if integer(a, sample_slots.VARIANCE):
        put(own, sample_slots.VARIANCE, integer(a, sample_slots.VARIANCE) + skipped)


@inlined
def is_one_run(a):
    """Say whether all channels of a sample are one group."""
    return integer(a, sample_slots.GROUPS) == 1


@inlined
def gather_run(a, block, low, high):
    """Moments of all elements of rows low to high, left where those of the first column would stand."""
    stride, held = columns(a), region(a, block)
    mean, m2 = run_moments(a, data(a, slots.X), low * stride, (high - low) * stride)
    store(held, 0, mean)
    store(held, 1, m2)


@inlined
def merge_runs(a):
    """Merge the moments of all blocks, in their order."""
    stride, count, mean, m2 = columns(a), 0.0, 0.0, 0.0
    for block in range(integer(a, slots.BLOCKS)):
        n, held = float((first_row(a, block + 1) - first_row(a, block)) * stride), region(a, block)
        mean, m2 = merge_moments(count, mean, m2, n, load(held, 0), load(held, 1))
        count += n
    return mean, m2


@inlined
def group_moments(a, group):
    """Merge the columns of a group, every one of which has as many rows."""
    channels, width, moments = integer(a, slots.CHANNELS), integer(a, slots.WIDTH), region(a, 0)
    planes, fold = channels // integer(a, sample_slots.GROUPS), integer(a, slots.FOLD)
    vectors = planes // 16 * 16
    first, shift, m2, between = load(moments, group * planes), 0.0, 0.0, 0.0
    for row in range(fold):
        begin, end = row * channels + group * planes, row * channels + (group + 1) * planes
        shifts = squares = splat(0.0)
        for column in range(begin, begin + vectors, 16):
            shifts = shifts + (vload(moments, column) - splat(first))
            squares = squares + vload(moments, width + column)
        shift += vsum(shifts)
        m2 += vsum(squares)
        for column in range(begin + vectors, end):
            shift += load(moments, column) - first
            m2 += load(moments, width + column)
    mean = first + shift / (planes * fold)
    for row in range(fold):
        begin, end = row * channels + group * planes, row * channels + (group + 1) * planes
        squares = splat(0.0)
        for column in range(begin, begin + vectors, 16):
            distances = vload(moments, column) - splat(mean)
            squares = squares + distances * distances
        between += vsum(squares)
        for column in range(begin + vectors, end):
            distance = load(moments, column) - mean
            between += distance * distance
    return mean, m2 + between * float(integer(a, slots.OUTER) // fold)


@called
def careful_group(a, group):
    """Mean and sum of squares of a group in float64, two passes: for what overflows float32 lanes."""
    x, rows, channels = data(a, slots.X), integer(a, slots.OUTER), integer(a, slots.CHANNELS)
    planes = channels // integer(a, sample_slots.GROUPS)
    first = float(load(x, group * planes))
    total, m2 = 0.0, 0.0
    for row in range(rows):
        for column in range(group * planes, (group + 1) * planes):
            total += float(load(x, row * channels + column)) - first
    mean = first + total / (rows * planes)
    for row in range(rows):
        for column in range(group * planes, (group + 1) * planes):
            distance = float(load(x, row * channels + column)) - mean
            m2 += distance * distance
    return mean, m2


@inlined
def spread_statistics(a, spread):
    """Set centre, scale and offset of every column from mean and rstd of its group; ``spread`` is memory for both."""
    channels, width, fold = integer(a, slots.CHANNELS), integer(a, slots.WIDTH), integer(a, slots.FOLD)
    planes, means, rstds = channels // integer(a, sample_slots.GROUPS), double(a, slots.MEAN), double(a, slots.RSTD)
    for group in range(integer(a, sample_slots.GROUPS)):
        mean, rstd = load(means, group), load(rstds, group)
        for channel in range(group * planes, (group + 1) * planes):
            store(spread, channel, mean)
            store(spread, width + channel, rstd)
    for low in range(0, channels, 16):
        if fold == 1 and low + 16 <= channels:
            set_vector_coefficients(a, low, vload(spread, low), vload(spread, width + low))
        else:
            for channel in range(low, min(low + 16, channels)):
                set_coefficients(a, channel, load(spread, channel), load(spread, width + channel))


@inlined
def add_origins(a):
    """Tell the columns' means from zero: they were gathered from each column's origin."""
    moments = region(a, 0)
    for column in range(columns(a)):
        store(moments, column, column_origin(a, column) + load(moments, column))


@inlined
def finish_groups(a):
    """From the columns' moments: statistics of every group, and the coefficients of every column."""
    count = float(integer(a, slots.OUTER) * (integer(a, slots.CHANNELS) // integer(a, sample_slots.GROUPS)))
    mean = m2 = 0.0
    if is_one_run(a):
        mean, m2 = merge_runs(a)
    else:
        for column in range(0, integer(a, slots.WIDTH), 16):
            merge_blocks(a, column)
        add_origins(a)
    for group in range(integer(a, sample_slots.GROUPS)):
        if not is_one_run(a):
            mean, m2 = group_moments(a, group)
        if needs_care(a, m2, count):
            mean, m2 = careful_group(a, group)
        keep_statistics(a, group, mean, m2, count, True)
    spread_statistics(a, region(a, 0))


def forward(begin, end, a):
    """Forward of samples: task = sample * PARTS + part."""
    own, step, parts = own_copy(a), integer(a, sample_slots.STEP), integer(a, sample_slots.PARTS)
    width, fold, channels = integer(a, slots.WIDTH), integer(a, slots.FOLD), integer(a, slots.CHANNELS)
    for task in range(begin, end):
        block = task % parts
        enter(own, a, task // parts)
        low, high = first_row(own, block), first_row(own, block + 1)
        if step == sample_slots.WHOLE or step == sample_slots.GATHER:
            if is_one_run(own):
                gather_run(own, block, low, high)
            else:
                gather(own, region(own, block), region_lanes(own, block), low, high, 0, width)
        if step == sample_slots.WHOLE or step == sample_slots.FINISH:
            finish_groups(own)
        if step == sample_slots.WHOLE or step == sample_slots.APPLY:
            write_rows(own, low, high, 0, width, channels * fold)
    fence()


@inlined
def finish_group_sums(a, sample):
    """From the columns' sums: a sample's part of dweight and dbias, and what dx is written from."""
    channels, width, fold = integer(a, slots.CHANNELS), integer(a, slots.WIDTH), integer(a, slots.FOLD)
    groups, sums, coefficients = integer(a, sample_slots.GROUPS), region(a, 0), parameter(a, slots.COEFFICIENTS)
    dweight, dbias, weight = parameter(a, slots.DWEIGHT), parameter(a, slots.DBIAS), parameter(a, slots.WEIGHT)
    planes = channels // groups
    count = float(integer(a, slots.OUTER) * planes)
    for column in range(0, width, 16):
        add_blocks(a, column)
    for row in range(1, fold):
        for channel in range(channels):
            store(sums, channel, load(sums, channel) + load(sums, row * channels + channel))
            store(sums, width + channel, load(sums, width + channel) + load(sums, width + row * channels + channel))
    for group in range(groups):
        mean, rstd = load(double(a, slots.MEAN), group), load(double(a, slots.RSTD), group)
        lost = mean - float(load(coefficients, group * planes))
        begin, end, vectors = group * planes, (group + 1) * planes, planes // 16 * 16
        totals = alongs = splat(0.0)
        for channel in range(begin, begin + vectors, 16):
            of_channels = vload(sums, channel)
            products = (vload(sums, width + channel) - splat(lost) * of_channels) * splat(rstd)
            gains = splat(1.0)
            if not is_null(weight):
                gains = widen(vload(weight, channel))
            totals = totals + gains * of_channels
            alongs = alongs + gains * products
            vstore(dbias, sample * channels + channel, narrow(a, of_channels))
            vstore(dweight, sample * channels + channel, narrow(a, products))
        total, along = vsum(totals), vsum(alongs)
        for channel in range(begin + vectors, end):
            of_channel = load(sums, channel)
            product = (load(sums, width + channel) - lost * of_channel) * rstd
            gain = 1.0 if is_null(weight) else float(load(weight, channel))
            total += gain * of_channel
            along += gain * product
            store_as(dbias, sample * channels + channel, of_channel)
            store_as(dweight, sample * channels + channel, product)
        slope = -rstd * rstd * along / count
        level = -rstd * total / count - slope * lost
        for channel in range(group * planes, (group + 1) * planes):
            set_coefficient(a, 3, channel, slope)
            set_coefficient(a, 4, channel, level)


def backward(begin, end, a):
    """Backward of samples, tasks as for `forward`: dx, and every sample's part of dweight and dbias."""
    own, step, parts = own_copy(a), integer(a, sample_slots.STEP), integer(a, sample_slots.PARTS)
    width, valid = integer(a, slots.WIDTH), integer(a, slots.FOLD) * integer(a, slots.CHANNELS)
    for task in range(begin, end):
        block = task % parts
        enter(own, a, task // parts)
        low, high = first_row(own, block), first_row(own, block + 1)
        if step == sample_slots.WHOLE or step == sample_slots.PREPARE:
            spread_statistics(own, region(own, 0))
        if step == sample_slots.WHOLE or step == sample_slots.GATHER:
            sums = region(own, block)
            clear(sums, width, 0, width)
            gather_backward(own, sums, low, high, 0, width, valid)
        if step == sample_slots.WHOLE or step == sample_slots.FINISH:
            finish_group_sums(own, task // parts)
        if step == sample_slots.WHOLE or step == sample_slots.APPLY:
            write_backward(own, low, high, 0, width, valid)
    fence()
