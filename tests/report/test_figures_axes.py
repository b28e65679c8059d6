import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from normkit.lab.charts import Line, Panel
from normkit.report.figures import _draw_panel


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
