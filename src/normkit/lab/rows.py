"""Questions that claims ask of their rows."""

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev

from .claim import Row, Value

__all__ = [
    "as_number",
    "compared_norms",
    "curve_per_seed",
    "last_accuracies",
    "late_accuracies",
    "matched",
    "mean_and_spread",
    "mean_curve",
    "mean_of",
    "of_norm",
    "per_seed",
    "spread_in_words",
    "where",
]


def of_norm(rows: Sequence[Row], norm: str) -> list[Row]:
    """Return the rows of one norm."""
    return [row for row in rows if row["norm"] == norm]


def where(rows: Sequence[Row], **values: Value) -> list[Row]:
    """Return the rows that hold these values.

    >>> where([{"seed": 0, "depth": 5}, {"seed": 0, "depth": 10}], depth=10)
    [{'seed': 0, 'depth': 10}]
    """
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def compared_norms(rows: Sequence[Row]) -> tuple[str, str]:
    """Return the norm that the claim is judged by, and what it is compared with.

    Batch normalization against none, where both were run; else the first norm that is not ``"none"``.
    """
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    others = [norm for norm in norms if norm != "none"]
    candidate = "batch" if "batch" in others or not others else others[0]
    return candidate, "none"


def per_seed(rows: Sequence[Row], reduce: Callable[[Sequence[Row]], float]) -> dict[int, float]:
    """Return one number per seed: what ``reduce`` makes of that seed's rows, in their order."""
    seeds = sorted({row["seed"] for row in rows})
    return {seed: reduce([row for row in rows if row["seed"] == seed]) for seed in seeds}


def mean_of(column: str, rows: Sequence[Row]) -> float:
    """Return the mean of a column over the rows.

    >>> mean_of("loss", [{"loss": 0.5}, {"loss": 0.25}])
    0.375
    """
    return fmean(as_number(row[column]) for row in rows)


def curve_per_seed(rows: Sequence[Row], column: str) -> list[list[float]]:
    """Return one curve per seed: a column's values in the order of the rows."""
    seeds = sorted({row["seed"] for row in rows})
    return [[as_number(row[column]) for row in rows if row["seed"] == seed] for seed in seeds]


def last_accuracies(rows: Sequence[Row]) -> dict[int, float]:
    """Return each seed's test accuracy after the last epoch."""
    return per_seed(rows, lambda run: as_number(run[-1]["test_accuracy"]))


def late_accuracies(rows: Sequence[Row], column: str = "test_accuracy", epochs: int = 3) -> dict[int, float]:
    """Return each seed's accuracy as the mean over the last epochs: at a rate that never falls, one epoch's is noise.

    >>> run = [{"seed": 0, "test_accuracy": accuracy} for accuracy in (0.1, 0.5, 0.75, 1.0)]
    >>> late_accuracies(run)
    {0: 0.75}
    """
    return per_seed(rows, lambda run: mean_of(column, run[-epochs:]))


def matched(first: Sequence[Row], second: Sequence[Row], *, fit: str, read: str) -> tuple[dict[int, float], ...]:
    """Return what a column reads on either side where both fit the training data equally well, seed by seed.

    The fit is the lowest that both sides of a seed reach (the higher of their lowest); the column is read there,
    between the two epochs in which a side first comes so low, along the fit. A seed with a number that is not finite
    gives NaN.

    >>> slow = [{"seed": 0, "fit": 2.0, "test": 3.0}, {"seed": 0, "fit": 1.0, "test": 2.0}]
    >>> fast = [{"seed": 0, "fit": 2.0, "test": 3.0}, {"seed": 0, "fit": 0.0, "test": 1.0}]
    >>> matched(slow, fast, fit="fit", read="test")
    ({0: 2.0}, {0: 2.0})
    """
    seeds = sorted({row["seed"] for row in first} & {row["seed"] for row in second})
    sides: tuple[dict[int, float], ...] = ({}, {})
    for seed in seeds:
        runs = [
            [(as_number(row[fit]), as_number(row[read])) for row in side if row["seed"] == seed]
            for side in (first, second)
        ]
        level = max(min(fitted for fitted, _ in run) for run in runs)
        for side, run in zip(sides, runs, strict=True):
            side[seed] = _read_at(run, level)
    return sides


def _read_at(run: Sequence[tuple[float, float]], level: float) -> float:
    """Return the second number where the first comes down to the level for the first time."""
    if any(not math.isfinite(number) for pair in run for number in pair):
        return math.nan
    before = run[0]
    for here in run:
        if here[0] <= level:
            share = 1.0 if here is run[0] or before[0] == here[0] else (before[0] - level) / (before[0] - here[0])
            return before[1] + share * (here[1] - before[1]) if here is not run[0] else here[1]
        before = here
    return math.nan


def as_number(value: float | None) -> float:
    """Return the number, or NaN where the results hold ``null`` for one that was not finite."""
    return math.nan if value is None else float(value)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation (divisor n - 1; zero for a single value).

    >>> mean_and_spread([1.0, 2.0, 3.0])
    (2.0, 1.0)
    """
    if any(not math.isfinite(value) for value in values):
        return math.nan, math.nan
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def spread_in_words(values: Sequence[float], digits: int = 4) -> str:
    """Return the cell of a table: mean ± standard deviation, or why there is none.

    >>> spread_in_words([1.0, 2.0, 3.0], digits=2), spread_in_words([]), spread_in_words([1.0, math.nan])
    ('2.00 ± 1.00', 'not run', 'not finite')
    """
    mean, spread = mean_and_spread(values) if values else (math.nan, math.nan)
    if not math.isfinite(mean):
        return "not finite" if values else "not run"
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def mean_curve(curves: Sequence[Sequence[float]]) -> tuple[list[float], list[float], list[float]]:
    """Return the mean over curves at each position, and the band of one standard deviation around it."""
    points = [mean_and_spread(values) for values in zip(*curves, strict=True)]
    means = [mean for mean, _ in points]
    return means, [mean - spread for mean, spread in points], [mean + spread for mean, spread in points]
