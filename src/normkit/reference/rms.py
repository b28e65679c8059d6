"""Root mean square normalization: layer normalization without the mean."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..axes import trailing_axes
from ..errors import ArgumentError, ShapeError
from .arrays import Array, Intermediates, as_float64, check_eps, check_same_shape
from .layer import check_normalized_shape
from .standardize import affine_parameter

__all__ = ["RMSBackward", "RMSForward", "rms_norm", "rms_norm_backward"]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class RMSForward(Intermediates):
    """What the forward computed, and all that the backward needs.

    Attributes:
        output: ``weight * xhat``, of x's shape.
        mean_square: ``mean(x^2)`` over the normalized dimensions, which stay with size one.
        rrms: ``1 / sqrt(mean_square + eps)``, likewise.
        xhat: ``x * rrms``, of x's shape.
        weight: gamma in the shape in which it broadcasts; ones where none was given.
        axes: the averaged axes.
        eps: the number added to the mean square.
    """

    output: Array
    mean_square: Array
    rrms: Array
    xhat: Array
    weight: Array
    axes: tuple[int, ...]
    eps: float


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class RMSBackward(Intermediates):
    """The gradients and the intermediates in the order of the chain rule.

    Attributes:
        dxhat: gradient of the normalized input, of x's shape.
        dmean_square: gradient of the mean squares, of their shape.
        dx: gradient of the input, of x's shape.
        dweight: gradient of gamma, of ``normalized_shape``.
    """

    dxhat: Array
    dmean_square: Array
    dx: Array
    dweight: Array


def rms_norm(
    x: ArrayLike, normalized_shape: int | Sequence[int], weight: ArrayLike | None = None, *, eps: float | None = None
) -> RMSForward:
    r"""Divide the last dimensions of x by their root mean square.

    .. math:: y = \gamma \, \frac{x}{\sqrt{\overline{x^2} + \epsilon}}

    Conventions: averages over the last dimensions; eps is added to the mean square (unit: input squared), and None
    stands for the spacing of float64 at one, as torch takes that of the input's type; nothing is stored; float64.

    Args:
        x: ``(*, *normalized_shape)``.
        normalized_shape: the sizes of the last dimensions, or the size of the last one.
        weight: gamma, of ``normalized_shape``; None stands for ones.
        eps: zero or positive, or None.

    Raises:
        ShapeError: x does not end in ``normalized_shape`` or holds no value; weight has another shape.
        DtypeError: an argument is not an array of real numbers.
        ArgumentError: eps is negative or not finite, or zero while a row is zero.

    Example:
        >>> rms_norm([2.0, -2.0, 2.0, 2.0], 4, eps=0.0).output.tolist()
        [1.0, -1.0, 1.0, 1.0]

    References:
        Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, arXiv:1910.07467, equation (4).
    """
    x = as_float64(x, "x")
    eps = float(np.finfo(np.float64).eps) if eps is None else eps
    check_eps(eps)
    shape = check_normalized_shape(x.shape, normalized_shape)
    if x.size == 0:
        raise ShapeError(f"x of shape {x.shape} holds no value; pass at least one sample")
    axes = trailing_axes(x.ndim, len(shape))
    gamma = affine_parameter(weight, shape, (1,) * (x.ndim - len(shape)) + shape, "weight", default=1.0)
    mean_square = (x**2).mean(axis=axes, keepdims=True)
    if not (mean_square + eps > 0).all():
        raise ArgumentError("eps is 0 and a row of x is zero, so it has no scale; pass eps=1e-5")
    rrms = 1 / np.sqrt(mean_square + eps)
    xhat = x * rrms
    return RMSForward(
        output=gamma * xhat, mean_square=mean_square, rrms=rrms, xhat=xhat, weight=gamma, axes=axes, eps=eps
    )


def rms_norm_backward(dy: ArrayLike, forward: RMSForward) -> RMSBackward:
    r"""Carry the gradient of the output back through the mean square.

    .. math:: dx = \frac{1}{r} \Bigl(\gamma dy - \hat x \, \overline{\gamma dy \, \hat x}\Bigr)

    is what the lines add up to, r being the root.

    Args:
        dy: gradient of the output, of x's shape.
        forward: what ``rms_norm`` returned.

    Raises:
        ShapeError: dy has another shape than the output.
        DtypeError: dy is not an array of real numbers.
    """
    given = as_float64(dy, "dy")
    check_same_shape(given, forward.xhat.shape, "dy")
    rrms, axes = forward.rrms, forward.axes
    x, m = forward.xhat / rrms, given.size // rrms.size
    dxhat = given * forward.weight  # y = gamma xhat
    dmean_square = (dxhat * x).sum(axis=axes, keepdims=True) * -0.5 * rrms**3  # xhat = x (mean_square + eps)^(-1/2)
    dx = dxhat * rrms + dmean_square * 2 * x / m  # x is in xhat, and in mean_square with slope 2 x / m
    leading = tuple(range(given.ndim - len(axes)))
    dweight = (given * forward.xhat).sum(axis=leading)
    return RMSBackward(dxhat=dxhat, dmean_square=dmean_square, dx=dx, dweight=dweight)
