import pytest
import torch

from normkit.lab.claims.style import CLAIM, LOOKS, deviation, stylized, transferred
from tiny_runs import tiny_run
from tolerances import RELATIVE


def rows_of(
    style=0.1, plain_style=0.99, class_lost=0.0, float64=1e-15, float32=1e-7, changed=0.9, kept=0.8, seeds=5,
    sides=("no", "yes"),
):  # fmt: skip
    """In the first epoch nothing is told yet."""
    rows = []
    for side in sides:
        for seed in range(seeds):
            noise = (0.001 if side == "yes" else -0.001) * (seed - 2)
            told = {"style": style if side == "yes" else plain_style, "class": 0.9 - class_lost * (side == "yes")}
            rows += [
                {
                    "norm": "none", "instance": side, "seed": seed, "epoch": epoch,
                    **{f"accuracy_{task}": value + noise if epoch == 2 else 0.5 for task, value in told.items()},
                    "deviation_float64": float64 * (1 + 0.01 * seed), "deviation_float32": float32 * (1 + 0.01 * seed),
                    **({"look_before": 0.99, "look_changed": changed + noise, "look_kept": 0.05, "class_before": 0.8,
                        "class_kept": kept + noise} if side == "no" else {}),
                }
                for epoch in (1, 2)
            ]  # fmt: skip
    return rows


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"float64": 1e-11}, "refuted"),
        ({"float64": 0.98e-12}, "inconclusive"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({"float32": 1e-5}, 0, "refuted"),
        ({"float32": 1.96e-6}, 0, "inconclusive"),
        ({"style": 0.3}, 1, "refuted"),
        ({"style": 0.15}, 1, "inconclusive"),
        ({"plain_style": 0.4}, 2, "refuted"),
        ({"plain_style": 0.6}, 2, "inconclusive"),
        ({"class_lost": 0.2}, 3, "refuted"),
        ({"class_lost": 0.05}, 3, "inconclusive"),
        ({"changed": 0.3}, 4, "refuted"),
        ({"changed": 0.5}, 4, "inconclusive"),
        ({"kept": 0.7}, 5, "refuted"),
        ({"kept": 0.75}, 5, "inconclusive"),
    ],
)
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert verdict.verdict == "supported"
    assert verdict.details[place].outcome == expected


def test_too_little_to_judge_is_inconclusive():
    assert CLAIM.judge([]).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(seeds=1)).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(sides=("no",))).details[1].outcome == "inconclusive"


def test_deviation_sees_statistics_that_are_not_the_style_s():
    style = torch.randn(3, 2, 5, 7, dtype=torch.float64) + 1
    assert deviation(style.flip(3), style) < RELATIVE[torch.float64]
    assert deviation(style * 1.01, style) > 0.005
    assert deviation(style + 0.01, style) > 0.001


def test_stylized_images_of_one_style_share_statistics_and_differ_in_content():
    made = stylized(torch.randn(40, 1, 28, 28), seed=0, draw=1, dtype=torch.float64)
    same = made.styles == made.styles.mode().values
    assert 1 < int(same.sum()) < 40
    means, first = made.features.mean((2, 3)), made.features[same][0]
    assert float((means[same] - first.mean((1, 2))).abs().max()) < RELATIVE[torch.float64]
    assert float((means[~same] - first.mean((1, 2))).abs().amax(1).min()) > 0.01
    assert float((made.features[same][1] - first).abs().max()) > 0.1


def test_shown_are_style_and_class_and_the_exactness():
    chart, table, transfer = CLAIM.show(rows_of())
    style, classes, exactness = chart.panels
    assert [[round(value, 2) for value in mark.y] for mark in style.marks] == [[0.5, 0.99], [0.5, 0.1], [0.1, 0.1]]
    assert [mark.label for mark in classes.marks] == ["plain", "instance-normalized", "chance"]
    assert list(exactness.marks[0].heights) == pytest.approx([1.02e-15, 1.02e-7])
    assert [line[0] for line in table.rows] == ["plain", "instance-normalized"]
    assert [line[1][:6] for line in transfer.rows] == ["0.9900", "0.8000"]
    assert CLAIM.show(rows_of(sides=("yes",)))[2].rows == []


def test_transfer_gives_features_the_statistics_of_an_image_of_another_look():
    images = torch.randn(40, 1, 28, 28)
    before, after, own, other = transferred(images, seed=0, draw=1)
    assert not (own == other).any()
    assert {int(look) for look in own} == set(range(len(LOOKS)))
    again = transferred(images, seed=0, draw=1)
    assert all(torch.equal(a, b) for a, b in zip((before, after, own, other), again, strict=True))
    # Content stays: each channel is its own, at another mean and scale.
    flat, changed = (x.double().flatten(2) - x.double().flatten(2).mean(2, keepdim=True) for x in (before, after))
    likeness = (flat * changed).sum(2) / (flat.norm(dim=2) * changed.norm(dim=2))
    assert float(likeness.min()) > 0.999
    assert float((before.std((2, 3)) - after.std((2, 3))).abs().max()) > 0.5


def test_measured_rows_can_be_judged_and_shown():
    rows = tiny_run(CLAIM, train_images=300, test_images=100, epochs=6)
    verdict = CLAIM.judge(rows)
    assert verdict.primary.effect < 1e-12
    assert verdict.details[0].effect < 2e-6
    assert verdict.details[1].effect < 0.3 < 0.8 < max(row["accuracy_style"] for row in rows if row["instance"] == "no")
    assert all(0 <= row["class_kept"] <= 1 for row in rows if row["instance"] == "no")
    assert CLAIM.show(rows)
