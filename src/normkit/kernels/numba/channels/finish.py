"""What `moments` does for one channel, for sixteen at a time: channels-last has them side by side in memory."""

from .. import slots
from ..arguments import double, integer, is_null, parameter, real
from ..moments import finish_backward, finish_channel, origin, restore_coefficients
from ..vectors import called, inlined, load, narrow, splat, square_root, vload, vstore, vsum, widen
from .columns import origins


@inlined
def finish_channels(a, column, moments, width):
    """Finish the channels of a vector: mean, told from its origin, and sum of squares stand ``width`` apart."""
    m2 = vload(moments, width + column)
    channels = integer(a, slots.CHANNELS)
    # An infinity or a NaN in any lane fails the comparison, and its channel is computed with care.
    if column + 16 <= channels and vsum(m2 - m2) == 0.0:
        _finish_vector(a, column, origins(a, column) + vload(moments, column), m2)
    else:
        for k in range(column, min(column + 16, channels)):
            finish_channel(a, k, origin(a, k) + load(moments, k), load(moments, width + k))


@inlined
def set_vector_coefficients(a, column, mean, rstd):
    """Store centre, scale and offset of sixteen channels; see `moments.set_coefficients`."""
    weight, bias, coefficients = parameter(a, slots.WEIGHT), parameter(a, slots.BIAS), parameter(a, slots.COEFFICIENTS)
    width, scale = integer(a, slots.WIDTH), rstd
    if not is_null(weight):
        scale = rstd * widen(vload(weight, column))
    centre = narrow(a, mean)
    offset = (widen(centre) - mean) * scale
    if not is_null(bias):
        offset = widen(vload(bias, column)) + offset
    vstore(coefficients, column, centre)
    vstore(coefficients, width + column, narrow(a, scale))
    vstore(coefficients, 2 * width + column, narrow(a, offset))


@inlined
def restore_channels(a, column):
    """Set the coefficients of sixteen channels for a backward; see `moments.restore_coefficients`."""
    channels = integer(a, slots.CHANNELS)
    if column + 16 <= channels and not integer(a, slots.INVERTED):
        means, rstds = double(a, slots.MEAN), double(a, slots.RSTD)
        set_vector_coefficients(a, column, vload(means, column), vload(rstds, column))
    else:
        for k in range(column, min(column + 16, channels)):
            restore_coefficients(a, k)


@called
def _finish_vector(a, column, mean, m2):
    count = float(integer(a, slots.COUNT))
    var = m2 / splat(count)
    rstd = splat(1.0) / square_root(var + splat(real(a, slots.EPS)))
    vstore(double(a, slots.MEAN), column, mean)
    vstore(double(a, slots.RSTD), column, rstd)
    wide = double(a, slots.WIDE)
    if not is_null(wide):
        vstore(wide, column, var)
    running_mean, running_var = parameter(a, slots.RUNNING_MEAN), parameter(a, slots.RUNNING_VAR)
    if not is_null(running_mean):
        momentum = splat(real(a, slots.MOMENTUM))
        divisor = count - 1.0 if integer(a, slots.UNBIASED) else count
        old_mean, old_var = widen(vload(running_mean, column)), widen(vload(running_var, column))
        kept = splat(1.0 - real(a, slots.MOMENTUM))
        vstore(running_mean, column, narrow(a, old_mean * kept + mean * momentum))
        vstore(running_var, column, narrow(a, old_var * kept + m2 / splat(divisor) * momentum))
    set_vector_coefficients(a, column, mean, rstd)


@inlined
def finish_channels_backward(a, column, sums, width):
    """Finish the backward of the channels of a vector: the two sums stand ``width`` apart."""
    channels = integer(a, slots.CHANNELS)
    if column + 16 <= channels:
        _finish_vector_backward(a, column, vload(sums, column), vload(sums, width + column))
    else:
        for k in range(column, min(column + 16, channels)):
            finish_backward(a, k, load(sums, k), load(sums, width + k))


@called
def _finish_vector_backward(a, column, total, along):
    coefficients, width = parameter(a, slots.COEFFICIENTS), integer(a, slots.WIDTH)
    mean, rstd = vload(double(a, slots.MEAN), column), vload(double(a, slots.RSTD), column)
    weight, nothing, gamma = parameter(a, slots.WEIGHT), splat(0.0), splat(1.0)
    if not is_null(weight):
        gamma = widen(vload(weight, column))
    factor, lost = rstd, mean - widen(vload(coefficients, column))
    if integer(a, slots.INVERTED):
        factor, lost = splat(1.0) / gamma, nothing
    product = (along - lost * total) * factor
    dweight, dbias, wide = parameter(a, slots.DWEIGHT), parameter(a, slots.DBIAS), double(a, slots.WIDE)
    if not is_null(dweight):
        vstore(dweight, column, narrow(a, product))
    if not is_null(dbias):
        vstore(dbias, column, narrow(a, total))
    if not is_null(wide):
        vstore(wide, column, total)
        vstore(wide, integer(a, slots.CHANNELS) + column, product)
    scale = rstd * gamma
    b = d = nothing
    if not integer(a, slots.FROZEN):
        part = splat(1.0 / float(integer(a, slots.COUNT)))
        b = nothing - scale * factor * product * part
        d = nothing - scale * total * part - b * lost
    vstore(coefficients, 3 * width + column, narrow(a, b))
    vstore(coefficients, 4 * width + column, narrow(a, d))
