"""The steps between the loops over a tensor: what is one number per channel, for both layouts. Tasks are channels."""

import math

from .. import slots
from ..arguments import double, integer, is_null, parameter, real
from ..moments import finish_backward, finish_channel, merge_moments, set_backward_coefficients, set_coefficients
from ..vectors import load, splat, square_root, store, vload, vstore, widen
from .finish import set_vector_coefficients


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


def stored(begin, end, a):
    """Set mean, rstd and the coefficients from the running statistics: a task is sixteen channels, or all if folded."""
    running_mean, running_var = parameter(a, slots.RUNNING_MEAN), parameter(a, slots.RUNNING_VAR)
    means, rstds, eps = double(a, slots.MEAN), double(a, slots.RSTD), real(a, slots.EPS)
    channels, folded = integer(a, slots.CHANNELS), integer(a, slots.FOLD) > 1
    for task in range(begin, end):
        low = 16 * task
        if not folded and low + 16 <= channels:
            mean = widen(vload(running_mean, low))
            rstd = splat(1.0) / square_root(widen(vload(running_var, low)) + splat(eps))
            vstore(means, low, mean)
            vstore(rstds, low, rstd)
            set_vector_coefficients(a, low, mean, rstd)
            continue
        for k in range(low, channels if folded else min(low + 16, channels)):
            mean_of_one = float(load(running_mean, k))
            rstd_of_one = 1.0 / math.sqrt(float(load(running_var, k)) + eps)
            store(means, k, mean_of_one)
            store(rstds, k, rstd_of_one)
            set_coefficients(a, k, mean_of_one, rstd_of_one)


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


def given(begin, end, a):
    """Set the coefficients from a mean and rstd that were computed elsewhere."""
    for k in range(begin, end):
        set_coefficients(a, k, load(double(a, slots.MEAN), k), load(double(a, slots.RSTD), k))


def given_sums(begin, end, a):
    """Set what the backward writes from, from the two sums of each channel that were added up elsewhere."""
    weight, sums, channels = parameter(a, slots.WEIGHT), double(a, slots.WIDE), integer(a, slots.CHANNELS)
    for k in range(begin, end):
        mean, rstd = load(double(a, slots.MEAN), k), load(double(a, slots.RSTD), k)
        gamma = 1.0 if is_null(weight) else float(load(weight, k))
        lost = mean - float(load(parameter(a, slots.COEFFICIENTS), k))
        set_backward_coefficients(a, k, load(sums, k), load(sums, channels + k), gamma, rstd, lost)
