import math

import pytest
import torch

from normkit.lab.claims.gamma_and_beta import CLAIM, RATES, WAYS, at_best_fit, build, explained_by_a_line
from tiny_runs import tiny_run

# The rate that fits best is another one for each side; at the others everything says the contrary.
BEST = {"yes": 1.0, "no": 0.3}


def rows_of(worse=0.1, straight=0.98, bent=-0.05, gained=0.02, accuracy=0.9, jitter=0.002, seeds=5):
    return [
        {
            "norm": "batch", "learns": learns, "rate": rate, "seed": seed, "epoch": epoch,
            "fit_loss": 9.0 if rate != BEST[learns] else 0.2 + (learns == "no") * (worse + jitter * (seed - 2)),
            "straight": 0.5 if rate != BEST[learns] else straight + (learns == "yes") * bent + 0.001 * seed,
            "test_accuracy": 0.1 if rate != BEST[learns] else accuracy + (learns == "yes") * (gained + 0.001 * seed),
        }
        for learns in WAYS for rate in RATES for seed in range(seeds) for epoch in (1, 2)
    ]  # fmt: skip


def with_a_spread(rows):
    """Give the two sides' straightness another spread over seeds, so that their difference has a width."""
    return [{**row, "straight": row["straight"] + (row["learns"] == "no") * 0.001 * row["seed"]} for row in rows]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"worse": -0.1}, "refuted"),
        ({"worse": 0.0}, "no difference worth having"),
        ({"worse": 0.01, "jitter": 0.02}, "inconclusive"),
        ({"accuracy": 0.12}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({}, 0, "supported"), ({"straight": 0.9}, 0, "refuted"),
        ({}, 1, "supported"), ({"bent": 0.05}, 1, "refuted"),
        ({}, 2, "supported"), ({"gained": -0.05}, 2, "refuted"), ({"gained": -0.002}, 2, "no difference worth having"),
    ],
)  # fmt: skip
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(with_a_spread(rows_of(**changes)))
    assert (verdict.verdict, verdict.details[place].outcome) == ("supported", expected)


def test_a_run_that_is_not_finite_or_lacks_a_rate_is_not_the_best_fit():
    rows = rows_of(seeds=2)
    rows = [{**row, "fit_loss": None if row["rate"] == 3.0 else row["fit_loss"]} for row in rows]
    assert {row["rate"] for row in at_best_fit([row for row in rows if row["learns"] == "yes"])} == {1.0}
    lacking = [row for row in rows if (row["rate"], row["seed"]) != (0.1, 0)]
    assert {row["seed"] for row in at_best_fit(lacking)} == {1}


@pytest.mark.parametrize(("scale", "expected"), [(1e-3, 1.0), (1.0, 0.985), (1e4, 2 / math.pi)])
def test_a_line_explains_of_a_sigmoid_what_the_closed_form_says(scale, expected):
    # Of the sign of a standard normal a line explains 2/pi; of a line everything.
    normal = torch.erfinv(torch.linspace(-1, 1, 100_001, dtype=torch.float64)[1:-1])[:, None] * math.sqrt(2)
    assert explained_by_a_line(normal * scale) == pytest.approx(expected, abs=0.003)


def test_sides_start_alike_and_one_keeps_gamma_and_beta():
    having, lacking = (torch.manual_seed(0) and build("batch", way) for way in WAYS)
    assert all(torch.equal(a, b) for a, b in zip(having.parameters(), lacking.parameters(), strict=True))
    assert [name for name, parameter in lacking.named_parameters() if not parameter.requires_grad] == [
        f"norms.{place}.{name}" for place in range(3) for name in ("weight", "bias")
    ]
    assert all(parameter.requires_grad for parameter in having.parameters())


def test_measured_rows_can_be_judged_and_shown():
    rows = tiny_run(CLAIM, epochs=1, batch_size=20)
    assert CLAIM.judge(rows).primary.seeds == 2
    assert all(0.5 < row["straight"] <= 1 for row in rows)
    assert len(CLAIM.show(rows)) == 2
