"""Kernels for contiguous ``(N, C, S)``: a channel is N planes of S values.

A task takes a few channels through everything, statistics and output, while they are in the cache nearest the core.
Tasks of tiny planes take several channels at a time, because theirs lie side by side in memory. Where there are too few
channels to share out, the steps run one after the other over blocks of a channel.
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
    plain,
    scratch,
    scratch_centres,
    scratch_double,
)
from ..moments import CHUNK, cancels, finish_backward, finish_channel, merge, origin, restore_coefficients, store_as
from ..vectors import (
    called,
    fence,
    fma,
    inlined,
    load,
    splat,
    store,
    vload,
    vload_first,
    vstore,
    vstore_first,
    vstream,
    vsum,
    widen,
    zeros,
)


@inlined
def span_moments(x, start, size, centre):
    """Sums of (x - centre) and of its square over a contiguous span, in lanes."""
    zero = centre - centre
    s0 = s1 = s2 = s3 = q0 = q1 = q2 = q3 = zero
    j = 0
    while j + 64 <= size:
        v = vload(x, start + j) - centre
        s0, q0 = s0 + v, fma(v, v, q0)
        v = vload(x, start + j + 16) - centre
        s1, q1 = s1 + v, fma(v, v, q1)
        v = vload(x, start + j + 32) - centre
        s2, q2 = s2 + v, fma(v, v, q2)
        v = vload(x, start + j + 48) - centre
        s3, q3 = s3 + v, fma(v, v, q3)
        j += 64
    while j + 16 <= size:
        v = vload(x, start + j) - centre
        s0, q0 = s0 + v, fma(v, v, q0)
        j += 16
    if j < size:
        v = vload_first(x, start + j, size - j, centre) - centre
        s1, q1 = s1 + v, fma(v, v, q1)
    return (s0 + s1) + (s2 + s3), (q0 + q1) + (q2 + q3)


@called
def careful_sums(x, start, size, centre):
    """The same two sums in float64: for what float32 lanes lose."""
    sums = squares = splat(0.0)
    j = 0
    while j + 16 <= size:
        v = widen(vload(x, start + j)) - splat(centre)
        sums, squares = sums + v, squares + v * v
        j += 16
    total, square = vsum(sums), vsum(squares)
    while j < size:
        distance = float(load(x, start + j)) - centre
        total, square = total + distance, square + distance * distance
        j += 1
    return total, square


@inlined
def output(a, x, residual, index, centre, scale, offset):
    """Sixteen elements of y."""
    z = fma(vload(x, index) - centre, scale, offset)
    if has_residual(a):
        z = z + vload(residual, index)
    return activate(a, z)


@inlined
def output_first(a, x, residual, index, left, centre, scale, offset):
    """The first ``left`` elements of y."""
    z = fma(vload_first(x, index, left, centre) - centre, scale, offset)
    if has_residual(a):
        z = z + vload_first(residual, index, left, centre)
    return activate(a, z)


@inlined
def before_vectors(start, size, stream):
    """How many of the first elements stand before a whole vector of memory, where the rest is to be streamed."""
    return min(size, -start % 16) if stream else 0


@inlined
def apply_span(a, x, residual, y, start, size, centre, scale, offset, stream):
    """Write y over a contiguous span. Streamed, its memory begins at a line of the cache."""
    j = before_vectors(start, size, stream)
    if j > 0:
        vstore_first(y, start, j, output_first(a, x, residual, start, j, centre, scale, offset))
    if stream:
        while j + 32 <= size:
            vstream(y, start + j, output(a, x, residual, start + j, centre, scale, offset))
            vstream(y, start + j + 16, output(a, x, residual, start + j + 16, centre, scale, offset))
            j += 32
    else:
        while j + 32 <= size:
            first = output(a, x, residual, start + j, centre, scale, offset)
            second = output(a, x, residual, start + j + 16, centre, scale, offset)
            vstore(y, start + j, first)
            vstore(y, start + j + 16, second)
            j += 32
    while j + 16 <= size:
        vstore(y, start + j, output(a, x, residual, start + j, centre, scale, offset))
        j += 16
    if j < size:
        vstore_first(y, start + j, size - j, output_first(a, x, residual, start + j, size - j, centre, scale, offset))


@inlined
def pivot(x, start, size, planes, stride):
    """A value near a channel's mean: the average of a few, as many as a power of two, so that equal ones stay exact.

    Sums are gathered about it. About a single value they would lose digits where that is an outlier.
    """
    if size >= 16:
        return vsum(vload(x, start)) / 16.0
    few = 8 if planes >= 8 else 4 if planes >= 4 else 1
    total = 0.0
    for i in range(few):
        total += float(load(x, start + i * stride))
    return total / float(few)


@inlined
def gather(a, x, lanes, centres, moments, first_channel, group, chunk, count):
    """Merge one chunk of each channel of a group into its moments in the scratch; return how many values it had.

    A chunk is several small planes, or a part of a large one. Means are told from the channel's `origin`.
    """
    outer, channels, inner = integer(a, slots.OUTER), integer(a, slots.CHANNELS), integer(a, slots.INNER)
    if inner <= CHUNK:
        planes = CHUNK // inner
        low, high = chunk * planes, min(outer, (chunk + 1) * planes)
        begin, size = 0, inner
    else:
        parts = (inner + CHUNK - 1) // CHUNK
        low = chunk // parts
        high, begin = low + 1, (chunk % parts) * CHUNK
        size = min(inner - begin, CHUNK)
    for g in range(group):
        start = (low * channels + first_channel + g) * inner + begin
        store_as(centres, g, pivot(x, start, size, high - low, channels * inner))
    for i in range(low, high):
        for g in range(group):
            k = first_channel + g
            s, q = span_moments(x, (i * channels + k) * inner + begin, size, splat(load(centres, g)))
            if i > low:
                s, q = s + vload(lanes, 32 * g), q + vload(lanes, 32 * g + 16)
            vstore(lanes, 32 * g, s)
            vstore(lanes, 32 * g + 16, q)
    n = float((high - low) * size)
    for g in range(group):
        total, square = vsum(vload(lanes, 32 * g)), vsum(vload(lanes, 32 * g + 16))
        centre = float(load(centres, g))
        if cancels(n, total, square):
            centre, total, square = centre + total / n, 0.0, 0.0
            for i in range(low, high):
                more = careful_sums(x, (i * channels + first_channel + g) * inner + begin, size, centre)
                total, square = total + more[0], square + more[1]
        first = centre - origin(a, first_channel + g)
        mean, m2 = merge(count, load(moments, 2 * g), load(moments, 2 * g + 1), n, first, total, square)
        store(moments, 2 * g, mean)
        store(moments, 2 * g + 1, m2)
    return n


@inlined
def chunks_of(a):
    """How many chunks a channel has."""
    outer, inner = integer(a, slots.OUTER), integer(a, slots.INNER)
    if inner <= CHUNK:
        planes = CHUNK // inner
        return (outer + planes - 1) // planes
    return outer * ((inner + CHUNK - 1) // CHUNK)


def forward(begin, end, a):
    """Training forward of groups of channels."""
    common = plain(a)
    outer, channels, inner = integer(a, slots.OUTER), integer(a, slots.CHANNELS), integer(a, slots.INNER)
    x, y, residual = data(a, slots.X), data(a, slots.Y), data(a, slots.RESIDUAL)
    coefficients = parameter(a, slots.COEFFICIENTS)
    lanes, centres, moments = scratch(a), scratch_centres(a), scratch_double(a)
    width, stream, chunks = integer(a, slots.GROUP), integer(a, slots.STREAM), chunks_of(common)
    for task in range(begin, end):
        first_channel = task * width
        group = min(width, channels - first_channel)
        for g in range(2 * group):
            store(moments, g, 0.0)
        count = 0.0
        for chunk in range(chunks):
            count += gather(common, x, lanes, centres, moments, first_channel, group, chunk, count)
        for g in range(group):
            mean = origin(common, first_channel + g) + load(moments, 2 * g)
            finish_channel(common, first_channel + g, mean, load(moments, 2 * g + 1))
        # The planes read last are the ones still in the cache.
        for reverse in range(outer):
            i = outer - 1 - reverse
            for g in range(group):
                k = first_channel + g
                centre = splat(load(coefficients, k))
                scale = splat(load(coefficients, channels + k))
                offset = splat(load(coefficients, 2 * channels + k))
                start = (i * channels + k) * inner
                apply_span(a, x, residual, y, start, inner, centre, scale, offset, stream)
    fence()


def partial(begin, end, a):
    """Moments of blocks of a channel: task = channel * BLOCKS + block."""
    channels = integer(a, slots.CHANNELS)
    x, partials = data(a, slots.X), double(a, slots.PARTIALS)
    lanes, centres, moments = scratch(a), scratch_centres(a), scratch_double(a)
    blocks, chunks = integer(a, slots.BLOCKS), chunks_of(a)
    for task in range(begin, end):
        k, block = task // blocks, task % blocks
        store(moments, 0, 0.0)
        store(moments, 1, 0.0)
        count = 0.0
        low, high = chunks * block // blocks, chunks * (block + 1) // blocks
        for chunk in range(low, high):
            count += gather(a, x, lanes, centres, moments, k, 1, chunk, count)
        where = (block * channels + k) * 3
        store(partials, where, count)
        store(partials, where + 1, load(moments, 0))
        store(partials, where + 2, load(moments, 1))


def apply(begin, end, a):
    """Write y of planes, from the coefficients: task = sample * C + channel."""
    channels, inner, stream = integer(a, slots.CHANNELS), integer(a, slots.INNER), integer(a, slots.STREAM)
    x, y, residual = data(a, slots.X), data(a, slots.Y), data(a, slots.RESIDUAL)
    coefficients = parameter(a, slots.COEFFICIENTS)
    for task in range(begin, end):
        k = task % channels
        centre = splat(load(coefficients, k))
        scale = splat(load(coefficients, channels + k))
        offset = splat(load(coefficients, 2 * channels + k))
        apply_span(a, x, residual, y, task * inner, inner, centre, scale, offset, stream)
    fence()


@inlined
def gradient(a, dy, other, distance, index, scale, offset):
    """Sixteen elements of dz, the gradient before the activation.

    What decides the activation's slope is computed again as the forward did, bit for bit, or is the sign of the output.
    """
    dz = vload(dy, index)
    if gates_by_output(a):
        dz = gate(a, dz, vload(other, index))
    elif has_activation(a):
        z = fma(distance, scale, offset)
        if has_residual(a):
            z = z + vload(other, index)
        dz = gate(a, dz, z)
    return dz


@inlined
def gradient_first(a, dy, other, distance, index, left, scale, offset):
    """The same for the first ``left`` lanes; the others are zero."""
    zero = zeros(a)
    dz = vload_first(dy, index, left, zero)
    if gates_by_output(a):
        dz = gate(a, dz, vload_first(other, index, left, zero))
    elif has_activation(a):
        z = fma(distance, scale, offset)
        if has_residual(a):
            z = z + vload_first(other, index, left, zero)
        dz = gate(a, dz, z)
    return dz


@inlined
def span_sums(a, x, dy, other, start, size, centre, scale, offset):
    """Sums of dz and of dz * (x - centre) over a contiguous span, in lanes."""
    s0 = s1 = q0 = q1 = zeros(a)
    j = 0
    while j + 32 <= size:
        distance = invert(a, vload(x, start + j)) - centre
        dz = gradient(a, dy, other, distance, start + j, scale, offset)
        s0, q0 = s0 + dz, fma(dz, distance, q0)
        distance = invert(a, vload(x, start + j + 16)) - centre
        dz = gradient(a, dy, other, distance, start + j + 16, scale, offset)
        s1, q1 = s1 + dz, fma(dz, distance, q1)
        j += 32
    while j + 16 <= size:
        distance = invert(a, vload(x, start + j)) - centre
        dz = gradient(a, dy, other, distance, start + j, scale, offset)
        s0, q0 = s0 + dz, fma(dz, distance, q0)
        j += 16
    if j < size:
        distance = invert(a, vload_first(x, start + j, size - j, centre)) - centre
        dz = gradient_first(a, dy, other, distance, start + j, size - j, scale, offset)
        s1, q1 = s1 + dz, fma(dz, distance, q1)
    return s0 + s1, q0 + q1


@inlined
def apply_backward_first(a, x, dy, other, dx, dr, index, left, centre, scale, offset, b, d):
    """Write the first ``left`` elements of dx, and of the residual's gradient."""
    distance = invert(a, vload_first(x, index, left, centre)) - centre
    dz = gradient_first(a, dy, other, distance, index, left, scale, offset)
    vstore_first(dx, index, left, fma(dz, scale, fma(distance, b, d)))
    if has_residual(a) and has_activation(a):
        vstore_first(dr, index, left, dz)


