"""A diagnosis as text, for a terminal and for ``print``."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from ..printable import printable
from .findings import SEVERITIES, Diagnosis, Finding

__all__ = ["as_table", "as_text", "format_evidence", "headline", "layer_label"]

_LISTED = 8  # entries of a list that are written out


def as_text(diagnosis: Diagnosis) -> str:
    """Write the headline, every error and warning in full, and a line for each of the rest."""
    return "\n".join(printable(line, keep="") for line in _lines(diagnosis))


def as_table(diagnosis: Diagnosis) -> str:
    """Write the headline and a table of the findings in HTML, every word escaped."""
    cells = [
        (f.severity, f.check, layer_label(f), f.summary, f.remedy if f.severity != "info" else "")
        for f in diagnosis.findings
    ]
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in cells)
    header = "".join(f"<th>{name}</th>" for name in ("severity", "check", "layer", "finding", "cure"))
    table = f"<table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table>" if cells else ""
    return f"<p>{escape(headline(diagnosis))}</p>{table}"


def headline(diagnosis: Diagnosis) -> str:
    """Say in one line how many layers were examined and what was found."""
    layers = len(diagnosis.layers)
    counts = [f"{diagnosis.count(s)} {s}{'s' * (diagnosis.count(s) != 1)}" for s in SEVERITIES[:2]]
    seen = f", measured on {diagnosis.samples} samples" if diagnosis.samples else ", without batches"
    verdict = "healthy" if diagnosis.healthy else " and ".join(counts)
    return f"{verdict}: {layers} normalization layer{'s' * (layers != 1)} examined{seen}"


def layer_label(finding: Finding) -> str:
    """Name the layer of a finding as prose does."""
    return finding.layer or "the model"


def format_evidence(evidence: Mapping[str, Any]) -> str:
    """Write the numbers of a finding on one line."""
    return ", ".join(f"{name.replace('_', ' ')} {_value(value)}" for name, value in evidence.items())


def _lines(diagnosis: Diagnosis) -> Iterator[str]:
    yield headline(diagnosis)
    for finding in diagnosis.findings:
        yield ""
        yield f"{finding.severity} [{finding.check}] {layer_label(finding)}: {finding.summary}"
        if finding.evidence:
            yield f"  numbers  {format_evidence(finding.evidence)}"
        if finding.severity == "info":
            continue
        for index, cause in enumerate(finding.causes):
            yield f"  {'causes' if index == 0 else '      '}   {index + 1}. {cause}"
        yield f"  cure     {finding.remedy}"
        yield f"  proof    {finding.proof}"
    for finding, reason in diagnosis.waived:
        yield ""
        yield f"waived [{finding.check}] {layer_label(finding)}: {reason}"
    for note in diagnosis.notes:
        yield f"not examined: {note}"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        shown = ", ".join(_value(entry) for entry in value[:_LISTED])
        return f"[{shown}{', ...' if len(value) > _LISTED else ''}]"
    return str(value)
