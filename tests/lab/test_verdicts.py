"""Verdicts: both sides, the band, premises, clusters, no width, looks, and the error over all of them."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from normkit.errors import ArgumentError
from normkit.lab.sequential import LEVEL, LOOKS
from normkit.lab.verdicts import OUTCOMES, Reproduced, Rule, conclude, paired, shares, single

ABOVE = Rule(effect="gain", unit="", direction="above", line=0.5, band=(-0.5, 0.5))
BELOW = Rule(effect="loss", unit="", direction="below", line=-0.5)
SHARE = Rule(effect="share", unit="", direction="above", line=0.5, kind="share")
SIGN = Rule(effect="ahead", unit="", direction="above", line=0.5, kind="sign")
HELPS = Rule(effect="help", unit="", direction="above", line=0.0)
SPREAD = (-0.1, 0.0, 0.1, 0.05, -0.05)


def around(center, spread=SPREAD):
    return {seed: center + difference for seed, difference in enumerate(spread)}


def judged(rule, values, **others):
    return conclude(single(rule, values), compared="ours", **others)


@pytest.mark.parametrize(
    ("rule", "center", "expected"),
    [
        (ABOVE, 1.0, "supported"), (ABOVE, 0.5, "inconclusive"), (ABOVE, -1.0, "refuted"), (ABOVE, 0.6, "inconclusive"),
        (ABOVE, 0.0, "no difference worth having"), (ABOVE, 0.3, "no difference worth having"),
        (ABOVE, -0.5, "refuted"), (ABOVE, 0.4, "inconclusive"),
        (BELOW, -1.0, "supported"), (BELOW, -0.5, "inconclusive"), (BELOW, 0.0, "refuted"), (BELOW, 1.0, "refuted"),
    ],
)  # fmt: skip
def test_verdict_follows_the_whole_interval(rule, center, expected):
    # The interval reaches 0.14 to either side: from 0.4 over the line, from -0.5 out of the band but not to the line.
    assert half_width() == pytest.approx(0.145, abs=0.005)
    assert judged(rule, around(center)).verdict == expected


def half_width():
    return stats.t.ppf(1 - LEVEL / 2, 4) * np.std(SPREAD, ddof=1) / math.sqrt(5)


def test_interval_is_student_s_at_the_level_of_a_look():
    answer = judged(ABOVE, around(1.0)).primary
    expected = stats.ttest_1samp(list(around(1.0).values()), 0.0).confidence_interval(1 - LEVEL)
    assert (answer.low, answer.high) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert answer.effect == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize(
    ("happened", "count", "expected"),
    [(10, 10, "supported"), (0, 10, "refuted"), (5, 5, "inconclusive"), (7, 10, "inconclusive")],
)
def test_runs_in_two_clusters_are_counted_exactly(happened, count, expected):
    verdict = conclude(shares(SHARE, {seed: seed < happened for seed in range(count)}), compared="ours")
    exact = stats.binomtest(happened, count).proportion_ci(1 - LEVEL, method="exact")
    assert verdict.verdict == expected
    assert (verdict.primary.low, verdict.primary.high) == pytest.approx((exact.low, exact.high), abs=1e-12)


def test_sign_test_counts_the_seeds_in_which_the_sides_differ():
    candidate = {seed: 0.9 if seed < 9 else 0.5 for seed in range(10)}
    verdict = conclude(paired(SIGN, candidate, dict.fromkeys(range(10), 0.5)), compared="ours")
    exact = stats.binomtest(9, 9).proportion_ci(1 - LEVEL, method="exact")
    assert (verdict.primary.seeds, verdict.verdict) == (9, "supported")
    assert verdict.primary.low == pytest.approx(exact.low, abs=1e-12)
    assert conclude(paired(SIGN, candidate, candidate), compared="ours").primary.note == "the sides differ in no seed"


def test_two_clusters_by_t_would_be_inconclusive_where_the_count_is_clear():
    # Runs that train gain two nats, runs that die nothing: a mean says little of either.
    gains = {seed: 2.0 if seed < 19 else 0.0 for seed in range(20)}
    assert conclude(shares(SHARE, {seed: gain > 1 for seed, gain in gains.items()}), compared="").verdict == "supported"


@pytest.mark.parametrize("center", [0.0, 1.0, -1.0])
def test_interval_of_no_width_decides_nothing(center):
    for spread in ([0.0] * 5, [1e-16, 0.0, 0.0, 0.0, 0.0]):
        verdict = judged(ABOVE, around(center, spread))
        if center == 0.0 and any(spread):
            continue  # 1e-16 alone is a number of its own
        assert verdict.verdict == "inconclusive"
        assert "no width" in verdict.primary.note


def test_differences_within_rounding_are_none():
    candidate = dict.fromkeys(range(5), 0.1 + 0.2)
    assert set(paired(ABOVE, candidate, dict.fromkeys(range(5), 0.3)).values.values()) == {0.0}


@pytest.mark.parametrize("values", [[0.0] * 5, list(SPREAD), [-1.0, -1.1, -0.9, -1.0, -1.05]])
def test_a_premise_that_is_not_shown_leaves_nothing_to_judge(values):
    verdict = judged(ABOVE, around(1.0), premises=[single(HELPS, dict(enumerate(values)))])
    assert verdict.verdict == "not testable here"
    assert verdict.record()["premise"]["holds"] is False
    # Only a premise that is shown to fail ends the run: the others may be shown by more seeds.
    assert verdict.final == (values[0] == -1.0)


def test_a_premise_that_holds_lets_the_question_decide():
    verdict = judged(ABOVE, around(1.0), premises=[single(HELPS, dict.fromkeys(range(5), 1.0))])
    assert (verdict.verdict, verdict.final) == ("supported", True)
    assert verdict.record()["premise"] == {
        "what": "help", "value": 1.0, "low": 1.0, "high": 1.0, "line": 0.0, "direction": "above", "holds": True,
    }  # fmt: skip


@pytest.mark.parametrize("center", [1.0, 0.0, -1.0])
def test_details_have_outcomes_and_never_veto(center):
    verdict = judged(ABOVE, around(1.0), details=[single(HELPS, around(center))])
    assert verdict.verdict == "supported"
    assert verdict.details[0].outcome == {1.0: "supported", 0.0: "inconclusive", -1.0: "refuted"}[center]


@pytest.mark.parametrize("seeds", range(5))
def test_fewer_seeds_than_the_first_look_decide_nothing(seeds):
    verdict = judged(ABOVE, around(5.0, SPREAD[:seeds]))
    assert (verdict.verdict, verdict.looks, verdict.final) == ("inconclusive", (), False)
    assert verdict.primary.note
    assert (verdict.primary.low is None) == (seeds < 2)


def test_first_look_that_decides_ends_the_experiment():
    values = {**around(1.0), **{seed: -9.0 - seed for seed in range(5, 20)}}
    verdict = judged(ABOVE, values)
    assert (verdict.verdict, [look.seeds for look in verdict.looks]) == ("supported", [5])
    assert verdict.record()["per_seed"].keys() == set("01234")


def test_seeds_between_two_looks_wait():
    values = {**around(0.5), **{seed: 9.0 + seed for seed in range(5, 9)}}
    verdict = judged(ABOVE, values)
    assert (verdict.primary.seeds, verdict.verdict) == (5, "inconclusive")


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_numbers_that_are_not_finite_decide_nothing_and_are_said(broken):
    verdict = judged(ABOVE, {**around(1.0), 1: broken})
    assert verdict.verdict == "inconclusive"
    assert verdict.primary.note == "1 of 5 seeds gave no finite number"


def test_effect_is_paired_by_seed_and_seeds_of_one_side_are_left_out():
    baseline = {seed: 10.0 * seed for seed in range(5)}
    candidate = {seed: baseline[seed] + value for seed, value in around(1.0).items()}
    verdict = conclude(paired(ABOVE, {**candidate, 99: 1e9}, {**baseline, 77: -1e9}), compared="ours")
    assert (verdict.verdict, verdict.primary.seeds) == ("supported", 5)


def test_seeds_needed_have_the_power_that_is_said():
    verdict = judged(BELOW, around(-0.55))
    assert verdict.verdict == "inconclusive"
    deviation = float(np.std(SPREAD, ddof=1))
    draws = np.random.default_rng(0).normal(-0.55, deviation, (20_000, verdict.needs))
    half = stats.t.ppf(1 - LEVEL / 2, verdict.needs - 1) * draws.std(1, ddof=1) / math.sqrt(verdict.needs)
    assert np.mean(draws.mean(1) + half < -0.5) == pytest.approx(0.8, abs=0.04)


def test_band_must_hold_the_line():
    with pytest.raises(ArgumentError, match="does not hold its line"):
        Rule(effect="gain", unit="", direction="above", line=1.0, band=(-0.5, 0.5))


@pytest.mark.parametrize(("ours", "holds"), [(0.59, True), (0.61, False), (None, None), (math.nan, None)])
def test_source_s_number_comes_out_or_not(ours, holds):
    number = Reproduced(what="accuracy", source=0.58, ours=ours, within=0.02)
    assert number.holds is holds
    json.dumps(number.record(), allow_nan=False)


def test_verdict_stands_for_a_whole_table_only_where_its_interval_is_far_enough():
    assert judged(ABOVE, around(3.0)).stands_among(30)
    near = judged(BELOW, around(-0.5 - 1.05 * half_width()))
    assert near.verdict == "supported"
    assert not near.stands_among(30)
    assert not judged(BELOW, around(-0.5)).stands_among(1)


def test_record_has_what_verdicts_json_promises():
    record = judged(ABOVE, around(1.0), details=[single(HELPS, around(1.0))]).record()
    assert record["verdict"] in OUTCOMES
    assert {"effect", "low", "high", "line", "direction", "band", "seeds", "kind"} <= record["primary"].keys()
    assert {"verdict", "primary", "premise", "details", "reproduced", "looks"} <= record.keys()
    assert record["details"][0]["outcome"] == "supported"
    assert record["looks"][0]["level"] == LEVEL
    json.dumps(record, allow_nan=False)


def missed(draws, truth, interval):
    """Return the share of experiments in which the interval of some look misses the truth."""
    misses = np.zeros(len(draws), dtype=bool)
    for look in LOOKS:
        low, high = interval(draws[:, :look])
        misses |= (low > truth) | (high < truth)
    return misses.mean()


def test_all_looks_together_miss_the_truth_in_five_percent_at_most():
    # Every false verdict, on either side of the line or of equivalence, needs an interval that misses the truth: the
    # line where the effect lies on it, the end of the band where it lies there.
    def student(draws):
        count = draws.shape[1]
        half = stats.t.ppf(1 - LEVEL / 2, count - 1) * draws.std(1, ddof=1) / math.sqrt(count)
        return draws.mean(1) - half, draws.mean(1) + half

    draws = np.random.default_rng(1).standard_normal((200_000, LOOKS[-1]))
    assert 0.045 < missed(draws, 0.0, student) <= 0.0505


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_all_looks_at_a_share_together_miss_it_in_five_percent_at_most(share):
    def exact(draws):
        count, happened = draws.shape[1], draws.sum(1)
        low = np.where(happened == 0, 0.0, stats.beta.ppf(LEVEL / 2, happened, count - happened + 1))
        high = np.where(happened == count, 1.0, stats.beta.ppf(1 - LEVEL / 2, happened + 1, count - happened))
        return low, high

    draws = np.random.default_rng(2).random((20_000, LOOKS[-1])) < share
    assert missed(draws, share, exact) <= 0.05


@pytest.mark.parametrize("truth", [0.5, -0.5])
def test_verdicts_themselves_are_false_in_five_percent_at_most(truth):
    # At 0.5, line and band end at once: supported, refuted and no difference are all false there; at -0.5, the other
    # end of the band, no difference is false and refuted is right.
    generator = np.random.default_rng(3)
    false = {"supported", "no difference worth having"} | ({"refuted"} if truth == 0.5 else set())
    experiments = 800
    wrong = sum(
        judged(ABOVE, dict(enumerate(generator.normal(truth, 0.6, LOOKS[-1]).tolist()))).verdict in false
        for _ in range(experiments)
    )
    assert wrong / experiments <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / experiments)
