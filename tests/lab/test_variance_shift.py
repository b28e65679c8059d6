import pytest
import torch

from normkit.lab.claims.variance_shift import CLAIM, variance_ratio
from normkit.lab.images import as_bits


def right_of(won):
    """Return the bits of sixteen images: of eight on which the two differ the one without dropout gets so many."""
    place = torch.arange(16)
    return {"prediction_right": as_bits(place < won), "training_right": as_bits((place >= won) & (place < 8))}


def rows_of(formula=0.002, shift=0.2, gain=0.02, after=0.0, accuracy=0.8, jitter=0.0005, seeds=5, won=6):
    return [
        {
            "order": order, "seed": seed, "epoch": epoch, "test_loss": 0.5,
            "test_accuracy": accuracy, "training_accuracy": accuracy + 0.01 * seed,
            "prediction_accuracy": accuracy + 0.01 * seed + (gain if order == "before" else after)
            + (jitter if order == "before" else -0.0003) * (seed - 2),
            **right_of(won - seed % 2 if order == "before" else 4),
            "ratios": [1.0, 1.0, 1.0 - (order == "before") * 3 * (shift + 0.001 * seed)],
            "formula": [1 + formula * (1 + 0.01 * seed), 1 - formula] if order == "before" else [],
        }
        for order in ("before", "after") for seed in range(seeds) for epoch in (1, 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"gain": -0.02}, "refuted"),
        ({"gain": 0.0}, "no difference worth having"),
        ({"gain": 0.002, "jitter": 0.002}, "inconclusive"),
        ({"accuracy": 0.1}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({}, 0, "supported"),
        ({"won": 3}, 0, "refuted"),
        ({"won": 4}, 0, "inconclusive"),
        ({}, 1, "no difference worth having"),
        ({"after": 0.02}, 1, "supported"),
        ({"after": 0.04}, 2, "refuted"),
        ({"shift": 0.01}, 3, "refuted"),
        ({"shift": 0.048}, 3, "inconclusive"),
        ({"formula": 0.02}, 4, "refuted"),
        ({"formula": 0.00995}, 4, "inconclusive"),
    ],
)
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert verdict.verdict == "supported"
    assert verdict.details[place].outcome == expected


def test_ratios_are_those_of_the_last_epoch():
    rows = rows_of()
    for row in rows:
        if row["epoch"] == 1:
            row["ratios"] = [9.0, 9.0, 9.0]
    assert CLAIM.judge(rows) == CLAIM.judge(rows_of())


def test_too_little_to_judge_is_inconclusive():
    assert CLAIM.judge([]).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(seeds=1)).verdict == "inconclusive"


def test_shown_are_both_orders():
    chart, table = CLAIM.show(rows_of())
    assert [mark.label for mark in chart.panels[0].marks] == ["as stored", "taken with dropout", "taken without"]
    assert [mark.label for mark in chart.panels[2].marks] == ["batch norm 1", "batch norm 2", "batch norm 3"]
    assert table.rows[0][3] == "0.394 ± 0.005"


@pytest.mark.parametrize(
    ("keep", "mean", "expected"),
    [(0.5, 0, 0.5), (0.5, 1, 1 / 3), (0.7, 0, 0.7), (0.7, 1, 0.5385), (0.9, 0, 0.9), (0.9, 1, 0.8182)],
)
def test_formula_has_the_published_numbers(keep, mean, expected):
    assert variance_ratio(keep, mean, 1.0) == pytest.approx(expected, abs=5e-5)