@inlined
def apply_backward_span(a, x, dy, other, dx, dr, start, size, centre, scale, offset, b, d, stream):
    """Write dx, and the residual's gradient where an activation makes it differ from dy; streamed as `apply_span`."""
    j = before_vectors(start, size, stream)
    if j > 0:
        apply_backward_first(a, x, dy, other, dx, dr, start, j, centre, scale, offset, b, d)
    while j + 16 <= size:
        distance = invert(a, vload(x, start + j)) - centre
        dz = gradient(a, dy, other, distance, start + j, scale, offset)
        result = fma(dz, scale, fma(distance, b, d))
        if stream:
            vstream(dx, start + j, result)
            if has_residual(a) and has_activation(a):
                vstream(dr, start + j, dz)
        else:
            vstore(dx, start + j, result)
            if has_residual(a) and has_activation(a):
                vstore(dr, start + j, dz)
        j += 16
    if j < size:
        apply_backward_first(a, x, dy, other, dx, dr, start + j, size - j, centre, scale, offset, b, d)


@inlined
def gather_backward(a, lanes, sums, first_channel, group, chunk):
    """Add one chunk's sums of each channel of a group to the scratch."""
    outer, channels, inner = integer(a, slots.OUTER), integer(a, slots.CHANNELS), integer(a, slots.INNER)
    x, dy, other = data(a, slots.X), data(a, slots.DY), data(a, slots.RESIDUAL)
    coefficients = parameter(a, slots.COEFFICIENTS)
    if inner <= CHUNK:
        planes = CHUNK // inner
        low, high = chunk * planes, min(outer, (chunk + 1) * planes)
        begin, size = 0, inner
    else:
        parts = (inner + CHUNK - 1) // CHUNK
        low = chunk // parts
        high, begin = low + 1, (chunk % parts) * CHUNK
        size = min(inner - begin, CHUNK)
    for i in range(low, high):
        for g in range(group):
            k = first_channel + g
            centre = splat(load(coefficients, k))
            scale = splat(load(coefficients, channels + k))
            offset = splat(load(coefficients, 2 * channels + k))
            s, q = span_sums(a, x, dy, other, (i * channels + k) * inner + begin, size, centre, scale, offset)
            if i > low:
                s, q = s + vload(lanes, 32 * g), q + vload(lanes, 32 * g + 16)
            vstore(lanes, 32 * g, s)
            vstore(lanes, 32 * g + 16, q)
    for g in range(group):
        store(sums, 2 * g, load(sums, 2 * g) + vsum(vload(lanes, 32 * g)))
        store(sums, 2 * g + 1, load(sums, 2 * g + 1) + vsum(vload(lanes, 32 * g + 16)))


