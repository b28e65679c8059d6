"""What the conformance kit found: one finding per deviation, in words."""

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Finding", "Report"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One deviation from the contract.

    Attributes:
        check: the name of the check.
        problem: what is wrong, with numbers.
        convention: which convention or fault the numbers fit, or an empty string.
    """

    check: str
    problem: str
    convention: str = ""

    def __str__(self) -> str:
        return f"{self.check}: {self.problem}" + (f" It {self.convention}." if self.convention else "")


@dataclass(frozen=True, kw_only=True, repr=False)
class Report:
    """All findings on one layer.

    Attributes:
        layer: the layer, as it prints.
        method: the catalog's name of the method it was held to.
        findings: what deviates, in the order of the checks.
        passed_checks: the checks without a finding. Whether the layer conforms is ``conforms``.
        skipped: the checks that do not apply, with the reason.
    """

    layer: str
    method: str
    findings: tuple[Finding, ...]
    passed_checks: tuple[str, ...]
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def conforms(self) -> bool:
        """Tell whether nothing deviates."""
        return not self.findings

    @property
    def conventions(self) -> tuple[str, ...]:
        """Return the conventions and faults that were recognised."""
        return tuple(finding.convention for finding in self.findings if finding.convention)

    def __getattr__(self, name: str) -> Any:
        """Say what became of the name that read like a verdict."""
        if name == "passed":
            said = "a Report has no `passed`: `conforms` is the verdict, `passed_checks` are those without a finding"
        else:
            said = f"{type(self).__name__!r} object has no attribute {name!r}"
        raise AttributeError(said, name=name, obj=self)

    def __repr__(self) -> str:
        """Return the outcome in one line."""
        return f"<Report: {self._headline()}>"

    def _headline(self) -> str:
        found = len(self.findings)
        ran = len(self.passed_checks) + len({finding.check for finding in self.findings})
        return f"{self.layer} as {self.method}: {found} finding{'s' * (found != 1)} in {ran} checks"

    def __str__(self) -> str:
        head = self._headline()
        skipped = [f"  skipped {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join([head, *(f"  {finding}" for finding in self.findings), *skipped])
