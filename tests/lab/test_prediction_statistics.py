import pytest

from normkit.lab.claims.prediction_statistics import CLAIM, MOMENTA, average_error


def rows_of(nearer=1.0, better=0.02, formula=1e-12, jitter=0.001, seeds=5):
    """The other momenta show the opposite, so that a rule that reads them is seen."""
    rows = []
    for momentum in MOMENTA:
        sign = 1 if momentum == 0.1 else -1
        for seed in range(seeds):
            for epoch in (1, 2):
                row = {"momentum": momentum, "seed": seed, "epoch": epoch, "formula": formula * (1 + 0.01 * seed)}
                for way in ("unbiased", "biased", "population"):
                    gain = sign * (way == "population")
                    row[f"error_{way}"] = -1.0 - gain * (nearer + 0.01 * seed)
                    row[f"accuracy_{way}"] = 0.9 + gain * (better + jitter * seed)
                rows.append(row)
    return rows


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"better": -0.02}, "refuted"),
        ({"better": 0.0, "jitter": 0.0002}, "no difference worth having"),
        ({"better": -0.002}, "inconclusive"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({"nearer": 0.1}, 0, "refuted"),
        ({"nearer": 0.28}, 0, "inconclusive"),
        ({"formula": 1e-4}, 1, "refuted"),
    ],
)
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert verdict.verdict == "supported"
    assert verdict.details[place].outcome == expected


def test_too_little_to_judge_is_inconclusive():
    assert CLAIM.judge([]).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(seeds=1)).verdict == "inconclusive"


def test_shown_are_all_ways_at_all_momenta():
    chart, table = CLAIM.show(rows_of())
    assert len(chart.panels[0].marks) == 3
    assert len(table.rows) == 9


def test_error_of_a_moving_average_is_the_decay_to_the_power_of_the_steps():
    assert average_error(seed=4) < 1e-12
