"""The inverse square root of covariances and its gradient, by eigenvectors (ZCA) and by Newton's iteration.

Everything takes stacks of matrices ``(..., d, d)``.
"""

import numpy as np

from ..errors import ArgumentError
from .arrays import Array

__all__ = [
    "inverse_root",
    "inverse_root_backward",
    "newton_inverse_root",
    "newton_inverse_root_backward",
    "symmetric",
    "trace",
    "transpose",
]


def inverse_root(covariance: Array) -> Array:
    """Return ``U diag(eigenvalue^-1/2) U'``, the symmetric inverse root (ZCA).

    Raises:
        ArgumentError: an eigenvalue is not positive.
    """
    values, vectors = np.linalg.eigh(covariance)
    if not (values > 0).all():
        raise ArgumentError(
            f"the covariance has eigenvalue {values.min():.3g}; pass a larger eps or shrinkage, or more samples"
        )
    root: Array = (vectors / np.sqrt(values)[..., None, :]) @ transpose(vectors)
    return root


def inverse_root_backward(dwhitening: Array, covariance: Array) -> Array:
    r"""Return the gradient of the covariance.

    In the basis of the eigenvectors the slope is the divided difference of :math:`\lambda^{-1/2}`:

    .. math:: K_{ij} = \frac{\lambda_i^{-1/2} - \lambda_j^{-1/2}}{\lambda_i - \lambda_j}
        = \frac{-1}{\sqrt{\lambda_i} \sqrt{\lambda_j} (\sqrt{\lambda_i} + \sqrt{\lambda_j})}

    The right form has no difference in it, so equal eigenvalues do no harm.
    """
    values, vectors = np.linalg.eigh(covariance)
    root = np.sqrt(values)
    rows, columns = root[..., :, None], root[..., None, :]
    slope = -1 / (rows * columns * (rows + columns))
    inner = transpose(vectors) @ symmetric(dwhitening) @ vectors
    gradient: Array = vectors @ (slope * inner) @ transpose(vectors)
    return gradient


def newton_inverse_root(covariance: Array, iterations: int) -> Array:
    """Approach the inverse root without eigenvectors: ``P <- (3 P - P^3 S) / 2``, S of trace one.

    References:
        Huang, Zhou, Zhu, Liu and Shao, Iterative Normalization, 2019, arXiv:1904.03441, equations (4) and (5).
    """
    total = trace(covariance)
    root: Array = _newton_steps(covariance / total, iterations)[-1] / np.sqrt(total)
    return root


def newton_inverse_root_backward(dwhitening: Array, covariance: Array, iterations: int) -> Array:
    """Return the gradient of the covariance by walking the iteration backwards."""
    total = trace(covariance)
    scaled = covariance / total
    steps = _newton_steps(scaled, iterations)
    # whitening = P trace^-1/2
    dp = dwhitening / np.sqrt(total)
    dtrace = -0.5 * (dwhitening * steps[-1]).sum(axis=(-2, -1), keepdims=True) / total**1.5
    dscaled = np.zeros_like(covariance)
    for p in reversed(steps[:-1]):
        square, cube = p @ p, p @ p @ p
        dscaled = dscaled - 0.5 * transpose(cube) @ dp  # P^3 S, with respect to S
        through_cube = dp @ transpose(square @ scaled) + transpose(p) @ dp @ transpose(p @ scaled)
        dp = 1.5 * dp - 0.5 * (through_cube + transpose(square) @ dp @ transpose(scaled))
    # S = covariance / trace
    dtrace = dtrace - (dscaled * covariance).sum(axis=(-2, -1), keepdims=True) / total**2
    return symmetric(dscaled / total + dtrace * np.eye(covariance.shape[-1]))


def _newton_steps(scaled: Array, iterations: int) -> list[Array]:
    """Return P before and after every step; it starts at the identity."""
    steps = [np.broadcast_to(np.eye(scaled.shape[-1]), scaled.shape)]
    for _ in range(iterations):
        p = steps[-1]
        steps.append(1.5 * p - 0.5 * p @ p @ p @ scaled)
    return steps


def transpose(matrices: Array) -> Array:
    """Swap rows and columns of every matrix."""
    return np.swapaxes(matrices, -1, -2)


def symmetric(matrices: Array) -> Array:
    """Return the symmetric part of every matrix."""
    return (matrices + transpose(matrices)) / 2


def trace(matrices: Array) -> Array:
    """Return the trace of every matrix, as ``(..., 1, 1)``."""
    traces: Array = np.trace(matrices, axis1=-2, axis2=-1)[..., None, None]
    return traces
