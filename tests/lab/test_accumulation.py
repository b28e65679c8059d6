import pytest

from normkit.lab.claims.accumulation import CLAIM, WAYS, distances
from tiny_runs import tiny_run


def rows_of(plain=0.1, exact=0.001, accuracy=0.9, lost=0.05, seeds=10, jitter=0.001):
    """Test losses around the large batch's: above in one epoch, below in the other."""
    apart, right = {"large": 0.0, "exact": exact, "plain": plain}, {"plain": accuracy - lost}
    return [
        {
            "norm": "batch", "way": way, "seed": seed, "epoch": epoch, "train_loss": 0.1,
            "test_loss": 1.0 + seed + (-1) ** epoch * (apart[way] + (way == "plain") * jitter * (seed % 5 - 2)),
            "test_accuracy": right.get(way, accuracy) + jitter * (way == "plain") * (seed % 3 - 1),
        }
        for way in WAYS
        for seed in range(seeds)
        for epoch in (1, 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"exact": 0.3}, "refuted"),
        ({"plain": 0.003}, "no difference worth having"),
        ({"plain": 0.0, "exact": 0.02, "jitter": 0.02}, "inconclusive"),
        ({"accuracy": 0.15}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [({"exact": 0.05}, 0, "inconclusive"), ({"lost": -0.05}, 1, "refuted"), ({"lost": 0.0}, 1, None)],
)
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert verdict.verdict == "supported"
    assert expected is None or verdict.details[place].outcome == expected


def test_too_little_to_judge_is_inconclusive():
    assert CLAIM.judge([]).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(seeds=1)).verdict == "inconclusive"


def test_a_tiny_run_measures_what_the_claim_is_about():
    rows = tiny_run(CLAIM, seeds=1, train_images=96, epochs=2, batch_size=32)
    near, far = distances(rows, "exact")[0], distances(rows, "plain")[0]
    assert near < 1e-3 < far
    chart, table = CLAIM.show(rows)
    assert len(chart.panels) == 2
    assert [line[0] for line in table.rows] == list(WAYS)
