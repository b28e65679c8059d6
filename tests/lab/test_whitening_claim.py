import pytest

from normkit.lab.claims.whitening import CLAIM
from tiny_runs import tiny_run


def rows_of(ratio=3.0, gain=0.0, seeds=5, norms=("batch", "whitening")):
    """In the first epoch the gain is the other way, so that a rule that reads another epoch is seen."""
    return [
        {
            "norm": norm, "seed": seed, "epoch": epoch, "rate": 0.03, "train_loss": 0.1,
            "test_accuracy": 0.9
            + (gain if epoch == 2 else 0.02 - gain) * (norm == "whitening")
            + (0.001 if norm == "batch" else -0.001) * (seed - 2),
            "milliseconds_batch": 8.0 if norm == "whitening" else None,
            "milliseconds_whitening": 8.0 * ratio + 0.1 * (seed - 2) if norm == "whitening" else None,
        }
        for norm in norms
        for seed in range(seeds)
        for epoch in (1, 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"gain": -0.1}, "supported"),
        ({"ratio": 1.3}, "refuted"),
        ({"ratio": 1.5}, "inconclusive"),
        ({"gain": 0.03}, "refuted"),
        ({"gain": 0.01}, "inconclusive"),
    ],
)
def test_rule_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


def test_too_little_to_judge_is_inconclusive():
    assert CLAIM.judge([]).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(seeds=1)).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(norms=("batch",))).verdict == "inconclusive"


def test_shown_is_accuracy_by_epoch_and_by_time():
    chart, table = CLAIM.show(rows_of())
    assert [list(mark.x) for mark in chart.panels[0].marks] == [[1, 2], [1, 2]]
    assert [list(mark.x) for mark in chart.panels[1].marks] == [[8, 16], [24, 48]]
    assert "3.00" in table.note
    assert CLAIM.show(rows_of(norms=("batch",)))


def test_measured_rows_hold_the_times_of_both_norms_in_the_cells_of_whitening():
    rows = tiny_run(CLAIM, epochs=1, batch_size=16)
    timed = [row for row in rows if row["norm"] == "whitening"]
    assert all(row["milliseconds_whitening"] > row["milliseconds_batch"] > 0 for row in timed)
    assert all(row["milliseconds_batch"] is None for row in rows if row["norm"] == "batch")
    assert [part.seeds for part in CLAIM.judge(rows).parts] == [2, 2]
    assert CLAIM.show(rows)
