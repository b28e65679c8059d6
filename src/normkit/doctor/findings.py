"""What the doctor says: a finding per fault, and the diagnosis that holds them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["SEVERITIES", "Diagnosis", "Finding", "LayerRow", "Severity"]

Severity = Literal["error", "warning", "info"]

# Worst first. An error: numbers are or will be wrong. A warning: usually wrong. An info: worth knowing.
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fault of one layer, with its numbers and the way out.

    Attributes:
        check: the id of the check, such as ``"drift"``.
        layer: the layer's path in the model; ``""`` is the model as a whole.
        severity: ``"error"`` (numbers are or will be wrong), ``"warning"`` (usually wrong) or ``"info"``.
        summary: the fault in one sentence.
        evidence: the numbers it rests on.
        causes: what may have led to it, the likeliest first.
        remedy: the call that cures it, as you would type it.
        proof: an expression that is true once it is cured.
        channels: values per channel, for a picture.
    """

    check: str
    layer: str
    severity: Severity
    summary: str
    evidence: Mapping[str, Any]
    causes: tuple[str, ...]
    remedy: str
    proof: str
    channels: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as plain values that strict JSON can hold."""
        plain: dict[str, Any] = _plain(vars(self))
        return plain


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One line of the table of layers.

    Attributes:
        name: the layer's path.
        kind: its kind, such as ``"batch"``.
        channels: the number of channels, where it is known.
        numbers: what was measured of it; the keys are the same for all layers that have them.
        worst: the severity of its worst finding, or None.
    """

    name: str
    kind: str
    channels: int | None
    numbers: Mapping[str, float | int | str | bool | None]
    worst: Severity | None

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain values that strict JSON can hold."""
        plain: dict[str, Any] = _plain(vars(self))
        return plain


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What :func:`normkit.diagnose` found.

    Attributes:
        findings: the worst first.
        layers: one row per normalization layer, in the model's order.
        waived: findings that ``waive=`` set aside, each with the reason given.
        notes: what could not be examined, and why.
        samples: how many samples the statistics were measured on.
    """

    findings: tuple[Finding, ...]
    layers: tuple[LayerRow, ...]
    waived: tuple[tuple[Finding, str], ...] = ()
    notes: tuple[str, ...] = ()
    samples: int = 0

    def of(self, check: str, layer: str | None = None) -> tuple[Finding, ...]:
        """Return the errors and warnings of one check, of one layer where it is named."""
        return tuple(
            finding
            for finding in self.findings
            if finding.check == check and finding.severity != "info" and layer in (None, finding.layer)
        )

    def count(self, severity: Severity) -> int:
        """Return how many findings have this severity."""
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def healthy(self) -> bool:
        """Whether there is neither an error nor a warning."""
        return self.count("error") == self.count("warning") == 0

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as plain values that strict JSON can hold: NaN and infinities become strings."""
        return {
            "healthy": self.healthy,
            "samples": self.samples,
            "findings": [finding.to_dict() for finding in self.findings],
            "layers": [row.to_dict() for row in self.layers],
            "waived": [{"finding": finding.to_dict(), "reason": reason} for finding, reason in self.waived],
            "notes": list(self.notes),
        }

    def to_html(self, title: str = "Diagnosis") -> str:
        """Return the diagnosis as one self-contained page; it needs the extra ``lab`` for pictures and template."""
        # The page is built above this room. It is asked for by name, late, so that nothing here hangs on it.
        from ..report.diagnosis import render_diagnosis

        return render_diagnosis(self, title)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: a table of the findings."""
        from .text import as_table

        return as_table(self)

    def __str__(self) -> str:
        """Return the diagnosis as text for a terminal."""
        from .text import as_text

        return as_text(self)


def sort_findings(findings: Iterable[Finding], checks: Sequence[str]) -> tuple[Finding, ...]:
    """Put the worst first; equal ones stay in the order of the checks and then of the layers."""
    return tuple(sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), checks.index(f.check))))


def worst(findings: Iterable[Finding]) -> Severity | None:
    """Return the worst severity among findings, or None where there are none."""
    present = {finding.severity for finding in findings}
    return next((severity for severity in SEVERITIES if severity in present), None)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
