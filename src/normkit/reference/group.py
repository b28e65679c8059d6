"""Group normalization: every sample over groups of its channels."""

from numpy.typing import ArrayLike

from ..axes import group_axes, group_shape
from ..errors import ArgumentError, ShapeError
from .arrays import as_float64
from .standardize import SampleBackward, SampleForward, affine_parameter, standardize, standardize_backward

__all__ = ["group_norm", "group_norm_backward"]


def group_norm(
    x: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
) -> SampleForward:
    r"""Normalize groups of neighbouring channels of every sample by their mean and variance.

    .. math:: y = \gamma \, \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    Conventions: averages over the channels of a group and all positions, each sample by itself; eps is added to the
    variance; the variance divides by the number of values; nothing is stored; gamma and beta per channel; float64.

    Args:
        x: ``(N, C, *)``.
        num_groups: G, a divisor of C.
        weight: gamma, ``(C,)``; None stands for ones.
        bias: beta, ``(C,)``; None stands for zeros.
        eps: zero or positive.

    Raises:
        ShapeError: x has fewer than two dimensions or no value; weight or bias do not fit its channels.
        DtypeError: an argument is not an array of real numbers.
        ArgumentError: num_groups does not divide C; eps is negative, not finite, or zero while a group is constant.

    Example:
        >>> group_norm([[1.0, 3.0, 10.0, 30.0]], 2, eps=0.0).output.tolist()
        [[-1.0, 1.0, -1.0, 1.0]]

    References:
        Wu and He, Group Normalization, 2018, arXiv:1803.08494, equations (1), (2) and (7).
    """
    x = as_float64(x, "x")
    if x.ndim < 2:
        raise ShapeError(f"x has shape {x.shape}; group normalization needs (N, C, *)")
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ArgumentError(f"num_groups is {num_groups}, which does not divide the {channels} channels")
    view = group_shape(x.shape, num_groups)
    broadcast = (1, num_groups, channels // num_groups, *(1 for _ in x.shape[2:]))
    gamma = affine_parameter(weight, (channels,), broadcast, "weight", default=1.0)
    beta = affine_parameter(bias, (channels,), broadcast, "bias", default=0.0)
    return standardize(x, view, group_axes(x.ndim), gamma, beta, eps, (channels,))


def group_norm_backward(dy: ArrayLike, forward: SampleForward) -> SampleBackward:
    """Carry the gradient of the output back; the lines are those of ``standardize_backward``.

    Args:
        dy: gradient of the output, of x's shape.
        forward: what ``group_norm`` returned.

    Raises:
        ShapeError: dy has another shape than the output.
        DtypeError: dy is not an array of real numbers.
    """
    return standardize_backward(dy, forward)
