"""Premises that many claims share: what must be so before their question means anything."""

from collections.abc import Sequence

from .claim import Row
from .rows import as_number, per_seed
from .verdicts import Evidence, Rule, single

__all__ = ["LEARNT", "chance", "learnt"]

LEARNT = Rule(
    effect="test accuracy above chance after the last epoch, as a share of all there is above chance, of the side that "
    "learnt least",
    unit="",
    direction="above",
    line=0.1,
)


def chance(row: Row) -> float:
    """Return the share of right answers that guessing gives; rows of older runs are of ten classes.

    >>> chance({"classes": 100}), chance({})
    (0.01, 0.1)
    """
    return 1 / float(row.get("classes", 10))


def learnt(*sides: Sequence[Row], column: str = "test_accuracy") -> Evidence:
    """Return the premise that all these sides have learnt something, seed by seed."""

    def above_chance(run: Sequence[Row]) -> float:
        guessed = chance(run[-1])
        return (as_number(run[-1][column]) - guessed) / (1 - guessed)

    reached = [per_seed(side, above_chance) for side in sides]
    seeds = set(reached[0]).intersection(*reached[1:])
    return single(LEARNT, {seed: min(side[seed] for side in reached) for seed in sorted(seeds)})
