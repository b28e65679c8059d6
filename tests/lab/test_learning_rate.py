import math

import pytest

from normkit.lab.claims.learning_rate import CHANCE, CLAIM, RATES, final_loss, unsteadiness


def rows_of(none=2.28, batch=0.3, none_spread=0.3, batch_spread=0.1, seeds=5, norms=("none", "batch")):
    """At every rate but 0.5 the sides are exchanged, so that a rule that reads another rate is seen."""
    rows = []
    for rate in RATES:
        for norm in norms:
            bad = (norm == "none") == (rate == 0.5)
            for seed in range(seeds):
                loss, spread = (none, none_spread) if bad else (batch, batch_spread)
                loss, spread = loss + 0.004 * seed, spread * (1 + 0.01 * seed)
                rows += [
                    {
                        "norm": norm, "rate": rate, "seed": seed, "epoch": epoch,
                        "train_loss": loss if epoch == 2 else 1.0, "step_losses": [1.0 - spread, 1.0, 1.0 + spread],
                    }
                    for epoch in (1, 2)
                ]  # fmt: skip
    return rows


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"none": 1.0}, "refuted"),
        ({"none": 1.995}, "inconclusive"),
        ({"batch": 2.1}, "refuted"),
        ({"batch_spread": 0.6}, "refuted"),
    ],
)
def test_rule_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


def test_too_little_to_judge_is_inconclusive():
    assert CLAIM.judge([]).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(seeds=1)).verdict == "inconclusive"


@pytest.mark.parametrize("loss", [None, math.inf, 7.0])
def test_a_run_that_diverged_counts_as_chance(loss):
    run = [{"train_loss": 0.1, "step_losses": [0.1]}, {"train_loss": loss, "step_losses": [loss, 0.0]}]
    assert final_loss(run) == CHANCE
    assert unsteadiness(run) == pytest.approx(CHANCE / math.sqrt(2))


def test_shown_are_both_sides_and_the_grid():
    chart, table = CLAIM.show(rows_of())
    assert [panel.title for panel in chart.panels] == ["Without norm", "With batch norm", "Last epoch"]
    assert table.rows[0][4] == "2.288 ± 0.006"
    assert CLAIM.show(rows_of(norms=("none",)))
