"""Draw the charts that claims describe: as files, and as SVG that lies inside a page and follows its colours."""

import io
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox

from ..lab.charts import Bars, Chart, Line, Panel, Points
from ..lab.files import atomic_write
from .language import ENGLISH, Language
from .readout import targets

__all__ = ["draw", "draw_miniature", "inline_miniature", "inline_panels"]

# Colours that stand on white and on black; the first six are told apart by colour-blind readers (Okabe and Ito).
COLOURS = (
    "#D55E00", "#1F83C4", "#009E73", "#CC79A7", "#B8860B", "#7F7F7F", "#8F76D6", "#0E98A3", "#96705B", "#B3423A",
    "#5D8A1F", "#D1478C", "#4F6D8F",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*", "d")
# Variants of one colour go from this share of white to this share of black; two are the colour itself and the darker.
LIGHTEST, DARKEST = 0.45, 0.35
STROKES: tuple[Any, ...] = ("-", (0, (6, 1.5)), (0, (3, 1, 1, 1)), (0, (1, 1)))

# Everything drawn in this colour takes the page's own text colour when the figure lies inside a page.
INK = "#1b1f24"

# A file is a white card with dark ink, or where the reader has chosen dark a dark card with light ink.
DARK_PAPER, DARK_INK = "#14171b", "#e3e7eb"
CARD = f"""<style>@media (prefers-color-scheme: dark) {{
[style*="fill: #ffffff"] {{ fill: {DARK_PAPER} !important }}
[style*="fill: {INK}"] {{ fill: {DARK_INK} !important }}
[style*="stroke: {INK}"] {{ stroke: {DARK_INK} !important }}
text:not([style*="fill:"]) {{ fill: {DARK_INK} }}
}}</style>"""

STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    # Labels are words of results and settings, never formulas.
    "text.parse_math": False,
    "svg.fonttype": "none",
    # Identifiers in the file follow from its content, so that the same results give the same bytes.
    "svg.hashsalt": "normkit",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
PANEL_INCHES = (4.6, 3.5)
MINIATURE_INCHES = (1.7, 1.0)

# A legend wider than its panel would leave no room for the curves.
LONGEST_LABEL = 36

# A title of more letters than this would leave its panel, and goes on in a second line.
TITLE_WIDTH = 38

# What comes in whole numbers only: no tick stands at epoch 2.5.
COUNTED = ("epoch", "step")


def draw(chart: Chart, folder: Path) -> tuple[Path, Path]:
    """Write the chart as SVG and as PNG, panels side by side on white, and return both paths.

    The SVG is dark where the reader has chosen that.
    """
    folder.mkdir(parents=True, exist_ok=True)
    svg, png = folder / f"{chart.name}.svg", folder / f"{chart.name}.png"
    with _figure(chart.panels) as figure:
        figure.patch.set_facecolor("white")
        about = {"Title": chart.title, "Description": chart.text}
        atomic_write(svg, _card(_svg(figure, about)).encode())
        pixels = io.BytesIO()
        figure.savefig(pixels, format="png", dpi=160, metadata=about)
        atomic_write(png, pixels.getvalue())
    return svg, png


def inline_panels(chart: Chart, lang: Language = ENGLISH) -> tuple[str, ...]:
    """Return one SVG element per panel, without background, sized by the page and in the page's text colour.

    In another language the words are put into the drawn figure: its layout is that of the English ones.
    """
    return tuple(_inline_panel(panel, lang) for panel in chart.panels)


def inline_miniature(chart: Chart) -> str:
    """Return the chart's first panel as a small SVG element without words."""
    with _miniature(chart) as figure:
        return _inline(figure)


def draw_miniature(chart: Chart, path: Path) -> None:
    """Write the chart's first panel as a small SVG file without words, on white or, where chosen, on dark."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _miniature(chart) as figure:
        figure.patch.set_facecolor("white")
        atomic_write(path, _card(_svg(figure, {"Title": chart.title})).encode())


def _inline_panel(panel: Panel, lang: Language) -> str:
    with _figure([panel]) as figure:
        markup = _inline(figure)
        for english, said in _words(panel, lang).items():
            markup = re.sub(
                f"(<text[^>]*>){re.escape(escape(english, quote=False))}(</text>)", rf"\g<1>{said}\2", markup
            )
        return markup.replace("</svg>", f"{targets(figure.axes[0], panel, lang)}</svg>")


def _words(panel: Panel, lang: Language) -> Mapping[str, str]:
    """Return the words that a panel draws, each with what stands in its place in another language."""
    if lang is ENGLISH:
        return {}
    first, *others = textwrap.wrap(panel.title, TITLE_WIDTH) or [""]
    said = {first: lang.label(panel.title), **dict.fromkeys(others, "")}
    labels = [panel.x_label, panel.y_label, *(_shortened(mark.label) for mark in panel.marks)]
    labels += [category for mark in panel.marks if isinstance(mark, Bars) for category in mark.categories]
    said.update({words: lang.label(words) for words in labels})
    return {english: escape(words).replace("\\", r"\\") for english, words in said.items() if english}


def _inline(figure: Figure) -> str:
    """Return the figure as an SVG element that has no background and no identifiers of its own."""
    figure.patch.set_alpha(0)
    markup = _svg(figure, {})
    markup = markup[markup.index("<svg") :]
    markup = re.sub(r"<metadata>.*?</metadata>", "", markup, flags=re.DOTALL)
    # Several panels in one page: names that nothing refers to would only collide.
    markup = re.sub(r'<g id="[^"]*"', "<g", markup)
    markup = re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r'<svg \1aria-hidden="true"', markup)
    markup = re.sub(r'<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"', r'<svg \1\2aria-hidden="true"', markup)
    return markup.replace(INK, "currentColor")


def _card(markup: str) -> str:
    """Return a file's SVG with the colours it has on a dark screen; programs that know no CSS show the white card."""
    start = markup.index(">", markup.index("<svg")) + 1
    return f"{markup[:start]}\n{CARD}{markup[start:]}"


def _svg(figure: Figure, about: Mapping[str, str]) -> str:
    """Return the figure as SVG, with places to a hundredth of a point: more is not seen and doubles the file."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, **about})
    places = re.compile(r'(\s(?:d|x|y|transform|width|height)=")([^"]*)')
    rounded = places.sub(
        lambda found: found[1] + re.sub(r"(\.\d\d)\d+", r"\1", " ".join(found[2].split())), stream.getvalue()
    )
    return re.sub(r"\n\s*", "\n", rounded)


@contextmanager
def _figure(panels: Sequence[Panel]) -> Iterator[Figure]:
    """Draw panels side by side, under this module's style and no one else's."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        width, height = PANEL_INCHES
        figure = Figure(figsize=(width * len(panels), height), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            axes.patch.set_alpha(0)
            _draw_panel(axes, panel)
        _lay_out(figure)
        yield figure


@contextmanager
def _miniature(chart: Chart) -> Iterator[Figure]:
    """Draw the first panel small, without words, ticks and grid: what is left is its shape."""
    panel = chart.panels[0]
    bare = replace(panel, title="", x_label="", y_label="", marks=[replace(mark, label="") for mark in panel.marks])
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({**STYLE, "axes.grid": False, "lines.markersize": 2})
        figure = Figure(figsize=MINIATURE_INCHES, layout="constrained")
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        _draw_panel(axes, bare)
        for line in axes.lines:
            line.set(linewidth=1.2, markersize=2.2)
        axes.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
        yield figure


def _draw_panel(axes: Axes, panel: Panel) -> None:
    """Draw one pair of axes."""
    axes.set_title(textwrap.fill(panel.title, TITLE_WIDTH))
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    if panel.log_x:
        axes.set_xscale("log")
    if panel.log_y:
        axes.set_yscale("log")
    groups = [mark for mark in panel.marks if isinstance(mark, Bars)]
    for mark in panel.marks:
        if isinstance(mark, Line):
            _draw_line(axes, mark)
        elif isinstance(mark, Points):
            _draw_points(axes, mark)
    for place, bars in enumerate(groups):
        _draw_bars(axes, bars, place, len(groups))
    for axis, logarithmic in ((axes.xaxis, panel.log_x), (axes.yaxis, panel.log_y)):
        if logarithmic:
            _label_plainly(axis)
    if panel.x_ticks:
        axes.set_xticks(list(panel.x_ticks))
    elif panel.x_label in COUNTED and not panel.log_x:
        axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True, min_n_ticks=1))
    if any(mark.label for mark in panel.marks):
        axes.legend()


