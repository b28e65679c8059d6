import math

import pytest

from normkit.lab.claims.saturation import CLAIM, SATURATED


def rows_of(none=0.3, batch=0.01, seeds=5, norms=("none", "batch"), accuracy=0.9, jitter=0.001):
    rows = []
    for norm in norms:
        for seed in range(seeds):
            share = (none if norm == "none" else batch) + jitter * (seed if norm == "none" else -seed)
            rows += [
                {
                    "norm": norm, "seed": seed, "epoch": epoch, "share": share + delta, "shares": [share + delta] * 3,
                    "test_accuracy": accuracy, "low": -1.0, "middle": 0.0, "high": 1.0,
                }
                for epoch, delta in ((1, -0.005), (2, 0.005))
            ]  # fmt: skip
    return rows


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"none": 0.0, "batch": 0.04}, "refuted"),
        ({"none": 0.04, "batch": 0.04, "jitter": 0.0002}, "no difference worth having"),
        ({"none": 0.04, "batch": 0.044}, "inconclusive"),
        ({"accuracy": 0.1}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({"batch": 0.1}, 0, "refuted"),
        ({"batch": 0.052}, 0, "inconclusive"),
        ({}, 1, "supported"),
    ],
)
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert verdict.verdict == "supported"
    assert verdict.details[place].outcome == expected


def test_too_little_to_judge_is_inconclusive():
    assert CLAIM.judge([]).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(seeds=1)).verdict == "inconclusive"


def test_saturated_is_a_tenth_of_the_largest_slope():
    value = 1 / (1 + math.exp(-SATURATED))
    assert value * (1 - value) == pytest.approx(0.025, rel=1e-4)


def test_shown_are_shares_percentiles_and_accuracy():
    chart, table = CLAIM.show(rows_of())
    assert len(chart.panels) == 3
    assert [line[0] for line in table.rows] == ["none", "batch"]
