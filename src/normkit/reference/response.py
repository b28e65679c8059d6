"""Local response normalization: every value divided by the activity of its neighbouring channels."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ArgumentError, ShapeError
from .arrays import Array, Intermediates, as_float64, check_same_shape

__all__ = ["ResponseBackward", "ResponseForward", "local_response_norm", "local_response_norm_backward"]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ResponseForward(Intermediates):
    """What the forward computed, and all that the backward needs.

    Attributes:
        output: ``x * scale**-beta``, of x's shape.
        scale: ``k + alpha / size * (sum of x^2 over the window)``, of x's shape.
        x: the input.
        window: ``(C, C)`` of zeros and ones: row c marks the channels in c's window.
        alpha: the weight of the mean square.
        beta: the exponent.
        size: the number of channels in a window.
    """

    output: Array
    scale: Array
    x: Array
    window: Array
    alpha: float
    beta: float
    size: int


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ResponseBackward(Intermediates):
    """The gradient and its intermediates.

    Attributes:
        dscale: gradient of the scale, of x's shape.
        dsquare: gradient of ``x^2``, of x's shape.
        dx: gradient of the input, of x's shape.
    """

    dscale: Array
    dsquare: Array
    dx: Array


def local_response_norm(
    x: ArrayLike, size: int, *, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> ResponseForward:
    r"""Divide every value by a power of the mean square of ``size`` neighbouring channels.

    .. math:: y_c = x_c \Bigl(k + \frac{\alpha}{n} \sum_{c' = c - \lfloor n/2 \rfloor}^{c + \lfloor (n-1)/2 \rfloor}
        x_{c'}^2\Bigr)^{-\beta}

    Conventions: the window holds the channel itself; an even window reaches one further down than up; channels
    outside count as zero and the divisor stays ``size``. As torch, and unlike the paper, alpha is divided by size.

    Args:
        x: ``(N, C, *)``.
        size: n, the number of channels in a window.
        alpha: the weight of the mean square.
        beta: the exponent.
        k: what is added.

    Raises:
        ShapeError: x has fewer than two dimensions.
        DtypeError: x is not an array of real numbers.
        ArgumentError: size is below 1, or some scale is not positive.

    Example:
        >>> local_response_norm([[3.0, 4.0]], 2, alpha=2.0, beta=1.0).output.round(4).tolist()
        [[0.3, 0.1538]]

    References:
        Krizhevsky, Sutskever and Hinton, ImageNet Classification with Deep Convolutional Neural Networks, 2012, 3.3.
    """
    x = as_float64(x, "x")
    if x.ndim < 2:
        raise ShapeError(f"x has shape {x.shape}; local response normalization needs (N, C, *)")
    if size < 1:
        raise ArgumentError(f"size is {size}; a window holds at least 1 channel")
    channel = np.arange(x.shape[1])
    offset = channel[None, :] - channel[:, None]
    window = ((offset >= -(size // 2)) & (offset <= (size - 1) // 2)).astype(np.float64)
    scale = k + alpha / size * _over_channels(window, x**2)
    if not (scale > 0).all():
        raise ArgumentError(f"the scale is {scale.min():.6g} somewhere; it must be positive. Pass k=1.0 and alpha >= 0")
    output = x * scale**-beta
    return ResponseForward(output=output, scale=scale, x=x, window=window, alpha=alpha, beta=beta, size=size)


def local_response_norm_backward(dy: ArrayLike, forward: ResponseForward) -> ResponseBackward:
    """Carry the gradient of the output back: directly, and through every window that holds the channel.

    Args:
        dy: gradient of the output, of x's shape.
        forward: what ``local_response_norm`` returned.

    Raises:
        ShapeError: dy has another shape than the output.
        DtypeError: dy is not an array of real numbers.
    """
    given = as_float64(dy, "dy")
    check_same_shape(given, forward.x.shape, "dy")
    x, scale, beta = forward.x, forward.scale, forward.beta
    dscale = given * x * -beta * scale ** (-beta - 1)  # y = x scale^-beta
    # scale = k + alpha / n window x^2: a channel collects from every window it is in, so the window is transposed
    dsquare = forward.alpha / forward.size * _over_channels(forward.window.T, dscale)
    dx = given * scale**-beta + dsquare * 2 * x
    return ResponseBackward(dscale=dscale, dsquare=dsquare, dx=dx)


def _over_channels(matrix: Array, values: Array) -> Array:
    mixed: Array = np.moveaxis(np.tensordot(matrix, values, axes=(1, 1)), 0, 1)
    return mixed
