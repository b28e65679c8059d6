"""Intervals: Student's for a mean over seeds, and the exact one for a share of seeds.

Both have a level, the probability of missing the truth. It is less than 5 % where an experiment is looked at more than
once: see `sequential`.
"""

import math
from collections.abc import Sequence

from scipy.stats import beta, t

__all__ = ["seeds_needed", "share_interval", "student_interval"]

# The power that "the seeds it would need" speaks of.
POWER = 0.8
MOST_SEEDS = 100_000


def student_interval(values: Sequence[float], level: float) -> tuple[float, float]:
    """Return ``mean ± t(1 - level/2, n - 1) · s / sqrt(n)``; no spread gives an interval of no width.

    >>> tuple(round(end, 4) for end in student_interval([1.0, 2.0, 3.0], level=0.05))
    (-0.4841, 4.4841)
    """
    count = len(values)
    mean = math.fsum(values) / count
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half = float(t.ppf(1 - level / 2, count - 1)) * math.sqrt(variance / count)
    return mean - half, mean + half


def share_interval(happened: int, count: int, level: float) -> tuple[float, float]:
    """Return the exact interval of a share (Clopper and Pearson 1934), each side wrong by half the level at most.

    >>> tuple(round(end, 4) for end in share_interval(10, 10, level=0.05))
    (0.6915, 1.0)
    """
    low = 0.0 if happened == 0 else float(beta.ppf(level / 2, happened, count - happened + 1))
    high = 1.0 if happened == count else float(beta.ppf(1 - level / 2, happened + 1, count - happened))
    return low, high


def seeds_needed(distance: float, deviation: float, level: float) -> int | None:
    """Return how many seeds show an effect at this distance from a line with a power of 80 %; ``None`` for no number.

    The smallest n with ``n >= ((t(1 - level/2) + t(0.8)) · deviation / distance)^2``, t having n - 1 degrees of
    freedom.

    >>> seeds_needed(1.0, 1.0, level=0.05)
    10
    """
    if not (distance > 0 and deviation > 0 and math.isfinite(deviation / distance)):
        return None

    def enough(count: int) -> bool:
        quantiles = float(t.ppf(1 - level / 2, count - 1) + t.ppf(POWER, count - 1))
        return count >= (quantiles * deviation / distance) ** 2

    if not enough(MOST_SEEDS):
        return None
    low, high = 1, MOST_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
