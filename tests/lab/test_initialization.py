import dataclasses

import pytest
import torch

from normkit.lab.claim import Request, plan
from normkit.lab.claims import initialization
from normkit.lab.claims.initialization import CLAIM, SCALES, measure
from normkit.lab.data import limited, load


def rows_of(none=0.3, batch=0.02, worst=0.4, seeds=5, norms=("none", "batch"), usual=0.95):
    """Every scale but 1 loses the same, but the largest loses ``worst`` more without a norm."""
    rows = []
    for norm in norms:
        for scale in SCALES:
            for seed in range(seeds):
                lost = 0.0 if scale == 1 else (none if norm == "none" else batch + 0.002 * seed)
                lost += worst * (norm == "none" and scale == 30)
                rows += [
                    {"norm": norm, "scale": scale, "seed": seed, "epoch": epoch, "rate": 0.1, "test_accuracy": accuracy}
                    for epoch, accuracy in ((1, 0.5), (2, usual - lost))
                ]
    return rows


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"batch": 0.5}, "refuted"),
        ({"worst": 0.6, "batch": 0.346}, "inconclusive"),
        ({"none": 0.2, "worst": 0.0, "batch": 0.2}, "no difference worth having"),
        ({"usual": 0.15, "none": 0.1}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({"none": 0.13, "worst": 0.0, "batch": 0.05}, 0, "refuted"),
    ],
)
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert verdict.verdict == "supported"
    assert verdict.details[place].outcome == expected


def test_too_little_to_judge_is_inconclusive():
    assert CLAIM.judge([]).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(seeds=1)).verdict == "inconclusive"
    assert CLAIM.judge([row for row in rows_of() if row["scale"] != 3]).verdict == "inconclusive"


def test_shown_are_both_sides_at_all_scales():
    chart, table = CLAIM.show(rows_of())
    assert [mark.label for mark in chart.panels[0].marks] == ["without norm", "with batch norm"]
    assert table.rows[0][1:] == [
        *["0.650 ± 0.000 (0.1)"] * 3,
        "0.950 ± 0.000 (0.1)",
        *["0.650 ± 0.000 (0.1)"] * 2,
        "0.250 ± 0.000 (0.1)",
    ]
    assert CLAIM.show(rows_of()[:2])[1].rows[0][2] == ""


def test_measured_network_starts_from_scaled_weights(monkeypatch):
    started = {}

    def look(model, dataset, settings, seed, device):
        started[scale] = (model.linears[0].weight.detach().clone(), settings.learning_rate)
        return iter(())

    monkeypatch.setattr(initialization, "best_rate", lambda *arguments: 0.3)
    monkeypatch.setattr(initialization, "train", look)
    for cell in plan(CLAIM, Request(norms=("none",), seeds=1)).cells():
        scale = dict(cell.variant)["scale"]
        list(measure(cell, load("digits")))
    assert torch.equal(started[10.0][0], started[1.0][0] * 10.0)
    assert {rate for _, rate in started.values()} == {0.3}


def test_measured_are_the_rate_and_every_epoch():
    cell = dataclasses.replace(
        plan(CLAIM, Request(epochs=2, seeds=1)).cells()[-1],
        settings=dataclasses.replace(CLAIM.settings["digits"], epochs=2),
    )
    rows = list(measure(cell, limited(load("digits"), 200, 50)))
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[0]["rate"] > 0
    assert 0 <= rows[1]["test_accuracy"] <= 1
