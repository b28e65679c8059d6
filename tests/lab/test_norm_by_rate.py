import pytest

from normkit.lab.claims.norm_by_rate import CLAIM, OWNERS
from tiny_runs import tiny_run


def rows_of(by_rate=0.1, by_norm=0.0, plain=0.7, broken=0.3, larger=3, jitter=0.001, seeds=5):
    """The last accuracies; in the first epoch everything is the other way round."""
    last = {
        ("none", "plain"): plain, ("batch", "plain"): plain + by_norm,
        ("batch", "normed"): plain + by_norm + by_rate, ("none", "normed"): plain - broken,
    }  # fmt: skip
    return [
        {
            "norm": norm, "rate_of": owner, "seed": seed, "epoch": epoch,
            "rate": 0.1 * (larger if owner == "normed" else 1), "train_loss": 0.1,
            "test_accuracy": 1 - value if epoch == 1
            else value + ((norm, owner) == ("batch", "normed")) * jitter * (seed - 2)
            + ((norm, owner) == ("none", "plain")) * 0.0003 * (seed % 2),
        }
        for (norm, owner), value in last.items() for seed in range(seeds) for epoch in (1, 2, 3, 4)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"by_rate": 0.02, "by_norm": 0.1}, "refuted"),
        ({"by_rate": 0.05, "by_norm": 0.05}, "no difference worth having"),
        ({"by_rate": 0.06, "by_norm": 0.055, "jitter": 0.01}, "inconclusive"),
        ({"plain": 0.1, "by_rate": 0.02}, "not testable here"),
        ({"by_rate": -0.1}, "not testable here"),
        ({"larger": 1}, "not testable here"),
        ({"larger": 0.3}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({}, 0, "supported"), ({"by_norm": 0.02}, 0, "refuted"),
        ({}, 1, "supported"), ({"broken": -0.3}, 1, "refuted"),
    ],
)  # fmt: skip
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert (verdict.verdict, verdict.details[place].outcome) == ("supported", expected)


def test_both_nets_are_trained_at_both_rates():
    rows = tiny_run(CLAIM, epochs=1, batch_size=16)
    rates = {(row["norm"], row["rate_of"]): row["rate"] for row in rows}
    assert len(rates) == 4
    assert all(rates["none", owner] == rates["batch", owner] for owner in OWNERS)
    assert CLAIM.judge(rows).primary.seeds == 2
    assert len(CLAIM.show(rows)) == 2
