"""How far off a number may be by chance where few samples were measured and many channels are looked at."""

import math
from statistics import NormalDist

from ..errors import ArgumentError
from .thresholds import FALSE_ALARMS

__all__ = ["check_samples", "errors_wanted"]


def check_samples(samples: object) -> None:
    """Refuse a number of samples that is none.

    Raises:
        ArgumentError: it is neither None nor a whole number above 0.
    """
    if samples is not None and (not isinstance(samples, int) or isinstance(samples, bool) or samples < 1):
        raise ArgumentError(f"samples={samples!r}: give a whole number above 0, or None for all batches")


def errors_wanted(samples: float, channels: int, layers: int) -> float:
    """Return how many standard errors a deviation must have, so that sampling alone raises few alarms in a model.

    One channel that is off is told of, in a layer of any width. That one of C channels is beyond a level p, by mean or
    variance, in one of L layers, happens by chance with a probability below ``2 L C p``, however the channels hang
    together (Bonferroni's inequality). So p is ``FALSE_ALARMS / (2 L C)``.

    The standard error is itself taken from the samples, so the quantile is Student's with one degree of freedom less
    than samples. It is reckoned from the normal one z as ``t^2 = n (exp(z^2 ((8 n + 3) / (8 n + 1))^2 / n) - 1)``
    (Wallace 1959), within 1 % from 20 samples on, and too large with fewer, never too small.

    Args:
        samples: independent ones.
        channels: of the layer.
        layers: that are looked at.

    >>> round(errors_wanted(2000, 64, 50), 1), round(errors_wanted(20, 64, 50), 1)
    (4.8, 6.9)
    """
    level = FALSE_ALARMS / (2 * layers * channels)
    normal = -NormalDist().inv_cdf(level / 2)  # either side
    freedom = samples - 1.0
    if freedom < 1.0:
        return math.inf
    exponent = (normal * (8 * freedom + 3) / (8 * freedom + 1)) ** 2 / freedom
    return math.sqrt(freedom * math.expm1(exponent))
