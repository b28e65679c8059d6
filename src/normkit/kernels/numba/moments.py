"""Arithmetic per channel that every CPU kernel shares: merging partial moments, finishing a channel, coefficients.

Scalars, float64. Sums that come in were gathered in float32 lanes about a value of the channel itself.
"""

import math

import numpy as np

from . import slots
from .arguments import data, double, integer, is_null, parameter, real
from .vectors import called, inlined, load, lower, store, upper

CHUNK = 2048  # values that float32 lanes gather before they are merged in float64


@inlined
def origin(a, channel):
    """A value of the channel itself, from which partial means are told: the middle one of three.

    Their differences, which the variance is made of, then keep all digits where the mean dwarfs the deviation; and so
    does the mean where one value is far from all others. The three stand in the first plane, or in the first of many
    small ones: memory that is read at once in any case.
    """
    outer, channels, inner = integer(a, slots.OUTER), integer(a, slots.CHANNELS), integer(a, slots.INNER)
    x, start, step, last = data(a, slots.X), channel * inner, 1, inner - 1
    if inner < 3:
        step, last = channels * inner, last_of_few(outer)
    first, second = float(load(x, start)), float(load(x, start + last // 2 * step))
    return middle_of(first, second, float(load(x, start + last * step)))


@inlined
def last_of_few(outer):
    """The last of the planes, or rows, of which an origin is taken."""
    return min(outer, 64) - 1


@inlined
def middle_of(x, y, z):
    """The middle one of three numbers."""
    return max(min(x, y), min(max(x, y), z))


@inlined
def middle(x, y, z):
    """The middle one of three, in every lane."""
    return upper(lower(x, y), lower(upper(x, y), z))


@inlined
def cancels(n, total, square):
    """Tell whether sums were gathered farther from the mean than a standard deviation: their difference loses digits.

    They are then gathered again, in float64 about the mean itself, which the sums give.
    """
    return 2.0 * total * total > n * square


@inlined
def merge(count, mean, m2, n, first, total, square):
    """Merge n values, with sums about ``first``, into a mean and a sum of squares (Chan, Golub and LeVeque 1983)."""
    delta = first + total / n - mean
    share = n / (count + n)
    spread = square - total * total / n
    return mean + delta * share, m2 + max(spread, 0.0) + delta * delta * count * share


@inlined
def merge_moments(count, mean, m2, n, other_mean, other_m2):
    """Merge two pairs of mean and sum of squares."""
    if n == 0.0:
        return mean, m2
    delta = other_mean - mean
    share = n / (count + n)
    return mean + delta * share, m2 + other_m2 + delta * delta * count * share


@inlined
def set_coefficient(a, which, channel, value):
    """Store one coefficient of a channel, in every column that holds the channel."""
    channels, width, coefficients = (
        integer(a, slots.CHANNELS),
        integer(a, slots.WIDTH),
        parameter(a, slots.COEFFICIENTS),
    )
    for fold in range(integer(a, slots.FOLD)):
        store_as(coefficients, which * width + fold * channels + channel, value)


@inlined
def set_coefficients(a, channel, mean, rstd):
    """Store what turns x into y: ``y = (x - centre) * scale + offset``.

    The mean is rounded to the type computed in, and what that loses goes into the offset: y stays exact where the mean
    dwarfs the deviation.
    """
    weight, bias, coefficients = parameter(a, slots.WEIGHT), parameter(a, slots.BIAS), parameter(a, slots.COEFFICIENTS)
    scale = rstd
    if not is_null(weight):
        scale = rstd * float(load(weight, channel))
    set_coefficient(a, 0, channel, mean)
    centre = float(load(coefficients, channel))
    offset = (centre - mean) * scale
    if not is_null(bias):
        offset = float(load(bias, channel)) + offset
    set_coefficient(a, 1, channel, scale)
    set_coefficient(a, 2, channel, offset)


@inlined
def restore_coefficients(a, channel):
    """Set the coefficients for a backward, from the mean and rstd that the forward saved: bit for bit as it did.

    In a backward from the output the centre is the bias: what stands before the activation lies about it.
    """
    set_coefficients(a, channel, load(double(a, slots.MEAN), channel), load(double(a, slots.RSTD), channel))
    if integer(a, slots.INVERTED):
        bias = parameter(a, slots.BIAS)
        set_coefficient(a, 0, channel, 0.0 if is_null(bias) else float(load(bias, channel)))


@inlined
def store_as(address, index, value):
    """Store a float64 in the type of the address."""
    store(address, index, type(load(address, index))(value))


@called
def finish_channel(a, channel, mean, m2):
    """From a channel's moments: save mean and rstd, move the running statistics, set the coefficients."""
    if not np.isfinite(m2):
        mean, m2 = careful_moments(a, channel)
    count = float(integer(a, slots.COUNT))
    var = m2 / count
    rstd = 1.0 / math.sqrt(var + real(a, slots.EPS))
    store(double(a, slots.MEAN), channel, mean)
    store(double(a, slots.RSTD), channel, rstd)
    wide = double(a, slots.WIDE)
    if not is_null(wide):
        store(wide, channel, var)
    running_mean, running_var = parameter(a, slots.RUNNING_MEAN), parameter(a, slots.RUNNING_VAR)
    if not is_null(running_mean):
        momentum = real(a, slots.MOMENTUM)
        stored = m2 / (count - 1.0) if integer(a, slots.UNBIASED) else var
        old_mean, old_var = float(load(running_mean, channel)), float(load(running_var, channel))
        # As a sum of two shares: of old + (new - old) * momentum, little is left where new is far smaller than old.
        store_as(running_mean, channel, old_mean * (1.0 - momentum) + mean * momentum)
        store_as(running_var, channel, old_var * (1.0 - momentum) + stored * momentum)
    set_coefficients(a, channel, mean, rstd)


@called
def finish_backward(a, channel, total, along):
    """From the sums of dz and of dz * (x - centre): dweight, dbias, and ``dx = dz * scale + (x - centre) * b + d``.

    Centre, scale and offset stand in the coefficients already; ``b`` and ``d`` follow them, and are zero where the
    statistics are constants.
    """
    weight, gamma = parameter(a, slots.WEIGHT), 1.0
    if not is_null(weight):
        gamma = float(load(weight, channel))
    factor = load(double(a, slots.RSTD), channel)
    lost = load(double(a, slots.MEAN), channel) - float(load(parameter(a, slots.COEFFICIENTS), channel))
    if integer(a, slots.INVERTED):
        # What stands for x is xhat * weight + bias, and the centre is the bias itself.
        factor, lost = 1.0 / gamma, 0.0
    product = (along - lost * total) * factor
    dweight, dbias, wide = parameter(a, slots.DWEIGHT), parameter(a, slots.DBIAS), double(a, slots.WIDE)
    if not is_null(dweight):
        store_as(dweight, channel, product)
    if not is_null(dbias):
        store_as(dbias, channel, total)
    if not is_null(wide):
        store(wide, channel, total)
        store(wide, integer(a, slots.CHANNELS) + channel, product)
    set_backward_coefficients(a, channel, total, product, gamma, factor, lost)


@inlined
def set_backward_coefficients(a, channel, total, product, gamma, factor, lost):
    """Store ``b`` and ``d`` of a channel; the normalized x is ``(x - centre - lost) * factor``."""
    b, d = 0.0, 0.0
    if not integer(a, slots.FROZEN):
        count, scale = float(integer(a, slots.COUNT)), load(double(a, slots.RSTD), channel) * gamma
        b = -scale * factor * product / count
        d = -scale * total / count - b * lost
    set_coefficient(a, 3, channel, b)
    set_coefficient(a, 4, channel, d)


@called
def careful_moments(a, channel):
    """Mean and sum of squares of one channel in float64, two passes: for what overflows float32 lanes."""
    outer, channels, inner = integer(a, slots.OUTER), integer(a, slots.CHANNELS), integer(a, slots.INNER)
    x, start, stride = data(a, slots.X), channel * inner, channels * inner
    first = float(load(x, start))
    total = 0.0
    for i in range(outer):
        for j in range(inner):
            total += float(load(x, start + i * stride + j)) - first
    offset = total / (outer * inner)
    m2 = 0.0
    for i in range(outer):
        for j in range(inner):
            distance = float(load(x, start + i * stride + j)) - first - offset
            m2 += distance * distance
    return first + offset, m2
