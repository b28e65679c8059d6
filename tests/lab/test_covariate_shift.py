import dataclasses
import math

import pytest
import torch

from normkit.lab.claim import Request, plan
from normkit.lab.claims.covariate_shift import CLAIM, MovingNoise, build, measure
from normkit.lab.data import limited, load


def rows_of(lead=0.05, lost=0.002, moves=1.0, jitter=0.001, seeds=5):
    """The noisy norm leads the plain net by ``lead``, ends ``lost`` behind the quiet norm, drifts 10**moves as far."""
    rows = []
    for norm, noise in (("none", "none"), ("batch", "none"), ("none", "moving"), ("batch", "moving")):
        for seed in range(seeds):
            spread = jitter * (seed - 2)
            first, last, moved = {
                ("none", "none"): (0.5, 0.9, 0.01),
                ("batch", "none"): (0.9, 0.9 + lead + lost, 0.02),
                ("none", "moving"): (0.0, 0.0, 99.0),
                ("batch", "moving"): (0.5 + lead + spread, 0.9 + lead + spread, 0.01 * 10 ** (moves + spread)),
            }[norm, noise]
            rows += [
                {
                    "norm": norm, "noise": noise, "seed": seed, "epoch": epoch, "rate": 0.1, "train_loss": 0.5,
                    "test_accuracy": accuracy, "moved": moved,
                }
                for epoch, accuracy in ((1, first), (2, last))
            ]  # fmt: skip
    return rows


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"lead": -0.05}, "refuted"),
        ({"lead": 0.0005}, "no difference worth having"),
        ({"lead": 0.009, "jitter": 0.005}, "inconclusive"),
        ({"moves": -0.5}, "not testable here"),
        ({"moves": 0.0005}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({"lost": 0.05}, 0, "refuted"),
        ({"lost": 0.0201}, 0, "inconclusive"),
    ],
)
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert verdict.verdict == "supported"
    assert verdict.details[place].outcome == expected


def test_too_little_to_judge_is_inconclusive():
    assert CLAIM.judge([]).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(seeds=1)).verdict == "inconclusive"
    assert CLAIM.judge([row for row in rows_of() if row["noise"] == "none"]).verdict == "inconclusive"


def test_shown_are_all_four_sides():
    chart, table = CLAIM.show(rows_of())
    assert [mark.label for mark in chart.panels[0].marks] == [
        "without norm", "with batch norm", "without norm, with noise", "with batch norm, with noise",
    ]  # fmt: skip
    assert [line[0] for line in table.rows] == [mark.label for mark in chart.panels[0].marks]


def test_noise_gives_every_feature_another_mean_and_scale_in_every_step():
    x = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(1))
    x = (x - x.mean(0)) / x.std(0)
    noise = MovingNoise().train()
    steps = [noise(x) for _ in range(40)]
    means, deviations = (torch.stack([getattr(step, name)(0) for step in steps]) for name in ("mean", "std"))
    assert means.abs().max() <= 0.5 + 0.01
    assert 0.6 < means.max() - means.min() <= 1.02
    assert deviations.min() > 0.78
    assert deviations.max() < 1.29
    assert not torch.equal(means[0], means[1])
    assert torch.equal(noise.eval()(x), x)


def test_noise_stands_behind_every_norm():
    torch.manual_seed(0)
    model = build("batch", "moving")
    assert [type(module[1]) for module in model.norms] == [MovingNoise] * 5
    assert not any(isinstance(module, MovingNoise) for module in build("batch").modules())


def test_measured_drift_is_larger_with_noise():
    small = limited(load("digits"), 200, 50)
    cells = [
        dataclasses.replace(cell, settings=dataclasses.replace(cell.settings, epochs=2))
        for cell in plan(CLAIM, Request(norms=("batch",), seeds=1)).cells()
    ]
    quiet, noisy, again = (list(measure(cell, small)) for cell in (*cells, cells[1]))
    assert noisy == again
    assert [row["epoch"] for row in noisy] == [1, 2]
    assert noisy[1]["moved"] > 2 * quiet[1]["moved"] > 0
    assert math.isfinite(noisy[1]["train_loss"])
