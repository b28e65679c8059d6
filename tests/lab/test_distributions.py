import pytest
import torch

from normkit.lab.claims.distributions import CLAIM, distance_to_normal


def rows_of(
    none=1.5, batch=0.1, factor=8.0, batch_factor=1.1, seeds=5, norms=("none", "batch"), accuracy=0.9, jitter=0.002
):
    return [
        {
            "norm": norm, "seed": seed, "epoch": epoch, "test_accuracy": accuracy,
            "means": [0.0] * 4, "densities": [[0.1] * 60] * 4,
            "distances": [distance + 9 * (epoch == 1)] * 4, "deviations": [1.0, 1.0, widest, 1.0],
        }
        for norm in norms for seed in range(seeds) for epoch in (1, 2)
        for distance, widest in [
            (none, factor * (1 + 0.01 * seed)) if norm == "none" else
            (batch + jitter * seed, batch_factor * (1 + 0.02 * seed))
        ]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"none": 0.0}, "refuted"),
        ({"none": 0.104}, "no difference worth having"),
        ({"none": 0.11, "jitter": 0.03}, "inconclusive"),
        ({"accuracy": 0.1}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({"batch": 0.3}, 0, "refuted"),
        ({"batch": 0.246}, 0, "inconclusive"),
        ({"factor": 1.0, "batch_factor": 2.0}, 1, "refuted"),
    ],
)
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert verdict.verdict == "supported"
    assert verdict.details[place].outcome == expected


def test_too_little_to_judge_is_inconclusive():
    assert CLAIM.judge([]).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(seeds=1)).verdict == "inconclusive"


def test_shown_are_both_sides_with_the_normal_curve_in_each_panel():
    chart, table = CLAIM.show(rows_of())
    assert len(chart.panels) == 4
    for panel in chart.panels:
        assert [mark.label for mark in panel.marks] == ["without norm", "with batch norm", "standard normal"]
    normal = chart.panels[0].marks[2]
    assert sum(normal.y) / 5 == pytest.approx(1.0, abs=1e-3)
    assert len(table.rows) == 2


@pytest.mark.parametrize(("shift", "scale", "expected"), [(0.0, 1.0, 0.0), (2.0, 1.0, 2.0), (0.0, 3.0, 1.5958)])
def test_distance_of_a_normal_has_its_closed_form(shift, scale, expected):
    # A wider normal is off by (scale - 1) times the mean of |z|, which is sqrt(2 / pi).
    values = torch.randn(200_000, dtype=torch.float64) * scale + shift
    assert distance_to_normal(values) == pytest.approx(expected, abs=0.02)
