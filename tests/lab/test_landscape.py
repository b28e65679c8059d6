import pytest

from normkit.lab.claims.landscape import CLAIM, theorem_deviation
from normkit.lab.data import load


def rows_of(smoother=0.5, steadier=0.5, theorem=1e-14, seeds=5, norms=("none", "batch"), accuracy=0.9):
    return [
        {
            "norm": norm, "seed": seed, "epoch": epoch, "test_accuracy": accuracy,
            "log_range": 0.1 * epoch + 0.01 * seed - (norm != "none") * (smoother + 0.01 * seed),
            "log_change": 0.1 * epoch - (norm != "none") * (steadier + 0.01 * seed),
            "theorem": theorem * (1 + 0.01 * seed) if norm == "batch" else None,
        }
        for norm in norms for seed in range(seeds) for epoch in (1, 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"smoother": -0.5}, "refuted"),
        ({"smoother": -0.02}, "inconclusive"),
        ({"accuracy": 0.1}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({"steadier": -0.5}, 0, "refuted"),
        ({"theorem": 1e-8}, 1, "refuted"),
        ({"theorem": 0.98e-10}, 1, "inconclusive"),
    ],
)
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert verdict.verdict == "supported"
    assert verdict.details[place].outcome == expected


def test_another_norm_is_judged_without_the_theorem_of_batch_norm():
    assert len(CLAIM.judge(rows_of(norms=("none", "group"))).details) == 1


def test_too_little_to_judge_is_inconclusive():
    assert CLAIM.judge([]).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(seeds=1)).verdict == "inconclusive"


def test_shown_are_range_and_change():
    chart, table = CLAIM.show(rows_of())
    assert len(chart.panels) == 2
    assert [line[0] for line in table.rows] == ["none", "batch"]


def test_theorem_holds_in_float64():
    assert theorem_deviation(load("digits"), seed=3) < 1e-10
