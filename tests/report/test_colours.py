"""Each norm has one colour in every figure; variants of a norm are shades of it."""

import itertools
import re

import pytest

from normkit.lab.charts import NEUTRAL, NORM_COLOURS, Chart, Line, Panel
from normkit.lab.curves import looks
from normkit.layers.catalog import METHODS
from normkit.report.figures import COLOURS, MARKERS, inline_panels


def test_every_norm_has_a_colour_and_a_marker_of_its_own():
    assert NORM_COLOURS.keys() == {"none", *(method.name for method in METHODS)}
    numbers = [*NORM_COLOURS.values(), NEUTRAL]
    assert sorted(numbers) == list(range(len(COLOURS)))
    assert len(set(COLOURS)) == len(COLOURS)
    assert len(set(MARKERS)) == len(MARKERS) == len(COLOURS)


def test_a_norm_looks_the_same_whatever_stands_beside_it():
    assert looks(["batch", "whitening"])[0] == looks(["none", "group", "batch"])[2]


def drawn(norms):
    """Return the colours of curves of these norms, as the figure has them."""
    marks = [Line(label="", x=[0, 1], y=[0, 1], **look) for look in looks(norms)]
    panel = Panel(title="", x_label="", y_label="", marks=marks)
    (markup,) = inline_panels(Chart(name="x", title="", panels=[panel], text=""))
    found = re.findall(r"fill: none; (?:stroke-dasharray: [^;]*; stroke-dashoffset: 0; )?stroke: (#\w{6})", markup)
    # Axes are in ink, which an inline figure takes from the page.
    return [colour.upper() for colour in found]


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("norm", ["none", "batch", "instance"])
def test_variants_are_shades_that_stand_on_white_and_on_the_dark_page(norm, count):
    colours = drawn([norm] * count)
    assert len(set(colours)) == count
    assert all(contrast(colour, page) > 1.9 for colour in colours for page in ("#FFFFFF", "#14171B"))
    hue = parts(COLOURS[NORM_COLOURS[norm]])
    order = sorted(range(3), key=hue.__getitem__)
    for colour in colours:
        assert sorted(range(3), key=parts(colour).__getitem__) == order


def test_two_norms_keep_their_own_colours_and_two_variants_begin_with_it():
    assert drawn(["none", "batch"]) == [COLOURS[0].upper(), COLOURS[1].upper()]
    assert drawn(["batch", "batch"])[0] == COLOURS[1].upper()
    for count in (2, 4):
        assert all(a != b for a, b in itertools.pairwise(drawn(["batch"] * count)))


def parts(colour):
    return [int(colour[start : start + 2], 16) for start in (1, 3, 5)]


def contrast(one, other):
    """Return the ratio of two colours' luminances, by WCAG 2."""

    def luminance(colour):
        linear = [part / 255 / 12.92 if part <= 10 else ((part / 255 + 0.055) / 1.055) ** 2.4 for part in parts(colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(luminance(colour) + 0.05 for colour in (one, other))
    return light / dark
