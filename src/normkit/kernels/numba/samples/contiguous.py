"""Kernels for contiguous ``(N, C, S)`` with statistics per sample: group and instance norm.

A group lies in one run of memory, made of planes that have one weight each. A task takes a group through everything;
where groups are few and large, several tasks share its planes, or pieces of its planes, in two launches.
"""

from .. import slots
from ..arguments import data, double, integer, is_null, parameter, scratch_centres
from ..channels.contiguous import apply_backward_span, apply_span, span_sums
from ..moments import CHUNK, merge_moments, store_as
from ..vectors import fence, inlined, load, narrow, splat, store, vsum
from . import slots as sample_slots
from .statistics import careful_run, keep_statistics, needs_care, run_moments


@inlined
def split_unit(a, unit):
    """The plane of a piece, and which piece of it. Mostly planes are whole, and a division costs as much as a plane."""
    pieces = integer(a, sample_slots.PIECES)
    if pieces == 1:
        return unit, 0
    return unit // pieces, unit % pieces


@inlined
def piece_of(a, plane, piece):
    """Where a piece begins in its group, and how many values it has."""
    inner, pieces = integer(a, slots.INNER), integer(a, sample_slots.PIECES)
    if pieces == 1:
        return plane * inner, inner
    low = inner * piece // pieces // 16 * 16
    high = inner if piece == pieces - 1 else inner * (piece + 1) // pieces // 16 * 16
    return plane * inner + low, high - low


@inlined
def plane_coefficients(a, channel, mean, rstd):
    """Scale and offset of a plane, in lanes: ``y = (x - centre) * scale + offset``."""
    weight, bias, held = parameter(a, slots.WEIGHT), parameter(a, slots.BIAS), scratch_centres(a)
    store_as(held, 0, mean)
    gain = 1.0 if is_null(weight) else float(load(weight, channel))
    scale = rstd * gain
    offset = (float(load(held, 0)) - mean) * scale
    if not is_null(bias):
        offset = float(load(bias, channel)) + offset
    return narrow(a, splat(scale)), narrow(a, splat(offset))


@inlined
def share_of(a, task, planes):
    """The group that a task works on, its part of it, and which of the group's pieces that is."""
    parts, units = integer(a, sample_slots.PARTS), planes * integer(a, sample_slots.PIECES)
    if parts == 1:
        return task, 0, 0, units
    part = task % parts
    return task // parts, part, units * part // parts, units * (part + 1) // parts


@inlined
def merge_parts(a, row):
    """Merge the moments of the parts of a group, in their order."""
    parts, partials = integer(a, slots.BLOCKS), double(a, slots.PARTIALS)
    mean, m2, count = 0.0, 0.0, 0.0
    for part in range(parts):
        at = 3 * (row * parts + part)
        n = load(partials, at)
        mean, m2 = merge_moments(count, mean, m2, n, load(partials, at + 1), load(partials, at + 2))
        count += n
    return mean, m2


def forward(begin, end, a):
    """Forward of groups: task = (sample * GROUPS + group) * PARTS + part."""
    x, y, stream = data(a, slots.X), data(a, slots.Y), integer(a, slots.STREAM)
    groups, step = integer(a, sample_slots.GROUPS), integer(a, sample_slots.STEP)
    planes, inner = integer(a, slots.CHANNELS) // groups, integer(a, slots.INNER)
    partials = double(a, slots.PARTIALS)
    for task in range(begin, end):
        row, part, low, high = share_of(a, task, planes)
        start = row * planes * inner
        mean, m2 = 0.0, 0.0
        if step != sample_slots.APPLY:
            plane, piece = split_unit(a, low)
            first, _ = piece_of(a, plane, piece)
            plane, piece = split_unit(a, high - 1)
            last, size = piece_of(a, plane, piece)
            mean, m2 = run_moments(a, x, start + first, last + size - first)
            if step == sample_slots.GATHER:
                store(partials, 3 * task, float(last + size - first))
                store(partials, 3 * task + 1, mean)
                store(partials, 3 * task + 2, m2)
                continue
        else:
            mean, m2 = merge_parts(a, row)
        if needs_care(a, m2, float(planes * inner)):
            mean, m2 = careful_run(a, x, start, planes * inner)
        mean, rstd = keep_statistics(a, row, mean, m2, float(planes * inner), part == 0)
        centre, channel = narrow(a, splat(mean)), row % groups * planes
        for unit in range(low, high):
            plane, piece = split_unit(a, unit)
            scale, offset = plane_coefficients(a, channel + plane, mean, rstd)
            at, size = piece_of(a, plane, piece)
            apply_span(a, x, x, y, start + at, size, centre, scale, offset, stream)
    fence()


