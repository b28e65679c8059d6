"""Normalizing weights instead of activations: weight normalization and weight standardization."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ArgumentError, ShapeError
from .arrays import Array, Intermediates, as_float64, check_same_shape
from .standardize import SampleBackward, SampleForward, standardize, standardize_backward

__all__ = [
    "WeightBackward",
    "WeightForward",
    "weight_norm",
    "weight_norm_backward",
    "weight_standardization",
    "weight_standardization_backward",
]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class WeightForward(Intermediates):
    """What the forward computed, and all that the backward needs.

    Attributes:
        output: ``magnitude * direction``, of the weight's shape.
        norm: the Euclidean norm of every slice, of the magnitude's shape.
        direction: ``v / norm``, of the weight's shape.
        magnitude: g, with size one in all dimensions but ``dim``.
        axes: the axes of one slice.
    """

    output: Array
    norm: Array
    direction: Array
    magnitude: Array
    axes: tuple[int, ...]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class WeightBackward(Intermediates):
    """The gradients and the intermediates in the order of the chain rule.

    Attributes:
        ddirection: gradient of the direction, of the weight's shape.
        dnorm: gradient of the norm, of the magnitude's shape.
        dv: gradient of v, of the weight's shape; orthogonal to v in every slice.
        dmagnitude: gradient of g, of its shape.
    """

    ddirection: Array
    dnorm: Array
    dv: Array
    dmagnitude: Array


def weight_norm(v: ArrayLike, magnitude: ArrayLike, *, dim: int | None = 0) -> WeightForward:
    r"""Write a weight as length times direction.

    .. math:: w = g \, \frac{v}{\lVert v \rVert}

    Conventions: one norm per slice along ``dim``, over all other dimensions; no eps, as in the paper; with
    ``dim=None`` one norm over everything.

    Args:
        v: the direction, before it is scaled to length one.
        magnitude: g, of v's shape with size one in all dimensions but ``dim``.
        dim: the dimension of the outputs; None for a single norm.

    Raises:
        ShapeError: magnitude has another shape, or v has no dimension ``dim``.
        DtypeError: an argument is not an array of real numbers.
        ArgumentError: a slice of v is zero and has no direction.

    Example:
        >>> weight_norm([[3.0, 4.0]], [[10.0]]).output.round(12).tolist()
        [[6.0, 8.0]]

    References:
        Salimans and Kingma, Weight Normalization, 2016, arXiv:1602.07868, equation (2).
    """
    v, magnitude = as_float64(v, "v"), as_float64(magnitude, "magnitude")
    if dim is not None and not -v.ndim <= dim < v.ndim:
        raise ShapeError(f"v has shape {v.shape} and no dimension {dim}; pass dim from {-v.ndim} to {v.ndim - 1}")
    kept = None if dim is None else dim % v.ndim
    axes = tuple(axis for axis in range(v.ndim) if axis != kept)
    norm = np.sqrt((v**2).sum(axis=axes, keepdims=True))
    check_same_shape(magnitude, norm.shape, "magnitude")
    if not (norm > 0).all():
        raise ArgumentError("a slice of v is zero, so it has no direction; start from a weight that is not zero")
    direction = v / norm
    return WeightForward(output=magnitude * direction, norm=norm, direction=direction, magnitude=magnitude, axes=axes)


def weight_norm_backward(dw: ArrayLike, forward: WeightForward) -> WeightBackward:
    r"""Carry the gradient of the weight back to length and direction.

    .. math:: dv = \frac{g}{\lVert v \rVert} (dw - u \, \langle dw, u \rangle), \quad dg = \langle dw, u \rangle

    is what the lines add up to, u being the direction: the gradient of v has no part along v.

    Args:
        dw: gradient of the weight, of its shape.
        forward: what ``weight_norm`` returned.

    Raises:
        ShapeError: dw has another shape than the weight.
        DtypeError: dw is not an array of real numbers.

    References:
        Salimans and Kingma, 2016, arXiv:1602.07868, equation (3).
    """
    given = as_float64(dw, "dw")
    check_same_shape(given, forward.direction.shape, "dw")
    axes, direction, norm = forward.axes, forward.direction, forward.norm
    dmagnitude = (given * direction).sum(axis=axes, keepdims=True)  # w = g u
    ddirection = given * forward.magnitude
    dnorm = -(ddirection * direction).sum(axis=axes, keepdims=True) / norm  # u = v / norm
    dv = ddirection / norm + dnorm * direction  # norm = sqrt(sum v^2) has slope v / norm = u
    return WeightBackward(ddirection=ddirection, dnorm=dnorm, dv=dv, dmagnitude=dmagnitude)


def weight_standardization(weight: ArrayLike, *, eps: float = 1e-6) -> SampleForward:
    r"""Give the weights of every output zero mean and unit variance.

    .. math:: \hat w = \frac{w - \mu}{\sqrt{\sigma^2 + \epsilon}}

    Conventions: averages over all dimensions but the first; eps is added to the variance (unit: weight squared); the
    variance divides by the number of weights of one output.

    Args:
        weight: ``(C_out, C_in, *)``.
        eps: zero or positive.

    Raises:
        ShapeError: the weight has fewer than two dimensions or no value.
        DtypeError: the weight is not an array of real numbers.
        ArgumentError: eps is negative or not finite, or zero while the weights of an output are all equal.

    Example:
        >>> weight_standardization([[1.0, 3.0]], eps=0.0).output.tolist()
        [[-1.0, 1.0]]

    References:
        Qiao, Wang, Liu, Shen and Yuille, Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization, 2019, arXiv:1903.10520, equations (2) to (4). Sources differ on eps: here it is in the root.
    """
    w = as_float64(weight, "weight")
    if w.ndim < 2:
        raise ShapeError(f"weight has shape {w.shape}; weight standardization needs (C_out, C_in, *)")
    one = np.ones((1,) * w.ndim)
    return standardize(w, w.shape, tuple(range(1, w.ndim)), one, np.zeros_like(one), eps, ())


def weight_standardization_backward(dw: ArrayLike, forward: SampleForward) -> SampleBackward:
    """Carry the gradient back to the weight before; the lines are those of ``standardize_backward``.

    Args:
        dw: gradient of the standardized weight, of its shape.
        forward: what ``weight_standardization`` returned.

    Raises:
        ShapeError: dw has another shape than the weight.
        DtypeError: dw is not an array of real numbers.
    """
    return standardize_backward(dw, forward)