def _lay_out(figure: Figure) -> None:
    """Find the place of every panel; put legends that would lie on data below, and make the figure as much taller."""
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.execute(figure)
    legends = [(axes, axes.get_legend()) for axes in figure.axes]
    taller = 0.0
    for axes, legend in legends:
        if legend is None or not _is_covered(axes, legend.get_window_extent()):
            continue
        taller = max(taller, legend.get_window_extent().height / figure.dpi)
        words = axes.xaxis.get_tightbbox()
        assert words is not None
        _, bottom = axes.transAxes.inverted().transform((words.x0, words.y0))
        legend.set_loc("upper center")
        legend.set_bbox_to_anchor((0.5, bottom), transform=axes.transAxes)
    width, height = figure.get_size_inches()
    if taller:
        figure.set_size_inches(width, height + taller)
        engine.execute(figure)
    # Each file would find the same layout again, which takes most of its time.
    figure.set_layout_engine("none")


def _is_covered(axes: Axes, box: Bbox) -> bool:
    """Say whether a curve, a point, a band or a bar lies in this box."""
    drawn = [(line.get_linestyle(), line.get_transform().transform_path(line.get_path())) for line in axes.lines]
    bands = [axes.transData.transform_path(path) for band in axes.collections for path in band.get_paths()]
    return (
        any(box.count_contains(path.vertices) for _, path in drawn)
        or any(path.intersects_bbox(box, filled=False) for style, path in drawn if style != "None")
        or any(path.intersects_bbox(box) for path in bands)
        or any(bar.get_window_extent().overlaps(box) for bar in axes.patches)
    )


