"""Ghost batch normalization: a large batch normalized in small parts."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ArgumentError
from .arrays import Array, Intermediates, as_float64, check_layout, check_same_shape
from .batch import Backward, Forward, batch_norm, batch_norm_backward

__all__ = ["GhostBackward", "GhostForward", "ghost_batch_norm", "ghost_batch_norm_backward", "ghost_sizes"]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class GhostForward(Intermediates):
    """What the forward computed.

    Attributes:
        output: of x's shape.
        parts: the batch normalization of every part, in order.
    """

    output: Array
    parts: tuple[Forward, ...]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class GhostBackward(Intermediates):
    """The gradients, and those of every part with their intermediates.

    Attributes:
        parts: the backward of every part, in order.
        dx: gradient of the input, of x's shape.
        dweight: gradient of gamma, the sum over parts, ``(C,)``.
        dbias: gradient of beta, the sum over parts, ``(C,)``.
    """

    parts: tuple[Backward, ...]
    dx: Array
    dweight: Array
    dbias: Array


def ghost_sizes(samples: int, ghost_size: int) -> tuple[int, ...]:
    """Return the sizes of the parts: as few as ``ghost_size`` allows, and as equal as possible, larger ones first.

    A remainder is spread over the parts, so that no part is left with a single sample.

    >>> ghost_sizes(9, 4), ghost_sizes(8, 4), ghost_sizes(3, 4)
    ((3, 3, 3), (4, 4), (3,))
    """
    if ghost_size < 1:
        raise ArgumentError(f"ghost_size is {ghost_size}; a part holds at least 1 sample")
    count = max(1, -(-samples // ghost_size))
    return tuple(samples // count + (part < samples % count) for part in range(count))


def ghost_batch_norm(
    x: ArrayLike,
    ghost_size: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
) -> GhostForward:
    """Normalize the batch in parts of at most ``ghost_size`` samples, each by its own statistics.

    Conventions: those of ``batch_norm`` within every part; the parts are consecutive samples, of the sizes that
    ``ghost_sizes`` gives; what is stored are the statistics of the whole batch, once per step.

    Args:
        x: ``(N, C, *)``.
        ghost_size: the largest part; a batch that is smaller is one part.
        weight: gamma, ``(C,)``; None stands for ones.
        bias: beta, ``(C,)``; None stands for zeros.
        eps: zero or positive.

    Raises:
        ShapeError: x has another rank or no value; weight or bias do not fit its channels.
        DtypeError: an argument is not an array of real numbers.
        ArgumentError: ghost_size is below 1; eps is out of range.

    Example:
        >>> ghost_batch_norm([[1.0], [3.0], [10.0], [30.0]], 2, eps=0.0).output.ravel().tolist()
        [-1.0, 1.0, -1.0, 1.0]

    References:
        Hoffer, Hubara and Soudry, Train longer, generalize better, 2017, arXiv:1705.08741, Algorithm 1. There a running
        update follows every part; here one follows the step.
    """
    x = as_float64(x, "x")
    check_layout(x)
    cuts = np.cumsum(ghost_sizes(len(x), ghost_size))[:-1]
    parts = tuple(batch_norm(part, weight, bias, eps=eps) for part in np.split(x, cuts))
    return GhostForward(output=np.concatenate([part.output for part in parts]), parts=parts)


def ghost_batch_norm_backward(dy: ArrayLike, forward: GhostForward) -> GhostBackward:
    """Carry the gradient of the output back, every part by itself.

    Args:
        dy: gradient of the output, of x's shape.
        forward: what ``ghost_batch_norm`` returned.

    Raises:
        ShapeError: dy has another shape than the output.
        DtypeError: dy is not an array of real numbers.
    """
    given = as_float64(dy, "dy")
    check_same_shape(given, forward.output.shape, "dy")
    cuts = np.cumsum([len(part.xhat) for part in forward.parts])[:-1]
    pairs = zip(np.split(given, cuts), forward.parts, strict=True)
    parts = tuple(batch_norm_backward(part, step) for part, step in pairs)
    return GhostBackward(
        parts=parts,
        dx=np.concatenate([part.dx for part in parts]),
        dweight=np.sum([part.dweight for part in parts], axis=0),  # gamma and beta are shared by the parts
        dbias=np.sum([part.dbias for part in parts], axis=0),
    )
