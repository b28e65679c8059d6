import pytest
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from normkit.lab.claims.whitening import BATCH, CLAIM, GROUP, MAPS, ROOT, layer_operations, norm_operations
from normkit.lab.small_network import SmallLeNet
from tiny_runs import tiny_run


def rows_of(ratio=3.0, gain=0.0, stored=0.0, accuracy=0.9, seeds=5, norms=("batch", "whitening")):
    """In the first epoch the gain is the other way, so that a rule that reads another epoch is seen."""
    return [
        {
            "norm": norm, "seed": seed, "epoch": epoch, "rate": 0.03, "train_loss": 0.1,
            "test_accuracy": accuracy
            + (gain if epoch == 2 else 0.02 - gain) * (norm == "whitening")
            + (0.001 if norm == "batch" else -0.001) * (seed - 2),
            "stored_accuracy": accuracy + (stored + 0.001 * seed) * (norm == "whitening"),
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
        ({"gain": 0.03}, "refuted"),
        ({"gain": 0.01}, "inconclusive"),
        ({"accuracy": 0.1}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({"ratio": 1.3}, 0, "refuted"),
        ({"ratio": 1.5}, 0, "inconclusive"),
        ({"stored": 0.05}, 1, "refuted"),
    ],
)
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert verdict.verdict == "supported"
    assert verdict.details[place].outcome == expected


def test_too_little_to_judge_is_inconclusive():
    assert CLAIM.judge([]).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(seeds=1)).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(norms=("batch",))).verdict == "inconclusive"


def test_shown_is_accuracy_by_epoch_and_by_time():
    chart, table, _ = CLAIM.show(rows_of())
    assert [list(mark.x) for mark in chart.panels[0].marks] == [[1, 2], [1, 2]]
    assert [list(mark.x) for mark in chart.panels[1].marks] == [[8, 16], [24, 48]]
    assert "3.00" in table.note
    assert CLAIM.show(rows_of(norms=("batch",)))


def test_measured_rows_hold_the_times_of_both_norms_in_the_cells_of_whitening():
    rows = tiny_run(CLAIM, epochs=1, batch_size=16)
    timed = [row for row in rows if row["norm"] == "whitening"]
    assert all(row["milliseconds_whitening"] > row["milliseconds_batch"] > 0 for row in timed)
    assert all(row["milliseconds_batch"] is None for row in rows if row["norm"] == "batch")
    assert CLAIM.judge(rows).primary.seeds == 2
    assert CLAIM.show(rows)


def products(norm):
    """Return the multiplications of the matrix products and convolutions of a step, as torch counts them."""
    images, labels = torch.randn(BATCH, 1, 28, 28), torch.zeros(BATCH, dtype=torch.long)
    net = SmallLeNet(norm)
    with FlopCounterMode(display=False) as counter:
        functional.cross_entropy(net(images), labels).backward()
    return counter.get_total_flops() / 2


def test_operations_counted_are_those_that_torch_counts():
    assert products("none") == layer_operations(BATCH)
    # torch counts no eigenvectors and nothing by element: beside these, whitening's products are as counted.
    roots = sum(ROOT * min(GROUP, channels) ** 3 * (channels // min(GROUP, channels)) for channels, _ in MAPS)
    by_element = 6 * BATCH * sum(channels * positions for channels, positions in MAPS)
    ours = norm_operations("whitening", BATCH) - by_element
    assert ours - roots <= products("whitening") - products("none") <= ours


def test_shown_are_the_operations_beside_the_time():
    *_, counted = CLAIM.show(rows_of())
    assert [line[0] for line in counted.rows] == ["batch", "whitening"]
    assert counted.rows[0][3] == "1.00"
    assert 1.2 < float(counted.rows[1][3]) < 2.0
