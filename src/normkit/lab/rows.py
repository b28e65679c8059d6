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
    "mean_and_spread",
    "mean_curve",
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


def curve_per_seed(rows: Sequence[Row], column: str) -> list[list[float]]:
    """Return one curve per seed: a column's values in the order of the rows."""
    seeds = sorted({row["seed"] for row in rows})
    return [[as_number(row[column]) for row in rows if row["seed"] == seed] for seed in seeds]


def last_accuracies(rows: Sequence[Row]) -> dict[int, float]:
    """Return each seed's test accuracy after the last epoch."""
    return per_seed(rows, lambda run: as_number(run[-1]["test_accuracy"]))


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
