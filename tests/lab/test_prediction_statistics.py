import copy
import math

import pytest
import torch

import normkit
from normkit.lab.claim import Cell
from normkit.lab.claims import prediction_statistics
from normkit.lab.claims.prediction_statistics import BESIDE, CLAIM, MOMENTA, WAYS, average_error
from normkit.lab.data import load
from normkit.lab.images import as_bits
from normkit.lab.networks import LeNet5
from normkit.lab.training import TrainingSettings
from tolerances import assert_close


def right_of(won, sign):
    """Return the bits of sixteen images: of eight on which the two differ the population gets so many right."""
    bits = torch.arange(16) < won, (torch.arange(16) >= won) & (torch.arange(16) < 8)
    return dict(zip(("right_population", "right_unbiased"), map(as_bits, bits[::sign]), strict=True))


def rows_of(nearer=1.0, better=0.02, formula=1e-12, jitter=0.001, seeds=5, beside=(), won=6):
    """The other momenta show the opposite, so that a rule that reads them is seen."""
    rows = []
    for momentum in MOMENTA:
        sign = 1 if momentum == 0.1 else -1
        for seed in range(seeds):
            for epoch in (1, 2):
                row = {"momentum": momentum, "seed": seed, "epoch": epoch, "formula": formula * (1 + 0.01 * seed)}
                row |= right_of(won - seed % 2, sign)
                for way in ("unbiased", "biased", "population", *beside):
                    gain = sign * (way == "population")
                    row[f"error_{way}"] = -1.0 - gain * (nearer + 0.01 * seed)
                    row[f"accuracy_{way}"] = 0.9 + gain * (better + jitter * seed)
                rows.append(row)
    return rows


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"better": -0.02}, "refuted"),
        ({"better": 0.0, "jitter": 0.0002}, "no difference worth having"),
        ({"better": -0.002}, "inconclusive"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({"nearer": 0.1}, 0, "refuted"),
        ({"nearer": 0.28}, 0, "inconclusive"),
        ({}, 1, "supported"),
        ({"won": 3}, 1, "refuted"),
        ({"won": 4}, 1, "inconclusive"),
        ({"formula": 1e-4}, 2, "refuted"),
    ],
)
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert verdict.verdict == "supported"
    assert verdict.details[place].outcome == expected


def test_too_little_to_judge_is_inconclusive():
    assert CLAIM.judge([]).verdict == "inconclusive"
    assert CLAIM.judge(rows_of(seeds=1)).verdict == "inconclusive"


def test_shown_are_all_ways_at_all_momenta():
    chart, table = CLAIM.show(rows_of())
    assert len(chart.panels[0].marks) == 3
    assert len(table.rows) == 9
    assert "half-life" not in table.note
    chart, table = CLAIM.show(rows_of(beside=BESIDE))
    assert len(chart.panels[0].marks) == 3
    assert [row[1] for row in table.rows[:7]] == [*WAYS.values(), *BESIDE.values()]
    assert len(table.rows) == 21
    assert "Nor does the half-life's" in table.note
    # A run that was begun before there were the other ways, and went on after.
    assert len(CLAIM.show(rows_of() + rows_of(beside=BESIDE))[1].rows) == 9


def test_other_laws_follow_the_same_training_and_the_population_is_what_recalibrate_writes():
    torch.manual_seed(0)
    model, images = LeNet5("batch"), torch.randn(96, 1, 28, 28)
    momentum = 0.3
    for layer in model.children():
        if hasattr(layer, "momentum"):
            layer.momentum = momentum
    model.train()
    laws = {"debiased": {"average": "debiased"}, "total": {"average": "debiased", "variance": "total"}}
    beside = {way: prediction_statistics._followed(model, momentum=momentum, **law) for way, law in laws.items()}
    alone = {way: copy.deepcopy(model) for way in laws}
    for way, other in alone.items():
        for name in beside[way]:
            layer = other.get_submodule(name)
            layer._forward_pre_hooks.clear()
            layer.average, layer.variance = laws[way]["average"], laws[way].get("variance", "batch")
    for batch in images.split(32):
        model(batch)
        for other in alone.values():
            other(batch)
    # Copies and evaluation move nothing.
    copy.deepcopy(model)(images), model.eval()(images)
    model.train()
    for way, other in alone.items():
        for name, (mean, var) in prediction_statistics._kept(dict(beside[way].items())).items():
            assert_close(mean, other.get_submodule(name).running_mean, dtype=torch.float32)
            assert_close(var, other.get_submodule(name).running_var, dtype=torch.float32)
    found = prediction_statistics._population(model, images, 32)
    for way, aggregate, values in (("population", "average", None), ("pooled", "pooled", {"norm1": 784, "norm4": 1})):
        written = copy.deepcopy(model)
        normkit.recalibrate(written, list(images.split(32)), aggregate=aggregate)
        for name in ("norm1", "norm4"):
            mean, var = found[way][name]
            count = 96 * values[name] if values else 0
            assert_close(mean, written.get_submodule(name).running_mean, dtype=torch.float32)
            expected = written.get_submodule(name).running_var
            # A layer's total variance divides by m.
            assert_close(var * count / (count - 1) if count else var, expected, dtype=torch.float32)


def test_a_run_measures_every_way():
    data = load("digits")
    settings = TrainingSettings(epochs=1, batch_size=64, optimizer="adam", learning_rate=0.002, train_images=256)
    variant = (("momentum", 0.01),)
    cell = Cell(claim=CLAIM.id, data="digits", norm="batch", seed=0, device="cpu", settings=settings, variant=variant)
    row = next(iter(CLAIM.measure(cell, data)))
    for way in (*WAYS, *BESIDE):
        assert math.isfinite(row[f"error_{way}"])
        assert 0 <= row[f"accuracy_{way}"] <= 1
    # After some dozen batches the start of 0 and 1 is most of what a plain average of momentum 0.01 holds.
    assert row["error_debiased"] < row["error_unbiased"]


def test_error_of_a_moving_average_is_the_decay_to_the_power_of_the_steps():
    assert average_error(seed=4) < 1e-12
