"""Lines that many claims draw: a column against the epochs, or a number per run against what was varied."""

from collections.abc import Callable, Sequence
from typing import TypedDict

from .charts import Line, Variant, norm_colour
from .claim import Row
from .rows import curve_per_seed, mean_curve, per_seed, where

__all__ = ["Look", "looks", "norm_label", "over_epochs", "over_variants"]


class Look(TypedDict):
    """What a mark looks like, to be given to it by ``**``."""

    colour: int
    variant: Variant


def looks(norms: Sequence[str]) -> list[Look]:
    """Return what marks of these norms look like: each norm's own colour, and variants where a norm comes again.

    >>> [look["colour"] for look in looks(["none", "batch"])]
    [0, 1]
    >>> looks(["batch", "batch"])
    [{'colour': 1, 'variant': (0, 2)}, {'colour': 1, 'variant': (1, 2)}]
    """
    return [
        {"colour": norm_colour(norm), "variant": (norms[:place].count(norm), norms.count(norm))}
        for place, norm in enumerate(norms)
    ]


def norm_label(norm: str) -> str:
    """Return the words for one side of a comparison.

    >>> norm_label("none"), norm_label("batch")
    ('without norm', 'with batch norm')
    """
    return "without norm" if norm == "none" else f"with {norm} norm"


def over_epochs(
    rows: Sequence[Row], column: str, *, label: str, colour: int, variant: Variant = (0, 1), dashed: bool = False
) -> Line:
    """Return the mean over seeds of a column, one point per epoch, with its band."""
    mean, low, high = mean_curve(curve_per_seed(rows, column))
    return Line(
        label=label, x=list(range(1, len(mean) + 1)), y=mean, low=low, high=high, colour=colour, variant=variant,
        dashed=dashed,
    )  # fmt: skip


def over_variants(
    rows: Sequence[Row],
    name: str,
    reduce: Callable[[Sequence[Row]], float],
    *,
    label: str,
    colour: int,
    variant: Variant = (0, 1),
) -> Line:
    """Return the mean over seeds of what ``reduce`` makes of each run, one point per value of the variant."""
    values = sorted({float(row[name]) for row in rows})
    points = [list(per_seed(where(rows, **{name: value}), reduce).values()) for value in values]
    runs = min(len(point) for point in points)
    mean, low, high = mean_curve([[point[run] for point in points] for run in range(runs)])
    return Line(label=label, x=values, y=mean, low=low, high=high, colour=colour, variant=variant)
