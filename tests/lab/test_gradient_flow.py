import math

import pytest

from normkit.lab.claims.gradient_flow import CLAIM, MEAN_FIELD_GROWTH, growth_per_layer


def rows_of(batch=0.5, none=-15.0, growth=1.46, seeds=5, norms=("none", "batch")):
    return [
        {
            "norm": norm, "activation": activation, "depth": depth, "seed": seed,
            "decades": (none if norm == "none" else batch) + 0.02 * seed,
            "growth": growth + 0.001 * seed if (norm, activation, depth) == ("batch", "relu", 30) else None,
        }
        for activation in ("sigmoid", "relu") for depth in (5, 10, 20, 30) for norm in norms for seed in range(seeds)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"none": 0.0}, "refuted"),
        ({"batch": -2.0}, "refuted"),
        ({"batch": math.log10(0.9**30) - 0.04}, "inconclusive"),
        ({"growth": 1.6}, "refuted"),
        ({"growth": MEAN_FIELD_GROWTH * 1.05 - 0.002}, "inconclusive"),
    ],
)
def test_rule_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


def test_sigmoid_at_depth_thirty_is_what_is_judged():
    rows = rows_of()
    for row in rows:
        if (row["activation"], row["depth"]) != ("sigmoid", 30):
            row["decades"] = -99.0
    assert CLAIM.judge(rows).verdict == "supported"


def test_another_norm_is_not_held_to_the_theory_of_batch_norm():
    verdict = CLAIM.judge(rows_of(norms=("none", "layer")))
    assert (verdict.verdict, len(verdict.parts)) == ("supported", 2)


def test_too_little_to_judge_is_inconclusive():
    assert CLAIM.judge([]).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(seeds=1)).verdict == "inconclusive"


def test_shown_are_both_activations_against_depth():
    chart, table = CLAIM.show(rows_of())
    assert [panel.title for panel in chart.panels] == ["sigmoid, at initialization", "relu, at initialization"]
    assert [mark.label for mark in chart.panels[0].marks] == ["without norm", "with batch norm", "0.9 to the depth"]
    assert len(table.rows) == 4
    assert "1.4669" in table.note


def test_growth_follows_the_batch_size_as_published():
    # Published for width 1024: 1.786 at a batch of 8. The rate falls towards pi/(pi-1) with the batch.
    assert growth_per_layer(0, width=256, depth=20, batch=8) == pytest.approx(1.786, rel=0.1)
