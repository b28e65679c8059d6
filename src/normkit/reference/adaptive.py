"""Adaptive instance normalization: the content keeps its shape and takes the style's mean and deviation."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..axes import position_axes
from ..errors import ShapeError
from .arrays import Array, Intermediates, as_float64, check_same_shape
from .instance import instance_norm, instance_norm_backward
from .standardize import SampleForward

__all__ = [
    "AdaptiveBackward",
    "AdaptiveForward",
    "adaptive_instance_norm",
    "adaptive_instance_norm_backward",
]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class AdaptiveForward(Intermediates):
    """What the forward computed, and all that the backward needs.

    Attributes:
        output: ``style_std * xhat + style_mean``, of the content's shape.
        content: the instance normalization of the content.
        style: the instance normalization of the style.
        style_std: ``sqrt(style_var + eps)``, ``(N, C, 1, ...)``.
    """

    output: Array
    content: SampleForward
    style: SampleForward
    style_std: Array


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class AdaptiveBackward(Intermediates):
    """The gradients of content and style, and the intermediates.

    Attributes:
        dxhat: gradient of the normalized content, of its shape.
        dcontent: gradient of the content, of its shape.
        dstyle_std: gradient of the style's deviation, ``(N, C, 1, ...)``.
        dstyle_mean: gradient of the style's mean, ``(N, C, 1, ...)``.
        dstyle: gradient of the style, of its shape.
    """

    dxhat: Array
    dcontent: Array
    dstyle_std: Array
    dstyle_mean: Array
    dstyle: Array


def adaptive_instance_norm(content: ArrayLike, style: ArrayLike, *, eps: float = 1e-5) -> AdaptiveForward:
    r"""Give every channel of the content the mean and deviation of the style's channel.

    .. math:: y = \sigma_s \, \frac{x - \mu_x}{\sigma_x} + \mu_s, \qquad \sigma = \sqrt{\mathrm{var} + \epsilon}

    Conventions: averages over positions; eps is added to both variances, so content that already has the style's
    statistics passes unchanged; the variances divide by the number of positions. The output has the style's mean;
    its variance is ``(var_s + eps) * var_x / (var_x + eps)``, the style's as eps goes to zero.

    Args:
        content: ``(N, C, *)``.
        style: ``(N, C, *)``; its positions may be of other number and rank.
        eps: zero or positive.

    Raises:
        ShapeError: samples or channels differ, or there are no positions.
        DtypeError: an argument is not an array of real numbers.
        ArgumentError: eps is negative or not finite, or zero while a channel is constant.

    Example:
        >>> adaptive_instance_norm([[[1.0, 3.0]]], [[[10.0, 30.0, 10.0, 30.0]]], eps=0.0).output.tolist()
        [[[10.0, 30.0]]]

    References:
        Huang and Belongie, Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization, 2017,
        arXiv:1703.06868, equation (8).
    """
    x, s = as_float64(content, "content"), as_float64(style, "style")
    if x.shape[:2] != s.shape[:2]:
        raise ShapeError(f"content {x.shape} and style {s.shape} must have the same samples and channels")
    normalized, source = instance_norm(x, eps=eps), instance_norm(s, eps=eps)
    rank = (*x.shape[:2], *(1 for _ in position_axes(x.ndim)))
    style_std, style_mean = np.sqrt(source.var + eps).reshape(rank), source.mean.reshape(rank)
    output = style_std * normalized.xhat + style_mean
    return AdaptiveForward(output=output, content=normalized, style=source, style_std=style_std)


def adaptive_instance_norm_backward(dy: ArrayLike, forward: AdaptiveForward) -> AdaptiveBackward:
    """Carry the gradient of the output back to the content and to the style.

    Args:
        dy: gradient of the output, of the content's shape.
        forward: what ``adaptive_instance_norm`` returned.

    Raises:
        ShapeError: dy has another shape than the output.
        DtypeError: dy is not an array of real numbers.
    """
    given = as_float64(dy, "dy")
    check_same_shape(given, forward.output.shape, "dy")
    dxhat = given * forward.style_std  # y = std_s xhat + mean_s
    dcontent = instance_norm_backward(dxhat, forward.content).dx
    axes = position_axes(given.ndim)
    dstyle_std = (given * forward.content.xhat).sum(axis=axes, keepdims=True)
    dstyle_mean = given.sum(axis=axes, keepdims=True)
    style = forward.style
    m = style.xhat.size // style.mean.size
    # std_s = sqrt(var_s + eps) has slope (s - mean_s) / (m std_s) = shat / m; mean_s has slope 1 / m
    dstyle = (dstyle_std.reshape(style.mean.shape) * style.xhat + dstyle_mean.reshape(style.mean.shape)) / m
    return AdaptiveBackward(
        dxhat=dxhat, dcontent=dcontent, dstyle_std=dstyle_std, dstyle_mean=dstyle_mean, dstyle=dstyle
    )
