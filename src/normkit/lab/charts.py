"""Charts and tables as data. A claim describes what is to be seen; ``report`` draws it.

Every chart carries a text alternative that says what a reader who cannot see it should know.

Colours are numbers; `NORM_COLOURS` gives each norm the one that it has in every chart. What is compared within one norm
has that norm's colour, as its variants.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["NEUTRAL", "NORM_COLOURS", "Bars", "Chart", "Line", "Panel", "Points", "Table", "Variant", "norm_colour"]

# The colour of what is no norm's: chance, a formula, a standard normal.
NEUTRAL = 5
# Every norm of the catalog, and none; no two alike.
NORM_COLOURS: Mapping[str, int] = {
    "none": 0, "batch": 1, "group": 2, "layer": 3, "whitening": 4, "instance": 6, "renorm": 7, "ghost": 8, "rms": 9,
    "adaptive": 10, "response": 11, "masked": 12,
}  # fmt: skip

# The place among the variants that share a colour, from 0, and how many they are.
Variant = tuple[int, int]


def norm_colour(norm: str) -> int:
    """Return the norm's colour; a word of results that is no norm's name is drawn as what is no norm's.

    >>> norm_colour("batch"), norm_colour("unheard of") == NEUTRAL
    (1, True)
    """
    return NORM_COLOURS.get(norm, NEUTRAL)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve, with a band around it where ``low`` and ``high`` are given.

    Attributes:
        label: its name in the legend.
        x: the positions.
        y: the values, as many.
        low: lower edge of the band.
        high: upper edge of the band.
        colour: lines of the same number have the same colour in every panel.
        variant: its place among the lines of its colour: each has another shade, stroke and marker.
        dashed: drawn dashed, for what is not ours: the source's numbers, a formula.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    colour: int = 0
    variant: Variant = (0, 1)
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class Bars:
    """One group of bars, with whiskers where ``low`` and ``high`` are given.

    Attributes:
        label: its name in the legend.
        categories: the words below the bars, the same in every group of a panel.
        heights: the values, as many.
        low: lower ends of the whiskers.
        high: upper ends of the whiskers.
        colour: groups of the same number have the same colour in every panel.
        variant: as of lines.
    """

    label: str
    categories: Sequence[str]
    heights: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    colour: int = 0
    variant: Variant = (0, 1)


@dataclass(frozen=True, kw_only=True)
class Points:
    """A cloud of points.

    Attributes:
        label: its name in the legend.
        x: the positions.
        y: the values, as many.
        colour: as of lines.
        variant: as of lines.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    variant: Variant = (0, 1)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes.

    Attributes:
        title: the words above it.
        x_label: the words along the horizontal axis.
        y_label: the words along the vertical axis.
        marks: what is drawn, in this order.
        log_x: a logarithmic horizontal axis.
        log_y: a logarithmic vertical axis.
        x_ticks: positions of the ticks, where they should not be chosen freely.
    """

    title: str
    x_label: str
    y_label: str
    marks: Sequence[Line | Bars | Points]
    log_x: bool = False
    log_y: bool = False
    x_ticks: Sequence[float] = ()


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One figure: panels side by side.

    Attributes:
        name: the stem of its files.
        title: the sentence above it.
        panels: from left to right; on a narrow page from top to bottom.
        text: the text alternative.
    """

    name: str
    title: str
    panels: Sequence[Panel]
    text: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under a header. Numbers are formatted by who makes the table.

    Attributes:
        title: the sentence above it.
        header: the names of the columns.
        rows: as many cells in each as the header has.
        note: what a reader must know to read it.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
