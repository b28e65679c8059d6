import math

import pytest
import torch

from normkit.lab.claims.weight_equilibrium import CLAIM, PAIRS, effective_rate
from normkit.lab.networks import DenseNetwork
from tiny_runs import tiny_run


def rows_of(apart=0.05, weak=-1.0, moves=0.0, worse=0.001, accuracy=0.9, jitter=0.01, seeds=5):
    """Effective rates beside the fast pair's; in the first two epochs of four they say the contrary."""
    beside = {"fast": 0.0, "slow": apart, "weak": apart + weak}

    def effective(pair, seed, epoch):
        if epoch <= 2:
            return 9.0 * (pair == "fast")
        # The pair with the smaller product need not have settled.
        moved = {"fast": 0.0, "slow": moves, "weak": -5.0}[pair] if epoch == 3 else 0.0
        spread = {"fast": 0, "slow": seed - 2, "weak": 1 - seed}[pair]
        return -3.0 + beside[pair] + moved + jitter * spread

    return [
        {
            "norm": "batch", "pair": pair, "seed": seed, "epoch": epoch, "before": 1.0, "train_loss": 0.1,
            "effective": effective(pair, seed, epoch),
            "test_accuracy": accuracy - (pair == "slow") * (worse + 0.0001 * seed),
        }
        for pair in PAIRS for seed in range(seeds) for epoch in (1, 2, 3, 4)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"apart": 0.5}, "refuted"),
        ({"apart": -0.5}, "refuted"),
        ({"apart": 0.25}, "inconclusive"),
        ({"accuracy": 0.12}, "not testable here"),
        ({"moves": 0.5}, "not testable here"),
        ({"moves": -0.5}, "not testable here"),
        ({"weak": 3.0}, "supported"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({}, 0, "supported"), ({"worse": 0.05}, 0, "refuted"),
    ],
)  # fmt: skip
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert (verdict.verdict, verdict.details[place].outcome) == ("supported", expected)


def test_pairs_are_what_the_claim_says():
    products = {pair: rate * decay for pair, (rate, decay) in PAIRS.items()}
    assert products["fast"] == pytest.approx(products["slow"], rel=1e-12)
    assert products["slow"] == pytest.approx(4 * products["weak"], rel=1e-12)


def test_effective_rate_falls_with_the_square_of_the_weights():
    model = DenseNetwork([7, 5], "batch")
    once = effective_rate(model, 0.1)
    with torch.no_grad():
        for linear in model.linears:
            linear.weight.mul_(3.0)
    assert effective_rate(model, 0.1) == pytest.approx(once - 2 * math.log2(3), abs=1e-5)
    assert effective_rate(model, 0.4) == pytest.approx(once - 2 * math.log2(3) + 2, abs=1e-5)


def test_measured_rows_can_be_judged_and_shown():
    rows = tiny_run(CLAIM, epochs=4, batch_size=16)
    assert CLAIM.judge(rows).primary.seeds == 2
    before = {row["pair"]: row["before"] for row in rows if row["seed"] == 0}
    assert before["fast"] - before["slow"] == pytest.approx(2.0, abs=1e-9)
    assert before["slow"] == before["weak"]
    assert len(CLAIM.show(rows)) == 2


def test_decay_is_on_the_weights_before_norms_alone(monkeypatch):
    # With a loss whose gradients are all zero, decay alone moves the weights.
    def still(model, images, labels):
        loss = (model(images) * 0).sum()
        loss.backward()
        return loss.detach()

    monkeypatch.setattr("normkit.lab.claims.weight_equilibrium.large_batch", still)
    rows = [row for row in tiny_run(CLAIM, seeds=1, epochs=1, batch_size=20) if row["pair"] == "fast"]
    rate, decay = PAIRS["fast"]
    assert rows[0]["effective"] - rows[0]["before"] == pytest.approx(-2 * 3 * math.log2(1 - rate * decay), rel=1e-4)
