"""The picture of a finding: running against true statistics, or what the rule compares, with its limit."""

import math
from collections.abc import Callable, Mapping, Sequence

from ..doctor.findings import Finding, LayerRow
from ..doctor.text import layer_label
from ..doctor.thresholds import CONDITION_LIMIT, DRIFT_LOG_RATIO, DRIFT_Z, EPS_FELT, RESIDUE_WARNING, VALUES_SMALL
from ..lab.charts import Bars, Chart, Line, Panel, Points

__all__ = ["chart_of", "chart_of_network"]

_STEPS = 30  # points of a straight line: with fewer the figure would mark each


def chart_of(finding: Finding) -> Chart | None:
    """Describe the picture of a finding, or return None where numbers say it all."""
    panels = list(_panels(finding))
    if not panels:
        return None
    title = f"{finding.check} at {layer_label(finding)}"
    return Chart(name=finding.check, title=title, panels=panels, text=f"{title}: {finding.summary}.")


def chart_of_network(rows: Sequence[LayerRow]) -> Chart | None:
    """Describe the picture of the whole network: how far each layer's statistics are from the data's, in its order.

    Returns:
        None where nothing was measured.
    """
    placed = [(place, row) for place, row in enumerate(rows, 1) if isinstance(row.numbers.get("z"), float)]
    if not placed:
        return None
    means = {place: float(row.numbers["z"] or 0) for place, row in placed}
    variances = {place: 2.0 ** float(row.numbers.get("log2_ratio") or 0) for place, row in placed}
    distance = {p: max(means[p] / DRIFT_Z, math.log2(variances[p]) / DRIFT_LOG_RATIO) for p, _ in placed}
    worst = max(distance, key=lambda place: distance[place])
    name = next(row.name for place, row in placed if place == worst) or "the model itself"
    off = sum(far > 1 for far in distance.values())
    titles = ("Means: standard deviations off", "Variances: times too small or large")
    limits = (DRIFT_Z, 2.0**DRIFT_LOG_RATIO)
    panels = [
        _network_panel(title, values, limit, worst if off else 0, name, len(rows))
        for title, values, limit in zip(titles, (means, variances), limits, strict=True)
    ]
    text = (
        f"How far the statistics of {len(placed)} layers are from those of the data, in the order in which the data "
        f"reach them: {off} are past a limit; the worst is {name}, its mean {means[worst]:.3g} standard deviations off "
        f"and its variance by a factor of {variances[worst]:.3g} (99th percentiles of its channels)."
    )
    return Chart(name="network", title="The whole network", panels=panels, text=text)


