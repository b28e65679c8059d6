"""Which elements share statistics: the only place that turns a layout into reduction axes.

Plain integers, no tensors: the NumPy reference, the torch functions and the kernels all ask here.
A tensor is laid out as ``(N, C, *)``: N samples, C channels, then any number of spatial dimensions.
"""

__all__ = ["batch_axes", "channel_shape", "values_per_channel"]


def batch_axes(ndim: int) -> tuple[int, ...]:
    """Return the axes that batch normalization averages: all but the channels (SPEC A2).

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
