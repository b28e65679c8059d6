import dataclasses

import pytest

from normkit.lab.claim import Request, plan
from normkit.lab.claims.weight_decay import CLAIM, DECAYS, chosen_decay, measure
from normkit.lab.data import limited, load


def rows_of(none=-0.03, batch=0.0, best=0.05, undecayed=0.85, seeds=5, norms=("none", "batch")):
    """A fifth of the best decay gains ``none`` without a norm and ``batch`` with it."""
    rows = []
    for norm in norms:
        for decay in DECAYS:
            for seed in range(seeds):
                gain = none if norm == "none" else batch + 0.001 * (seed - 2)
                # Whatever stands at other decays must not matter.
                accuracy = {best: 0.9, best / 5: 0.9 + gain, 0.0: undecayed + 0.001 * seed}.get(decay, 0.1 * seed)
                held_out = 0.9 if (norm == "none") == (decay == best) else 0.8
                rows += [
                    {
                        "norm": norm, "decay": decay, "seed": seed, "epoch": epoch,
                        "late_validation_accuracy": held_out if epoch == 2 else 1.0 - decay, "test_accuracy": value,
                        "late_accuracy": value,
                    }
                    for epoch, value in ((1, 0.2), (2, accuracy))
                ]  # fmt: skip
    return rows


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"batch": -0.02}, "refuted"),
        ({"batch": -0.0101}, "inconclusive"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({"batch": -0.005, "none": 0.02}, 0, "refuted"),
        ({"none": 0.0005}, 0, "inconclusive"),
    ],
)
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert verdict.verdict == "supported"
    assert verdict.details[place].outcome == expected


@pytest.mark.parametrize("best", [0.01, 0.05, 0.25])
def test_decay_judged_is_the_best_one_held_out_and_it_must_help_the_plain_net(best):
    assert CLAIM.judge(rows_of(best=best)).verdict == "supported"
    assert CLAIM.judge(rows_of(best=best, batch=-0.02)).verdict == "refuted"
    assert CLAIM.judge(rows_of(best=best, undecayed=0.92)).verdict == "not testable here"


def test_decay_is_chosen_by_the_held_out_accuracy_of_the_last_epoch():
    rows = rows_of(norms=("none",), best=0.25)
    assert chosen_decay(rows) == 0.25
    assert "0.05 against 0.25" in CLAIM.judge(rows).compared
    assert chosen_decay([]) == 0.01


def test_too_little_to_judge_is_inconclusive():
    assert CLAIM.judge([]).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(seeds=1)).verdict == "inconclusive"


def test_shown_are_both_sides_at_all_decays():
    chart, table = CLAIM.show(rows_of())
    assert [mark.label for mark in chart.panels[0].marks] == ["without norm", "with batch norm"]
    assert table.rows[0][1] == "0.05"
    assert table.rows[0][4:6] == ["0.8700 ± 0.0000", "0.9000 ± 0.0000"]
    unfinished = CLAIM.show([row for row in rows_of() if row["decay"] == 0])
    assert unfinished[1].rows[0][3] == "not run"


def test_measured_trains_on_half_and_hangs_on_the_decay():
    small = limited(load("digits"), 300, 50)
    cells = [
        dataclasses.replace(cell, settings=dataclasses.replace(cell.settings, epochs=2))
        for cell in plan(CLAIM, Request(norms=("none",), seeds=1)).cells()
    ]
    none, much = (list(measure(cell, small)) for cell in (cells[0], cells[-1]))
    assert [row["epoch"] for row in much] == [1, 2]
    assert much[1]["train_loss"] > none[1]["train_loss"]
    assert (much[0]["late_validation_accuracy"] * 150) % 1 == pytest.approx(0, abs=1e-9)
