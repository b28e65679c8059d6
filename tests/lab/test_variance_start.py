import pytest
import torch

from normkit.lab.claims.variance_start import BATCHES, CLAIM, STARTS, build
from tiny_runs import tiny_run


def rows_of(late=0.001, first=2.0, early=1.0, neither=-0.1, accuracy=0.9, jitter=0.01, seeds=5):
    """Distances to either side of the loss with a start at 1; elsewhere they say the contrary."""

    def moved(start, batches, seed):
        spread = 1 + jitter * (seed - 2)
        if start == "none":
            return neither * spread if batches <= 5 else 9.0
        if batches == 1:
            return first * spread
        return late * spread * (-1) ** seed if batches == 50 else early * spread if batches <= 5 else -9.0

    return [
        {
            "norm": "batch", "start": start, "seed": seed, "batches": batches,
            "test_loss": 3.0 + (moved(start, batches, seed) if start != "1" else 0.0),
            "test_accuracy": accuracy if batches == 70 else 0.1,
        }
        for start in STARTS for seed in range(seeds) for batches in (*BATCHES, 70)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"late": 0.1}, "refuted"),
        ({"late": 0.0101, "jitter": 0.05}, "inconclusive"),
        ({"accuracy": 0.1}, "not testable here"),
        ({"first": 0.01}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [({}, 0, "supported"), ({"early": -2.0}, 0, "refuted"), ({}, 1, "supported"), ({"neither": 0.1}, 1, "refuted")],
)
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert (verdict.verdict, verdict.details[place].outcome) == ("supported", expected)


def test_starts_differ_in_the_stored_variance_alone():
    models = {start: torch.manual_seed(0) and build(start) for start in STARTS}
    assert [model.norm3.running_var.unique().tolist() for model in models.values()] == [[0.0], [1.0], [1.0]]
    assert models["none"].norm3.average == "debiased"
    assert all(torch.equal(model.fc1.weight, models["1"].fc1.weight) for model in models.values())


def test_measured_rows_can_be_judged_and_shown():
    rows = tiny_run(CLAIM, epochs=2, batch_size=2)
    assert CLAIM.judge(rows).primary.seeds == 2
    by_start = {start: [row["test_loss"] for row in rows if row["start"] == start] for start in STARTS}
    assert all(len(losses) == 2 * 7 for losses in by_start.values())
    assert by_start["0"][0] != by_start["1"][0]
    assert len(CLAIM.show(rows)) == 2
