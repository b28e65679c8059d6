import pytest

from normkit.lab.claims.variance_shift import CLAIM, variance_ratio


def rows_of(formula=0.002, shift=0.2, gain=0.02, seeds=5):
    return [
        {
            "order": order, "seed": seed, "epoch": epoch, "test_loss": 0.5,
            "test_accuracy": 0.8 + 0.01 * seed + (order == "after") * (gain + 0.001 * seed),
            "ratios": [1.0, 1.0, 1.0 - (order == "before") * 3 * (shift + 0.001 * seed)],
            "formula": [1 + formula * (1 + 0.01 * seed), 1 - formula] if order == "before" else [],
        }
        for order in ("before", "after") for seed in range(seeds) for epoch in (1, 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"formula": 0.02}, "refuted"),
        ({"formula": 0.00995}, "inconclusive"),
        ({"shift": 0.01}, "refuted"),
        ({"shift": 0.048}, "inconclusive"),
        ({"gain": -0.02}, "refuted"),
        ({"gain": -0.002}, "inconclusive"),
    ],
)
def test_rule_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


def test_only_the_last_epoch_is_judged():
    rows = rows_of()
    for row in rows:
        if row["epoch"] == 1:
            row["ratios"], row["test_accuracy"] = [9.0, 9.0, 9.0], 0.0
    assert CLAIM.judge(rows).verdict == "supported"


def test_too_little_to_judge_is_inconclusive():
    assert CLAIM.judge([]).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(seeds=1)).verdict == "inconclusive"


def test_shown_are_both_orders():
    chart, table = CLAIM.show(rows_of())
    assert [mark.label for mark in chart.panels[0].marks] == ["dropout before", "dropout after"]
    assert table.rows[0][3] == "0.394 ± 0.005"


@pytest.mark.parametrize(
    ("keep", "mean", "expected"),
    [(0.5, 0, 0.5), (0.5, 1, 1 / 3), (0.7, 0, 0.7), (0.7, 1, 0.5385), (0.9, 0, 0.9), (0.9, 1, 0.8182)],
)
def test_formula_has_the_published_numbers(keep, mean, expected):
    assert variance_ratio(keep, mean, 1.0) == pytest.approx(expected, abs=5e-5)
