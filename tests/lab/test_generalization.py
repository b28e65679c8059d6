import dataclasses

import pytest
import torch
from torch import nn

from normkit.lab.claim import Request, plan
from normkit.lab.claims import generalization
from normkit.lab.claims.generalization import CLAIM, builder, measure
from normkit.lab.data import limited, load
from normkit.lab.networks import AlexNet


def rows_of(test=0.05, train=0.02, other=0.0, fitted=0.9, jitter=0.001, seeds=5, data="digits"):
    return [
        {
            "norm": norm, "dropout": dropout, "data": data, "seed": seed, "epoch": epoch, "rate": 0.001,
            "train_accuracy": (fitted if epoch == 2 else 0.5) + ahead * (train + 0.002 * (seed - 2)),
            "train_error": 1 - (fitted if epoch == 2 else 0.5) - ahead * (train + 0.002 * (seed - 2)),
            "test_accuracy": (0.8 if epoch == 2 else 0.5) + ahead * (test + jitter * (seed - 2))
            + (other + 0.0001 * seed) * ((norm == "none") == (dropout == 0)),
        }
        for norm in ("none", "batch") for dropout in (0.0, 0.5) for seed in range(seeds) for epoch in (1, 2)
        for ahead in [(norm == "batch" and dropout == 0) * (1 if epoch == 2 else -9)]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"test": -0.02}, "refuted"),
        ({"test": 0.0005}, "no difference worth having"),
        ({"test": 0.005, "jitter": 0.005}, "inconclusive"),
        ({"fitted": 0.7}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({"train": 0.1}, 1, "refuted"),
        ({"train": -0.02}, 2, "refuted"),
        ({"train": 0.0005}, 2, "inconclusive"),
        ({"other": 0.2}, 3, "refuted"),
        ({"other": 0.2}, 4, "refuted"),
        ({}, 0, "supported"),
    ],
)
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert verdict.verdict == "supported"
    assert verdict.details[place].outcome == expected


def test_too_little_to_judge_is_inconclusive():
    assert CLAIM.judge([]).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(seeds=1)).verdict == "inconclusive"


def test_shown_is_the_source_on_its_own_data_alone():
    assert len(CLAIM.show(rows_of())[0].panels[0].marks) == 4
    chart, table = CLAIM.show(rows_of(data="cifar-100"))
    assert [(mark.label, mark.dashed) for mark in chart.panels[1].marks] == [
        ("no norm, no dropout", False),
        ("no norm, dropout", False),
        ("no norm, dropout, source", True),
        ("batch norm, no dropout", False),
        ("batch norm, no dropout, source", True),
        ("batch norm, dropout", False),
    ]
    assert table.rows[2][2:4] == ["0.9200 ± 0.0032", "0.8500 ± 0.0016"]


def test_figure_of_the_source_comes_out_or_not_on_its_own_data_alone():
    numbers = CLAIM.judge(rows_of(data="cifar-100")).reproduced
    assert [(number.source, number.holds) for number in numbers] == [
        (0.999, False), (0.58, False), (0.973, False), (0.40, False)
    ]  # fmt: skip
    assert [number.ours for number in CLAIM.judge(rows_of()).reproduced] == [None] * 4


def modules(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


def test_sides_differ_in_norm_and_dropout_alone():
    torch.manual_seed(0)
    plain = builder(0.5, 9, 1, 28, 10)("none")
    torch.manual_seed(0)
    normed = builder(0.0, 9, 1, 28, 10)("batch")
    assert [layer.p for layer in modules(plain, nn.Dropout)] == [0.5, 0.5]
    assert [layer.p for layer in modules(normed, nn.Dropout)] == [0.0, 0.0]
    for kind in (nn.Conv2d, nn.Linear):
        for a, b in zip(modules(plain, kind), modules(normed, kind), strict=True):
            assert torch.equal(a.weight, b.weight)
    assert builder(0.0, 9, 1, 28, 10) is builder(0.0, 9, 1, 28, 10)


def test_alexnet_of_the_original_width_has_the_original_channels():
    with torch.device("meta"):
        model = AlexNet(in_channels=3, size=32, classes=100)
    assert [layer.out_channels for layer in modules(model, nn.Conv2d)] == [96, 256, 384, 384, 256]
    assert [layer.out_features for layer in modules(model, nn.Linear)] == [1536, 1536, 100]


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (29, 2), (32, 3)])
def test_alexnet_takes_images_of_other_sizes(size, channels):
    model = AlexNet("batch", width=3, in_channels=channels, size=size, classes=7)
    assert model(torch.randn(5, channels, size, size)).shape == (5, 7)


def test_measured_are_training_and_test_accuracy_and_the_run_repeats(monkeypatch):
    monkeypatch.setattr(generalization, "best_rate", lambda *arguments: 0.003)
    small = limited(load("digits"), 96, 30)
    cell = plan(CLAIM, Request(norms=("none",), seeds=1)).cells()[0]
    cell = dataclasses.replace(cell, settings=dataclasses.replace(cell.settings, epochs=2))
    rows, again = list(measure(cell, small)), list(measure(cell, small))
    assert rows == again
    assert [row["epoch"] for row in rows] == [1, 2]
    assert (rows[1]["train_accuracy"] * 96) % 1 == pytest.approx(0, abs=1e-9)
    assert rows[0]["rate"] == 0.003
