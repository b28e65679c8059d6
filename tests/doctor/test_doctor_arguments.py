"""What the doctor is given that it cannot use is told in words, before anything is run."""

import pytest
import torch
from torch import nn

import normkit
from normkit.errors import ArgumentError


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()


def test_a_batch_without_samples_is_left_out_and_said():
    model, full = network(), [torch.randn(16, 3, 8, 8) for _ in range(4)]
    normkit.recalibrate(model, full)
    empty = torch.randn(0, 3, 8, 8)
    diagnosis = normkit.diagnose(model, [empty, *full, empty], labels=lambda batch: torch.zeros(len(batch)).long())
    assert diagnosis.samples == 64
    assert "2 batches without a sample" in diagnosis.notes
    assert diagnosis.gap.samples == 64
    with pytest.raises(ArgumentError, match="none of the 1 batches holds a sample"):
        normkit.diagnose(model, empty)


@pytest.mark.parametrize("samples", [0, -1, "a", 2.5, True])
def test_a_number_of_samples_that_is_none_is_refused(samples):
    with pytest.raises(ArgumentError, match="give a whole number above 0, or None"):
        normkit.diagnose(network(), torch.randn(4, 3, 8, 8), samples=samples)


def test_an_optimizer_that_is_none_is_refused():
    with pytest.raises(ArgumentError, match=r"optimizer= is 'sgd'; give the torch.optim.Optimizer"):
        normkit.diagnose(network(), optimizer="sgd")


def test_classes_that_are_words_are_refused_in_words():
    with pytest.raises(ArgumentError, match="labels= gave a list of str, such as 'cat'; needed is the class"):
        normkit.diagnose(network(), [torch.randn(8, 3, 8, 8)], labels=lambda batch: ["cat"] * 8)


@pytest.mark.parametrize("training", [False, True])
def test_an_exported_module_is_told_from_a_model_without_layers(training):
    example = torch.randn(4, 3, 8, 8)
    exported = torch.export.export(network().train(training), (example,)).module()
    diagnosis = normkit.diagnose(exported, example)
    assert not diagnosis.healthy
    assert bool(diagnosis.of("fold-ready")) == training
    assert "exported program's module, whose batch norms have become operators" in str(diagnosis)
    plain = normkit.diagnose(nn.Linear(2, 2))
    assert str(plain).splitlines()[0] == "nothing was examined: the model has no normalization layer"
