"""The double backward of batch normalization: the derivative of its backward."""

from dataclasses import dataclass

from numpy.typing import ArrayLike

from ..axes import batch_axes
from ..errors import ArgumentError
from .arrays import Array, Intermediates, per_channel, spread
from .batch import Forward, cotangent

__all__ = ["DoubleBackward", "batch_norm_double_backward"]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class DoubleBackward(Intermediates):
    """The gradients of ``<dx, ddx> + <dweight, ddweight> + <dbias, ddbias>``.

    Attributes:
        ddy: with respect to dy, of x's shape.
        dx: with respect to x, of x's shape.
        dweight: with respect to gamma, ``(C,)``.
    """

    ddy: Array
    dx: Array
    dweight: Array


def batch_norm_double_backward(
    ddx: ArrayLike, ddweight: ArrayLike | None, ddbias: ArrayLike | None, dy: ArrayLike, forward: Forward
) -> DoubleBackward:
    r"""Differentiate the backward itself: needed by gradient penalties and by second-order optimisers.

    With :math:`P g = g - \overline g - \hat x \, \overline{g \hat x}` the backward is :math:`dx = r P(\gamma dy)`,
    where r is rstd. P is symmetric, so :math:`\langle dx, ddx \rangle = \langle \gamma dy, r P(ddx) \rangle`.

    Args:
        ddx: gradient with respect to dx, of x's shape.
        ddweight: gradient with respect to dweight, ``(C,)``; None stands for zeros.
        ddbias: gradient with respect to dbias, ``(C,)``; None stands for zeros.
        dy: the gradient that the backward was given, of x's shape.
        forward: what ``batch_norm`` returned.

    Returns:
        The gradients with respect to dy, x and weight.

    Raises:
        ShapeError: an argument does not fit the shape of x.
        DtypeError: an argument is not an array of real numbers.
        ArgumentError: the forward used stored statistics.

    Example:
        >>> from normkit.reference import batch_norm
        >>> step = batch_norm([[1.0], [2.0], [4.0]], eps=0.0)
        >>> batch_norm_double_backward([[1.0], [0.0], [0.0]], None, None, step.xhat, step).ddy.round(4).ravel().tolist()
        [0.2291, -0.3436, 0.1145]
    """
    if not forward.training:
        raise ArgumentError("this forward used stored statistics, so its backward is linear in dy alone")
    dy, ddx = cotangent(dy, forward, "dy"), cotangent(ddx, forward, "ddx")
    axes, ndim, xhat = batch_axes(dy.ndim), dy.ndim, forward.xhat
    channels = len(forward.weight)
    ddgamma = spread(per_channel(ddweight, channels, "ddweight", default=0.0), ndim)
    ddbeta = spread(per_channel(ddbias, channels, "ddbias", default=0.0), ndim)
    rstd, gamma = spread(forward.rstd, ndim), spread(forward.weight, ndim)

    def average(values: Array) -> Array:
        means: Array = values.mean(axis=axes, keepdims=True)
        return means

    def project(values: Array) -> Array:
        return values - average(values) - xhat * average(values * xhat)

    dxhat = gamma * dy
    # <dx, ddx> = <gamma dy, r P(ddx)>;  <dweight, ddweight> = <dy, xhat ddweight>;  <dbias, ddbias> = <dy, ddbias>
    ddy = gamma * rstd * project(ddx) + xhat * ddgamma + ddbeta
    # the same <gamma dy, r P(ddx)>, with respect to gamma
    dweight = (dy * rstd * project(ddx)).sum(axis=axes)
    # <dx, ddx> = r <dxhat, P(ddx)>, and dr/dx = -r^2 xhat / m
    dx_through_rstd = -(rstd**2) * xhat * average(dxhat * project(ddx))
    # P holds -xhat xhat' / m, so xhat is met twice; and once more in dweight = sum dy xhat
    dxhat_total = -rstd * (ddx * average(dxhat * xhat) + dxhat * average(ddx * xhat)) + dy * ddgamma
    dx_through_xhat = rstd * project(dxhat_total)  # the backward of the normalization itself
    return DoubleBackward(ddy=ddy, dx=dx_through_rstd + dx_through_xhat, dweight=dweight)
