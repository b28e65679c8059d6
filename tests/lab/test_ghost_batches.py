import pytest
import torch

from normkit.lab.claims.ghost_batches import CLAIM, LARGE, SMALL, WAYS, build, settings_of
from tiny_runs import tiny_run


def rows_of(ghost=0.05, costs=0.06, accuracy=0.9, jitter=0.001, seeds=5):
    """The large batch's accuracy beside the others'; before the last three measurements it is the other way round."""
    beside = {"small": costs, "large": 0.0, "ghost": ghost}
    return [
        {
            "norm": "batch", "way": way, "seed": seed, "epoch": epoch, "rate": 0.1, "fit_loss": 0.1, "test_loss": 0.2,
            "test_accuracy": 0.5 - 9 * beside[way] if epoch <= 2
            else accuracy - costs + beside[way] + (way == "ghost") * jitter * (seed - 2)
            + (way == "small") * 0.0005 * (seed - 2),
        }
        for way in WAYS for seed in range(seeds) for epoch in range(1, 6)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"ghost": -0.05}, "refuted"),
        ({"ghost": 0.0}, "no difference worth having"),
        ({"ghost": 0.01, "jitter": 0.01}, "inconclusive"),
        ({"accuracy": 0.15}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({}, 0, "supported"), ({"costs": -0.05}, 0, "refuted"),
        ({"ghost": 0.06}, 1, "supported"), ({"ghost": 0.03}, 1, "refuted"),
    ],
)  # fmt: skip
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert (verdict.verdict, verdict.details[place].outcome) == ("supported", expected)


def test_all_sides_take_the_same_number_of_steps():
    for settings in CLAIM.settings.values():
        steps = set()
        for way in WAYS:
            side = settings_of(way, settings)
            steps.add(side.epochs * (settings.train_images // side.batch_size))
        assert len(steps) == 1
        assert settings_of("ghost", settings).batch_size == LARGE == 16 * SMALL


def test_a_sample_notices_its_part_alone():
    images = torch.randn(2 * SMALL, 1, 28, 28)
    for part in (SMALL, LARGE):
        model = build("batch", part).train()
        alone = torch.allclose(model(images)[:SMALL], model(images[:SMALL]), atol=1e-5)
        assert alone == (part == SMALL)


def test_measured_rows_can_be_judged_and_shown():
    rows = tiny_run(CLAIM, epochs=2, batch_size=2)
    assert CLAIM.judge(rows).primary.seeds == 2
    assert {row["epoch"] for row in rows} == {1, 2}
    assert len(rows) == 3 * 2 * 2
    assert len(CLAIM.show(rows)) == 2