def _network_panel(title: str, values: Mapping[int, float], limit: float, worst: int, name: str, count: int) -> Panel:
    groups = (
        ("as the data", 1, [place for place in values if values[place] <= limit and place != worst]),
        ("past the limit", 4, [place for place in values if values[place] > limit and place != worst]),
        (f"the worst: {name}", 0, [worst] if worst else []),
    )
    marks: list[Line | Points] = [
        Points(label=label, x=places, y=[values[place] for place in places], colour=colour)
        for label, colour, places in groups
        if places
    ]
    marks.append(_level("limit", 1, max(count, 2), limit))
    step = max(count // 6, 1)
    return Panel(
        title=title,
        x_label="layer, in the order of the forward",
        y_label="",
        marks=marks,
        log_y=max(values.values()) > 4 * limit,
        x_ticks=tuple(range(1, count + 1, step)),
    )


def _panels(finding: Finding) -> list[Panel]:
    if "population_mean" in finding.channels:
        return _running_against_true(finding)
    if finding.check in _BY_CHECK:
        return _BY_CHECK[finding.check](finding)
    return [
        _sorted_panel(name.replace("_", " "), values, None)
        for name, values in finding.channels.items()
        if len(values) > 1
    ]


def _running_against_true(finding: Finding) -> list[Panel]:
    """Two clouds beside the diagonal on which healthy channels lie."""
    values = finding.channels
    means = _cloud("Means", values["population_mean"], values["running_mean"])
    smallest = min((v for v in (*values["population_var"], *values["running_var"]) if v > 0), default=1.0)
    true = [max(v, smallest) for v in values["population_var"]]
    kept = [max(v, smallest) for v in values["running_var"]]
    low, high = min(*true, *kept), max(*true, *kept)
    factor = 2.0**DRIFT_LOG_RATIO
    line = [low * (high / low) ** (step / _STEPS) for step in range(_STEPS + 1)]
    diagonal = Line(
        label="equal, within a factor of 2", x=line, y=line, low=[v / factor for v in line],
        high=[v * factor for v in line], colour=5, dashed=True,
    )  # fmt: skip
    variances = Panel(
        title="Variances",
        x_label="variance of the data",
        y_label="running variance",
        marks=[diagonal, Points(label="channels", x=true, y=kept, colour=0)],
        log_x=True,
        log_y=True,
    )
    return [means, variances]


def _cloud(title: str, true: Sequence[float], kept: Sequence[float]) -> Panel:
    low, high = min(*true, *kept), max(*true, *kept)
    line = [low + (high - low) * step / _STEPS for step in range(_STEPS + 1)]
    diagonal = Line(label="equal", x=line, y=line, colour=5, dashed=True)
    points = Points(label="channels", x=true, y=kept, colour=0)
    return Panel(title=title, x_label="mean of the data", y_label="running mean", marks=[diagonal, points])


def _sorted_panel(name: str, values: Sequence[float], limit: tuple[str, float] | None, *, log_y: bool = False) -> Panel:
    """Values of all channels, largest first, with the limit of the rule."""
    ordered = sorted((v for v in values if v > 0 or not log_y), reverse=True)
    x = list(range(1, len(ordered) + 1))
    marks: list[Line | Points] = [Points(label="channels, largest first", x=x, y=ordered, colour=0)]
    if limit is not None and x:
        marks.append(_level(limit[0], 1, max(len(x), 2), limit[1]))
    return Panel(title=name.capitalize(), x_label="rank of the channel", y_label=name, marks=marks, log_y=log_y)


def _level(label: str, first: float, last: float, height: float) -> Line:
    """Describe a dashed horizontal line."""
    x = [first + (last - first) * step / _STEPS for step in range(_STEPS + 1)]
    return Line(label=label, x=x, y=[height] * len(x), colour=5, dashed=True)


def _dead(finding: Finding) -> list[Panel]:
    limit = EPS_FELT * float(finding.evidence["eps"])
    values = finding.channels.get("running_var", ())
    return [_sorted_panel("running variance", values, ("10 times eps", limit), log_y=True)] if len(values) > 1 else []


def _conditioning(finding: Finding) -> list[Panel]:
    values = finding.channels.get("mean_over_std", ())
    limit = ("all of a one-pass variance is rounding", CONDITION_LIMIT)
    return [_sorted_panel("mean over standard deviation", values, limit, log_y=True)] if len(values) > 1 else []


def _residue(finding: Finding) -> list[Panel]:
    momentum, updates = finding.evidence.get("momentum"), finding.evidence.get("updates")
    if not isinstance(momentum, float) or not isinstance(updates, int) or not 0 < momentum < 1:
        return []
    last = max(updates, 1)
    while (1 - momentum) ** last > RESIDUE_WARNING / 2:
        last = int(last * 1.3) + 1
    x = [last * step / 60 for step in range(61)]
    marks: list[Line | Points] = [
        Line(label=f"momentum {momentum:g}", x=x, y=[(1 - momentum) ** k for k in x], colour=1),
        Points(label="this layer", x=[updates], y=[(1 - momentum) ** updates], colour=0),
        _level("1 %", 0, last, RESIDUE_WARNING),
    ]
    return [
        Panel(title="What is left of the initial 0 and 1", x_label="updates", y_label="share", marks=marks, log_y=True)
    ]


def _few_values(finding: Finding) -> list[Panel]:
    values = [finding.evidence.get(name) for name in ("values", "last_values")]
    counts = [max(int(value), 2) for value in values if isinstance(value, int)]
    if not counts:
        return []
    last = max(64, 2 * max(counts))
    x = [2 * (last / 2) ** (step / 60) for step in range(61)]
    marks: list[Line | Points] = [
        Line(label="one batch", x=x, y=[_chance(n) for n in x], colour=1),
        Points(label="this layer", x=counts, y=[_chance(n) for n in counts], colour=0),
        Line(label=f"{VALUES_SMALL} values", x=[VALUES_SMALL] * 2, y=[_chance(last), 1.5], colour=5, dashed=True),
    ]
    return [
        Panel(title="Chance in the variance of a batch", x_label="values per channel", y_label="relative error",
              marks=marks, log_x=True, log_y=True)
    ]  # fmt: skip


def _chance(count: float) -> float:
    """Return the relative error of a variance of so many values."""
    return float((2 / (count - 1)) ** 0.5)


def _counts(finding: Finding) -> list[Panel]:
    usual, updates = finding.evidence.get("usual"), finding.evidence.get("updates")
    if not isinstance(usual, int) or not isinstance(updates, int):
        return []
    bars = Bars(label="", categories=["most layers", "this layer"], heights=[usual, updates], colour=1)
    return [Panel(title="Updates", x_label="", y_label="num_batches_tracked", marks=[bars])]


def _bad_channels(finding: Finding) -> list[Panel]:
    named = {
        key.removesuffix("_channels"): len(value) for key, value in finding.evidence.items() if isinstance(value, list)
    }
    bars = Bars(label="", categories=list(named), heights=list(named.values()), colour=0)
    return [Panel(title="Channels that are not finite, or negative", x_label="", y_label="channels", marks=[bars])]


def _company(finding: Finding) -> list[Panel]:
    values = finding.channels.get("layer_differences", ())
    if not values:
        return []
    x = list(range(1, len(values) + 1))
    points = Points(label="layers in the order of the model", x=x, y=[max(v, 1e-9) for v in values], colour=0)
    limit = _level("allowed", 1, max(len(x), 2), float(finding.evidence["limit"]))
    title = "Change of a layer's output with the batch"
    return [Panel(title=title, x_label="layer", y_label="relative difference", marks=[points, limit], log_y=True)]


_BY_CHECK: dict[str, Callable[[Finding], list[Panel]]] = {
    "dead-channel": _dead,
    "precision": _conditioning,
    "ema-window": _residue,
    "effective-n": _few_values,
    "update-count": _counts,
    "nonfinite": _bad_channels,
    "batch-dependence": _company,
}
