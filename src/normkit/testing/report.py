"""What the conformance kit found: one finding per deviation, in words."""

from dataclasses import dataclass, field

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


@dataclass(frozen=True, kw_only=True)
class Report:
    """All findings on one layer.

    Attributes:
        layer: the layer, as it prints.
        method: the catalog's name of the method it was held to.
        findings: what deviates, in the order of the checks.
        passed: the checks without a finding.
        skipped: the checks that do not apply, with the reason.
    """

    layer: str
    method: str
    findings: tuple[Finding, ...]
    passed: tuple[str, ...]
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def conforms(self) -> bool:
        """Tell whether nothing deviates."""
        return not self.findings

    @property
    def conventions(self) -> tuple[str, ...]:
        """Return the conventions and faults that were recognised."""
        return tuple(finding.convention for finding in self.findings if finding.convention)

    def __str__(self) -> str:
        ran = len(self.passed) + len({finding.check for finding in self.findings})
        head = f"{self.layer} as {self.method}: {len(self.findings)} findings in {ran} checks"
        skipped = [f"  skipped {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join([head, *(f"  {finding}" for finding in self.findings), *skipped])
