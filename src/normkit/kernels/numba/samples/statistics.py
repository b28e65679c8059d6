"""Statistics of one run of memory, which is what a group of a contiguous sample is, and what follows from them.

Lanes gather at most `RUN` values about one near their mean, and merge in float64 in the order of memory.
"""

import math

import numpy as np

from .. import slots
from ..arguments import data, double, integer, is_null, real, scratch_centres
from ..channels.contiguous import careful_sums, span_moments
from ..moments import cancels, merge, store_as
from ..vectors import called, inlined, load, narrow, splat, store, vload, vsum, widen
from . import slots as sample_slots

# Values that lanes gather before they are merged: 32 additions to a lane. Inputs far from zero lie on a coarse grid,
# and so do their squares: with 64 additions to a lane all rounding went one way, and cost two units in the last place.
RUN = 2048
_FAINT = 1e-28  # a variance whose squares, in float32, begin to lose digits


@inlined
def run_moments(a, x, start, size):
    """Mean and sum of squared distances from it of ``size`` values; not centred, zero and the sum of squares."""
    centred, held = integer(a, sample_slots.CENTRED), scratch_centres(a)
    mean, m2, count = 0.0, 0.0, 0.0
    for begin in range(0, size, RUN):
        n = min(size - begin, RUN)
        store_as(held, 0, 0.0)
        if centred:
            store_as(held, 0, vsum(vload(x, start + begin)) / 16.0 if n >= 16 else float(load(x, start + begin)))
        s, q = span_moments(x, start + begin, n, splat(load(held, 0)))
        total, square, first = vsum(s), vsum(q), float(load(held, 0))
        if centred and cancels(n, total, square):
            first += total / n
            total, square = careful_sums(x, start + begin, n, first)
        if centred:
            mean, m2 = merge(count, mean, m2, float(n), first, total, square)
        else:
            m2 += square
        count += n
    return mean, m2


@called
def careful_run(a, x, start, size):
    """The same in float64, value by value: for what overflows float32 lanes."""
    mean, m2 = 0.0, 0.0
    if integer(a, sample_slots.CENTRED):
        first = float(load(x, start))
        for i in range(size):
            mean += float(load(x, start + i)) - first
        mean = first + mean / size
    for i in range(size):
        distance = float(load(x, start + i)) - mean
        m2 += distance * distance
    return mean, m2


@inlined
def needs_care(a, m2, count):
    """Tell whether squares left the range of float32: above it, or below it where no eps covers that."""
    return not np.isfinite(m2) or (m2 < _FAINT * count and real(a, slots.EPS) < _FAINT)


@inlined
def keep_statistics(a, row, mean, m2, count, write):
    """Return mean and rstd of a group, and where this task is to write them save them for the backward."""
    var = m2 / count
    rstd = 1.0 / math.sqrt(var + real(a, slots.EPS))
    if write:
        store(double(a, slots.MEAN), row, mean)
        store(double(a, slots.RSTD), row, rstd)
        if not is_null(double(a, sample_slots.VARIANCE)):
            store(double(a, sample_slots.VARIANCE), row, var)
    return mean, rstd


@inlined
def run_statistics(a, row, start, size):
    """Mean and rstd of a group that lies in one run, saved for the backward."""
    x = data(a, slots.X)
    mean, m2 = run_moments(a, x, start, size)
    if needs_care(a, m2, float(size)):
        mean, m2 = careful_run(a, x, start, size)
    return keep_statistics(a, row, mean, m2, float(size), True)


@inlined
def standardize_by(a, mean, rstd):
    """Centre, scale and shift, in lanes: ``xhat = (x - centre) * scale + shift``.

    The shift holds what the mean loses where it is rounded to the type computed in.
    """
    centre, scale = narrow(a, splat(mean)), splat(rstd)
    return centre, narrow(a, scale), narrow(a, (widen(centre) - splat(mean)) * scale)
