import pytest
import torch

from normkit.lab.claims.shuffling import CLAIM, MATES, PART, build, grouped
from normkit.lab.data import limited, load
from tiny_runs import tiny_run


def rows_of(helps=0.05, plain=0.0, matched=0.1, accuracy=0.9, jitter=0.001, seeds=5):
    """Mates that change are better by so much, both sides fitting alike; before the last ten epochs all is contrary."""
    better = {"batch": helps, "none": plain}
    return [
        {
            "norm": norm, "mates": mates, "seed": seed, "epoch": epoch, "rate": 0.1, "train_accuracy": 1.0,
            "fit_loss": 1.0 / epoch,
            "test_loss": 1.0 - (mates == "new") * (norm == "batch") * (matched + 0.002 * (seed - 2)),
            "test_accuracy": 0.5 - (mates == "new") * 9 * helps if epoch <= 2
            else accuracy + (mates == "new") * (better[norm] + jitter * (seed - 2)),
        }
        for norm in ("none", "batch") for mates in MATES for seed in range(seeds) for epoch in range(1, 13)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"helps": -0.05}, "refuted"),
        ({"helps": 0.0}, "no difference worth having"),
        ({"helps": 0.01, "jitter": 0.02}, "inconclusive"),
        ({"accuracy": 0.1}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({}, 0, "no difference worth having"), ({"plain": -0.1}, 0, "refuted"), ({"plain": 0.1}, 0, "supported"),
        ({}, 1, "supported"), ({"matched": -0.1}, 1, "refuted"), ({"matched": 0.0}, 1, "no difference worth having"),
    ],
)  # fmt: skip
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert (verdict.verdict, verdict.details[place].outcome) == ("supported", expected)


def test_groups_hold_every_image_once_and_follow_the_seed():
    digits = limited(load("digits"), 60, 30)
    first, again, other = (grouped(digits, seed) for seed in (0, 0, 1))
    assert first.train_images.shape == (7, PART, 1, 28, 28)
    assert len(first.train_images.flatten(0, 1).flatten(1).unique(dim=0)) == 7 * PART
    assert torch.equal(first.train_labels, again.train_labels)
    assert not torch.equal(first.train_images, other.train_images)


def test_norm_takes_its_statistics_from_the_group_alone():
    model = build("batch").train()
    groups = torch.randn(2, PART, 1, 28, 28)
    whole, alone = model(groups.flatten(0, 1)), model(groups[1])
    assert torch.allclose(whole[PART:], alone, atol=1e-5)


def test_measured_rows_can_be_judged_and_shown():
    rows = tiny_run(CLAIM, epochs=2, batch_size=16, learning_rate=0.1)
    assert CLAIM.judge(rows).primary.seeds == 2
    losses = {(row["norm"], row["mates"]): row["test_loss"] for row in rows if (row["seed"], row["epoch"]) == (0, 2)}
    assert losses["batch", "new"] != losses["batch", "fixed"]
    assert len(CLAIM.show(rows)) == 2
