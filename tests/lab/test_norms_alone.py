import pytest
import torch

from normkit.lab.claims.norms_alone import CLAIM, PARTS, build, learnt_numbers
from normkit.lab.data import limited, load
from normkit.lab.training import TrainingSettings, train
from tiny_runs import tiny_run


def rows_of(norms=0.7, more=0.1, less=0.2, classes=10, jitter=0.002, seeds=5):
    """The last accuracy with gamma and beta alone, and how far the others are; in the first epoch all are at 0.2."""
    last = {"norms": norms, "random": norms - more, "all": norms + less}
    return [
        {
            "norm": "batch", "part": part, "seed": seed, "epoch": epoch, "rate": 0.01, "train_loss": 0.1,
            "classes": classes,
            "test_accuracy": 0.2 if epoch == 1 else last[part] + (part == "norms") * jitter * (seed - 2),
        }
        for part in PARTS for seed in range(seeds) for epoch in (1, 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"norms": 0.5}, "refuted"),
        ({"norms": 0.552, "jitter": 0.01}, "inconclusive"),
        # Half of the way from chance to 1 is 0.505 with a hundred classes, 0.55 with ten.
        ({"norms": 0.52, "classes": 100}, "supported"),
        ({"less": -0.6}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({}, 0, "supported"), ({"more": -0.1}, 0, "refuted"), ({"more": 0.0}, 0, "no difference worth having"),
        ({}, 1, "supported"), ({"less": -0.1}, 1, "refuted"), ({"less": 0.0}, 1, "no difference worth having"),
    ],
)  # fmt: skip
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert (verdict.verdict, verdict.details[place].outcome) == ("supported", expected)


def test_parts_start_alike_and_are_as_many_numbers():
    models = {part: torch.manual_seed(0) and build("batch", part) for part in PARTS}
    for model in models.values():
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), models["all"].parameters(), strict=True))
    counts = {part: learnt_numbers(model) for part, model in models.items()}
    features = sum(module.num_features for module in models["norms"].modules() if hasattr(module, "num_features"))
    assert counts["norms"] == 2 * features
    # A weight whose input is nowhere active has a gradient of 0 in this batch.
    assert 0.9 * counts["norms"] < counts["random"] <= counts["norms"] < counts["all"]


@pytest.mark.parametrize("part", ["norms", "random"])
def test_training_changes_the_part_alone(part):
    digits = limited(load("digits"), 64, 20)
    model = torch.manual_seed(0) and build("batch", part)
    before = {name: value.clone() for name, value in model.named_parameters()}
    settings = TrainingSettings(epochs=2, batch_size=16, optimizer="adam", learning_rate=0.01)
    list(train(model, digits, settings, 0))
    changed = {name: int((value != before[name]).sum()) for name, value in model.named_parameters()}
    norms = {name for name, value in before.items() if value.ndim == 1 and "head" not in name and changed[name]}
    assert sum(changed.values()) <= 2 * sum(
        module.num_features for module in model.modules() if hasattr(module, "num_features")
    )
    assert (part == "norms") == bool(norms)
    assert changed["head.weight"] == changed["head.bias"] == 0


def test_measured_rows_can_be_judged_and_shown():
    rows = tiny_run(CLAIM, epochs=1, batch_size=20)
    assert CLAIM.judge(rows).primary.seeds == 2
    assert len(CLAIM.show(rows)) == 2
