"""Masked batch normalization: padding takes no part in the statistics."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import DtypeError, ShapeError
from .arrays import Array, Intermediates, as_float64, check_layout, check_same_shape
from .batch import Backward, Forward, batch_norm, batch_norm_backward

__all__ = ["MaskedBackward", "MaskedForward", "masked_batch_norm", "masked_batch_norm_backward"]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class MaskedForward(Intermediates):
    """What the forward computed, and all that the backward needs.

    Attributes:
        output: of x's shape, zero where the mask is False.
        valid: the batch normalization of the valid positions, laid out as ``(count, C)``.
        mask: ``(N, *)``, True where a position is valid.
    """

    output: Array
    valid: Forward
    mask: NDArray[np.bool_]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class MaskedBackward(Intermediates):
    """The gradients.

    Attributes:
        valid: the backward at the valid positions, with its intermediates.
        dx: gradient of the input, of x's shape, zero where the mask is False.
        dweight: gradient of gamma, ``(C,)``.
        dbias: gradient of beta, ``(C,)``.
    """

    valid: Backward
    dx: Array
    dweight: Array
    dbias: Array


def masked_batch_norm(
    x: ArrayLike,
    mask: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
) -> MaskedForward:
    """Normalize the valid positions by their own statistics; the others become zero.

    Conventions: those of ``batch_norm`` over the valid positions; m counts these. What stands at the other positions,
    NaN included, has no influence.

    Args:
        x: ``(N, C, *)``.
        mask: boolean, ``(N, *)``: x's shape without the channels. True marks a valid position.
        weight: gamma, ``(C,)``; None stands for ones.
        bias: beta, ``(C,)``; None stands for zeros.
        eps: zero or positive.

    Raises:
        ShapeError: x has another rank, the mask another shape, or no position is valid.
        DtypeError: x is not an array of real numbers, or the mask is not boolean.
        ArgumentError: eps is out of range.

    Example:
        >>> x, mask = [[[1.0, 3.0, 999.0]]], [[True, True, False]]
        >>> masked_batch_norm(x, mask, eps=0.0).output.tolist()
        [[[-1.0, 1.0, 0.0]]]
    """
    x = as_float64(x, "x")
    check_layout(x)
    chosen = np.asarray(mask)
    if chosen.dtype != np.bool_:
        raise DtypeError(f"mask has dtype {chosen.dtype}; pass booleans, True where a position is valid")
    if chosen.shape != (len(x), *x.shape[2:]):
        raise ShapeError(f"mask has shape {chosen.shape}; for x {x.shape} pass {(len(x), *x.shape[2:])}")
    if not chosen.any():
        raise ShapeError("the mask has no valid position, so there is no mean; leave this batch out")
    valid = batch_norm(_gather(x, chosen), weight, bias, eps=eps)
    return MaskedForward(output=_scatter(valid.output, chosen), valid=valid, mask=chosen)


def masked_batch_norm_backward(dy: ArrayLike, forward: MaskedForward) -> MaskedBackward:
    """Carry the gradient of the output back through the valid positions; the others get zero.

    Args:
        dy: gradient of the output, of x's shape; what stands at invalid positions has no influence.
        forward: what ``masked_batch_norm`` returned.

    Raises:
        ShapeError: dy has another shape than the output.
        DtypeError: dy is not an array of real numbers.
    """
    given = as_float64(dy, "dy")
    check_same_shape(given, forward.output.shape, "dy")
    valid = batch_norm_backward(_gather(given, forward.mask), forward.valid)
    return MaskedBackward(valid=valid, dx=_scatter(valid.dx, forward.mask), dweight=valid.dweight, dbias=valid.dbias)


def _gather(x: Array, mask: NDArray[np.bool_]) -> Array:
    """Lay the valid positions out as ``(count, C)``."""
    return np.moveaxis(x, 1, -1)[mask]


def _scatter(values: Array, mask: NDArray[np.bool_]) -> Array:
    spread = np.zeros((*mask.shape, values.shape[1]))
    spread[mask] = values
    return np.moveaxis(spread, -1, 1)
