import pytest
import torch

from normkit.lab.claims.recurrent import CLAIM, STEPS, RowReader, with_shared_statistics
from normkit.lab.training import evaluate
from tiny_runs import tiny_run

NORMS = ("none", "batch", "layer")


def rows_of(layer=0.05, none=-0.1, shared=0.2, accuracy=0.8, jitter=0.002, seeds=5):
    """Accuracies beside batch norm's; in the first epoch the other way round."""
    beside = {"none": layer + none, "batch": 0.0, "layer": layer}
    return [
        {
            "norm": norm, "seed": seed, "epoch": epoch, "train_loss": 0.1,
            "test_accuracy": accuracy + (-1 if epoch == 1 else 1) * beside[norm]
            + (norm == "layer") * jitter * (seed - 2),
            "shared_accuracy": accuracy - (norm == "batch") * (shared + 0.001 * seed),
        }
        for norm in NORMS for seed in range(seeds) for epoch in (1, 2, 3, 4)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "supported"),
        ({"layer": -0.05}, "refuted"),
        ({"layer": 0.0}, "no difference worth having"),
        ({"layer": 0.01, "jitter": 0.01}, "inconclusive"),
        ({"accuracy": 0.1}, "not testable here"),
    ],
)
def test_question_decides_synthetic_rows(changes, expected):
    assert CLAIM.judge(rows_of(**changes)).verdict == expected


@pytest.mark.parametrize(
    ("changes", "place", "expected"),
    [
        ({}, 0, "supported"), ({"none": 0.1}, 0, "refuted"), ({"none": 0.0}, 0, "no difference worth having"),
        ({}, 1, "supported"), ({"shared": 0.01}, 1, "refuted"),
    ],
)  # fmt: skip
def test_details_have_outcomes_of_their_own_and_never_veto(changes, place, expected):
    verdict = CLAIM.judge(rows_of(**changes))
    assert (verdict.verdict, verdict.details[place].outcome) == ("supported", expected)


def test_steps_share_gamma_and_beta_and_store_statistics_of_their_own():
    model = RowReader("batch")
    assert len(list(model.norms.parameters())) == 2
    assert all(layer.weight is model.norms[0].weight for layer in model.norms)
    model.train()(torch.randn(16, 1, 28, 28))
    means = torch.stack([layer.running_mean for layer in model.norms])
    assert len(means.unique(dim=0)) == STEPS


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_mates_are_seen_by_batch_norm_alone(norm):
    model = RowReader(norm).train()
    images = torch.randn(8, 1, 28, 28)
    whole, part = model(images)[:4], model(images[:4])
    assert torch.allclose(whole, part, atol=1e-5) == (norm == "layer")


def test_shared_statistics_leave_the_model_as_it_was():
    model = RowReader("batch").train()
    images, labels = torch.randn(40, 1, 28, 28), torch.arange(40) % 10
    model(images)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    usual = evaluate(model, images, labels)
    with_shared_statistics(model, images, labels, [images[:20], images[20:]])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert evaluate(model, images, labels) == usual
    assert not any(layer is model.norms[0] for layer in model.norms[1:])


def test_measured_rows_can_be_judged_and_shown():
    rows = tiny_run(CLAIM, epochs=1, batch_size=20)
    assert CLAIM.judge(rows).primary.seeds == 2
    assert len(CLAIM.show(rows)) == 2
