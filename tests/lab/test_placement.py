import pytest
import torch
from torch import nn

from normkit.lab.claims.placement import BUILDS, CLAIM
from tiny_runs import tiny_run


def rows_of(before=0.95, after=0.9, seeds=10, norms=("batch",), spread=0.002):
    """Before the last epoch the sides are exchanged, so that a rule that reads another epoch is seen."""
    return [
        {
            "norm": norm, "place": place, "seed": seed, "epoch": epoch, "rate": 0.03, "train_loss": 0.1,
            "test_accuracy": (before if (place == "before") == (epoch == 2) else after)
            + (spread if place == "before" else -spread) * (seed % 5 - 2),
        }
        for norm in norms
        for place in ("before", "after")
        for seed in range(seeds)
        for epoch in (1, 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"before": 0.9, "after": 0.95}, "refuted"),
        ({"before": 0.904, "after": 0.9, "seeds": 5}, "inconclusive"),
        ({"before": 0.901, "after": 0.9, "spread": 0.001}, "no difference worth having"),
        ({"before": 0.2, "after": 0.1}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


def test_too_little_to_judge_is_inconclusive():
    assert CLAIM.judge([]).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(seeds=1)).verdict == "inconclusive"


def test_another_norm_can_take_the_place_of_batch_norm():
    verdict = CLAIM.judge(rows_of(norms=("none", "group")))
    assert verdict.verdict == "supported"
    assert verdict.compared == "group norm before against after the activation"


def test_places_differ_in_the_order_of_norm_and_activation_alone():
    before, after = BUILDS["before"]("batch"), BUILDS["after"]("batch")
    after.load_state_dict(before.state_dict())
    images = torch.randn(5, 1, 28, 28)
    conv1, norm1, conv2, norm2 = before.conv1, before.norm1, before.conv2, before.norm2
    fc1, norm3, head = before.fc1, before.norm3, before.fc2
    flat, relu = nn.Flatten(), nn.ReLU()
    usual = nn.Sequential(conv1, norm1, relu, conv2, norm2, relu, flat, fc1, norm3, relu, head)
    other = nn.Sequential(conv1, relu, norm1, conv2, relu, norm2, flat, fc1, relu, norm3, head)
    assert torch.equal(before(images), usual(images))
    assert torch.equal(after(images), other(images))


def test_shown_are_both_places_by_epoch():
    chart, table = CLAIM.show(rows_of())
    assert [mark.label for mark in chart.panels[0].marks] == [
        "with batch norm, before ReLU",
        "with batch norm, after ReLU",
    ]
    assert [line[1] for line in table.rows] == ["before", "after"]


def test_measured_rows_can_be_judged_and_shown():
    rows = tiny_run(CLAIM, epochs=1, batch_size=16)
    assert len(rows) == 4
    assert CLAIM.judge(rows).primary.seeds == 2
    assert CLAIM.show(rows)
