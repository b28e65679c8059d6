import math

import pytest
import torch

from normkit.lab.claims.residual_gradient import CLAIM, DEEPEST, DEPTHS, MEAN_FIELD, NETS, DeepNetwork
from tiny_runs import tiny_run


def rows_of(plain=MEAN_FIELD * (DEEPEST - 1), residual=0.5, jitter=0.02, seeds=5):
    """At other depths the sides are exchanged, so that a rule that reads another depth is seen."""
    return [
        {
            "norm": "batch", "net": net, "depth": depth, "seed": seed, "gradients": [1.0] * depth,
            "decades": ((plain if (net == "plain") == (depth == DEEPEST) else residual)
            + (net == "residual") * jitter * (seed - 2)) * (1 + 0.001 * seed),
        }
        for net in NETS for depth in DEPTHS for seed in range(seeds)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"residual": 4.0}, "refuted"),
        ({"residual": MEAN_FIELD * (DEEPEST - 1) - 2.0, "jitter": 0.2}, "inconclusive"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({}, 0, "supported"), ({"residual": 1.5}, 0, "refuted"), ({"residual": 1.0}, 0, "inconclusive"),
        ({}, 1, "supported"), ({"plain": 8.0}, 1, "refuted"),
    ],
)  # fmt: skip
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert (verdict.verdict, verdict.details[place].outcome) == ("supported", expected)


def test_growth_of_the_mean_field_is_the_number_that_is_quoted():
    assert pytest.approx(math.sqrt(math.pi / (math.pi - 1)), rel=1e-12) == 10**MEAN_FIELD
    assert f"{10**MEAN_FIELD:.2f}" == "1.21"


def test_a_residual_net_without_layers_that_put_out_anything_is_the_identity_between_ends():
    model = DeepNetwork(3, "none", residual=True)
    for layer in model.layers:
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(model(images), model.head(torch.relu(model.first(images.flatten(1)))))


def test_measured_gradient_explodes_without_residual_connections():
    rows = tiny_run(CLAIM, seeds=1, batch_size=50)
    decades = {(row["net"], row["depth"]): row["decades"] for row in rows}
    assert decades["plain", 50] > decades["plain", 10] + 2
    assert decades["residual", 50] < decades["plain", 50] - 1
    assert len(CLAIM.show(rows)) == 2
