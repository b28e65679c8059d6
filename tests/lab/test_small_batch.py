import pytest

from normkit.lab.charts import NORM_COLOURS
from normkit.lab.claims.small_batch import BATCH_SIZES, CLAIM, IMAGENET_ERRORS, NETS, PREDICTED, lost
from tiny_runs import tiny_run


def rows_of(
    batch=0.1, group=0.0, layer=0.0, dense=0.2, accuracy=0.8, jitter=0.001, seeds=10, norms=("batch", "group", "layer")
):
    """Losses at batches of two; at eight every norm has lost all, and in the first epoch the other way round."""
    losses = {"batch": batch, "group": group, "layer": layer}

    def lost_by(net, norm):
        return losses[norm] if net == "residual" else dense * (norm == "batch")

    return [
        {
            "norm": norm, "net": net, "batch_size": size, "seed": seed, "epoch": epoch, "rate": 0.03, "train_loss": 0.1,
            "test_accuracy": 0.0
            if size == 8
            else accuracy
            - ((lost_by(net, norm) if epoch == 2 else 0.1 - losses[norm]) if size == 2 else 0.0)
            + (jitter if norm == "batch" else -jitter) * (seed % 5 - 2) * (size == 2),
        }
        for net in NETS
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
        ({"batch": -0.05}, "refuted"),
        ({"batch": 0.0}, "no difference worth having"),
        ({"batch": 0.01, "jitter": 0.006}, "inconclusive"),
        ({"accuracy": 0.15}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({"layer": 0.2}, 0, "refuted"),
        ({"group": 0.05}, 1, "refuted"),
        ({"group": 0.02}, 1, "inconclusive"),
        ({"layer": 0.05}, 2, "refuted"),
        # Five seeds cannot tell a share from a half.
        ({}, 3, "inconclusive"),
    ],
)
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert verdict.verdict == "supported"
    assert verdict.details[place].outcome == expected


@pytest.mark.parametrize(("dense", "expected"), [(0.2, "supported"), (-0.2, "refuted")])
def test_net_with_a_normalized_dense_layer_is_told_apart_by_counting_seeds(dense, expected):
    verdict = CLAIM.judge(rows_of(batch=0.0, jitter=0.003, dense=dense))
    assert verdict.primary.seeds == 10
    assert verdict.details[3].outcome == expected


def test_too_little_to_judge_is_inconclusive():
    assert CLAIM.judge([]).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(seeds=1)).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(norms=("batch", "layer"))).verdict == "inconclusive"


def test_prediction_is_the_published_table():
    assert pytest.approx({"batch": 0.111, "group": 0.0}) == PREDICTED
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
    colours = {mark.label: mark.colour for panel in chart.panels for mark in panel.marks}
    assert colours["with batch norm, Wu and He"] == colours["with batch norm"] == NORM_COLOURS["batch"]
    assert table.rows[0][-1] == "0.1000 ± 0.0015"


def test_measured_rate_is_in_proportion_to_the_batch():
    rows = tiny_run(CLAIM, epochs=1, seeds=2)
    rates = {row["batch_size"]: row["rate"] for row in rows if (row["norm"], row["net"]) == ("batch", "residual")}
    assert rates[2] * 16 == pytest.approx(rates[32])
    assert rates[8] * 4 == pytest.approx(rates[32])
    assert CLAIM.judge(rows).primary.seeds == 2
    assert CLAIM.show(rows)
