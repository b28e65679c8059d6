"""A diagnosis as text, for a terminal and for ``print``: the worst first, never more than a screen or two."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from .. import renderers
from ..printable import printable
from .findings import SEVERITIES, Diagnosis, Finding, LayerRow

__all__ = [
    "as_table",
    "as_text",
    "finding_text",
    "format_evidence",
    "gap_in_words",
    "headline",
    "layer_label",
    "share_in_words",
]

_LISTED = 8  # entries of a list that are written out
_LINES = 56  # of a whole diagnosis


def as_text(diagnosis: Diagnosis) -> str:
    """Write the headline, errors and warnings in full while there is room, and a line for each of the rest."""
    lines = [headline(diagnosis), *gap_in_words(diagnosis)]
    # Where nothing was examined the headline has the first note.
    told_above = 0 if _examined(diagnosis) or diagnosis.findings else 1
    notes = [f"not examined: {note}" for note in diagnosis.notes[told_above:]]
    waived = [f"waived [{f.check}] {layer_label(f)}: {reason}" for f, reason in diagnosis.waived]
    tail = [*_few(waived, 6, "waived findings"), *_few(notes, 6, "notes")]
    severe = [finding for finding in diagnosis.findings if finding.severity != "info"]
    infos = [finding for finding in diagnosis.findings if finding.severity == "info"]
    room = _LINES - len(lines) - len(tail)
    told: set[object] = set()
    for index, finding in enumerate(severe):
        # Causes that were listed just above are not listed again.
        block = ["", *_block(finding, with_causes=(finding.check, finding.causes) not in told)]
        left = len(severe) - index - 1
        if len(block) + min(left, 8) > room:
            rest = [_line(other) for other in severe[index:]]
            lines += ["", *_few(rest, max(room - 2, 1), "errors and warnings")]
            room -= min(len(rest), max(room - 2, 1)) + 1
            break
        told.add((finding.check, finding.causes))
        lines += block
        room -= len(block)
    if infos and room > 1:
        lines += ["", *_few([_line(finding) for finding in infos], room - 1, "things worth knowing")]
    return "\n".join(printable(line, keep="") for line in [*lines, *tail])


def finding_text(finding: Finding) -> str:
    """Write one finding in full."""
    return "\n".join(printable(line, keep="") for line in _block(finding))


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
    rows = _examined(diagnosis)
    layers = len(rows)
    if not layers and not diagnosis.findings:
        return f"nothing was examined: {diagnosis.notes[0] if diagnosis.notes else 'no normalization layer was found'}"
    counts = [f"{diagnosis.count(s)} {s}{'s' * (diagnosis.count(s) != 1)}" for s in SEVERITIES[:2]]
    reached = sum(row.measured for row in rows)
    which = "" if reached == layers else f"{reached or 'none'} of them "
    seen = f", {which}measured on {diagnosis.samples} samples" if diagnosis.samples else ", without batches"
    verdict = "healthy" if diagnosis.healthy else " and ".join(counts)
    return f"{verdict}: {layers} normalization layer{'s' * (layers != 1)} examined{seen}"


def _examined(diagnosis: Diagnosis) -> list[LayerRow]:
    return [row for row in diagnosis.layers if row.examined]


def gap_in_words(diagnosis: Diagnosis) -> list[str]:
    """Say what the stored statistics cost, where labels were given: no line or one."""
    gap = diagnosis.gap
    if gap is None:
        return []
    return [
        f"accuracy {gap.evaluation:.1%} in evaluation, {gap.training:.1%} with the statistics of each batch, "
        f"on {gap.samples} samples"
    ]


def share_in_words(share: float) -> str:
    """Say how much of the gap a finding explains."""
    return f"{share:.0%} of the gap between evaluation and training" if share >= 0.005 else "nothing of the gap"


def layer_label(finding: Finding) -> str:
    """Name the layer of a finding, and its class, as prose does; of many the first ones."""
    if len(finding.layers) > 1:
        more = f" and {len(finding.layers) - 3} more" if len(finding.layers) > 3 else ""
        return f"{', '.join(finding.layers[:3])}{more}"
    named = finding.layer or ("the model itself" if finding.layer_class else "the model")
    return f"{named} ({finding.layer_class})" if finding.layer_class else named


def format_evidence(evidence: Mapping[str, Any]) -> str:
    """Write the numbers of a finding on one line."""
    return ", ".join(f"{name.replace('_', ' ')} {_value(value)}" for name, value in evidence.items())


def _line(finding: Finding) -> str:
    return f"{finding.severity} [{finding.check}] {layer_label(finding)}: {finding.summary}"


def _block(finding: Finding, *, with_causes: bool = True) -> Iterator[str]:
    yield _line(finding)
    if len(finding.layers) > 1:
        yield f"  layers   {_value(finding.layers)}"
    if finding.explains is not None:
        yield f"  explains {share_in_words(finding.explains)}"
    if finding.evidence:
        yield f"  numbers  {format_evidence(finding.evidence)}"
    for index, cause in enumerate(finding.causes if with_causes else ()):
        yield f"  {'causes' if index == 0 else '      '}   {index + 1}. {cause}"
    yield f"  cure     {_indented(finding.remedy)}"
    yield f"  proof    {_indented(finding.proof)}"


def _indented(code: str) -> str:
    return code.replace("\n", "\n           ")


def _few(lines: list[str], most: int, what: str) -> list[str]:
    """Return the lines, or the first ones and how many more there are."""
    if len(lines) <= most:
        return lines
    return [*lines[: most - 1], f"... and {len(lines) - most + 1} more {what}"]


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        shown = ", ".join(_value(entry) for entry in value[:_LISTED])
        return f"[{shown}{', ...' if len(value) > _LISTED else ''}]"
    return str(value)


renderers.register("diagnosis as text", as_text)
renderers.register("diagnosis as a table", as_table)
renderers.register("diagnosis as a line", lambda diagnosis: f"Diagnosis: {headline(diagnosis)}")
renderers.register("finding as text", finding_text)
renderers.register("finding as a line", lambda finding: f"Finding: {_line(finding)}")
