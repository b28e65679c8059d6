"""From numbers per seed to a verdict: the paired effect, its 95 % interval, and a rule fixed before the data.

A claim may have several parts, each with its own rule. It is supported when every part is, refuted when any part is,
and inconclusive otherwise.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from scipy.special import stdtrit

from ..errors import ArgumentError

__all__ = ["Outcome", "Part", "Rule", "Verdict", "combine", "judge", "judge_values"]

Outcome = Literal["supported", "refuted", "inconclusive"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A line that the whole interval must lie beyond, written down before the data were seen.

    Attributes:
        effect: what is measured, in words.
        unit: the effect's unit, as it stands behind a number.
        direction: the side of the threshold on which the claim holds.
        threshold: the line.
        predicted: the effect that the source's numbers give, where it gives any.
    """

    effect: str
    unit: str
    direction: Literal["above", "below"]
    threshold: float
    predicted: float | None = None

    @property
    def text(self) -> str:
        """The rule in one sentence."""
        other = "below" if self.direction == "above" else "above"
        return (
            f"{self.effect}: supported if its whole 95 % interval lies {self.direction} {self.threshold:g}, refuted "
            f"if it lies {other}, inconclusive otherwise."
        )


@dataclass(frozen=True, kw_only=True)
class Part:
    """One rule applied: the mean effect over seeds, its 95 % interval and what follows."""

    rule: Rule
    verdict: Outcome
    effect: float | None
    low: float | None
    high: float | None
    seeds: int
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The verdict on a claim. The first part is the headline: its effect and interval stand for the claim."""

    verdict: Outcome
    compared: str
    parts: tuple[Part, ...]

    @property
    def headline(self) -> Part:
        """The part whose effect stands for the claim."""
        return self.parts[0]

    def record(self) -> dict[str, Any]:
        """Return what ``verdicts.json`` holds."""
        head = self.headline
        return {
            "verdict": self.verdict,
            "effect": head.effect,
            "low": head.low,
            "high": head.high,
            "seeds": head.seeds,
            "rule": " And: ".join(part.rule.text for part in self.parts),
            "unit": head.rule.unit,
            "predicted": head.rule.predicted,
            "compared": self.compared,
            "parts": [{**asdict(part), "rule": part.rule.text} for part in self.parts],
        }


def judge(rule: Rule, candidate: Mapping[int, float], baseline: Mapping[int, float]) -> Part:
    """Apply a rule to the differences candidate minus baseline, paired by seed.

    The interval is Student's, ``mean ± t(0.975, n - 1) · s / sqrt(n)`` over the n differences. It needs two pairs of
    finite numbers; with fewer the part is inconclusive, and a note says why.

    Args:
        rule: the line to be beyond.
        candidate: one number per seed.
        baseline: one number per seed; seeds that only one side has are left out.

    >>> rule = Rule(effect="gain", unit="", direction="above", threshold=0.0)
    >>> judge(rule, {0: 2.0, 1: 3.0, 2: 4.0}, {0: 1.0, 1: 1.5, 2: 3.0}).verdict
    'supported'
    """
    seeds = sorted(candidate.keys() & baseline.keys())
    differences = [candidate[seed] - baseline[seed] for seed in seeds]
    finite = [difference for difference in differences if math.isfinite(difference)]
    note = ""
    if len(finite) < len(differences):
        note = f"{len(differences) - len(finite)} of {len(differences)} seeds gave no finite number"
    elif len(differences) < 2:
        note = f"an interval needs two seeds or more; {len(differences)} measured"
    mean = math.fsum(finite) / len(finite) if finite else None
    if note or mean is None:
        return Part(
            rule=rule, verdict="inconclusive", effect=mean, low=None, high=None, seeds=len(differences), note=note
        )
    low, high = _interval(finite, mean)
    return Part(rule=rule, verdict=_side(rule, low, high), effect=mean, low=low, high=high, seeds=len(finite))


def judge_values(rule: Rule, values: Mapping[int, float]) -> Part:
    """Apply a rule to the values themselves, one per seed, where the rule speaks of no difference.

    >>> rule = Rule(effect="deviation", unit="", direction="below", threshold=0.1)
    >>> judge_values(rule, {0: 0.2, 1: 0.3, 2: 0.4}).verdict
    'inconclusive'
    """
    return judge(rule, values, dict.fromkeys(values, 0.0))


def combine(parts: Sequence[Part], compared: str) -> Verdict:
    """Join the parts of a claim into its verdict.

    Raises:
        ArgumentError: there are no parts.
    """
    if not parts:
        raise ArgumentError("a verdict needs at least one part")
    outcomes = {part.verdict for part in parts}
    verdict: Outcome = "inconclusive"
    if "refuted" in outcomes:
        verdict = "refuted"
    elif outcomes == {"supported"}:
        verdict = "supported"
    return Verdict(verdict=verdict, compared=compared, parts=tuple(parts))


def _interval(differences: Sequence[float], mean: float) -> tuple[float, float]:
    """Return Student's 95 % interval of the mean; no spread gives an interval of no width."""
    count = len(differences)
    variance = math.fsum((difference - mean) ** 2 for difference in differences) / (count - 1)
    half = float(stdtrit(count - 1, 0.975)) * math.sqrt(variance / count)
    return mean - half, mean + half


def _side(rule: Rule, low: float, high: float) -> Outcome:
    """Return on which side of the rule's line the whole interval lies."""
    above, below = low > rule.threshold, high < rule.threshold
    if rule.direction == "below":
        above, below = below, above
    return "supported" if above else "refuted" if below else "inconclusive"
