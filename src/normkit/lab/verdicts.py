"""What a verdict is: one question, asked by the claim's title, decides; everything else is shown beside it.

A claim's *rule* names one effect, a line, the side of the line on which the claim holds, and often a band within which
no difference is worth having, all before the data are seen. The verdict is

- *not testable here* where a *premise* is not shown: the nets did not learn, or what the claim calls superfluous did
  not help in the first place;
- *no difference worth having* where the whole interval lies inside the band;
- *supported* or *refuted* where it lies wholly on one side of the line;
- *inconclusive* otherwise, and wherever an interval has no width: a spread of nothing is no measurement of one.

*Details* are judged by rules of the same form and never change the verdict. Whether a source's number *comes out* is
said apart from it. Seeds are looked at when `sequential` allows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal

from ..errors import ArgumentError
from .intervals import seeds_needed, share_interval, student_interval
from .sequential import LEVEL, looks_within

__all__ = [
    "OUTCOMES", "Answer", "Evidence", "Look", "Outcome", "Premise", "Reproduced", "Rule", "Verdict", "conclude",
    "paired",
    "shares", "single",
]  # fmt: skip

Outcome = Literal["supported", "refuted", "no difference worth having", "inconclusive", "not testable here"]
OUTCOMES: tuple[Outcome, ...] = (
    "supported", "refuted", "no difference worth having", "inconclusive", "not testable here",
)  # fmt: skip
Kind = Literal["t", "share", "sign"]
# Numbers that agree to so many parts of themselves are the same number.
ROUNDING = 1e-13
DECIDED = ("supported", "refuted", "no difference worth having")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A question, and the line that the whole interval must lie beyond; written down before the data were seen.

    Attributes:
        effect: what is measured, in words.
        unit: the effect's unit, as it stands behind a number.
        direction: the side of the line on which the claim holds.
        line: the line.
        band: within these ends no difference is worth having; ``None`` where every difference counts.
        kind: ``"t"`` for a mean over seeds; ``"share"`` for the share of seeds in which something happens; ``"sign"``
            for the share of seeds that are ahead, among those in which the sides differ (the paired sign test).
    """

    effect: str
    unit: str
    direction: Literal["above", "below"]
    line: float
    band: tuple[float, float] | None = None
    kind: Kind = "t"

    def __post_init__(self) -> None:
        """Refuse a band that does not hold the line: it would call the claim's own success no difference."""
        if self.band is not None and not self.band[0] <= self.line <= self.band[1]:
            raise ArgumentError(f"the band {self.band} of '{self.effect}' does not hold its line, {self.line:g}")

    @property
    def text(self) -> str:
        """The rule in one sentence."""
        other = "below" if self.direction == "above" else "above"
        words = {"t": "interval", "share": "exact interval", "sign": "exact interval of the sign test"}[self.kind]
        within = f"no difference worth having inside {self.band[0]:g} to {self.band[1]:g}, " if self.band else ""
        return (
            f"{self.effect}: {within}supported if its whole {words} lies {self.direction} {self.line:g}, refuted if it "
            f"lies {other}, inconclusive otherwise."
        )


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A rule with the numbers that it is applied to, one per seed: differences, values, or 1 and 0 for yes and no."""

    rule: Rule
    values: Mapping[int, float]

    def answer(self, seeds: Sequence[int], level: float) -> "Answer":
        """Apply the rule to these seeds; what they lack is left out, and what is not finite leaves no interval."""
        values = [self.values[seed] for seed in seeds if seed in self.values]
        finite = [value for value in values if math.isfinite(value)]
        if len(finite) < len(values):
            effect = math.fsum(finite) / len(finite) if finite else None
            note = f"{len(values) - len(finite)} of {len(values)} seeds gave no finite number"
            return Answer(rule=self.rule, outcome="inconclusive", effect=effect, seeds=len(values), note=note)
        return _of_mean(self.rule, values, level) if self.rule.kind == "t" else _of_share(self.rule, values, level)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A rule applied: the effect over seeds, its interval and what follows.

    Attributes:
        rule: the rule.
        outcome: one of the words of a verdict.
        effect: mean or share; ``None`` where there is none.
        low: the interval's lower end.
        high: its upper end.
        seeds: how many seeds are counted.
        note: why there is no interval, or why it decides nothing.
    """

    rule: Rule
    outcome: Outcome
    effect: float | None
    low: float | None = None
    high: float | None = None
    seeds: int
    note: str = ""

    def record(self) -> dict[str, Any]:
        """Return what ``verdicts.json`` holds."""
        rule = self.rule
        return {
            "effect": self.effect,
            "low": self.low,
            "high": self.high,
            "line": rule.line,
            "direction": rule.direction,
            "band": None if rule.band is None else list(rule.band),
            "seeds": self.seeds,
            "kind": rule.kind,
            "what": rule.effect,
            "unit": rule.unit,
            "note": self.note,
        }


