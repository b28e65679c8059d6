import pytest
import torch

from normkit.lab.claims.rank_collapse import CLAIM, DEPTHS, effective_rank
from tiny_runs import tiny_run


def rows_of(none=1.2, batch=8.0, seeds=5):
    """At other depths the sides are exchanged, so that a rule that reads another depth is seen."""
    return [
        {"norm": norm, "depth": depth, "seed": seed, "rank": rank * (1 + (0.012 if norm == "batch" else 0.002) * seed)}
        for depth in DEPTHS for norm in ("none", "batch") for seed in range(seeds)
        for rank in [none if (norm == "none") == (depth == 50) else batch]
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, "supported"), ({"batch": 1.2}, "refuted"), ({"batch": 2.36}, "inconclusive")],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


def test_detail_never_vetoes():
    verdict = CLAIM.judge(rows_of(none=4.0, batch=30.0))
    assert (verdict.verdict, verdict.details[0].outcome) == ("supported", "refuted")


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_effective_rank_counts_equal_directions(rank):
    basis = torch.linalg.qr(torch.randn(11, rank, dtype=torch.float64)).Q
    assert effective_rank(basis.T * 5) == pytest.approx(rank, rel=1e-10)


def test_measured_rank_collapses_without_a_norm_and_not_with_it():
    rows = tiny_run(CLAIM, seeds=1, batch_size=50)
    ranks = {(row["norm"], row["depth"]): row["rank"] for row in rows}
    assert ranks["none", 50] < ranks["none", 5]
    assert ranks["batch", 50] > 2 * ranks["none", 50]
    assert len(CLAIM.show(rows)) == 2
