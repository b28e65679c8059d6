import pytest
import torch

from normkit.lab.claims.skip_init import BLOCKS, BRANCHES, CLAIM, DeepResidual
from tiny_runs import tiny_run


def rows_of(behind=0.0, lead=0.3, accuracy=0.9, jitter=0.002, seeds=5):
    """The last accuracies; in the first epoch everything is the other way round."""
    last = {"batch": accuracy, "skip-init": accuracy - behind, "plain": accuracy - lead}
    return [
        {
            "norm": "batch", "branch": branch, "seed": seed, "epoch": epoch, "rate": 0.1, "train_loss": 0.1,
            "test_accuracy": 1 - last[branch] if epoch == 1
            else last[branch] + (branch == "skip-init") * jitter * (seed - 2) + (branch == "plain") * 0.001 * seed,
        }
        for branch in BRANCHES for seed in range(seeds) for epoch in (1, 2, 3, 4)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"behind": -0.05}, "supported"),
        ({"behind": 0.05}, "refuted"),
        ({"behind": 0.02}, "inconclusive"),
        ({"accuracy": 0.12, "lead": 0.05}, "not testable here"),
        ({"lead": 0.01}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("behind", "expected"),
    [(0.0, "supported"), (0.5, "refuted"), (0.298, "no difference worth having")],
)
def test_detail_compares_the_scalar_with_neither(behind, expected):
    assert CLAIM.judge(rows_of(behind=behind)).details[0].outcome == expected


def test_branches_put_out_nothing_at_first_with_the_scalar_alone():
    images = torch.randn(16, 1, 28, 28)
    for branch in BRANCHES:
        torch.manual_seed(0)
        model = DeepResidual(branch).train()
        straight = model.first(images.flatten(1))
        expected = model.head(torch.relu(model.last_norm(straight)))
        assert torch.allclose(model(images), expected) == (branch == "skip-init")


def test_sides_differ_in_norms_and_scalars_alone():
    states = {branch: torch.manual_seed(0) and DeepResidual(branch).state_dict() for branch in BRANCHES}
    dense = set(states["plain"])
    assert all(torch.equal(states["skip-init"][name], states["plain"][name]) for name in dense)
    assert states["skip-init"].keys() - dense == {"scales"}
    assert states["skip-init"]["scales"].tolist() == [0.0] * BLOCKS
    weights = sum(value.numel() for name, value in states["batch"].items() if value.ndim == 2)
    assert weights == sum(value.numel() for value in states["plain"].values() if value.ndim == 2)


def test_measured_rows_can_be_judged_and_shown():
    rows = tiny_run(CLAIM, epochs=1, batch_size=16)
    assert CLAIM.judge(rows).primary.seeds == 2
    assert len(CLAIM.show(rows)) == 2
