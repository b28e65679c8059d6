import math

import pytest

from normkit.lab.claims.learning_rate import CLAIM, LARGE, RATES, final_loss, largest_rates, unsteadiness

CHANCE = math.log(10)


def rows_of(none=0.25, batch=2.0, stray=0, seeds=10, norms=("none", "batch"), data="digits", classes=10):
    """A side trains at rates up to its number; in the first so many seeds both train as far as the plain one."""
    rows = []
    for rate in RATES:
        for norm in norms:
            for seed in range(seeds):
                most = none if norm == "none" or seed < stray else batch
                loss = 0.3 + 0.004 * seed if rate <= most else math.log(classes) - 0.02 - 0.001 * seed
                rows += [
                    {
                        "norm": norm, "rate": rate, "seed": seed, "epoch": epoch, "data": data, "classes": classes,
                        "train_loss": loss if epoch == 2 else 1.0,
                        "step_losses": [0.9 - 0.01 * seed * (norm == "none"), 1.0, 1.1],
                    }
                    for epoch in (1, 2)
                ]  # fmt: skip
    return rows


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"stray": 1}, "supported"),
        ({"stray": 7}, "inconclusive"),
        # Five seeds cannot tell a share from a half, the premise's neither.
        ({"seeds": 5}, "not testable here"),
        ({"batch": 0.25}, "refuted"),
        ({"none": 0.01}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    changes = {"seeds": 20, **changes} if "stray" in changes else changes
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


def test_too_little_to_judge_is_inconclusive():
    assert CLAIM.judge([]).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(seeds=1)).verdict == "inconclusive"


def test_largest_rate_is_read_where_all_rates_have_been_run():
    rows = [row for row in rows_of(norms=("batch",), seeds=2) if (row["seed"], row["rate"]) != (1, 4.0)]
    assert largest_rates(rows) == {0: 2.0}
    assert largest_rates(rows_of(none=0.0, norms=("none",), seeds=1)) == {0: 0.0}


def test_source_s_loss_comes_out_on_its_own_data_alone():
    (number,) = CLAIM.judge(rows_of(data="fashion-mnist")).reproduced
    assert (number.source, number.holds) == (2.25, True)
    assert number.ours == pytest.approx(CHANCE - 0.0245)
    (number,) = CLAIM.judge(rows_of(none=LARGE, data="fashion-mnist")).reproduced
    assert number.holds is False
    assert CLAIM.judge(rows_of()).reproduced[0].holds is None


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("loss", [None, math.inf, 7.0])
def test_a_run_that_diverged_counts_as_chance_of_its_own_classes(loss, classes):
    run = [{"train_loss": 0.1, "step_losses": [0.1]}, {"train_loss": loss, "step_losses": [loss, 0.0]}]
    run = [{**row, "classes": classes} for row in run]
    assert final_loss(run) == pytest.approx(math.log(classes))
    assert unsteadiness(run) == pytest.approx(math.log(classes) / math.sqrt(2))


def test_shown_are_both_sides_the_grid_and_who_dies():
    chart, table, dead = CLAIM.show(rows_of())
    assert [panel.title for panel in chart.panels] == ["Without norm", "With batch norm", "Last epoch"]
    assert table.rows[0][1] == "0.318 ± 0.012"
    assert dead.rows[0][1:] == ["0 of 10", "0 of 10", *["10 of 10"] * 4, "0.25"]
    assert dead.rows[1][-1] == "2"
    assert CLAIM.show(rows_of(norms=("none",)))
    assert "4.6052" in CLAIM.show(rows_of(classes=100))[1].note
