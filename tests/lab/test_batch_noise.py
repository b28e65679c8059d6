import dataclasses

import pytest

from normkit.lab.claim import Request, plan
from normkit.lab.claims.batch_noise import CLAIM, PARTS, build, measure, slope, spread
from normkit.lab.data import limited, load


def rows_of(narrower=0.03, noise=0.02, spread=0.2, power=-0.5, seeds=5):
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
                            "train_accuracy": 1.0, "test_accuracy": accuracy,
                            "sizes": list(sizes), "spreads": spreads if epoch == 2 else [],
                        }
                    )  # fmt: skip
    return rows


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"narrower": -0.02}, "refuted"),
        ({"narrower": 0.0005}, "inconclusive"),
        ({"noise": -0.02}, "refuted"),
        ({"noise": 0.0005}, "inconclusive"),
        ({"spread": 0.01}, "refuted"),
        ({"spread": 0.0501}, "inconclusive"),
        ({"power": -0.2}, "refuted"),
        ({"power": -0.8}, "refuted"),
        ({"power": -0.601}, "inconclusive"),
    ],
)
def test_rule_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


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
