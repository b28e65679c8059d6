"""Two folders of results beside each other: each claim's effects and verdicts, and what changed between them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArgumentError
from .ledger import Entry, read_ledger
from .record import differing
from .verdicts import Answer, Outcome

__all__ = ["AnswerComparison", "Comparison", "compare"]


@dataclass(frozen=True, kw_only=True)
class AnswerComparison:
    """One rule in both folders.

    Attributes:
        effect: what is measured, in words.
        unit: the effect's unit.
        first: the rule applied to the first folder.
        second: the rule applied to the second folder.
    """

    effect: str
    unit: str
    first: Answer
    second: Answer

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
        parts: the claim's rules, the one that decides first.
        rows: what rows of the same cell differ in though they should not, in words; empty where they agree.
    """

    claim: str
    title: str
    verdicts: tuple[Outcome, Outcome]
    settings: Mapping[str, tuple[Any, Any]]
    parts: tuple[AnswerComparison, ...]
    rows: str = ""

    def record(self) -> dict[str, Any]:
        """Return the comparison as JSON holds it."""
        parts = []
        for part in self.parts:
            sides = {
                name: {**side.record(), "outcome": side.outcome}
                for name, side in (("first", part.first), ("second", part.second))
            }
            parts.append(
                {"effect": part.effect, "unit": part.unit, "difference": part.difference, **sides}
            )  # fmt: skip
        return {
            "claim": self.claim,
            "verdicts": list(self.verdicts),
            "settings": {name: list(values) for name, values in self.settings.items()},
            "parts": parts,
            "rows": self.rows,
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
    mine, other = ((entry.verdict.primary, *entry.verdict.details) for entry in (ours, theirs))
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
            AnswerComparison(effect=a.rule.effect, unit=a.rule.unit, first=a, second=b)
            for a, b in zip(mine, other, strict=True)
        ),
        rows="" if settings.keys() - {"seeds"} else _differing_rows(ours, theirs),
    )


# What two runs with the same settings may differ in: where and when, not what came out.
CIRCUMSTANCES = frozenset({"machine", "commit"})


def _differing_rows(ours: Entry, theirs: Entry) -> str:
    """Say which cells of two runs with the same settings, versions and machine hold other numbers."""
    sides = []
    for entry in (ours, theirs):
        cells: dict[str, list[dict[str, Any]]] = {}
        for row in entry.rows:
            cells.setdefault(row["cell"], []).append({k: v for k, v in row.items() if k not in CIRCUMSTANCES})
        sides.append(cells)
    first, second = sides
    other = [cell for cell in first if cell in second and first[cell] != second[cell]]
    if not other:
        return ""
    return f"{len(other)} of {len(first)} cells hold other numbers though nothing that they hang on differs: {other[0]}"