@dataclass(frozen=True, kw_only=True)
class Premise:
    """What must be so before the question means anything.

    Attributes:
        evidence: a rule and its numbers; it is shown where the rule is *supported*.
    """

    evidence: Evidence

    def state(self, seeds: Sequence[int], level: float) -> tuple[Answer, bool, bool]:
        """Return the answer, whether the premise is shown, and whether it is shown to fail.

        A premise may rest on numbers without a spread: all nets may have learnt everything.
        """
        answer = self.evidence.answer(seeds, level)
        low, high = answer.low, answer.high
        if low is None or high is None:
            return answer, False, False
        above, below = low > answer.rule.line, high < answer.rule.line
        return (answer, above, below) if answer.rule.direction == "above" else (answer, below, above)


@dataclass(frozen=True, kw_only=True)
class Reproduced:
    """A source's number beside ours.

    Attributes:
        what: the number, in words.
        source: the source's.
        ours: ours, mean over seeds; ``None`` where the source's data were not run.
        within: how far apart they may be to count as the same, said beforehand.
    """

    what: str
    source: float
    ours: float | None
    within: float

    @property
    def holds(self) -> bool | None:
        """Whether the number comes out; ``None`` where it was not measured."""
        if self.ours is None or not math.isfinite(self.ours):
            return None
        return abs(self.ours - self.source) <= self.within

    def record(self) -> dict[str, Any]:
        """Return what ``verdicts.json`` holds."""
        ours = self.ours if self.holds is not None else None
        return {"what": self.what, "source": self.source, "ours": ours, "within": self.within, "holds": self.holds}


