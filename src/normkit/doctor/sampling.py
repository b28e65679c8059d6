"""How far off a number may be by chance where few samples were measured and many channels are looked at."""

import math
from statistics import NormalDist

from .thresholds import FALSE_ALARMS

__all__ = ["channels_told", "errors_wanted"]


def channels_told(channels: int) -> int:
    """Return how many channels of a layer must be beyond a limit before their 99th percentile is."""
    return math.floor(0.01 * (channels - 1)) + 1


def errors_wanted(samples: float, channels: int, layers: int) -> float:
    """Return how many standard errors a deviation must have, so that sampling alone raises few alarms in a model.

    A layer is off where its 99th percentile is, thus k of its C channels. That k are beyond a level p happens by chance
    with a probability below ``p C / k``, however the channels hang together (Lehmann and Romano 2005, Theorem 2.1), and
    in one of L layers, by mean or variance, below ``2 L p C / k``. So p is ``FALSE_ALARMS k / (2 L C)``.

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
    level = FALSE_ALARMS * channels_told(channels) / (2 * layers * channels)
    normal = -NormalDist().inv_cdf(level / 2)  # either side
    freedom = samples - 1.0
    if freedom < 1.0:
        return math.inf
    exponent = (normal * (8 * freedom + 3) / (8 * freedom + 1)) ** 2 / freedom
    return math.sqrt(freedom * math.expm1(exponent))
