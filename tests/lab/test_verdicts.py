import math

import pytest
from scipy import stats

from normkit.errors import ArgumentError
from normkit.lab.verdicts import Rule, combine, judge

ABOVE = Rule(effect="gain", unit="", direction="above", threshold=0.5)
BELOW = Rule(effect="loss", unit="", direction="below", threshold=-0.5)
SPREAD = (-0.1, 0.0, 0.1)


def pairs(center, spread=SPREAD):
    """Candidate and baseline whose differences lie around the center."""
    baseline = {seed: 10.0 * seed for seed in range(len(spread))}
    return {seed: baseline[seed] + center + spread[seed] for seed in baseline}, baseline


@pytest.mark.parametrize(
    ("rule", "center", "expected"),
    [
        (ABOVE, 1.0, "supported"), (ABOVE, 0.5, "inconclusive"), (ABOVE, 0.0, "refuted"), (ABOVE, 0.6, "inconclusive"),
        (BELOW, -1.0, "supported"), (BELOW, -0.5, "inconclusive"), (BELOW, 0.0, "refuted"), (BELOW, 1.0, "refuted"),
    ],
)  # fmt: skip
def test_verdict_follows_the_side_of_the_whole_interval(rule, center, expected):
    assert judge(rule, *pairs(center)).verdict == expected


def test_interval_is_student_s():
    candidate, baseline = pairs(1.0, (0.3, -0.2, 0.05, 0.11))
    part = judge(ABOVE, candidate, baseline)
    expected = stats.ttest_1samp([candidate[s] - baseline[s] for s in baseline], 0.0).confidence_interval(0.95)
    assert part.low == pytest.approx(expected.low, rel=1e-12)
    assert part.high == pytest.approx(expected.high, rel=1e-12)
    assert part.effect == pytest.approx(1.065, rel=1e-12)
    assert part.seeds == 4


def test_effect_is_paired_by_seed():
    # Unpaired, the spread of the baselines would drown the effect.
    assert judge(ABOVE, *pairs(1.0)).verdict == "supported"
    candidate, baseline = pairs(1.0)
    crossed = dict(zip(candidate, reversed(baseline.values()), strict=True))
    assert judge(ABOVE, candidate, crossed).verdict == "inconclusive"


def test_seeds_of_one_side_only_are_left_out():
    candidate, baseline = pairs(1.0)
    part = judge(ABOVE, {**candidate, 99: 1e9}, {**baseline, 77: -1e9})
    assert part == judge(ABOVE, candidate, baseline)


@pytest.mark.parametrize("seeds", [0, 1])
def test_fewer_than_two_seeds_are_inconclusive(seeds):
    candidate, baseline = pairs(5.0, SPREAD[:seeds])
    part = judge(ABOVE, candidate, baseline)
    assert part.verdict == "inconclusive"
    assert part.low is None
    assert part.note == f"an interval needs two seeds or more; {seeds} measured"


def test_no_spread_gives_an_interval_of_no_width():
    part = judge(ABOVE, *pairs(0.75, (0.0, 0.0)))
    assert (part.low, part.effect, part.high, part.verdict) == (0.75, 0.75, 0.75, "supported")


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_inconclusive_and_said(broken):
    candidate, baseline = pairs(1.0)
    part = judge(ABOVE, {**candidate, 1: broken}, baseline)
    assert part.verdict == "inconclusive"
    assert part.note == "1 of 3 seeds gave no finite number"


SUPPORTED, REFUTED, OPEN = (judge(ABOVE, *pairs(center)) for center in (1.0, 0.0, 0.5))


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((SUPPORTED, SUPPORTED), "supported"), ((SUPPORTED, OPEN), "inconclusive"), ((SUPPORTED, REFUTED), "refuted"),
        ((OPEN, REFUTED), "refuted"), ((OPEN,), "inconclusive"),
    ],
)  # fmt: skip
def test_claim_needs_every_part(parts, expected):
    assert combine(parts, compared="batch against none").verdict == expected


def test_claim_without_parts_is_refused():
    with pytest.raises(ArgumentError, match="at least one part"):
        combine((), compared="")


def test_record_has_what_verdicts_json_promises():
    record = combine((SUPPORTED, OPEN), compared="batch against none").record()
    assert {"verdict", "effect", "low", "high", "seeds", "rule"} <= record.keys()
    assert record["effect"] == SUPPORTED.effect
    assert record["rule"].count("supported if") == 2
