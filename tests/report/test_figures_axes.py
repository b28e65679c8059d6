import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from normkit.lab.charts import Line, Panel
from normkit.report.figures import _draw_panel, _figure


def drawn(**changes):
    values = {
        "title": "Loss",
        "x_label": "epoch",
        "y_label": "nats",
        "marks": [Line(label="a", x=[1, 2, 3], y=[3, 2, 1])],
    }
    axes = Figure(figsize=(4.6, 3.5), layout="constrained").subplots()
    with mpl.rc_context():
        mpl.rcdefaults()
        _draw_panel(axes, Panel(**{**values, **changes}))
    return axes


@pytest.mark.parametrize("epochs", [[1], [1, 2], [1, 2, 3], list(range(1, 41))])
def test_epochs_have_ticks_at_whole_numbers_only(epochs):
    axes = drawn(marks=[Line(label="a", x=epochs, y=epochs)])
    assert all(float(tick).is_integer() for tick in axes.get_xticks())


def test_what_is_not_counted_has_ticks_between():
    axes = drawn(x_label="rate", marks=[Line(label="a", x=[1, 2], y=[1, 2])])
    assert any(not float(tick).is_integer() for tick in axes.get_xticks())


def test_long_title_goes_on_in_a_second_line():
    assert drawn(title="Change of the gradient along the gradient").get_title() == (
        "Change of the gradient along the\ngradient"
    )


CROWDED = [Line(label="up", x=[0, 1, 2], y=[0, 1, 2]), Line(label="down", x=[0, 1, 2], y=[2, 1, 0])] + [
    Line(label="", x=[0, 2], y=[height, height]) for height in (0.2, 0.6, 1.0, 1.4, 1.8)
]


def test_legend_stands_below_a_panel_that_has_no_room_for_it():
    free = Panel(title="free", x_label="epoch", y_label="nats", marks=CROWDED[:1])
    crowded = Panel(title="crowded", x_label="epoch", y_label="nats", marks=CROWDED)
    with _figure([free, crowded]) as figure:
        figure.draw_without_rendering()
        inside, below = (axes.get_legend().get_window_extent() for axes in figure.axes)
        first, second = (axes.get_window_extent() for axes in figure.axes)
        label = figure.axes[1].xaxis.label.get_window_extent()
        assert inside.y0 > first.y0
        assert not any(line.get_window_extent().overlaps(below) for line in figure.axes[1].lines)
        assert 0 <= below.y0 < below.y1 <= label.y0
        assert second.x0 <= below.x0 < below.x1 <= second.x1
