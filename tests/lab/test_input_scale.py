import pytest
import torch

from normkit.lab.claims.input_scale import CLAIM, INPUTS, as_pixels
from normkit.lab.data import limited, load
from tiny_runs import tiny_run


def rows_of(batch=0.0, none=0.05, own=0.0, plain_own=0.05, accuracy=0.9, jitter=0.002, seeds=5):
    """Accuracies lost with raw pixels; in the first epoch everything is the other way round."""
    lost = {
        ("batch", "pixels"): batch, ("none", "pixels"): none,
        ("batch", "pixels-own-rate"): own, ("none", "pixels-own-rate"): plain_own,
    }  # fmt: skip
    return [
        {
            "norm": norm, "input": given, "seed": seed, "epoch": epoch, "rate": 0.1, "train_loss": 0.1,
            "test_accuracy": 0.5 + lost.get((norm, given), 0.0) if epoch == 1
            else accuracy - (given != "standardised") * (lost.get((norm, given), 0.0) + jitter * (seed - 2)),
        }
        for norm in ("none", "batch") for given in INPUTS for seed in range(seeds) for epoch in (1, 2, 3, 4)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"batch": 0.03}, "refuted"),
        ({"batch": 0.01}, "inconclusive"),
        ({"accuracy": 0.15}, "not testable here"),
        ({"none": 0.005}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({}, 0, "supported"), ({"own": 0.05}, 0, "refuted"),
        ({}, 1, "supported"), ({"plain_own": -0.02}, 1, "refuted"),
    ],
)  # fmt: skip
def test_details_are_of_pixels_at_a_rate_of_their_own(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert (verdict.verdict, verdict.details[place].outcome) == ("supported", expected)


def test_pixels_are_the_images_as_they_came():
    digits = load("digits")
    raw = as_pixels(digits)
    assert (raw.train_images.min(), raw.train_images.max()) == (0.0, 255.0)
    standardised = (raw.test_images - raw.train_images.mean()) / raw.train_images.std()
    assert torch.allclose(standardised, digits.test_images, atol=1e-4)
    # A search draws from the whole, which must have the same scale.
    part = as_pixels(limited(digits, 100, 50))
    assert part.whole is as_pixels(digits)


def test_measured_rows_can_be_judged_and_shown():
    rows = tiny_run(CLAIM, epochs=1, batch_size=20)
    assert CLAIM.judge(rows).primary.seeds == 2
    rates = {(row["norm"], row["input"]): row["rate"] for row in rows}
    assert all(rates[norm, "pixels"] == rates[norm, "standardised"] for norm in ("none", "batch"))
    assert len(CLAIM.show(rows)) == 2
