import pytest
import torch

from normkit.lab.claims.batch_statistics import CLAIM, WAYS, build
from tiny_runs import tiny_run
from tolerances import assert_close


def rows_of(better=0.05, gap=0.02, fit=0.5, accuracy=0.8, jitter=0.001, seeds=5):
    """Both sides go through the same training losses, and the batch's is the more accurate at each; it ends lower."""
    rows = []
    for way in WAYS:
        batch = way == "batch"
        for seed in range(seeds):
            for epoch in range(1, 5):
                fit_loss = 0.8 / 2**epoch * (fit if batch and epoch == 4 else 1)
                rows.append({
                    "norm": "batch", "statistics": way, "seed": seed, "epoch": epoch, "train_loss": fit_loss,
                    "fit_loss": fit_loss * (1 + 0.01 * seed * batch), "test_accuracy": accuracy,
                    "test_loss": 0.6 - batch * better + batch * jitter * (seed - 2),
                    "train_accuracy": accuracy + 0.1 - batch * (gap + 0.001 * seed),
                })  # fmt: skip
    return rows


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"better": -0.05}, "refuted"),
        ({"better": 0.0}, "no difference worth having"),
        ({"better": 0.01, "jitter": 0.01}, "inconclusive"),
        ({"accuracy": 0.1}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [({}, 0, "supported"), ({"gap": -0.02}, 0, "refuted"), ({}, 1, "supported"), ({"fit": 2.0}, 1, "refuted")],
)
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert (verdict.verdict, verdict.details[place].outcome) == ("supported", expected)


def test_losses_are_compared_where_both_sides_fit_equally_well():
    rows = rows_of(better=0.0)
    for row in rows:
        # Only where the other side has not been does the batch's side get better.
        if row["statistics"] == "batch" and row["epoch"] == 4:
            row |= {"fit_loss": 0.001, "test_loss": 0.1}
        if row["statistics"] == "population" and row["epoch"] == 4:
            row["fit_loss"] = 0.1
    assert abs(CLAIM.judge(rows).primary.effect) < 0.01


def test_the_populations_side_normalizes_with_the_average_and_not_with_the_batch():
    torch.manual_seed(0)
    x = torch.randn(64, 128) * 3 + 1
    for way in WAYS:
        norm = build(way).norms[0].train()
        for _ in range(3):
            norm(x)
        other = x[:8] * 2 - 5
        mean, var = (norm.get_buffer(name).clone() for name in ("running_mean", "running_var"))
        by_population = (other - mean) / torch.sqrt(var + norm.eps)
        by_batch = (other - other.mean(0)) / torch.sqrt(other.var(0, correction=0) + norm.eps)
        expected = by_batch if way == "batch" else by_population
        assert_close(norm(other), expected, dtype=torch.float32)


def test_measured_rows_can_be_judged_and_shown():
    rows = tiny_run(CLAIM, epochs=2, batch_size=16)
    assert CLAIM.judge(rows).primary.seeds == 2
    assert len(rows) == 2 * 2 * 2
    chart, table = CLAIM.show(rows)
    assert [mark.label for mark in chart.panels[0].marks] == list(WAYS.values())
    assert [line[0] for line in table.rows] == list(WAYS.values())
