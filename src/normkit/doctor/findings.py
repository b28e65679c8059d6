"""What the doctor says: a finding per fault, and the diagnosis that holds them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .. import renderers

__all__ = ["SEVERITIES", "Diagnosis", "Finding", "Gap", "LayerRow", "Severity"]

Severity = Literal["error", "warning", "info"]

# Worst first. An error: numbers are or will be wrong. A warning: usually wrong. An info: worth knowing.
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")


@dataclass(frozen=True, kw_only=True, repr=False)
class Finding:
    """One fault with its numbers and the way out: of one layer, or of many layers with one cause.

    Attributes:
        check: the id of the check, such as ``"drift"``.
        layer: the layer's path in the model; ``""`` is the model as a whole. Of several layers it is the worst, whose
            numbers the evidence holds.
        severity: ``"error"`` (numbers are or will be wrong), ``"warning"`` (usually wrong) or ``"info"``.
        summary: the fault in one sentence.
        evidence: the numbers it rests on.
        causes: what may have led to it, the likeliest first.
        remedy: the call that cures it, as you would type it.
        proof: an expression that is true once it is cured.
        channels: values per channel, for a picture.
        layers: the paths of all layers that have the fault, in the model's order.
        layer_class: the class of the layer.
        extent: how bad it is, to find the worst of several layers with one cause.
        explains: the share of the gap between training and evaluation that goes with it, where that was measured.
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
    layers: tuple[str, ...] = ()
    layer_class: str = ""
    extent: float = 0.0
    explains: float | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            object.__setattr__(self, "layers", (self.layer,))

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as plain values that strict JSON can hold."""
        told = {name: value for name, value in vars(self).items() if name != "extent"}
        told["channels"] = {name: [float(f"{value:.5g}") for value in values] for name, values in self.channels.items()}
        plain: dict[str, Any] = _plain(told)
        return plain

    def __str__(self) -> str:
        """Return the finding as text for a terminal: what, where, the numbers, the cure."""
        return renderers.render("finding as text", self)

    def __repr__(self) -> str:
        """Return the finding in one line."""
        return f"<{renderers.render('finding as a line', self)}>"


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One line of the table of layers.

    Attributes:
        name: the layer's path.
        kind: its kind, such as ``"batch"``.
        channels: the number of channels, where it is known.
        layer_class: its class, such as ``"BatchNorm2d"``; empty for a file of weights.
        numbers: what was measured of it; the keys are the same for all layers that have them.
        worst: the severity of its worst finding, or None.
        examined: whether anything was: of a layer that cannot be read nothing is, unless a finding says otherwise.
        measured: whether a batch reached it.
    """

    name: str
    kind: str
    channels: int | None
    numbers: Mapping[str, float | int | str | bool | None]
    worst: Severity | None
    layer_class: str = ""
    examined: bool = True
    measured: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain values that strict JSON can hold."""
        plain: dict[str, Any] = _plain(vars(self))
        return plain


@dataclass(frozen=True, kw_only=True)
class Gap:
    """What the stored statistics cost, measured with labels: the share of samples that are classified rightly.

    Attributes:
        evaluation: as the model evaluates now.
        training: with the statistics of each batch, as training has it.
        samples: how many were judged.
    """

    evaluation: float
    training: float
    samples: int


@dataclass(frozen=True, kw_only=True, repr=False)
class Diagnosis:
    """What :func:`normkit.diagnose` found.

    Attributes:
        findings: the worst first. One cause in more than three layers is one finding.
        layers: one row per normalization layer, in the order in which the batches reach them, else in the model's.
        waived: findings that ``waive=`` set aside, each with the reason given.
        notes: what could not be examined, and why.
        samples: how many samples the statistics were measured on.
        gap: accuracy in evaluation and with the batch's statistics, where labels were given.
    """

    findings: tuple[Finding, ...]
    layers: tuple[LayerRow, ...]
    waived: tuple[tuple[Finding, str], ...] = ()
    notes: tuple[str, ...] = ()
    samples: int = 0
    gap: Gap | None = None

    def of(self, check: str, layer: str | Sequence[str] | None = None) -> tuple[Finding, ...]:
        """Return the errors and warnings of one check; where layers are named, those that concern one of them."""
        named = None if layer is None else {layer} if isinstance(layer, str) else set(layer)
        return tuple(
            finding
            for finding in self.findings
            if finding.check == check
            and finding.severity != "info"
            and (named is None or not named.isdisjoint(finding.layers))
        )

    def count(self, severity: Severity) -> int:
        """Return how many findings have this severity."""
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def healthy(self) -> bool:
        """Whether layers were examined and there is neither an error nor a warning."""
        examined = any(row.examined for row in self.layers)
        return examined and self.count("error") == self.count("warning") == 0

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as plain values that strict JSON can hold: NaN and infinities become strings."""
        return {
            "healthy": self.healthy,
            "samples": self.samples,
            "findings": [finding.to_dict() for finding in self.findings],
            "layers": [row.to_dict() for row in self.layers],
            "waived": [{"finding": finding.to_dict(), "reason": reason} for finding, reason in self.waived],
            "notes": list(self.notes),
            "gap": None if self.gap is None else _plain(vars(self.gap)),
        }

    def to_html(self, title: str = "Diagnosis") -> str:
        """Return the diagnosis as one self-contained page; it needs the extra ``lab`` for pictures and template."""
        return renderers.render("diagnosis as a page", self, title)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: a table of the findings."""
        return renderers.render("diagnosis as a table", self)

    def __str__(self) -> str:
        """Return the diagnosis as text for a terminal."""
        return renderers.render("diagnosis as text", self)

    def __repr__(self) -> str:
        """Return the diagnosis in one line."""
        return f"<{renderers.render('diagnosis as a line', self)}>"


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