@inlined
def write_backward(a, i, k):
    """Write dx of one plane from the coefficients."""
    channels, inner, stream = integer(a, slots.CHANNELS), integer(a, slots.INNER), integer(a, slots.STREAM)
    x, dy, other = data(a, slots.X), data(a, slots.DY), data(a, slots.RESIDUAL)
    dx, dr, coefficients = data(a, slots.DX), data(a, slots.DRESIDUAL), parameter(a, slots.COEFFICIENTS)
    centre = splat(load(coefficients, k))
    scale = splat(load(coefficients, channels + k))
    offset = splat(load(coefficients, 2 * channels + k))
    b = splat(load(coefficients, 3 * channels + k))
    d = splat(load(coefficients, 4 * channels + k))
    start = (i * channels + k) * inner
    apply_backward_span(a, x, dy, other, dx, dr, start, inner, centre, scale, offset, b, d, stream)


def backward(begin, end, a):
    """Backward of groups of channels."""
    common = plain(a)
    outer, channels = integer(a, slots.OUTER), integer(a, slots.CHANNELS)
    width, chunks = integer(a, slots.GROUP), chunks_of(common)
    lanes, sums = scratch(a), scratch_double(a)
    for task in range(begin, end):
        first_channel = task * width
        group = min(width, channels - first_channel)
        for g in range(group):
            restore_coefficients(common, first_channel + g)
        for g in range(2 * group):
            store(sums, g, 0.0)
        for chunk in range(chunks):
            gather_backward(a, lanes, sums, first_channel, group, chunk)
        for g in range(group):
            finish_backward(common, first_channel + g, load(sums, 2 * g), load(sums, 2 * g + 1))
        for reverse in range(outer):
            for g in range(group):
                write_backward(a, outer - 1 - reverse, first_channel + g)
    fence()


def backward_partial(begin, end, a):
    """Sums of blocks of a channel, whose coefficients are set: task = channel * BLOCKS + block."""
    channels, blocks, chunks = integer(a, slots.CHANNELS), integer(a, slots.BLOCKS), chunks_of(a)
    partials, lanes, sums = double(a, slots.PARTIALS), scratch(a), scratch_double(a)
    for task in range(begin, end):
        k, block = task // blocks, task % blocks
        store(sums, 0, 0.0)
        store(sums, 1, 0.0)
        for chunk in range(chunks * block // blocks, chunks * (block + 1) // blocks):
            gather_backward(a, lanes, sums, k, 1, chunk)
        where = (block * channels + k) * 2
        store(partials, where, load(sums, 0))
        store(partials, where + 1, load(sums, 1))


def apply_backward(begin, end, a):
    """Write dx of planes, from the coefficients: task = sample * C + channel."""
    channels = integer(a, slots.CHANNELS)
    for task in range(begin, end):
        write_backward(a, task // channels, task % channels)
    fence()