@inlined
def gather_piece(a, start, size, centre, scale, offset):
    """Sums of dz and of ``dz * (x - centre)`` over a piece of a plane."""
    x, dy = data(a, slots.X), data(a, slots.DY)
    total, along = 0.0, 0.0
    for low in range(0, size, CHUNK):
        s, q = span_sums(a, x, dy, x, start + low, min(CHUNK, size - low), centre, scale, offset)
        total += vsum(s)
        along += vsum(q)
    return total, along


@inlined
def group_sums(a, table, channel, units):
    """Sums over a group of ``dz * weight`` and of ``dz * weight * xhat``, from the tables."""
    dweight, dbias, weight = parameter(a, slots.DWEIGHT), parameter(a, slots.DBIAS), parameter(a, slots.WEIGHT)
    channels = integer(a, slots.CHANNELS)
    total, along = 0.0, 0.0
    for unit in range(units):
        plane, piece = split_unit(a, unit)
        at = table + piece * channels + plane
        gain = 1.0 if is_null(weight) else float(load(weight, channel + plane))
        total += gain * float(load(dbias, at))
        along += gain * float(load(dweight, at))
    return total, along


def backward(begin, end, a):
    """Backward of groups, tasks as for `forward`: dx, and every piece's sums for dweight and dbias."""
    x, dy, dx, stream = data(a, slots.X), data(a, slots.DY), data(a, slots.DX), integer(a, slots.STREAM)
    dweight, dbias, held = parameter(a, slots.DWEIGHT), parameter(a, slots.DBIAS), scratch_centres(a)
    groups, step = integer(a, sample_slots.GROUPS), integer(a, sample_slots.STEP)
    planes, inner = integer(a, slots.CHANNELS) // groups, integer(a, slots.INNER)
    channels, pieces = integer(a, slots.CHANNELS), integer(a, sample_slots.PIECES)
    for task in range(begin, end):
        row, _, low, high = share_of(a, task, planes)
        start, channel = row * planes * inner, row % groups * planes
        # A row of the tables for every piece of a plane: chunk = sample * PIECES + piece.
        table = row // groups * pieces * channels + channel
        mean, rstd = load(double(a, slots.MEAN), row), load(double(a, slots.RSTD), row)
        centre = narrow(a, splat(mean))
        store_as(held, 0, mean)
        lost = mean - float(load(held, 0))
        if step != sample_slots.APPLY:
            for unit in range(low, high):
                plane, piece = split_unit(a, unit)
                scale, offset = plane_coefficients(a, channel + plane, mean, rstd)
                at, size = piece_of(a, plane, piece)
                total, along = gather_piece(a, start + at, size, centre, scale, offset)
                store_as(dweight, table + piece * channels + plane, (along - lost * total) * rstd)
                store_as(dbias, table + piece * channels + plane, total)
            if step == sample_slots.GATHER:
                continue
        total, along = group_sums(a, table, channel, planes * pieces)
        slope = -rstd * rstd * along / (planes * inner)
        level = -rstd * total / (planes * inner) - slope * lost
        b, d = narrow(a, splat(slope)), narrow(a, splat(level))
        for unit in range(low, high):
            plane, piece = split_unit(a, unit)
            scale, offset = plane_coefficients(a, channel + plane, mean, rstd)
            at, size = piece_of(a, plane, piece)
            apply_backward_span(a, x, dy, x, dx, dx, start + at, size, centre, scale, offset, b, d, stream)
    fence()
