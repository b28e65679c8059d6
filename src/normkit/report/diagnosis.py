"""A diagnosis as one self-contained page: worst first, a picture for each finding that has one."""

from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..doctor.findings import SEVERITIES, Diagnosis, Finding, LayerRow
from ..doctor.text import format_evidence, headline, layer_label
from ..lab.charts import Chart
from .diagnosis_charts import chart_of
from .figures import inline_panels

__all__ = ["render_diagnosis"]

_PICTURES = 24  # a page of a hundred pictures helps nobody


@dataclass(frozen=True, kw_only=True)
class Section:
    """One error or warning as the template takes it."""

    finding: Finding
    layer: str
    numbers: str
    chart: Chart | None
    panels: tuple[Markup, ...]


def render_diagnosis(diagnosis: Diagnosis, title: str = "Diagnosis") -> str:
    """Return the page. Layer names, numbers and everything else that comes from a model or a file are escaped."""
    environment = Environment(
        loader=PackageLoader("normkit.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    severe = [finding for finding in diagnosis.findings if finding.severity != "info"]
    rows = sorted(diagnosis.layers, key=_rank)
    return environment.get_template("diagnosis.html.j2").render(
        title=title,
        headline=headline(diagnosis),
        diagnosis=diagnosis,
        sections=[_section(finding, index < _PICTURES) for index, finding in enumerate(severe)],
        infos=[_section(finding, False) for finding in diagnosis.findings if finding.severity == "info"],
        waived=[(_section(finding, False), reason) for finding, reason in diagnosis.waived],
        rows=[(row, [_cell(row.numbers.get(column)) for column in _columns(rows)]) for row in rows],
        columns=[column.replace("_", " ") for column in _columns(rows)],
    )


def _section(finding: Finding, with_picture: bool) -> Section:
    chart = chart_of(finding) if with_picture else None
    # The only markup that is not escaped is what matplotlib drew, which escapes every word itself.
    panels = () if chart is None else tuple(Markup(panel) for panel in inline_panels(chart))  # noqa: S704
    return Section(
        finding=finding,
        layer=layer_label(finding),
        numbers=format_evidence(finding.evidence),
        chart=chart,
        panels=panels,
    )


def _rank(row: LayerRow) -> int:
    return SEVERITIES.index(row.worst) if row.worst is not None else len(SEVERITIES)


def _columns(rows: Sequence[LayerRow]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.numbers))


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