@dataclass(frozen=True, kw_only=True)
class Look:
    """One look at the first so many seeds.

    Attributes:
        seeds: how many seeds were looked at.
        answer: the question's answer there.
        premises: each premise's answer there, and whether it is shown.
        outcome: the verdict that follows.
        final: whether more seeds are of no use: a verdict, or a premise that is shown to fail.
    """

    seeds: int
    answer: Answer
    premises: tuple[tuple[Answer, bool], ...]
    outcome: Outcome
    final: bool


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The verdict on a claim, and all that it rests on.

    Attributes:
        verdict: one of the five words.
        compared: the sides, in words.
        primary: the answer that decided, or the last one.
        premises: each premise's answer at that look, and whether it is shown.
        details: what else was measured.
        reproduced: the source's numbers beside ours.
        looks: every look up to the one that decided.
        needs: the seeds that would show an effect as large as the one measured, where it is inconclusive.
        evidence: the question's numbers per seed, up to the look that decided.
    """

    verdict: Outcome
    compared: str
    primary: Answer
    premises: tuple[tuple[Answer, bool], ...]
    details: tuple[Answer, ...]
    reproduced: tuple[Reproduced, ...]
    looks: tuple[Look, ...]
    needs: int | None
    evidence: Evidence

    @property
    def final(self) -> bool:
        """Whether more seeds are of no use."""
        return bool(self.looks) and self.looks[-1].final

    @property
    def failing(self) -> Answer | None:
        """The first premise that is not shown."""
        return next((answer for answer, shown in self.premises if not shown), None)

    def stands_among(self, claims: int) -> bool:
        """Tell whether the verdict is the same at a level that keeps 5 % for a whole table of so many claims."""
        seeds = sorted(self.evidence.values)
        return self.verdict in DECIDED and self.evidence.answer(seeds, LEVEL / claims).outcome == self.verdict

    def record(self) -> dict[str, Any]:
        """Return what ``verdicts.json`` holds."""
        premises = [
            {"what": answer.rule.effect, "value": answer.effect, "low": answer.low, "high": answer.high,
             "line": answer.rule.line, "direction": answer.rule.direction, "holds": shown}
            for answer, shown in self.premises
        ]  # fmt: skip
        return {
            "verdict": self.verdict,
            "compared": self.compared,
            "primary": self.primary.record(),
            # The one that the verdict hangs on; all of them follow.
            "premise": next((premise for premise in premises if not premise["holds"]), next(iter(premises), None)),
            "premises": premises,
            "details": [{**answer.record(), "outcome": answer.outcome} for answer in self.details],
            "reproduced": [number.record() for number in self.reproduced],
            "looks": [
                {"seeds": look.seeds, "level": LEVEL, "effect": look.answer.effect, "low": look.answer.low,
                 "high": look.answer.high, "outcome": look.outcome}
                for look in self.looks
            ],
            "needs": self.needs,
            "per_seed": {str(seed): value for seed, value in sorted(self.evidence.values.items())},
        }  # fmt: skip


def paired(rule: Rule, candidate: Mapping[int, float], baseline: Mapping[int, float]) -> Evidence:
    """Return a rule with the differences candidate minus baseline, by seed; seeds of one side only are left out.

    >>> rule = Rule(effect="gain", unit="", direction="above", line=0.0)
    >>> paired(rule, {0: 2.0, 1: 3.0}, {0: 1.0, 2: 1.5}).values
    {0: 1.0}
    """
    seeds = sorted(candidate.keys() & baseline.keys())
    return Evidence(rule=rule, values={seed: _difference(candidate[seed], baseline[seed]) for seed in seeds})


def single(rule: Rule, values: Mapping[int, float]) -> Evidence:
    """Return a rule with the values themselves, where the rule speaks of no difference."""
    return Evidence(rule=rule, values={seed: values[seed] for seed in sorted(values)})


def shares(rule: Rule, happened: Mapping[int, bool]) -> Evidence:
    """Return a rule with what happened in each seed, for a rule of the kind ``"share"``."""
    return Evidence(rule=rule, values={seed: float(happened[seed]) for seed in sorted(happened)})


def conclude(
    primary: Evidence,
    *,
    compared: str,
    premises: Sequence[Evidence] = (),
    details: Sequence[Evidence] = (),
    reproduced: Sequence[Reproduced] = (),
) -> Verdict:
    """Return the verdict: that of the first look that decides, or of the last look that the seeds allow.

    Args:
        primary: the one question that decides.
        compared: the sides, in words.
        premises: what must be shown first.
        details: what else was measured; it never changes the verdict.
        reproduced: the source's numbers beside ours.

    >>> rule = Rule(effect="gain", unit="", direction="above", line=0.0)
    >>> conclude(single(rule, {0: 2.0, 1: 3.0, 2: 4.0, 3: 2.5, 4: 3.0}), compared="ours").verdict
    'supported'
    """
    seeds = sorted(primary.values)
    looks: list[Look] = []
    for count in looks_within(len(seeds)):
        looks.append(_look(primary, [Premise(evidence=it) for it in premises], seeds[:count]))
        if looks[-1].final:
            break
    if not looks:
        return _too_few(primary, compared, premises, details, reproduced)
    last, counted = looks[-1], seeds[: looks[-1].seeds]
    return Verdict(
        verdict=last.outcome,
        compared=compared,
        primary=last.answer,
        premises=last.premises,
        details=tuple(detail.answer(counted, LEVEL) for detail in details),
        reproduced=tuple(reproduced),
        looks=tuple(looks),
        needs=_needed(last.answer, [primary.values[seed] for seed in counted])
        if last.outcome == "inconclusive"
        else None,
        evidence=replace(primary, values={seed: primary.values[seed] for seed in counted}),
    )


def _difference(a: float, b: float) -> float:
    """Return a - b, and 0 where it is no more than the numbers' own rounding."""
    difference = a - b
    return 0.0 if abs(difference) <= ROUNDING * max(abs(a), abs(b)) else difference


