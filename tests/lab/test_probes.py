import pytest
import torch
from torch import nn
from torch.nn import functional

from normkit.lab.data import load
from normkit.lab.networks import DenseNetwork, FourConvolutions
from normkit.lab.probes import drift, input_moments, probe, recorded, retaken
from normkit.lab.training import TrainingSettings, deterministic, train, with_seed
from small_fashion_mnist import write_small_fashion_mnist
from tolerances import assert_close

SETTINGS = TrainingSettings(epochs=3, batch_size=32, optimizer="sgd", learning_rate=0.1, momentum=0.9)


@pytest.fixture
def small(tmp_path):
    return load("fashion-mnist", write_small_fashion_mnist(tmp_path / "data"))


def trained(dataset, probed):
    """Train a net whose dropout draws random numbers; between the epochs, do everything a claim may do to a copy."""
    torch.manual_seed(3)
    model = with_seed(lambda: DenseNetwork([20, 20], "batch", dropout=0.5, dropout_after=0), 1)
    with deterministic("cpu"):
        for _ in train(model, dataset, SETTINGS, seed=1):
            if probed:
                look(model, dataset)
    return model


def look(model, dataset):
    with probe(model) as copied, recorded(copied, ["norms.0"]) as seen:
        copied.train()
        functional.cross_entropy(copied(dataset.train_images), dataset.train_labels).backward()
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.add_(1.0)
        torch.rand(7)
    assert seen["norms.0"][1].shape == (130, 20)


def test_probes_change_no_bit_of_the_training(small):
    plain, probed = trained(small, probed=False), trained(small, probed=True)
    assert all(torch.equal(value, probed.state_dict()[name]) for name, value in plain.state_dict().items())
    assert int(plain.norms[0].num_batches_tracked) == 12


def test_recorded_are_the_input_and_output_of_the_module_and_the_hooks_end():
    model = FourConvolutions("batch")
    images = torch.randn(3, 1, 28, 28)
    with recorded(model, ["convolutions.0", "norms.0"]) as seen:
        model(images)
    assert torch.equal(seen["convolutions.0"][0], images)
    assert seen["norms.0"][0] is seen["convolutions.0"][1]
    kept = seen["norms.0"][1]
    model(images)
    assert seen["norms.0"][1] is kept


def test_input_moments_are_those_of_the_batch_by_channel(small):
    model = with_seed(lambda: DenseNetwork([20, 7]), 1)
    images = small.train_images[:37]
    moments = input_moments(model, ["linears.1"], images)
    with torch.no_grad():
        x = torch.relu(model.linears[0](images.flatten(1))).double()
    assert_close(moments["linears.1"][0], x.mean(0), dtype=torch.float64)
    assert_close(moments["linears.1"][1], x.std(0, correction=0), dtype=torch.float64)
    assert model.training


def test_drift_counts_mean_and_deviation_in_units_of_the_deviation():
    generator = torch.Generator().manual_seed(2)
    mean, deviation = torch.randn(5, generator=generator), torch.rand(5, generator=generator) + 0.5
    unit = float(deviation.square().mean().sqrt())
    moved = {"a": (mean + 0.3, deviation * 2), "b": (mean, deviation)}
    means, deviations = drift({"a": (mean, deviation), "b": (mean, deviation)}, moved)
    assert means == pytest.approx([0.3 / unit, 0.0])
    assert deviations == pytest.approx([1.0, 0.0])


@pytest.mark.parametrize("dropout", [False, True])
def test_statistics_taken_again_are_the_plain_average_with_or_without_dropout(dropout):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3)).double()
    model[1].running_mean.fill_(7.0)
    x = torch.randn(4000, 3, dtype=torch.float64) + 1
    with retaken(model, x, 1000, dropout=dropout) as copied:
        mean, var = copied[1].running_mean, copied[1].running_var
        assert not copied.training
    assert torch.allclose(mean, x.mean(0), atol=0.1)
    expected = torch.stack([part.var(0) for part in x.split(1000)]).mean(0)
    if not dropout:
        assert torch.allclose(mean, x.mean(0), rtol=1e-12)
        assert torch.allclose(var, expected, rtol=1e-12)
    else:
        # Dropout of a half doubles the mean square and leaves the mean: E[x^2] = 2, so the variance is 4 - 1.
        assert torch.allclose(var, torch.full_like(var, 3.0), atol=0.3)
    # The model itself is as it was.
    assert model[1].running_mean.eq(7.0).all()
    assert model[0].p == 0.5
