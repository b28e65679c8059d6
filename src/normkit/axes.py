"""Which elements share statistics: the only place that turns a layout into reduction axes.

Plain integers, no tensors: the NumPy reference, the torch functions and the kernels all ask here.
A tensor is laid out as ``(N, C, *)``: N samples, C channels, then any number of spatial dimensions.
"""

__all__ = [
    "batch_axes",
    "channel_shape",
    "group_axes",
    "group_shape",
    "position_axes",
    "trailing_axes",
    "values_per_channel",
]


def batch_axes(ndim: int) -> tuple[int, ...]:
    """Return the axes that batch normalization averages: all but the channels.

    >>> batch_axes(2), batch_axes(4)
    ((0,), (0, 2, 3))
    """
    return (0, *range(2, ndim))


def channel_shape(ndim: int, channels: int) -> tuple[int, ...]:
    """Return the shape in which one value per channel broadcasts against ``(N, C, *)``.

    >>> channel_shape(4, 16)
    (1, 16, 1, 1)
    """
    return (1, channels, *(1 for _ in range(2, ndim)))


def values_per_channel(shape: tuple[int, ...]) -> int:
    """Return how many values of a tensor of this shape share one channel's statistics.

    >>> values_per_channel((32, 64, 7, 7))
    1568
    """
    count = shape[0]
    for size in shape[2:]:
        count *= size
    return count


def position_axes(ndim: int) -> tuple[int, ...]:
    """Return the axes that instance normalization averages: the positions of one sample's channel.

    >>> position_axes(4)
    (2, 3)
    """
    return tuple(range(2, ndim))


def trailing_axes(ndim: int, count: int) -> tuple[int, ...]:
    """Return the axes that layer and RMS normalization average: the last ones.

    >>> trailing_axes(3, 1), trailing_axes(4, 3)
    ((2,), (1, 2, 3))
    """
    return tuple(range(ndim - count, ndim))


def group_shape(shape: tuple[int, ...], num_groups: int) -> tuple[int, ...]:
    """Return the shape ``(N, G, C / G, *)`` in which group normalization sees ``(N, C, *)``.

    >>> group_shape((2, 6, 5), 3)
    (2, 3, 2, 5)
    """
    return (shape[0], num_groups, shape[1] // num_groups, *shape[2:])


def group_axes(ndim: int) -> tuple[int, ...]:
    """Return the axes that group normalization averages in the shape of ``group_shape``.

    >>> group_axes(4)
    (2, 3, 4)
    """
    return tuple(range(2, ndim + 1))
