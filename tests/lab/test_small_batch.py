import pytest

from normkit.lab.claims.small_batch import BATCH_SIZES, CLAIM, IMAGENET_ERRORS, lost
from tiny_runs import tiny_run


def rows_of(batch=0.1, group=0.0, layer=0.0, seeds=5, norms=("batch", "group", "layer")):
    """Losses at batches of two; at eight every norm has lost all, and in the first epoch the other way round."""
    losses = {"batch": batch, "group": group, "layer": layer}
    return [
        {
            "norm": norm, "batch_size": size, "seed": seed, "epoch": epoch, "rate": 0.03, "train_loss": 0.1,
            "test_accuracy": 0.0
            if size == 8
            else 0.8
            - ((losses[norm] if epoch == 2 else 0.1 - losses[norm]) if size == 2 else 0.0)
            + (0.001 if norm == "batch" else -0.001) * (seed - 2) * (size == 2),
        }
        for size in BATCH_SIZES
        for norm in norms
        for seed in range(seeds)
        for epoch in (1, 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"group": -0.05}, "supported"),
        ({"batch": 0.01}, "refuted"),
        ({"batch": 0.02}, "inconclusive"),
        ({"layer": 0.09}, "refuted"),
        ({"layer": 0.05}, "refuted"),
        ({"group": 0.02}, "inconclusive"),
    ],
)
def test_rule_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


def test_too_little_to_judge_is_inconclusive():
    assert CLAIM.judge([]).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(seeds=1)).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(norms=("batch", "group"))).verdict == "inconclusive"


def test_prediction_is_the_published_table():
    assert CLAIM.rules[0].predicted == pytest.approx(0.111)
    assert [CLAIM.rules[place].predicted for place in (1, 3)] == [None, None]
    assert CLAIM.rules[2].predicted == pytest.approx(0.0)
    assert IMAGENET_ERRORS["batch"][2] == 0.347


def test_lost_pairs_seeds_that_both_sizes_have():
    rows = [
        {"batch_size": size, "seed": seed, "test_accuracy": accuracy}
        for size, seed, accuracy in ((32, 0, 0.9), (32, 1, 0.9), (2, 1, 0.5))
    ]
    assert lost(rows) == {1: pytest.approx(0.4)}


def test_shown_is_the_error_against_the_batch_size_beside_the_published_one():
    chart, table = CLAIM.show(rows_of())
    assert [list(mark.x) for mark in chart.panels[0].marks] == [[2, 8, 32]] * 3
    assert [mark.colour for mark in chart.panels[1].marks] == [0, 1]
    assert table.rows[0][-1] == "0.1000 ± 0.0016"


def test_measured_rate_is_in_proportion_to_the_batch():
    rows = tiny_run(CLAIM, epochs=1, seeds=2)
    rates = {row["batch_size"]: row["rate"] for row in rows if row["norm"] == "batch"}
    assert rates[2] * 16 == pytest.approx(rates[32])
    assert rates[8] * 4 == pytest.approx(rates[32])
    assert [part.seeds for part in CLAIM.judge(rows).parts] == [2, 2, 2, 2]
    assert CLAIM.show(rows)
