"""Layer normalization: every sample over its own features."""

from collections.abc import Sequence

from numpy.typing import ArrayLike

from ..axes import trailing_axes
from ..errors import ShapeError
from .arrays import as_float64
from .standardize import SampleBackward, SampleForward, affine_parameter, standardize, standardize_backward

__all__ = ["check_normalized_shape", "layer_norm", "layer_norm_backward"]


def layer_norm(
    x: ArrayLike,
    normalized_shape: int | Sequence[int],
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
) -> SampleForward:
    r"""Normalize the last dimensions of x by their mean and variance, each position of the first ones by itself.

    .. math:: y = \gamma \, \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    Conventions: averages over the last dimensions; eps is added to the variance; the variance divides by the number of
    values; nothing is stored; gamma and beta have one value per normalized element; float64 throughout.

    Args:
        x: ``(*, *normalized_shape)``.
        normalized_shape: the sizes of the last dimensions, or the size of the last one.
        weight: gamma, of ``normalized_shape``; None stands for ones.
        bias: beta, of ``normalized_shape``; None stands for zeros.
        eps: zero or positive.

    Raises:
        ShapeError: x does not end in ``normalized_shape`` or holds no value; weight or bias have another shape.
        DtypeError: an argument is not an array of real numbers.
        ArgumentError: eps is negative or not finite, or zero while a row is constant.

    Example:
        >>> layer_norm([[1.0, 3.0], [10.0, 30.0]], 2, eps=0.0).output.tolist()
        [[-1.0, 1.0], [-1.0, 1.0]]

    References:
        Ba, Kiros and Hinton, Layer Normalization, 2016, arXiv:1607.06450, equation (3).
    """
    x = as_float64(x, "x")
    shape = check_normalized_shape(x.shape, normalized_shape)
    broadcast = (1,) * (x.ndim - len(shape)) + shape
    gamma = affine_parameter(weight, shape, broadcast, "weight", default=1.0)
    beta = affine_parameter(bias, shape, broadcast, "bias", default=0.0)
    return standardize(x, x.shape, trailing_axes(x.ndim, len(shape)), gamma, beta, eps, shape)


def layer_norm_backward(dy: ArrayLike, forward: SampleForward) -> SampleBackward:
    """Carry the gradient of the output back; the lines are those of ``standardize_backward``.

    Args:
        dy: gradient of the output, of x's shape.
        forward: what ``layer_norm`` returned.

    Raises:
        ShapeError: dy has another shape than the output.
        DtypeError: dy is not an array of real numbers.
    """
    return standardize_backward(dy, forward)


def check_normalized_shape(shape: tuple[int, ...], normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    """Return ``normalized_shape`` as a tuple, or refuse a shape that does not end in it."""
    wanted = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    if not wanted or shape[-len(wanted) :] != wanted:
        raise ShapeError(f"x has shape {shape}, which does not end in normalized_shape {wanted}")
    return wanted
