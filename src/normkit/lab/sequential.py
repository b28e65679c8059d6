"""When an experiment that gets seed after seed may be looked at, so that it is wrong in 5 % of all cases at most.

A verdict may fall at 5, 10, 20 or 40 seeds, at the first of these looks at which it is clear. Every look has an
interval of its own that misses the truth with probability `LEVEL`. Whatever verdict falls wrongly (*supported*,
*refuted*, or *no difference worth having* where there is one), the interval of some look has missed the truth; the
level is so small that this happens in 5 % of all experiments at most, over all four looks. A test simulates it.
"""

from collections.abc import Sequence

__all__ = ["LEVEL", "LOOKS", "looks_within", "next_look"]

LOOKS = (5, 10, 20, 40)
# Simulated with a million experiments of normal differences: 0.015 at each look misses in 4.95 % over all four, 0.016
# in 5.28 %.
LEVEL = 0.015


def looks_within(count: int) -> Sequence[int]:
    """Return the looks that so many seeds allow.

    >>> looks_within(4), looks_within(12), looks_within(100)
    ((), (5, 10), (5, 10, 20, 40))
    """
    return tuple(look for look in LOOKS if look <= count)


def next_look(count: int) -> int | None:
    """Return the first look after so many seeds; ``None`` after the last.

    >>> next_look(0), next_look(5), next_look(40)
    (5, 10, None)
    """
    return next((look for look in LOOKS if look > count), None)
