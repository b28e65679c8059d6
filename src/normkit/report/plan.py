"""A plan as one self-contained page: what to do first, a picture of every layer, the table below."""

import re
from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..doctor.planning import PlannedLayer, TrainingPlan
from ..lab.charts import Chart, Line, Panel, Points
from .figures import inline_panels

__all__ = ["render_plan"]

_HEADER = ("kind", "samples", "values", "effective", "mean off", "variance off", "gap", "needs")


def render_plan(plan: TrainingPlan, title: str = "Plan") -> str:
    """Return the page. Layer names and everything else that comes from a model are escaped."""
    environment = Environment(
        loader=PackageLoader("normkit.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    chart = _chart(plan)
    few = [layer for layer in plan.layers if _has_too_little(layer, plan.gap)]
    left_over = [layer for layer in plan.layers if layer.last_values <= 2 < layer.values]
    return environment.get_template("plan.html.j2").render(
        title=title,
        plan=plan,
        state="healthy" if not few and not left_over else "error" if _stops(plan.layers) else "warning",
        headline=_headline(plan, few, left_over),
        chart=chart,
        # The only markup that is not escaped is what matplotlib drew, which escapes every word itself.
        panels=[Markup(panel) for panel in inline_panels(chart)],  # noqa: S704
        columns=_HEADER,
        rows=[(layer, _cells(layer)) for layer in plan.layers],
        advice=[_sentence(line) for line in plan.advice],
        data=plan.to_dict(),
    )


def _has_too_little(layer: PlannedLayer, gap: float) -> bool:
    return layer.values <= 2 or layer.gap > gap


def _stops(layers: Sequence[PlannedLayer]) -> bool:
    """Say whether one value, which has no variance, is met in training or at the end of an epoch."""
    return any(1 in (layer.values, layer.last_values) for layer in layers)


def _headline(plan: TrainingPlan, few: Sequence[PlannedLayer], left_over: Sequence[PlannedLayer]) -> str:
    count = len(plan.layers)
    if _stops(plan.layers):
        return "Training raises an error: one value has no variance"
    if few:
        return f"{len(few)} of {count} layer{'s' * (count > 1)} {'take' if len(few) > 1 else 'takes'} too little data"
    return "The last batch of an epoch is too small" if left_over else "Every layer has data enough"


def _sentence(line: str) -> str:
    """Begin with a capital what does not begin with code or a layer's name."""
    return line if re.match(r"\S*[=:]", line) else line[0].upper() + line[1:]


def _cells(layer: PlannedLayer) -> tuple[str, ...]:
    return (
        layer.kind,
        f"{layer.samples:,}",
        f"{layer.values:,}",
        "" if layer.effective is None else f"{layer.effective:,.0f}",
        f"{layer.mean_error:.0%}",
        "no variance" if layer.var_error is None else f"{layer.var_error:.0%}",
        f"{layer.gap:.2f}",
        f"{layer.samples_needed:,} sample{'' if layer.samples_needed == 1 else 's'}",
    )


def _chart(plan: TrainingPlan) -> Chart:
    layers = plan.layers
    worst = max(range(len(layers)), key=lambda place: layers[place].gap)
    name = layers[worst].name or "the model itself"
    places = range(1, len(layers) + 1)
    off = [place for place in places if layers[place - 1].gap > plan.gap]
    fine = [place for place in places if place not in off]
    gaps: list[Line | Points] = [
        Points(label=label, x=chosen, y=[layers[place - 1].gap for place in chosen], colour=colour)
        for label, chosen, colour in (("small enough", fine, 1), ("too far apart", off, 0))
        if chosen
    ]
    gaps.append(_level("asked for", len(layers), plan.gap))
    shared = [
        Points(label="share a statistic", x=places, y=[layer.samples for layer in layers], colour=1),
        Points(label="would have to", x=places, y=[layer.samples_needed for layer in layers], colour=0),
    ]
    largest = max(layer.gap for layer in layers)
    ticks = tuple(range(1, len(layers) + 1, max(len(layers) // 6, 1)))
    text = (
        f"Of {len(layers)} layers in the model's order, how far training is from evaluation and how many samples share "
        f"a statistic: {len(off)} are past the gap of {plan.gap:g} that was asked for; the worst is {name}, with a gap "
        f"of {largest:.2g}, where {layers[worst].samples} samples share a statistic and {layers[worst].samples_needed} "
        "would have to."
    )
    panels = (
        Panel(
            title="Training from evaluation: deviations",
            x_label="layer, in the model's order",
            y_label="",
            marks=gaps,
            log_y=largest > 4 * plan.gap,
            x_ticks=ticks,
        ),
        Panel(
            title="Samples that share a statistic",
            x_label="layer, in the model's order",
            y_label="",
            marks=shared,
            log_y=True,
            x_ticks=ticks,
        ),
    )
    return Chart(name="plan", title="Every layer", panels=panels, text=text)


def _level(label: str, count: int, height: float) -> Line:
    # So many points that the figure marks none of them.
    x = [1 + (max(count, 2) - 1) * step / 30 for step in range(31)]
    return Line(label=label, x=x, y=[height] * len(x), colour=5, dashed=True)
