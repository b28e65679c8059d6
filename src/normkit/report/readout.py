"""Values to be read off a figure inside a page: an invisible target with its words over each point of a panel."""

from collections.abc import Iterator, Sequence
from html import escape

from matplotlib.axes import Axes

from ..lab.charts import Bars, Line, Panel, Points
from .language import ENGLISH, Language

__all__ = ["targets"]

# A curve of a thousand points is read as well at forty of them, and the page stays small.
MOST_POINTS = 40


def targets(axes: Axes, panel: Panel, lang: Language = ENGLISH) -> str:
    """Return SVG circles, one per value, in points from the figure's upper left corner.

    Each holds its words as ``<title>``, which browsers show by themselves; the page's script shows them also to a
    finger. The figure must have been drawn: its layout decides where the values lie.
    """
    return "".join(
        f'<circle class="value" fill="transparent" cx="{x:.1f}" cy="{y:.1f}" r="5">'
        f"<title>{escape(words)}</title></circle>"
        for x, y, words in _placed(axes, panel, lang)
    )


def _placed(axes: Axes, panel: Panel, lang: Language) -> Iterator[tuple[float, float, str]]:
    """Yield the place and the words of every value that lies within the axes."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    points_per_pixel, height = 72 / figure.dpi, figure.get_size_inches()[1] * 72
    for x, y, words in _values(panel, lang):
        across, up = axes.transData.transform((x, y))
        if axes.bbox.contains(across, up):
            yield across * points_per_pixel, height - up * points_per_pixel, words


def _values(panel: Panel, lang: Language) -> Iterator[tuple[float, float, str]]:
    groups = [mark for mark in panel.marks if isinstance(mark, Bars)]
    for mark in panel.marks:
        name = f"{lang.label(mark.label)}{lang.say(': ')}" if mark.label else ""
        if isinstance(mark, Bars):
            yield from _bar_values(mark, name, groups.index(mark), len(groups), lang)
        elif isinstance(mark, Line | Points):
            chosen = _spread(len(mark.x)) if isinstance(mark, Line) else range(min(len(mark.x), 5 * MOST_POINTS))
            for place in chosen:
                band = ""
                if isinstance(mark, Line) and mark.low and mark.high:
                    band = lang.say(" ({low} to {high})", low=f"{mark.low[place]:.4g}", high=f"{mark.high[place]:.4g}")
                where = f"{lang.label(panel.x_label)} {mark.x[place]:.4g}".strip()
                value = f"{name}{mark.y[place]:.4g}{band}"
                yield mark.x[place], mark.y[place], lang.say("{value} at {where}", value=value, where=where)


def _bar_values(bars: Bars, name: str, place: int, groups: int, lang: Language) -> Iterator[tuple[float, float, str]]:
    width = 0.8 / groups
    for index, (category, height) in enumerate(zip(bars.categories, bars.heights, strict=True)):
        whiskers = ""
        if bars.low and bars.high:
            whiskers = lang.say(" ({low} to {high})", low=f"{bars.low[index]:.4g}", high=f"{bars.high[index]:.4g}")
        said = lang.say("{value} at {where}", value=f"{name}{height:.4g}{whiskers}", where=lang.label(category))
        yield index + (place - (groups - 1) / 2) * width, height, said


def _spread(count: int) -> Sequence[int]:
    """Return evenly spread positions, first and last among them."""
    if count <= MOST_POINTS:
        return range(count)
    return [round(place * (count - 1) / (MOST_POINTS - 1)) for place in range(MOST_POINTS)]
