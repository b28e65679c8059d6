import pytest
import torch
from torch import nn
from torch.nn import functional

from normkit.lab.claims.response_norm import BUILDS, CLAIM
from tiny_runs import tiny_run
from tolerances import assert_close


def rows_of(batch_gain=0.0, none_gain=0.03, seeds=5, norms=("none", "batch")):
    gains = {"none": none_gain, "batch": batch_gain}
    return [
        {
            "norm": norm, "response": response, "seed": seed, "epoch": epoch, "rate": 0.03, "train_loss": 0.1,
            "test_accuracy": (0.9 if epoch == 2 else 0.1 + 0.1 * (response == "yes"))
            + (gains.get(norm, batch_gain) if response == "yes" and epoch == 2 else 0.0)
            + (0.001 if response == "yes" else -0.001) * (seed - 2),
        }
        for response in ("no", "yes")
        for norm in norms
        for seed in range(seeds)
        for epoch in (1, 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"batch_gain": -0.1}, "supported"),
        ({"batch_gain": 0.03}, "refuted"),
        ({"batch_gain": 0.01}, "inconclusive"),
        ({"none_gain": -0.03}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({"none_gain": 0.03}, 0, "refuted"),
        ({"none_gain": 0.01}, 0, "inconclusive"),
    ],
)
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert verdict.verdict == "supported"
    assert verdict.details[place].outcome == expected


def test_too_little_to_judge_is_inconclusive():
    assert CLAIM.judge([]).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(seeds=1)).verdict == "inconclusive"


def test_response_norm_has_alexnet_s_constants_and_stands_behind_each_convolution():
    model = BUILDS["yes"]("none")

    def alexnet(x):
        """Krizhevsky et al., section 3.3: the sum over five neighbouring channels, alpha undivided."""
        padded = functional.pad(x.square(), (0, 0, 0, 0, 2, 2))
        total = sum(padded[:, place : place + x.shape[1]] for place in range(5))
        return x / (2 + 1e-4 * total) ** 0.75

    images = torch.randn(3, 1, 28, 28) * 30
    x = alexnet(torch.relu(model.conv1(images)))
    x = alexnet(torch.relu(model.conv2(x)))
    expected = model.fc2(torch.relu(model.fc1(x.flatten(1))))
    assert_close(model(images), expected, dtype=torch.float32)
    assert isinstance(BUILDS["no"]("none").response, nn.Identity)


def test_shown_is_one_panel_per_norm():
    chart, table = CLAIM.show(rows_of())
    assert [panel.title for panel in chart.panels] == ["Without norm", "With batch norm"]
    assert [line[:2] for line in table.rows] == [["none", "no"], ["none", "yes"], ["batch", "no"], ["batch", "yes"]]


def test_measured_rows_can_be_judged_and_shown():
    rows = tiny_run(CLAIM, epochs=1, batch_size=16)
    assert len(rows) == 8
    assert CLAIM.judge(rows).primary.seeds == 2
    assert CLAIM.show(rows)
