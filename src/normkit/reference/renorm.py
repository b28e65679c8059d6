"""Batch renormalization: batch statistics in the gradient, running statistics in the output."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ArgumentError
from .arrays import Array, Intermediates, as_float64, per_channel, spread
from .batch import Backward, Forward, batch_norm, batch_norm_backward
from .statistics import Running

__all__ = ["RenormForward", "batch_renorm", "batch_renorm_backward"]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class RenormForward(Intermediates):
    """What the forward computed, and all that the backward needs.

    Attributes:
        output: ``weight * (xhat * r + d) + bias``, of x's shape.
        batch: the batch normalization inside, with ``weight * r`` for its weight.
        r: the ratio of batch deviation to running deviation, clipped, ``(C,)``; a constant to the gradient.
        d: the distance of batch mean to running mean in running deviations, clipped, ``(C,)``; likewise.
    """

    output: Array
    batch: Forward
    r: Array
    d: Array


def batch_renorm(
    x: ArrayLike,
    running: Running,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    r_max: float,
    d_max: float,
    eps: float = 1e-5,
) -> RenormForward:
    r"""Normalize by the batch, then correct towards what prediction will see.

    .. math:: y = \gamma \Bigl(\frac{x - \mu_B}{\sigma_B} \, r + d\Bigr) + \beta, \qquad
        r = \mathrm{clip}\Bigl(\frac{\sigma_B}{\sigma}, \frac{1}{r_{max}}, r_{max}\Bigr), \qquad
        d = \mathrm{clip}\Bigl(\frac{\mu_B - \mu}{\sigma}, -d_{max}, d_{max}\Bigr)

    Without clipping r and d undo the batch: ``y = weight * (x - mean) / sigma + bias`` with the running statistics.
    With ``r_max=1, d_max=0`` it is batch normalization.

    Conventions: averages over all axes but the channels; ``sigma = sqrt(var + eps)`` for batch and running alike; the
    batch variance divides by m; the running statistics are those before this batch's update; r and d are constants to
    the gradient; float64 throughout.

    Args:
        x: ``(N, C, *)``.
        running: the running mean and variance.
        weight: gamma, ``(C,)``; None stands for ones.
        bias: beta, ``(C,)``; None stands for zeros.
        r_max: at least 1.
        d_max: at least 0.
        eps: positive.

    Raises:
        ShapeError: x has another rank or no value; an argument does not fit its channels.
        DtypeError: an argument is not an array of real numbers.
        ArgumentError: r_max is below 1, d_max below 0, or eps out of range.

    Example:
        >>> running = Running(mean=np.array([0.0]), var=np.array([4.0]))
        >>> batch_renorm([[1.0], [3.0]], running, r_max=9.0, d_max=9.0, eps=0.0).output.ravel().tolist()
        [0.5, 1.5]

    References:
        Ioffe, Batch Renormalization, 2017, arXiv:1702.03275, Algorithm 1. There the running quantity is sigma; here it
        is the variance, so that state is exchanged with batch normalization.
    """
    if not r_max >= 1 or not d_max >= 0:
        raise ArgumentError(f"r_max is {r_max} and d_max {d_max}; allowed are r_max >= 1 and d_max >= 0")
    plain = batch_norm(x, eps=eps)
    channels, ndim = len(plain.mean), plain.xhat.ndim
    mean = per_channel(running.mean, channels, "running mean", default=0.0)
    sigma = np.sqrt(per_channel(running.var, channels, "running var", default=1.0) + eps)
    r = np.clip(1 / plain.rstd / sigma, 1 / r_max, r_max)
    d = np.clip((plain.mean - mean) / sigma, -d_max, d_max)
    gamma = per_channel(weight, channels, "weight", default=1.0)
    inner = batch_norm(x, gamma * r, eps=eps)
    beta = per_channel(bias, channels, "bias", default=0.0)
    output = inner.output + spread(gamma * d + beta, ndim)
    return RenormForward(output=output, batch=inner, r=r, d=d)


def batch_renorm_backward(dy: ArrayLike, forward: RenormForward) -> Backward:
    """Carry the gradient of the output back: batch normalization's, with ``weight * r`` for the weight.

    Args:
        dy: gradient of the output, of x's shape.
        forward: what ``batch_renorm`` returned.

    Returns:
        The intermediates of batch normalization; dweight and dbias are those of gamma and beta.

    Raises:
        ShapeError: dy has another shape than the output.
        DtypeError: dy is not an array of real numbers.

    References:
        Ioffe, 2017, arXiv:1702.03275, section 3: the gradient treats r and d as constants.
    """
    inner = batch_norm_backward(as_float64(dy, "dy"), forward.batch)
    dweight = inner.dweight * forward.r + inner.dbias * forward.d  # y = gamma (r xhat + d) + beta
    return Backward(
        dxhat=inner.dxhat, dvar=inner.dvar, dmean=inner.dmean, dx=inner.dx, dweight=dweight, dbias=inner.dbias
    )
