"""Premises that many claims share: what must be so before their question means anything."""

from collections.abc import Sequence

from .claim import Row
from .rows import as_number, per_seed
from .verdicts import Evidence, Rule, single

__all__ = ["LEARNT", "chance", "learnt"]

LEARNT = Rule(
    effect="test accuracy after the last epoch, in multiples of chance, of the side that learnt least",
    unit="times",
    direction="above",
    line=3.0,
)


def chance(row: Row) -> float:
    """Return the share of right answers that guessing gives; rows of older runs are of ten classes.

    >>> chance({"classes": 100}), chance({})
    (0.01, 0.1)
    """
    return 1 / float(row.get("classes", 10))


def learnt(*sides: Sequence[Row], column: str = "test_accuracy") -> Evidence:
    """Return the premise that all these sides have learnt something, seed by seed."""

    def times_chance(run: Sequence[Row]) -> float:
        return as_number(run[-1][column]) / chance(run[-1])

    reached = [per_seed(side, times_chance) for side in sides]
    seeds = set(reached[0]).intersection(*reached[1:])
    return single(LEARNT, {seed: min(side[seed] for side in reached) for seed in sorted(seeds)})
