import pytest
import torch
from torch.nn import functional

from normkit.lab.claims.augmentation import CLAIM, STRENGTHS, gains
from normkit.lab.data import limited, load
from normkit.lab.distortion import Distortion, distorted_once
from normkit.lab.training import seeded
from tiny_runs import tiny_run
from tolerances import assert_close


def rows_of(batch=0.01, none=0.05, spread=0.001, seeds=5, norms=("none", "batch")):
    """A last epoch with these gains, and a first one with gains the other way."""
    return [
        {
            "norm": norm, "strength": strength, "seed": seed, "epoch": epoch, "train_loss": 0.1, "test_accuracy": 0.9,
            "late_accuracy": 0.9
            + (1 if epoch == 2 else -1) * (none if norm == "none" else batch) * (strength > 0)
            + (spread if norm == "none" else -spread) * (strength > 0) * (seed - 2),
        }
        for strength in STRENGTHS
        for norm in norms
        for seed in range(seeds)
        for epoch in (1, 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"batch": 0.05, "spread": 0.0003}, "no difference worth having"),
        ({"batch": 0.09}, "refuted"),
        ({"batch": 0.045}, "inconclusive"),
        ({"none": -0.05}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


def test_too_little_to_judge_is_inconclusive():
    assert CLAIM.judge([]).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(seeds=1)).verdict == "inconclusive"


def test_gain_is_the_mean_over_strengths():
    rows = [
        {"strength": strength, "seed": 0, "late_accuracy": accuracy}
        for strength, accuracy in zip(STRENGTHS, (0.5, 0.6, 0.9), strict=True)
    ]
    assert gains(rows) == {0: pytest.approx(0.25)}


def test_shown_is_accuracy_against_strength():
    chart, table = CLAIM.show(rows_of())
    assert list(chart.panels[0].marks[0].x) == list(STRENGTHS)
    assert table.rows[0][-1] == "0.0500 ± 0.0016"


def drawn(monkeypatch, *values):
    """Let the next draws be these numbers from -1 to 1: angle, right, down, contrast, brightness."""
    numbers = (torch.tensor(values)[:, None] + 1) / 2
    monkeypatch.setattr(torch, "rand", lambda *shape, device: numbers.expand(shape))


def test_distortion_by_whole_pixels_and_by_light_is_exact(monkeypatch):
    images = torch.randn(3, 1, 28, 28)
    drawn(monkeypatch, 0.0, 0.5, -0.25, 0.5, 1.0)
    shifted = functional.pad(images, (0, 2, 1, 0), mode="replicate")[:, :, :28, 2:]
    assert_close(Distortion(1.0)(images), shifted * 1.25 + 0.5, dtype=torch.float32)


def test_distortion_turns_the_image(monkeypatch):
    images = torch.randn(1, 1, 28, 28)
    drawn(monkeypatch, 1.0, 0.0, 0.0, 0.0, 0.0)
    # Strength 3 turns by three times 30 degrees. A place in the grid rounds, which moves a value by more than its own.
    assert_close(Distortion(3.0)(images), images.rot90(1, (2, 3)), dtype=torch.float16)


def test_distortion_draws_each_image_by_itself_and_repeats_with_the_seed():
    images = torch.randn(1, 1, 28, 28).expand(4, 1, 28, 28)
    with seeded(7):
        first = Distortion(1.0)(images)
    with seeded(7):
        again = Distortion(1.0)(images)
    assert torch.equal(first, again)
    assert len({float(image.sum()) for image in first}) == 4


def test_images_distorted_once_are_others_for_each_seed_and_keep_their_labels():
    dataset = limited(load("digits"), 60, 30)
    first, again, other = (distorted_once(dataset, 1.0, seed) for seed in (0, 0, 1))
    assert torch.equal(first.train_images, again.train_images)
    assert torch.equal(first.test_images, again.test_images)
    assert not torch.equal(first.train_images, other.train_images)
    assert not torch.equal(first.test_images, dataset.test_images)
    assert torch.equal(first.train_labels, dataset.train_labels)
    assert torch.equal(distorted_once(dataset, 0.0, 0).train_images, dataset.train_images)


def test_measured_rows_can_be_judged_and_shown():
    rows = tiny_run(CLAIM, epochs=1, batch_size=16)
    assert len(rows) == 12
    assert CLAIM.judge(rows).primary.seeds == 2
    assert CLAIM.show(rows)
