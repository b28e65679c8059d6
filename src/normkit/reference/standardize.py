"""Zero mean and unit variance over any axes, forward and backward: what layer, group and instance normalization share.

They differ in which values share statistics, and in nothing else. Each brings a *view* of x and the axes of that view
to average; the formulas stand here once, as ``docs/batch-norm.md`` derives them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ArgumentError, ShapeError
from .arrays import Array, Intermediates, as_float64, check_eps, check_same_shape

__all__ = ["SampleBackward", "SampleForward", "affine_parameter", "standardize", "standardize_backward"]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class SampleForward(Intermediates):
    """What the forward computed, and all that the backward needs.

    Attributes:
        output: ``weight * xhat + bias``, of x's shape.
        mean: of each set of values that share statistics; broadcasts against ``view``.
        var: likewise, divisor: the number of these values.
        rstd: ``1 / sqrt(var + eps)``, likewise.
        xhat: ``(x - mean) * rstd``, of x's shape.
        weight: gamma in the shape in which it broadcasts against ``view``; ones where none was given.
        parameter_shape: the shape of gamma and beta as the caller knows them.
        view: the shape of x in which ``axes`` share statistics.
        axes: the averaged axes of that view.
        eps: the number added to the variance.
    """

    output: Array
    mean: Array
    var: Array
    rstd: Array
    xhat: Array
    weight: Array
    parameter_shape: tuple[int, ...]
    view: tuple[int, ...]
    axes: tuple[int, ...]
    eps: float


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class SampleBackward(Intermediates):
    """The gradients and, in the order of the chain rule, the intermediates.

    Attributes:
        dxhat: gradient of the normalized input, of x's shape.
        dvar: gradient of the variances, of their shape.
        dmean: gradient of the means, of their shape.
        dx: gradient of the input, of x's shape.
        dweight: gradient of gamma, in the caller's shape.
        dbias: gradient of beta, in the caller's shape.
    """

    dxhat: Array
    dvar: Array
    dmean: Array
    dx: Array
    dweight: Array
    dbias: Array


def affine_parameter(
    values: ArrayLike | None, shape: tuple[int, ...], broadcast: tuple[int, ...], name: str, *, default: float
) -> Array:
    """Return gamma or beta in the shape in which it broadcasts; None stands for the default."""
    if values is None:
        return np.full(broadcast, default)
    array = as_float64(values, name)
    if array.shape != shape:
        raise ShapeError(f"{name} has shape {array.shape}; pass shape {shape}")
    return array.reshape(broadcast)


def standardize(
    x: Array,
    view: tuple[int, ...],
    axes: tuple[int, ...],
    weight: Array,
    bias: Array,
    eps: float,
    parameter_shape: tuple[int, ...],
) -> SampleForward:
    """Normalize x over some axes of a view of it.

    Raises:
        ShapeError: x holds no value.
        ArgumentError: eps is negative or not finite, or it is zero and some values that share statistics are all equal.
    """
    check_eps(eps)
    if x.size == 0:
        raise ShapeError(f"x of shape {x.shape} holds no value, so it has no mean; pass at least one sample")
    seen = x.reshape(view)
    mean = seen.mean(axis=axes, keepdims=True)
    deviation = seen - mean
    deviation = deviation - deviation.mean(axis=axes, keepdims=True)  # the rounding of the mean
    var = (deviation**2).mean(axis=axes, keepdims=True)
    if not (var + eps > 0).all():
        raise ArgumentError(
            "eps is 0 and values that share statistics are all equal, so they have no scale; pass eps=1e-5"
        )
    rstd = 1 / np.sqrt(var + eps)
    xhat = deviation * rstd
    output = weight * xhat + bias
    return SampleForward(
        output=output.reshape(x.shape),
        mean=mean,
        var=var,
        rstd=rstd,
        xhat=xhat.reshape(x.shape),
        weight=weight,
        parameter_shape=parameter_shape,
        view=view,
        axes=axes,
        eps=eps,
    )


def standardize_backward(dy: ArrayLike, forward: SampleForward) -> SampleBackward:
    """Carry the gradient of the output back through the statistics.

    Raises:
        ShapeError: dy has another shape than the output.
        DtypeError: dy is not an array of real numbers.
    """
    given = as_float64(dy, "dy")
    check_same_shape(given, forward.xhat.shape, "dy")
    seen, xhat, rstd, axes = given.reshape(forward.view), forward.xhat.reshape(forward.view), forward.rstd, forward.axes
    deviation, m = xhat / rstd, seen.size // rstd.size

    # y = gamma xhat + beta
    dxhat = seen * forward.weight
    # xhat = (x - mean) (var + eps)^(-1/2)
    dvar = (dxhat * deviation).sum(axis=axes, keepdims=True) * -0.5 * rstd**3
    # the path through var is a sum of deviations, which is zero
    dmean = -(dxhat * rstd).sum(axis=axes, keepdims=True)
    # x is in xhat, in var with slope 2 (x - mean) / m, in mean with slope 1 / m
    dx = dxhat * rstd + dvar * 2 * deviation / m + dmean / m
    # gamma and beta are shared by all values against which they broadcast
    shared = tuple(axis for axis, size in enumerate(forward.weight.shape) if size == 1)
    dweight = (seen * xhat).sum(axis=shared).reshape(forward.parameter_shape)
    dbias = seen.sum(axis=shared).reshape(forward.parameter_shape)
    return SampleBackward(
        dxhat=dxhat.reshape(given.shape),
        dvar=dvar,
        dmean=dmean,
        dx=dx.reshape(given.shape),
        dweight=dweight,
        dbias=dbias,
    )
