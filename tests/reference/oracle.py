"""Judges that share nothing with the reference: 50-digit arithmetic and central differences."""

from collections.abc import Callable, Sequence

import mpmath
import numpy as np
import torch

from tolerances import assert_close

DIGITS = 50
# At 50 digits a central difference with this step is right to about 30 digits: a derivative without a formula.
_STEP = mpmath.mpf(10) ** -16


def close(actual, expected, what: str = "result") -> None:
    """Compare two arrays with the table's tolerance for float64."""
    left, right = (torch.as_tensor(np.asarray(value, dtype=np.float64)) for value in (actual, expected))
    assert_close(left, right, dtype=torch.float64, what=what)


def random_array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def central_difference(function: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Differentiate a scalar function of an array, element by element, in float64."""
    gradient = np.empty_like(at)
    for index in np.ndindex(at.shape):
        moved = at.copy()
        moved[index] = at[index] + step
        above = function(moved)
        moved[index] = at[index] - step
        gradient[index] = (above - function(moved)) / (2 * step)
    return gradient


def exact_batch_norm(x: Sequence, weight, bias, eps) -> list:
    """Normalize the values of one channel in 50 digits, from the words of SPEC A1."""
    with mpmath.workdps(DIGITS):
        values = [mpmath.mpf(value) for value in x]
        mean = mpmath.fsum(values) / len(values)
        var = mpmath.fsum((value - mean) ** 2 for value in values) / len(values)
        root = mpmath.sqrt(var + mpmath.mpf(eps))
        return [mpmath.mpf(weight) * (value - mean) / root + mpmath.mpf(bias) for value in values]


def exact_gradient(function: Callable[[list], list], at: Sequence, cotangent: Sequence) -> list[float]:
    """Differentiate ``<cotangent, function(at)>`` in 50 digits, knowing nothing but the function."""
    with mpmath.workdps(DIGITS):
        point = [mpmath.mpf(value) for value in at]

        def total(index: int, step) -> mpmath.mpf:
            moved = [value + (step if position == index else 0) for position, value in enumerate(point)]
            return mpmath.fsum(mpmath.mpf(c) * y for c, y in zip(cotangent, function(moved), strict=True))

        slopes = [(total(index, _STEP) - total(index, -_STEP)) / (2 * _STEP) for index in range(len(point))]
        return [float(slope) for slope in slopes]
