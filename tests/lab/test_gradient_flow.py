import math

import pytest

from normkit.lab.claims.gradient_flow import CLAIM, MEAN_FIELD_GROWTH, growth_per_layer


def rows_of(batch=0.5, none=-15.0, growth=1.46, he=3.0, he_none=0.2, jitter=0.01, seeds=5, norms=("none", "batch")):
    return [
        {
            "norm": norm, "activation": activation, "initialization": start, "depth": depth, "seed": seed,
            "decades": (none if norm == "none" else batch + jitter * seed) + 0.02 * seed
            if (activation, start) != ("relu", "he") else (he_none if norm == "none" else he) + 0.02 * seed,
            "growth": growth + 0.001 * seed
            if (norm, activation, start, depth) == ("batch", "relu", "he", 30) else None,
        }
        for activation in ("sigmoid", "relu") for start in ("torch", "he") for depth in (5, 10, 20, 30)
        for norm in norms for seed in range(seeds)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"none": 0.0}, "refuted"),
        ({"none": -0.45, "jitter": 0.02}, "inconclusive"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({"batch": -2.0}, 0, "refuted"),
        ({"batch": math.log10(0.9**30) - 0.04}, 0, "inconclusive"),
        ({"he": 0.0}, 1, "refuted"),
        ({"he_none": 2.0}, 2, "refuted"),
        ({"growth": 1.6}, 3, "refuted"),
        ({"growth": MEAN_FIELD_GROWTH * 1.05 - 0.002}, 3, "inconclusive"),
    ],
)
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert verdict.verdict == "supported"
    assert verdict.details[place].outcome == expected


def test_sigmoid_at_depth_thirty_is_what_is_judged():
    rows = rows_of()
    for row in rows:
        if (row["activation"], row["initialization"], row["depth"]) != ("sigmoid", "torch", 30):
            row["decades"] = -99.0
    assert CLAIM.judge(rows).verdict == "supported"


def test_another_norm_is_not_held_to_the_theory_of_batch_norm():
    verdict = CLAIM.judge(rows_of(norms=("none", "layer")))
    assert (verdict.verdict, len(verdict.details)) == ("supported", 3)


def test_too_little_to_judge_is_inconclusive():
    assert CLAIM.judge([]).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(seeds=1)).verdict == "inconclusive"


def test_shown_are_both_activations_against_depth():
    chart, table = CLAIM.show(rows_of())
    assert [panel.title for panel in chart.panels] == [
        f"{activation}, {start}'s initialization" for activation in ("sigmoid", "relu") for start in ("torch", "he")
    ]
    assert [mark.label for mark in chart.panels[0].marks] == ["without norm", "with batch norm", "0.9 to the depth"]
    assert len(table.rows) == 8
    assert "1.4669" in table.note


def test_growth_follows_the_batch_size_as_published():
    # Published for width 1024: 1.786 at a batch of 8. The rate falls towards pi/(pi-1) with the batch.
    assert growth_per_layer(0, width=256, depth=20, batch=8) == pytest.approx(1.786, rel=0.1)