def _look(primary: Evidence, premises: Sequence[Premise], seeds: Sequence[int]) -> Look:
    answer = primary.answer(seeds, LEVEL)
    states = [premise.state(seeds, LEVEL) for premise in premises]
    shown = all(state[1] for state in states)
    outcome: Outcome = answer.outcome if shown else "not testable here"
    final = (shown and outcome in DECIDED) or any(state[2] for state in states)
    return Look(
        seeds=len(seeds), answer=answer, premises=tuple(state[:2] for state in states), outcome=outcome, final=final
    )


def _too_few(
    primary: Evidence, compared: str, premises: Sequence[Evidence], details: Sequence[Evidence],
    reproduced: Sequence[Reproduced],
) -> Verdict:  # fmt: skip
    """Return the verdict of fewer seeds than the first look wants: inconclusive, with what was measured."""
    everything = [primary, *premises, *details]
    seeds = sorted(set(chain.from_iterable(evidence.values for evidence in everything)))
    note = f"the first look is at 5 seeds; {len(primary.values)} measured"
    answer, *others = (
        replace(answer, outcome="inconclusive", note=answer.note or note)
        for answer in (evidence.answer(seeds, LEVEL) for evidence in everything)
    )
    return Verdict(
        verdict="inconclusive",
        compared=compared,
        primary=answer,
        premises=tuple((other, False) for other in others[: len(premises)]),
        details=tuple(others[len(premises) :]),
        reproduced=tuple(reproduced),
        looks=(),
        needs=None,
        evidence=primary,
    )


def _of_mean(rule: Rule, values: Sequence[float], level: float) -> Answer:
    effect = math.fsum(values) / len(values) if values else None
    if len(values) < 2:
        note = f"an interval needs two seeds or more; {len(values)} measured"
        return Answer(rule=rule, outcome="inconclusive", effect=effect, seeds=len(values), note=note)
    low, high = student_interval(values, level)
    flat = not high - low > ROUNDING * max(map(abs, values))
    return Answer(
        rule=rule,
        outcome="inconclusive" if flat else _side(rule, low, high),
        effect=effect,
        low=low,
        high=high,
        seeds=len(values),
        note="all seeds gave the same number: an interval of no width decides nothing" if flat else "",
    )


def _of_share(rule: Rule, values: Sequence[float], level: float) -> Answer:
    """Return the share of seeds in which it happened, or, for the sign test, that are ahead of those that differ."""
    counted = [value for value in values if value != 0] if rule.kind == "sign" else list(values)
    if not counted:
        note = "the sides differ in no seed" if values else "no seed measured"
        return Answer(rule=rule, outcome="inconclusive", effect=None, seeds=len(values), note=note)
    happened = sum(value > 0 for value in counted)
    low, high = share_interval(happened, len(counted), level)
    return Answer(
        rule=rule,
        outcome=_side(rule, low, high),
        effect=happened / len(counted),
        low=low,
        high=high,
        seeds=len(counted),
    )


def _side(rule: Rule, low: float, high: float) -> Outcome:
    """Return where the whole interval lies: inside the band, or on which side of the rule's line."""
    if rule.band is not None and rule.band[0] < low and high < rule.band[1]:
        return "no difference worth having"
    above, below = low > rule.line, high < rule.line
    if rule.direction == "below":
        above, below = below, above
    return "supported" if above else "refuted" if below else "inconclusive"


def _needed(answer: Answer, values: Sequence[float]) -> int | None:
    """Return the seeds that would decide, beyond the line or in the band, were effect and spread as measured."""
    rule, effect, count = answer.rule, answer.effect, len(values)
    if effect is None or count < 2 or not all(math.isfinite(value) for value in values):
        return None
    if rule.kind == "t":
        deviation = math.sqrt(math.fsum((value - effect) ** 2 for value in values) / (count - 1))
    else:
        # A share of nothing or of all has no spread of its own: half a seed more or less gives it one.
        share = min(max(effect, 0.5 / count), 1 - 0.5 / count)
        deviation = math.sqrt(share * (1 - share))
    distances = [abs(effect - rule.line)]
    if rule.band is not None and rule.band[0] < effect < rule.band[1]:
        distances.append(min(effect - rule.band[0], rule.band[1] - effect))
    needed = [seeds_needed(distance, deviation, LEVEL) for distance in distances]
    return min((number for number in needed if number is not None), default=None)
