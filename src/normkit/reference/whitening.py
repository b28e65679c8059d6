"""Whitening batch normalization: channels are also made uncorrelated, not only each of unit variance.

``docs/methods/whitening.md`` derives the gradient. For a group of d channels ``X`` is ``(d, m)``: its
m values in columns.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ArgumentError
from .arrays import Array, Intermediates, as_float64, check_eps, check_layout, check_same_shape, per_channel, spread
from .inverse_root import (
    inverse_root,
    inverse_root_backward,
    newton_inverse_root,
    newton_inverse_root_backward,
    trace,
    transpose,
)

__all__ = [
    "WhiteningBackward",
    "WhiteningForward",
    "whitening_batch_norm",
    "whitening_batch_norm_backward",
    "whitening_batch_norm_inference",
]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class WhiteningForward(Intermediates):
    """What the forward computed, and all that the backward needs.

    Attributes:
        output: ``weight * xhat + bias``, of x's shape.
        mean: ``(C,)``.
        covariance: ``(G, d, d)``, divisor m, before shrinkage.
        regularized: ``(G, d, d)``: shrunk, with eps on the diagonal.
        whitening: ``(G, d, d)``, the inverse root of the regularized covariance.
        deviation: ``(G, d, m)``, ``X - mean``.
        xhat: ``whitening @ deviation``, of x's shape.
        weight: gamma, ``(C,)``; ones where none was given.
        shrinkage: the share of the scaled identity in the covariance.
        iterations: Newton steps, or None for the eigenvectors.
    """

    output: Array
    mean: Array
    covariance: Array
    regularized: Array
    whitening: Array
    deviation: Array
    xhat: Array
    weight: Array
    shrinkage: float
    iterations: int | None


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class WhiteningBackward(Intermediates):
    """The gradients and the intermediates in the order of the chain rule.

    Attributes:
        dxhat: gradient of the whitened input, of x's shape.
        dwhitening: gradient of the whitening matrices, ``(G, d, d)``.
        dregularized: gradient of the regularized covariance, symmetric, ``(G, d, d)``.
        dcovariance: gradient of the covariance, symmetric, ``(G, d, d)``.
        ddeviation: gradient of the deviations, ``(G, d, m)``.
        dx: gradient of the input, of x's shape.
        dweight: gradient of gamma, ``(C,)``.
        dbias: gradient of beta, ``(C,)``.
    """

    dxhat: Array
    dwhitening: Array
    dregularized: Array
    dcovariance: Array
    ddeviation: Array
    dx: Array
    dweight: Array
    dbias: Array


def whitening_batch_norm(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    num_groups: int = 1,
    eps: float = 1e-5,
    shrinkage: float = 0.0,
    iterations: int | None = None,
) -> WhiteningForward:
    r"""Remove the mean and the correlations of every group of channels, by the statistics of this batch.

    .. math:: y = \gamma \, \bigl(\Sigma_s + \epsilon I\bigr)^{-1/2} (x - \mu) + \beta, \qquad
        \Sigma_s = (1 - s) \, \Sigma + s \, \frac{\mathrm{tr} \Sigma}{d} I

    Conventions: averages over all axes but the channels; eps is added to the variances, on the diagonal (unit: input
    squared); the covariance divides by m; the inverse root is the symmetric one, which turns the channels least.

    Args:
        x: ``(N, C, *)``.
        weight: gamma, ``(C,)``; None stands for ones.
        bias: beta, ``(C,)``; None stands for zeros.
        num_groups: G, a divisor of C; d = C / G channels are whitened together.
        eps: zero or positive.
        shrinkage: s, from 0 to 1.
        iterations: Newton steps, at least 1; None takes the eigenvectors.

    Raises:
        ShapeError: x has another rank or no value; weight or bias do not fit its channels.
        DtypeError: an argument is not an array of real numbers.
        ArgumentError: a setting is out of range, or the covariance has no inverse.

    Example:
        >>> x = [[1.0, 1.0], [2.0, 2.0], [1.0, 2.0], [2.0, 1.0]]
        >>> whitening_batch_norm(x, eps=0.0).output.round(6).tolist()
        [[-1.0, -1.0], [1.0, 1.0], [-1.0, 1.0], [1.0, -1.0]]

    References:
        Huang, Yang, Lang and Deng, Decorrelated Batch Normalization, 2018, arXiv:1804.08450, section 3.
    """
    x = as_float64(x, "x")
    check_layout(x)
    _check_settings(x.shape[1], num_groups, eps, shrinkage, iterations)
    values = _by_group(x, num_groups)
    mean = values.mean(axis=-1, keepdims=True)
    deviation = values - mean
    deviation = deviation - deviation.mean(axis=-1, keepdims=True)  # the rounding of the mean
    covariance = deviation @ transpose(deviation) / values.shape[-1]
    regularized = _regularize(covariance, eps, shrinkage)
    whitening = inverse_root(regularized) if iterations is None else newton_inverse_root(regularized, iterations)
    xhat = _by_sample(whitening @ deviation, x.shape)
    gamma = per_channel(weight, x.shape[1], "weight", default=1.0)
    beta = per_channel(bias, x.shape[1], "bias", default=0.0)
    return WhiteningForward(
        output=spread(gamma, x.ndim) * xhat + spread(beta, x.ndim),
        mean=mean.ravel(),
        covariance=covariance,
        regularized=regularized,
        whitening=whitening,
        deviation=deviation,
        xhat=xhat,
        weight=gamma,
        shrinkage=shrinkage,
        iterations=iterations,
    )


def whitening_batch_norm_backward(dy: ArrayLike, forward: WhiteningForward) -> WhiteningBackward:
    """Carry the gradient of the output back through the whitening matrix and the covariance.

    Args:
        dy: gradient of the output, of x's shape.
        forward: what ``whitening_batch_norm`` returned.

    Raises:
        ShapeError: dy has another shape than the output.
        DtypeError: dy is not an array of real numbers.
    """
    given = as_float64(dy, "dy")
    check_same_shape(given, forward.xhat.shape, "dy")
    deviation, whitening = forward.deviation, forward.whitening
    groups, d, m = deviation.shape
    axes = (0, *range(2, given.ndim))

    dxhat = given * spread(forward.weight, given.ndim)  # y = gamma xhat + beta
    upstream = _by_group(dxhat, groups)
    dwhitening = upstream @ transpose(deviation)  # xhat = whitening deviation
    if forward.iterations is None:
        dregularized = inverse_root_backward(dwhitening, forward.regularized)
    else:
        dregularized = newton_inverse_root_backward(dwhitening, forward.regularized, forward.iterations)
    # regularized = (1 - s) covariance + s trace / d I + eps I
    s = forward.shrinkage
    dcovariance = (1 - s) * dregularized + s / d * trace(dregularized) * np.eye(d)
    # deviation is in xhat, and twice in covariance = deviation deviation' / m
    ddeviation = transpose(whitening) @ upstream + 2 / m * dcovariance @ deviation
    dx = _by_sample(ddeviation - ddeviation.mean(axis=-1, keepdims=True), given.shape)  # deviation = X - mean
    return WhiteningBackward(
        dxhat=dxhat,
        dwhitening=dwhitening,
        dregularized=dregularized,
        dcovariance=dcovariance,
        ddeviation=ddeviation,
        dx=dx,
        dweight=(given * forward.xhat).sum(axis=axes),
        dbias=given.sum(axis=axes),
    )


def whitening_batch_norm_inference(
    x: ArrayLike,
    mean: ArrayLike,
    covariance: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    shrinkage: float = 0.0,
    iterations: int | None = None,
) -> Array:
    """Whiten by a stored mean and covariance: one affine map per group, the same for every sample.

    Args:
        x: ``(N, C, *)``.
        mean: the stored mean, ``(C,)``.
        covariance: the stored covariance before shrinkage, ``(G, d, d)``.
        weight: gamma, ``(C,)``; None stands for ones.
        bias: beta, ``(C,)``; None stands for zeros.
        eps: zero or positive.
        shrinkage: from 0 to 1.
        iterations: Newton steps, or None for the eigenvectors.

    Returns:
        The output, of x's shape.

    Raises:
        ShapeError: x has another rank or no value; an argument does not fit its channels.
        DtypeError: an argument is not an array of real numbers.
        ArgumentError: a setting is out of range, or the covariance has no inverse.
    """
    x, stored = as_float64(x, "x"), as_float64(covariance, "covariance")
    check_layout(x)
    channels, ndim, groups = x.shape[1], x.ndim, len(stored)
    _check_settings(channels, groups, eps, shrinkage, iterations)
    check_same_shape(stored, (groups, channels // groups, channels // groups), "covariance")
    regularized = _regularize(stored, eps, shrinkage)
    whitening = inverse_root(regularized) if iterations is None else newton_inverse_root(regularized, iterations)
    deviation = _by_group(x - spread(per_channel(mean, channels, "mean", default=0.0), ndim), groups)
    xhat = _by_sample(whitening @ deviation, x.shape)
    gamma = per_channel(weight, channels, "weight", default=1.0)
    return spread(gamma, ndim) * xhat + spread(per_channel(bias, channels, "bias", default=0.0), ndim)


def _check_settings(channels: int, num_groups: int, eps: float, shrinkage: float, iterations: int | None) -> None:
    check_eps(eps)
    if num_groups < 1 or channels % num_groups:
        raise ArgumentError(f"num_groups is {num_groups}, which does not divide the {channels} channels")
    if not 0 <= shrinkage <= 1:
        raise ArgumentError(f"shrinkage is {shrinkage}; allowed is 0 to 1")
    if iterations is not None and iterations < 1:
        raise ArgumentError(f"iterations is {iterations}; pass at least 1, or None for the eigenvectors")


def _regularize(covariance: Array, eps: float, shrinkage: float) -> Array:
    identity = np.eye(covariance.shape[-1])
    return (1 - shrinkage) * covariance + (shrinkage * trace(covariance) / len(identity) + eps) * identity


def _by_group(x: Array, num_groups: int) -> Array:
    """Lay ``(N, C, *)`` out as ``(G, d, m)``."""
    return np.moveaxis(x, 1, 0).reshape(num_groups, x.shape[1] // num_groups, -1)


def _by_sample(values: Array, shape: tuple[int, ...]) -> Array:
    """Undo ``_by_group``."""
    return np.moveaxis(values.reshape(shape[1], shape[0], *shape[2:]), 0, 1)
