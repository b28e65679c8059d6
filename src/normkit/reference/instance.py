"""Instance normalization: every channel of every sample over its positions."""

from numpy.typing import ArrayLike

from ..axes import channel_shape, position_axes, values_per_channel
from ..errors import ShapeError
from .arrays import as_float64
from .standardize import SampleBackward, SampleForward, affine_parameter, standardize, standardize_backward
from .statistics import Statistics

__all__ = ["instance_norm", "instance_norm_backward", "instance_statistics"]


def instance_norm(
    x: ArrayLike, weight: ArrayLike | None = None, bias: ArrayLike | None = None, *, eps: float = 1e-5
) -> SampleForward:
    r"""Normalize every channel of every sample by the mean and variance of its positions.

    .. math:: y = \gamma \, \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    Conventions: averages over positions only; eps is added to the variance; the variance divides by the number of
    positions; gamma and beta per channel; float64 throughout. What may be stored: ``instance_statistics``.

    Args:
        x: ``(N, C, *)`` with at least one spatial dimension.
        weight: gamma, ``(C,)``; None stands for ones.
        bias: beta, ``(C,)``; None stands for zeros.
        eps: zero or positive.

    Raises:
        ShapeError: x has fewer than three dimensions or no value; weight or bias do not fit its channels.
        DtypeError: an argument is not an array of real numbers.
        ArgumentError: eps is negative or not finite, or zero while a channel of a sample is constant.

    Example:
        >>> instance_norm([[[1.0, 3.0]], [[10.0, 30.0]]], eps=0.0).output.tolist()
        [[[-1.0, 1.0]], [[-1.0, 1.0]]]

    References:
        Ulyanov, Vedaldi and Lempitsky, Instance Normalization, 2016, arXiv:1607.08022, equation (2).
    """
    x = as_float64(x, "x")
    if x.ndim < 3:
        raise ShapeError(f"x has shape {x.shape}; instance normalization needs positions: (N, C, L) or more dimensions")
    channels, broadcast = x.shape[1], channel_shape(x.ndim, x.shape[1])
    gamma = affine_parameter(weight, (channels,), broadcast, "weight", default=1.0)
    beta = affine_parameter(bias, (channels,), broadcast, "bias", default=0.0)
    return standardize(x, x.shape, position_axes(x.ndim), gamma, beta, eps, (channels,))


def instance_norm_backward(dy: ArrayLike, forward: SampleForward) -> SampleBackward:
    """Carry the gradient of the output back; the lines are those of ``standardize_backward``.

    Args:
        dy: gradient of the output, of x's shape.
        forward: what ``instance_norm`` returned.

    Raises:
        ShapeError: dy has another shape than the output.
        DtypeError: dy is not an array of real numbers.
    """
    return standardize_backward(dy, forward)


def instance_statistics(forward: SampleForward) -> Statistics:
    """Return what a layer that tracks statistics stores: the samples' means and variances, averaged over the batch.

    ``running_update`` takes it; the unbiased form divides by positions - 1, as torch does.

    >>> found = instance_statistics(instance_norm([[[1.0, 3.0]], [[10.0, 30.0]]]))
    >>> found.mean.tolist(), found.unbiased_var.tolist()
    ([11.0], [101.0])
    """
    shape = (forward.xhat.shape[0], forward.xhat.shape[1])
    mean, var = (values.reshape(shape).mean(axis=0) for values in (forward.mean, forward.var))
    return Statistics(count=values_per_channel(forward.xhat.shape) // shape[0], mean=mean, var=var)
