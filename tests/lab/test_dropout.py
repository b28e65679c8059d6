import dataclasses

import pytest
import torch

from normkit.lab.claim import Request, plan
from normkit.lab.claims.dropout import CLAIM, HIGH, SHARES, build, measure
from normkit.lab.data import limited, load


def rows_of(none=0.03, batch=-0.005, seeds=5, norms=("none", "batch")):
    """Much dropout gains ``none`` without a norm and ``batch`` with it."""
    return [
        {
            "norm": norm, "dropout": share, "seed": seed, "epoch": epoch, "test_loss": 0.3,
            "test_accuracy": accuracy, "late_accuracy": accuracy,
        }
        for norm in norms for share in SHARES for seed in range(seeds)
        for epoch, accuracy in (
            (1, 0.2),
            (2, 0.9 + (share in HIGH) * (none if norm == "none" else batch + 0.001 * (seed - 2))),
        )
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"batch": 0.02}, "refuted"),
        ({"batch": 0.0101}, "inconclusive"),
        ({"none": -0.02}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({"none": 0.004, "batch": 0.007}, 0, "refuted"),
        ({"none": 0.005, "batch": 0.005}, 0, "inconclusive"),
    ],
)
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert verdict.verdict == "supported"
    assert verdict.details[place].outcome == expected


def test_too_little_to_judge_is_inconclusive():
    assert CLAIM.judge([]).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(seeds=1)).verdict == "inconclusive"
    assert CLAIM.judge([row for row in rows_of() if row["dropout"] != 0.4]).verdict == "inconclusive"


def test_shown_are_both_sides_at_all_shares():
    chart, table = CLAIM.show(rows_of())
    assert [mark.label for mark in chart.panels[0].marks] == ["without norm", "with batch norm"]
    assert table.header[1:] == ["0%", "5%", "10%", "40%", "50%"]
    assert table.rows[0][1:] == [*["0.9000 ± 0.0000"] * 3, *["0.9300 ± 0.0000"] * 2]


def test_dropout_follows_every_hidden_layer():
    model = build("batch", 0.4)
    assert (model.dropout.p, model.dropout_after, len(model.linears)) == (0.4, "all", 2)


def test_measured_repeats_and_hangs_on_the_dropout():
    small = limited(load("digits"), 200, 50)
    cells = [
        dataclasses.replace(cell, settings=dataclasses.replace(cell.settings, epochs=2))
        for cell in plan(CLAIM, Request(norms=("batch",), seeds=1)).cells()
    ]
    none, much, again = (list(measure(cell, small)) for cell in (cells[0], cells[-1], cells[-1]))
    assert much == again
    assert [row["epoch"] for row in much] == [1, 2]
    assert much[1]["late_accuracy"] == pytest.approx((much[0]["test_accuracy"] + much[1]["test_accuracy"]) / 2)
    assert none[0]["train_loss"] != much[0]["train_loss"]


def test_dropout_behind_every_hidden_layer_is_one_behind_each():
    model = build("none", 1.0).train()
    seen = []
    for linear in [*model.linears[1:], model.head]:
        linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].abs().max().item()))
    model(torch.ones(2, 1, 28, 28))
    # With everything dropped, nothing comes behind either hidden layer.
    assert seen == [0.0, 0.0]
