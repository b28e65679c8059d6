r"""Batch normalization: forward and backward, each intermediate named as in the derivation.

``docs/batch-norm.md`` derives every line. Sums and means run over the axes that share statistics: all but the
channels. ``m`` is the number of values they hold, ``xhat`` the normalized input.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..axes import batch_axes, values_per_channel
from ..errors import ArgumentError
from .arrays import Array, Intermediates, as_float64, check_eps, check_layout, check_same_shape, per_channel, spread
from .statistics import batch_statistics, deviations

__all__ = [
    "Backward",
    "Forward",
    "InferenceBackward",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_inference",
    "batch_norm_inference_backward",
]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Forward(Intermediates):
    """What the forward computed, and all that the backward needs.

    Attributes:
        output: ``weight * xhat + bias``, of x's shape.
        mean: per channel ``(C,)``: of the batch, or the stored one in prediction.
        var: per channel ``(C,)``, divisor m: of the batch, or the stored one in prediction.
        rstd: ``1 / sqrt(var + eps)``, ``(C,)``.
        xhat: ``(x - mean) * rstd``, of x's shape.
        weight: gamma, ``(C,)``; ones where none was given.
        bias: beta, ``(C,)``; zeros where none was given.
        eps: the number added to the variance.
        training: whether mean and var came from x itself; they are constants otherwise.
    """

    output: Array
    mean: Array
    var: Array
    rstd: Array
    xhat: Array
    weight: Array
    bias: Array
    eps: float
    training: bool


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Backward(Intermediates):
    """The gradients of a training step and, in the order of the chain rule, the intermediates.

    Attributes:
        dxhat: gradient of the normalized input, of x's shape.
        dvar: gradient of the batch variance, ``(C,)``.
        dmean: gradient of the batch mean, ``(C,)``.
        dx: gradient of the input, of x's shape.
        dweight: gradient of gamma, ``(C,)``; it exists also where gamma is the constant 1.
        dbias: gradient of beta, ``(C,)``.
    """

    dxhat: Array
    dvar: Array
    dmean: Array
    dx: Array
    dweight: Array
    dbias: Array


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class InferenceBackward(Intermediates):
    """The gradients in prediction, where mean and variance are constants.

    Attributes:
        dxhat: gradient of the normalized input, of x's shape.
        dx: gradient of the input, of x's shape.
        dweight: gradient of gamma, ``(C,)``.
        dbias: gradient of beta, ``(C,)``.
    """

    dxhat: Array
    dx: Array
    dweight: Array
    dbias: Array


def batch_norm(
    x: ArrayLike, weight: ArrayLike | None = None, bias: ArrayLike | None = None, *, eps: float = 1e-5
) -> Forward:
    r"""Normalize every channel by the mean and variance of this batch.

    .. math:: y = \gamma \, \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    Conventions: averages over all axes but the channels; eps is added to the variance (unit: input squared); the
    variance divides by m, not by m - 1; nothing is stored, see ``running_update``; float64 throughout. One value per
    channel is allowed and gives beta.

    Args:
        x: ``(N, C)``, ``(N, C, L)``, ``(N, C, H, W)`` or ``(N, C, D, H, W)``.
        weight: gamma, ``(C,)``; None stands for ones.
        bias: beta, ``(C,)``; None stands for zeros.
        eps: zero or positive.

    Returns:
        The output with mean, var, rstd and xhat.

    Raises:
        ShapeError: x has another rank or no value; weight or bias do not fit its channels.
        DtypeError: an argument is not an array of real numbers.
        ArgumentError: eps is negative or not finite, or it is zero and a channel is constant.

    Example:
        >>> step = batch_norm([[1.0], [2.0], [3.0]], eps=0.0)
        >>> step.mean.item(), round(step.var.item(), 4), step.output.round(4).ravel().tolist()
        (2.0, 0.6667, [-1.2247, 0.0, 1.2247])

    References:
        Ioffe and Szegedy, Batch Normalization, 2015, arXiv:1502.03167, Algorithm 1.
    """
    x = as_float64(x, "x")
    batch = batch_statistics(x)  # mean = sum x / m,  var = sum (x - mean)^2 / m
    return _normalize(deviations(x, batch.mean), batch.mean, batch.var, weight, bias, eps, training=True)


def batch_norm_inference(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
) -> Forward:
    """Normalize by stored statistics: in prediction every sample is mapped by itself, by one affine function.

    Args:
        x: ``(N, C, *)`` with up to three spatial dimensions.
        mean: the stored mean, ``(C,)``.
        var: the stored variance, ``(C,)``, not negative.
        weight: gamma, ``(C,)``; None stands for ones.
        bias: beta, ``(C,)``; None stands for zeros.
        eps: zero or positive.

    Returns:
        The output, with the stored statistics in ``mean`` and ``var``.

    Raises:
        ShapeError: x has another rank or no value; an argument does not fit its channels.
        DtypeError: an argument is not an array of real numbers.
        ArgumentError: eps or a variance is negative or not finite, or both are zero.

    Example:
        >>> batch_norm_inference([[5.0]], [1.0], [4.0], eps=0.0).output.item()
        2.0
    """
    x = as_float64(x, "x")
    check_layout(x)
    mean = per_channel(as_float64(mean, "mean"), x.shape[1], "mean", default=0.0)
    var = per_channel(as_float64(var, "var"), x.shape[1], "var", default=1.0)
    return _normalize(x - spread(mean, x.ndim), mean, var, weight, bias, eps, training=False)


def _normalize(
    deviation: Array,
    mean: Array,
    var: Array,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    eps: float,
    *,
    training: bool,
) -> Forward:
    """Scale the deviations from the mean, then shift: the half of the transform that training and prediction share."""
    check_eps(eps)
    if not (var + eps > 0).all():
        channel = int(np.argmin(var + eps > 0))
        raise ArgumentError(
            f"channel {channel} has variance {var[channel]:.6g} and eps is {eps}; their sum must be positive. "
            "Pass eps=1e-5"
        )
    channels, ndim = deviation.shape[1], deviation.ndim
    gamma = per_channel(weight, channels, "weight", default=1.0)
    beta = per_channel(bias, channels, "bias", default=0.0)
    rstd = 1 / np.sqrt(var + eps)
    xhat = deviation * spread(rstd, ndim)  # (x - mean) / sqrt(var + eps)
    output = spread(gamma, ndim) * xhat + spread(beta, ndim)
    return Forward(
        output=output, mean=mean, var=var, rstd=rstd, xhat=xhat, weight=gamma, bias=beta, eps=eps, training=training
    )


def batch_norm_backward(dy: ArrayLike, forward: Forward) -> Backward:
    r"""Carry the gradient of the output back through the batch statistics, step by step.

    .. math:: dx = \frac{\gamma}{\sigma} \Bigl(dy - \overline{dy} - \hat x \, \overline{dy \, \hat x}\Bigr)

    is what the six lines add up to; the derivation is in ``docs/batch-norm.md``.

    Args:
        dy: gradient of the output, of x's shape.
        forward: what ``batch_norm`` returned.

    Returns:
        dx, dweight, dbias and the intermediates dxhat, dvar, dmean.

    Raises:
        ShapeError: dy has another shape than the output.
        DtypeError: dy is not an array of real numbers.
        ArgumentError: the forward used stored statistics.

    Example:
        >>> step = batch_norm([[1.0], [2.0], [4.0]], eps=0.0)
        >>> batch_norm_backward([[1.0], [0.0], [0.0]], step).dx.round(4).ravel().tolist()
        [0.2291, -0.3436, 0.1145]

    References:
        Ioffe and Szegedy, 2015, arXiv:1502.03167, section 3, the six unnumbered equations of the chain rule.
    """
    if not forward.training:
        raise ArgumentError("this forward used stored statistics; call batch_norm_inference_backward(dy, forward)")
    dy = cotangent(dy, forward, "dy")
    axes, ndim, m = batch_axes(dy.ndim), dy.ndim, values_per_channel(dy.shape)
    xhat, rstd = forward.xhat, forward.rstd
    deviation = xhat / spread(rstd, ndim)  # x - mean

    # y = gamma xhat + beta
    dxhat = dy * spread(forward.weight, ndim)
    # xhat = (x - mean) (var + eps)^(-1/2), and d(var + eps)^(-1/2) / dvar = -1/2 (var + eps)^(-3/2)
    dvar = (dxhat * deviation).sum(axis=axes) * -0.5 * rstd**3
    # mean enters xhat directly, and var = sum (x - mean)^2 / m through a sum that is zero: sum (x - mean) = 0
    dmean = -(dxhat * spread(rstd, ndim)).sum(axis=axes) + dvar * -2 * deviation.sum(axis=axes) / m
    # x enters xhat directly, var with slope 2 (x - mean) / m, and mean with slope 1 / m
    dx = dxhat * spread(rstd, ndim) + spread(dvar, ndim) * 2 * deviation / m + spread(dmean, ndim) / m
    # y = gamma xhat + beta, each gamma and beta shared by m values
    dweight = (dy * xhat).sum(axis=axes)
    dbias = dy.sum(axis=axes)
    return Backward(dxhat=dxhat, dvar=dvar, dmean=dmean, dx=dx, dweight=dweight, dbias=dbias)


def batch_norm_inference_backward(dy: ArrayLike, forward: Forward) -> InferenceBackward:
    """Carry the gradient of the output back where mean and variance are constants.

    Args:
        dy: gradient of the output, of x's shape.
        forward: what ``batch_norm_inference`` returned.

    Returns:
        dx, dweight, dbias and dxhat.

    Raises:
        ShapeError: dy has another shape than the output.
        DtypeError: dy is not an array of real numbers.
        ArgumentError: the forward used the statistics of the batch.

    Example:
        >>> step = batch_norm_inference([[5.0]], [1.0], [4.0], [3.0], eps=0.0)
        >>> batch_norm_inference_backward([[1.0]], step).dx.item()
        1.5
    """
    if forward.training:
        raise ArgumentError("this forward used the statistics of its batch; call batch_norm_backward(dy, forward)")
    dy = cotangent(dy, forward, "dy")
    axes, ndim = batch_axes(dy.ndim), dy.ndim
    dxhat = dy * spread(forward.weight, ndim)  # y = gamma xhat + beta
    dx = dxhat * spread(forward.rstd, ndim)  # xhat = (x - mean) rstd, both constant
    dweight = (dy * forward.xhat).sum(axis=axes)
    dbias = dy.sum(axis=axes)
    return InferenceBackward(dxhat=dxhat, dx=dx, dweight=dweight, dbias=dbias)


def cotangent(values: ArrayLike, forward: Forward, name: str) -> Array:
    """Return a gradient of the output as float64, or refuse one of another shape."""
    array = as_float64(values, name)
    check_same_shape(array, forward.xhat.shape, name)
    return array
