"""Two folders of results beside each other: each claim's effects and verdicts, and what changed between them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from .ledger import Entry, read_ledger
from .record import differing
from .verdicts import Outcome, Part

__all__ = ["Comparison", "PartComparison", "compare"]


@dataclass(frozen=True, kw_only=True)
class PartComparison:
    """One rule in both folders.

    Attributes:
        effect: what is measured, in words.
        unit: the effect's unit.
        first: the rule applied to the first folder.
        second: the rule applied to the second folder.
    """

    effect: str
    unit: str
    first: Part
    second: Part

    @property
    def difference(self) -> float | None:
        """The second effect minus the first; ``None`` where one of them is no number."""
        if self.first.effect is None or self.second.effect is None:
            return None
        return self.second.effect - self.first.effect


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One claim in both folders.

    Attributes:
        claim: the claim's id.
        title: the claim in a few words.
        verdicts: the verdict of the first and of the second folder.
        settings: what the two runs were made with where it differs, by name: the first's and the second's.
        parts: the claim's rules, the headline first.
    """

    claim: str
    title: str
    verdicts: tuple[Outcome, Outcome]
    settings: Mapping[str, tuple[Any, Any]]
    parts: tuple[PartComparison, ...]

    def record(self) -> dict[str, Any]:
        """Return the comparison as JSON holds it."""
        parts = []
        for part in self.parts:
            sides = {name: asdict(side) for name, side in (("first", part.first), ("second", part.second))}
            for side in sides.values():
                del side["rule"]
            parts.append(
                {"effect": part.effect, "unit": part.unit, "difference": part.difference, **sides}
            )  # fmt: skip
        return {
            "claim": self.claim,
            "verdicts": list(self.verdicts),
            "settings": {name: list(values) for name, values in self.settings.items()},
            "parts": parts,
        }


def compare(first: Path, second: Path) -> tuple[Comparison, ...]:
    """Put the claims that both folders hold beside each other.

    Other settings, versions and machines are what one compares, and are named; other data or another rule make the
    effects two different numbers, and are refused.

    Raises:
        ArgumentError: a folder holds no run, they have no claim in common, or a claim's data or rule differ.
        ResultsError: a folder is damaged.
    """
    ours, theirs = ({entry.claim.id: entry for entry in read_ledger(folder)} for folder in (first, second))
    common = [claim for claim in ours if claim in theirs]
    if not common:
        raise ArgumentError(
            f"nothing to compare: {first} holds {', '.join(ours)}; {second} holds {', '.join(theirs)}; expected a "
            "claim that both hold"
        )
    return tuple(_compared(ours[claim], theirs[claim], first, second) for claim in common)


def _compared(ours: Entry, theirs: Entry, first: Path, second: Path) -> Comparison:
    claim = ours.claim
    settings = differing(ours.record, theirs.record)
    for name in ("data", "data files (SHA-256)"):
        if name in settings:
            here, there = settings[name]
            raise ArgumentError(
                f"{claim.id} cannot be compared: {name} {here} in {first}, {there} in {second}; compare runs on the "
                "same data"
            )
    mine, other = (entry.verdict.parts for entry in (ours, theirs))
    if [part.rule for part in mine] != [part.rule for part in other]:
        raise ArgumentError(
            f"{claim.id} cannot be compared: its effects are '{mine[0].rule.effect}' in {first} and "
            f"'{other[0].rule.effect}' in {second}; compare runs of the same norms"
        )
    return Comparison(
        claim=claim.id,
        title=claim.title,
        verdicts=(ours.verdict.verdict, theirs.verdict.verdict),
        settings=settings,
        parts=tuple(
            PartComparison(effect=a.rule.effect, unit=a.rule.unit, first=a, second=b)
            for a, b in zip(mine, other, strict=True)
        ),
    )
