import math

import pytest
import torch

from normkit.lab.claims.weight_equilibrium import CLAIM, PAIRS, effective_rate
from normkit.lab.networks import DenseNetwork
from tiny_runs import tiny_run


def rows_of(apart=0.05, weak=-2.0, worse=0.001, accuracy=0.9, jitter=0.01, seeds=5):
    """Effective rates beside the fast pair's; in the first epoch they say the contrary."""
    beside = {"fast": 0.0, "slow": apart, "weak": apart + weak}
    return [
        {
            "norm": "batch", "pair": pair, "seed": seed, "epoch": epoch, "before": 1.0, "train_loss": 0.1,
            "effective": 9.0 * (pair == "fast") if epoch == 1
            else -3.0 + beside[pair] + jitter * (seed - 2) * (pair == "slow") - jitter * (seed - 1) * (pair == "weak"),
            "test_accuracy": accuracy - (pair == "slow") * (worse + 0.0001 * seed),
        }
        for pair in PAIRS for seed in range(seeds) for epoch in (1, 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"apart": 0.5}, "refuted"),
        ({"apart": -0.5}, "refuted"),
        ({"apart": 0.25}, "inconclusive"),
        ({"accuracy": 0.12}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({}, 0, "supported"), ({"weak": 0.0}, 0, "refuted"), ({"weak": -4.0}, 0, "refuted"),
        ({}, 1, "supported"), ({"worse": 0.05}, 1, "refuted"),
    ],
)  # fmt: skip
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert (verdict.verdict, verdict.details[place].outcome) == ("supported", expected)


def test_pairs_are_what_the_claim_says():
    products = {pair: rate * decay for pair, (rate, decay) in PAIRS.items()}
    assert products["fast"] == pytest.approx(products["slow"], rel=1e-12)
    assert products["slow"] == pytest.approx(16 * products["weak"], rel=1e-12)


def test_effective_rate_falls_with_the_square_of_the_weights():
    model = DenseNetwork([7, 5], "batch")
    once = effective_rate(model, 0.1)
    with torch.no_grad():
        for linear in model.linears:
            linear.weight.mul_(3.0)
    assert effective_rate(model, 0.1) == pytest.approx(once - 2 * math.log2(3), abs=1e-5)
    assert effective_rate(model, 0.4) == pytest.approx(once - 2 * math.log2(3) + 2, abs=1e-5)


def test_measured_rows_can_be_judged_and_shown():
    rows = tiny_run(CLAIM, epochs=2, batch_size=16)
    assert CLAIM.judge(rows).primary.seeds == 2
    before = {row["pair"]: row["before"] for row in rows if row["seed"] == 0}
    assert before["fast"] - before["slow"] == pytest.approx(2.0, abs=1e-9)
    assert before["slow"] == before["weak"]
    assert len(CLAIM.show(rows)) == 2
