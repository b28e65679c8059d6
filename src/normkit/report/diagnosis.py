"""A diagnosis as one self-contained page: worst first, a picture for each finding that has one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..doctor.findings import SEVERITIES, Diagnosis, Finding, LayerRow
from ..doctor.text import format_evidence, gap_in_words, headline, layer_label, share_in_words
from ..lab.charts import Chart
from .diagnosis_charts import chart_of, chart_of_network
from .figures import inline_panels

__all__ = ["render_diagnosis"]

_PICTURES = 6  # a page of a hundred pictures helps nobody
_DATA_BYTES = 150_000  # of the diagnosis as data; beyond it the numbers of single channels are left out


@dataclass(frozen=True, kw_only=True)
class Section:
    """One error or warning as the template takes it."""

    finding: Finding
    layer: str
    layers: tuple[str, ...]
    numbers: str
    explains: str
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
    network = chart_of_network(diagnosis.layers)
    return environment.get_template("diagnosis.html.j2").render(
        title=title,
        headline=headline(diagnosis),
        examined=bool(diagnosis.layers or diagnosis.findings),
        gap=gap_in_words(diagnosis),
        network=network,
        network_panels=_drawn(network),
        data=_data(diagnosis),
        diagnosis=diagnosis,
        sections=[_section(finding, index < _PICTURES) for index, finding in enumerate(severe)],
        infos=[_section(finding, False) for finding in diagnosis.findings if finding.severity == "info"],
        waived=[(_section(finding, False), reason) for finding, reason in diagnosis.waived],
        rows=[(row, [_cell(row.numbers.get(column)) for column in _columns(rows)]) for row in rows],
        columns=[column.replace("_", " ") for column in _columns(rows)],
    )


def _section(finding: Finding, with_picture: bool) -> Section:
    chart = chart_of(finding) if with_picture else None
    return Section(
        finding=finding,
        layer=layer_label(finding),
        layers=finding.layers if len(finding.layers) > 1 else (),
        numbers=format_evidence(finding.evidence),
        explains="" if finding.explains is None else share_in_words(finding.explains),
        chart=chart,
        panels=_drawn(chart),
    )


def _drawn(chart: Chart | None) -> tuple[Markup, ...]:
    # The only markup that is not escaped is what matplotlib drew, which escapes every word itself.
    return () if chart is None else tuple(Markup(panel) for panel in inline_panels(chart))  # noqa: S704


def _data(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return the diagnosis as plain values, without those of single channels where they would swell the page."""
    data = diagnosis.to_dict()
    if sum(len(values) for f in diagnosis.findings for values in f.channels.values()) * 8 > _DATA_BYTES:
        for finding in data["findings"]:
            finding["channels"] = {}
    return data


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
