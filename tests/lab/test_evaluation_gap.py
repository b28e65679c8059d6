import pytest
import torch

from normkit.lab.claims.evaluation_gap import BATCH_SIZES, CLAIM, loss_in_training
from normkit.lab.data import limited, load
from normkit.lab.small_network import SmallResidual
from normkit.lab.training import evaluate
from tiny_runs import tiny_run


def rows_of(moving=0.4, again=0.05, small=0.01, left=0.1, gained=0.02, accuracy=0.9, jitter=0.002, seeds=5):
    """Gaps at batches of 64 and 4; at 16, and in the first epoch, they say the contrary."""
    gaps = {4: (small, left), 16: (-9.0, 9.0), 64: (moving, again)}
    return [
        {
            "norm": "batch", "batch_size": size, "seed": seed, "epoch": epoch, "rate": 0.1, "in_training": 1.0,
            "gap_moving": gaps[size][0] * (1 + 0.01 * (seed - 2)) if epoch > 1 else -9.0,
            "gap_retaken": gaps[size][1] + jitter * (seed - 2) ** 2 if epoch > 1 else 9.0,
            "test_accuracy": accuracy if size == 64 and epoch > 1 else 0.1,
            "retaken_accuracy": accuracy + gained + 0.0001 * (seed - 2) if size == 64 and epoch > 1 else 0.0,
        }
        for size in BATCH_SIZES for seed in range(seeds) for epoch in (1, 2, 3)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"again": 0.3}, "refuted"),
        ({"again": 0.2}, "inconclusive"),
        ({"accuracy": 0.1}, "not testable here"),
        ({"moving": 0.01}, "not testable here"),
        ({"moving": -0.4, "again": -0.4}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({}, 0, "supported"), ({"small": 0.5}, 0, "refuted"),
        ({}, 1, "supported"), ({"left": -0.1}, 1, "refuted"),
        ({}, 2, "supported"), ({"gained": -0.02}, 2, "refuted"), ({"gained": 0.0}, 2, "no difference worth having"),
    ],
)  # fmt: skip
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert (verdict.verdict, verdict.details[place].outcome) == ("supported", expected)


def test_loss_in_training_of_one_batch_is_the_batch_s_own_and_changes_nothing():
    digits = limited(load("digits"), 40, 20)
    model = SmallResidual("batch")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = loss_in_training(model, digits, 40, 0, "cpu")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    expected = torch.nn.functional.cross_entropy(model.train()(digits.train_images), digits.train_labels)
    assert found == pytest.approx(expected.item(), rel=1e-5)
    # Without a norm the mode makes no difference.
    plain = SmallResidual("none")
    assert loss_in_training(plain, digits, 8, 0, "cpu") == pytest.approx(
        evaluate(plain, digits.train_images, digits.train_labels)[0], rel=1e-5
    )


def test_measured_rows_can_be_judged_and_shown():
    rows = tiny_run(CLAIM, epochs=2, train_images=64)
    assert CLAIM.judge(rows).primary.seeds == 2
    assert {row["rate"] for row in rows} == {0.1 * size / 64 for size in BATCH_SIZES}
    assert len(CLAIM.show(rows)) == 2
