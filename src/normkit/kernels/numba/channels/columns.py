"""The columns of channels-last memory: sixteen are read at once, and the mean of each is told from its origin."""

from .. import slots
from ..arguments import data, integer
from ..moments import last_of_few, middle, middle_of
from ..vectors import inlined, load, vload, vload_first, widen, zeros

TILE = 64  # columns that are taken side by side


@inlined
def columns(a):
    """How many columns a folded row has."""
    return integer(a, slots.CHANNELS) * integer(a, slots.FOLD)


@inlined
def read(address, index, left, rest):
    """Sixteen elements, or the ``left`` that the row still has."""
    return vload(address, index) if left >= 16 else vload_first(address, index, left, rest)


@inlined
def last_row(a):
    """The last row, of folded ones, of which the origins are taken."""
    return last_of_few(integer(a, slots.OUTER) // integer(a, slots.FOLD))


@inlined
def origins(a, column):
    """What the means of sixteen columns are told from: `moments.origin`, where a column is a channel."""
    x, stride, last = data(a, slots.X), columns(a), last_row(a)
    first = read(x, column, stride - column, zeros(a))
    second = read(x, last // 2 * stride + column, stride - column, zeros(a))
    third = read(x, last * stride + column, stride - column, zeros(a))
    return widen(middle(first, second, third))


@inlined
def column_origin(a, column):
    """The same for one column."""
    x, stride, last = data(a, slots.X), columns(a), last_row(a)
    first, second = float(load(x, column)), float(load(x, last // 2 * stride + column))
    return middle_of(first, second, float(load(x, last * stride + column)))