def _label_plainly(axis: Axis) -> None:
    """Label a logarithmic axis with numbers: powers of ten would be formulas, which the style leaves unread."""
    low, high = axis.get_view_interval()
    # Over many decades whole powers are enough; with the steps between them the locator would find no room for any.
    subs = (1.0,) if high > 1000 * low else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=6))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _colour(mark: Line | Bars | Points) -> str:
    """Return the mark's colour, in the shade of its variant."""
    colour, (place, count) = COLOURS[mark.colour % len(COLOURS)], mark.variant
    if place == 0 and count <= 2:
        return colour
    # From light to dark, in the order in which variants are shown: rates and sizes come in theirs.
    depth = place / (count - 1) * (LIGHTEST + DARKEST) - LIGHTEST
    end, share = ("#000000", depth) if depth > 0 else ("#FFFFFF", -depth)
    red, green, blue = (
        round((1 - share) * was + share * towards) for was, towards in zip(_parts(colour), _parts(end), strict=True)
    )
    return f"#{red:02X}{green:02X}{blue:02X}"


def _parts(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[start : start + 2], 16) for start in (1, 3, 5))


def _marker(mark: Line | Points) -> str:
    return MARKERS[(mark.colour + mark.variant[0]) % len(MARKERS)]


def _draw_line(axes: Axes, line: Line) -> None:
    """Draw a curve, its points where there are few, and its band."""
    colour = _colour(line)
    marker = _marker(line) if len(line.x) <= 20 else ""
    place, count = line.variant
    stroke = STROKES[place] if count <= len(STROKES) else STROKES[0]
    style: dict[str, Any] = (
        {"linestyle": (0, (4, 3)), "markerfacecolor": "none"} if line.dashed else {"linestyle": stroke}
    )
    axes.plot(
        line.x, line.y, color=colour, label=_shortened(line.label), marker=marker, markersize=5, linewidth=1.8, **style
    )
    if line.low and line.high:
        axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.2, linewidth=0)


def _shortened(label: str) -> str:
    """Return the label, cut where it is too long for a legend."""
    return label if len(label) <= LONGEST_LABEL else f"{label[: LONGEST_LABEL - 1]}…"


def _draw_points(axes: Axes, points: Points) -> None:
    """Draw a cloud of points, lighter where there are many."""
    colour = _colour(points)
    marker, alpha = _marker(points), 0.9 if len(points.x) <= 100 else 0.5
    axes.plot(
        points.x, points.y, color=colour, label=points.label, marker=marker, markersize=5, alpha=alpha, linestyle=""
    )


def _draw_bars(axes: Axes, bars: Bars, place: int, groups: int) -> None:
    """Draw one group of bars beside the others, with whiskers."""
    width = 0.8 / groups
    positions = [index + (place - (groups - 1) / 2) * width for index in range(len(bars.categories))]
    colour = _colour(bars)
    whiskers = None
    if bars.low and bars.high:
        below = [height - low for height, low in zip(bars.heights, bars.low, strict=True)]
        above = [high - height for height, high in zip(bars.heights, bars.high, strict=True)]
        whiskers = [below, above]
    axes.bar(
        positions, bars.heights, width, color=colour, label=_shortened(bars.label), yerr=whiskers, ecolor=INK, capsize=2
    )
    axes.set_xticks(range(len(bars.categories)), list(bars.categories))
