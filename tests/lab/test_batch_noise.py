import dataclasses

import pytest

from normkit.lab.claim import Request, plan
from normkit.lab.claims.batch_noise import CLAIM, PARTS, build, measure, slope, spread
from normkit.lab.data import limited, load


def rows_of(narrower=0.03, noise=0.02, spread=0.2, power=-0.5, matched=0.1, apart=0.001, seeds=5):
    """The gap is narrower by ``narrower`` with statistics of 64, and by ``noise`` more with statistics of 4."""
    rows = []
    for norm in ("none", "batch"):
        for part in (4, 16, 64):
            for seed in range(seeds):
                jitter = 1 + 0.02 * (seed - 2)
                gap = 0.1
                if norm == "batch":
                    gap -= narrower + 0.001 * (seed - 2) + (part == 4) * (noise + 0.001 * (seed - 2))
                sizes = PARTS if (norm, part) == ("batch", 64) else [part]
                spreads = [(norm == "batch") * spread * jitter * (size / 64) ** (power * jitter) for size in sizes]
                for epoch, accuracy in ((1, 0.0), (2, 1.0 - gap)):
                    rows.append(
                        {
                            "norm": norm, "part": part, "seed": seed, "epoch": epoch, "rate": 0.1,
                            "train_accuracy": 1.0, "test_accuracy": accuracy, "fit_loss": 1.0 / epoch,
                            "test_loss": 1.0 - (part == 4) * (matched + apart * (seed - 2)),
                            "sizes": list(sizes), "spreads": spreads if epoch == 2 else [],
                        }
                    )  # fmt: skip
    return rows


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"matched": -0.1}, "refuted"),
        ({"matched": 0.0}, "no difference worth having"),
        ({"matched": 0.009, "apart": 0.005}, "inconclusive"),
        ({"narrower": -0.85}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({"noise": -0.02}, 0, "refuted"),
        ({"noise": 0.0005}, 0, "inconclusive"),
        ({"narrower": -0.02}, 1, "refuted"),
        ({"narrower": 0.0005}, 1, "inconclusive"),
        ({"spread": 0.01}, 2, "refuted"),
        ({"spread": 0.0501}, 2, "inconclusive"),
        ({"power": -0.2}, 3, "refuted"),
        ({"power": -0.8}, 3, "refuted"),
        ({"power": -0.601}, 3, "inconclusive"),
    ],
)
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert verdict.verdict == "supported"
    assert verdict.details[place].outcome == expected


def test_too_little_to_judge_is_inconclusive():
    assert CLAIM.judge([]).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(seeds=1)).verdict == "inconclusive"


def test_shown_are_gap_accuracy_and_spread():
    chart, table = CLAIM.show(rows_of())
    assert len(chart.panels) == 3
    assert [line[:2] for line in table.rows] == [["none", ""], ["batch", "4"], ["batch", "16"], ["batch", "64"]]
    assert table.rows[3][5] == "0.2000 ± 0.0063"
    assert len(CLAIM.show([row for row in rows_of() if row["norm"] == "none"])[0].panels) == 2


def test_output_hangs_on_the_batch_mates_with_a_batch_norm_alone():
    digits = limited(load("digits"), 200, 50)
    assert spread(build("none"), digits, 8, seed=0) < 1e-6
    spreads = [spread(build("batch"), digits, size, seed=0) for size in PARTS]
    assert spreads[0] > spreads[2] > spreads[4] > 0.01
    assert slope(spreads) == pytest.approx(-0.5, abs=0.15)


def test_measured_is_the_spread_after_the_last_epoch_alone():
    small = limited(load("digits"), 200, 50)
    cells = [
        dataclasses.replace(cell, settings=dataclasses.replace(cell.settings, epochs=2))
        for cell in plan(CLAIM, Request(seeds=1)).cells()
        if dict(cell.variant)["part"] != 16
    ]
    rows = {(cell.norm, dict(cell.variant)["part"]): list(measure(cell, small)) for cell in cells}
    assert [len(row["spreads"]) for row in rows["batch", 64]] == [0, len(PARTS)]
    assert [len(row["spreads"]) for row in rows["batch", 4]] == [0, 1]
    # Without a norm the parts make no difference; with it they do.
    assert rows["none", 4][1]["train_loss"] == rows["none", 64][1]["train_loss"]
    assert rows["batch", 4][1]["train_loss"] != rows["batch", 64][1]["train_loss"]
