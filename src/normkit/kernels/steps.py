"""The steps between the loops over a tensor: what is one number per channel, for both layouts. Tasks are channels."""

import math

from . import slots
from .arguments import double, integer, parameter, real
from .moments import finish_backward, finish_channel, merge_moments, set_coefficients
from .simd import load, store


def finish(begin, end, a):
    """Merge the blocks' moments of each channel in their order, and finish the channel."""
    channels, blocks, partials = integer(a, slots.CHANNELS), integer(a, slots.BLOCKS), double(a, slots.PARTIALS)
    for k in range(begin, end):
        count, mean, m2 = 0.0, 0.0, 0.0
        for block in range(blocks):
            where = (block * channels + k) * 3
            n = load(partials, where)
            mean, m2 = merge_moments(count, mean, m2, n, load(partials, where + 1), load(partials, where + 2))
            count += n
        finish_channel(a, k, mean, m2)


def coefficients(begin, end, a):
    """Set centre, scale and offset from mean and rstd."""
    mean, rstd = double(a, slots.MEAN), double(a, slots.RSTD)
    for k in range(begin, end):
        set_coefficients(a, k, load(mean, k), load(rstd, k))


def stored(begin, end, a):
    """Set mean, rstd and the coefficients from the running statistics."""
    running_mean, running_var = parameter(a, slots.RUNNING_MEAN), parameter(a, slots.RUNNING_VAR)
    for k in range(begin, end):
        mean = float(load(running_mean, k))
        rstd = 1.0 / math.sqrt(float(load(running_var, k)) + real(a, slots.EPS))
        store(double(a, slots.MEAN), k, mean)
        store(double(a, slots.RSTD), k, rstd)
        set_coefficients(a, k, mean, rstd)


def finish_sums(begin, end, a):
    """Add the blocks' sums of each channel in their order, and set what the backward writes from."""
    channels, blocks, partials = integer(a, slots.CHANNELS), integer(a, slots.BLOCKS), double(a, slots.PARTIALS)
    for k in range(begin, end):
        total, along = 0.0, 0.0
        for block in range(blocks):
            where = (block * channels + k) * 2
            total += load(partials, where)
            along += load(partials, where + 1)
        finish_backward(a, k, total, along)
