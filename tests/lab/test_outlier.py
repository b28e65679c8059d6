import pytest
import torch

from normkit.lab.claims.outlier import CLAIM, sensitivity
from normkit.lab.networks import LeNet5
from tiny_runs import tiny_run


def rows_of(less=-0.5, others=0.5, accuracy=0.9, jitter=0.01, seeds=5):
    return [
        {
            "norm": norm, "seed": seed, "epoch": epoch, "test_accuracy": accuracy,
            "whole": 0.3 + (norm == "batch") * (less + jitter * (seed - 2)),
            "others": others + 0.01 * seed if norm == "batch" else -9.0,
        }
        for norm in ("none", "batch") for seed in range(seeds) for epoch in (1, 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"less": 0.5}, "refuted"),
        ({"less": 0.01}, "no difference worth having"),
        ({"less": 0.1, "jitter": 0.1}, "inconclusive"),
        ({"accuracy": 0.1}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(("others", "expected"), [(0.5, "refuted"), (-0.5, "supported"), (-0.02, "inconclusive")])
def test_detail_is_the_gradient_of_the_other_samples(others, expected):
    verdict = CLAIM.judge(rows_of(others=others))
    assert (verdict.verdict, verdict.details[0].outcome) == ("supported", expected)


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
def test_the_other_samples_notice_through_batch_statistics_alone(norm):
    torch.manual_seed(0)
    model = LeNet5(norm)
    before = [parameter.clone() for parameter in model.parameters()]
    whole, others = sensitivity(model, torch.randn(16, 1, 28, 28), torch.arange(16) % 10)
    assert whole > 0.01
    assert (others > 0.01) == (norm == "batch")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_measured_rows_can_be_judged_and_shown():
    rows = tiny_run(CLAIM, epochs=1, batch_size=6)
    assert CLAIM.judge(rows).primary.seeds == 2
    assert len(CLAIM.show(rows)) == 2
