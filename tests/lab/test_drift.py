import dataclasses
import math

import pytest

from normkit.lab.claim import Request, plan
from normkit.lab.claims.drift import CLAIM, LAYERS, decades, measure
from normkit.lab.data import limited, load

LINE = -math.log10(2)


def rows_of(mean=-0.6, deviation=-0.6, last=0.3, seeds=5, norms=("none", "batch"), accuracy=0.9):
    """The side with the norm moves 10**mean and 10**deviation times as far as the other."""
    rows = []
    for norm in norms:
        for seed in range(seeds):
            for epoch in (1, 2, 3):
                spread = 0.002 * seed
                lower = {"mean": mean + spread, "deviation": deviation + spread} if norm == "batch" else {}
                row = {"norm": norm, "seed": seed, "epoch": epoch, "test_accuracy": accuracy}
                for column, plural in (("mean", "means"), ("deviation", "deviations")):
                    moved = (99.0 if epoch == 1 else last + 0.001 * seed) * 10 ** (lower.get(column, 0.0) * (epoch > 1))
                    row |= {column: moved, plural: [moved] * len(LAYERS)}
                rows.append(row)
    return rows


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"mean": -0.2}, "refuted"),
        ({"mean": 0.4}, "refuted"),
        ({"mean": LINE - 0.004}, "inconclusive"),
        ({"accuracy": 0.1}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({"deviation": 0.1}, 0, "refuted"),
        ({"deviation": LINE - 0.004}, 0, "inconclusive"),
        ({"last": 0.03}, 1, "refuted"),
        ({"last": 0.048}, 1, "inconclusive"),
    ],
)
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert verdict.verdict == "supported"
    assert verdict.details[place].outcome == expected


def test_too_little_to_judge_is_inconclusive():
    assert CLAIM.judge([]).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(seeds=1)).verdict == "inconclusive"


def test_no_movement_at_all_is_a_small_number():
    assert decades("mean", [{"means": [0.0]}] * 2) == pytest.approx(-6)


def test_shown_are_three_curves_and_every_layer():
    chart, table = CLAIM.show(rows_of())
    assert len(chart.panels) == 3
    assert [line[:2] for line in table.rows] == [
        ["none", "mean"],
        ["none", "deviation"],
        ["batch", "mean"],
        ["batch", "deviation"],
    ]
    assert len(table.rows[0]) == 2 + len(LAYERS)


def test_measured_is_a_drift_that_vanishes_where_nothing_is_learnt():
    cell = plan(CLAIM, Request(norms=("none",), seeds=1)).cells()[0]
    small = limited(load("digits"), 128, 50)
    settings = dataclasses.replace(cell.settings, epochs=1)
    moving = list(measure(dataclasses.replace(cell, settings=settings), small))
    still = list(
        measure(dataclasses.replace(cell, settings=dataclasses.replace(settings, learning_rate=0.0)), small)
    )  # fmt: skip
    assert moving[0]["mean"] > 0.01
    assert min(moving[0]["means"]) > 0
    assert still[0]["means"] == [0.0] * 4
    assert still[0]["deviations"] == [0.0] * 4
