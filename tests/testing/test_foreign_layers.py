"""The kit reads layers of other libraries and tutorials by their own names, and says which conventions they follow."""

import pytest
import torch
from torch import nn

import foreign_layers as foreign
import normkit
from normkit.testing import check_norm_layer

BIASED = "weights the old value by momentum, as Keras, Flax and ONNX do and stores the biased variance"


def test_a_layer_with_keras_names_is_told_its_conventions():
    report = check_norm_layer(foreign.KerasNorm)
    assert BIASED in report.conventions
    assert "running update" not in report.passed_checks
    assert {"training output", "evaluation", "gradients"} <= set(report.passed_checks)
    assert "running update" not in report.skipped


def test_a_tutorials_layer_is_told_that_it_stores_the_biased_variance():
    report = check_norm_layer(foreign.ArticleNorm)
    found = [finding for finding in report.findings if finding.check == "running update"]
    assert [finding.convention for finding in found] == ["stores the biased variance"]
    assert {"training output", "evaluation", "gradients", "double gradients"} <= set(report.passed_checks)


@pytest.mark.parametrize("cls", [foreign.BatchNormAct2d, foreign.ABN])
def test_what_a_layer_brings_along_is_taken_off_and_told(cls):
    report, plain = check_norm_layer(cls), check_norm_layer(nn.BatchNorm2d)
    assert "of the layer was taken off" in report.skipped["what comes after"]
    assert {"training output", "evaluation", "gradients", "running update"} <= set(report.passed_checks)
    assert "what comes after" not in plain.skipped


def test_a_layer_given_as_an_object_keeps_what_it_brings():
    layer = foreign.BatchNormAct2d(6)
    check_norm_layer(layer)
    assert isinstance(layer.act, nn.ReLU)


def test_a_frozen_layer_is_told_to_be_one():
    report = check_norm_layer(foreign.FrozenBatchNorm2d)
    assert "normalizes with what it stores in training too, as a frozen layer does" in report.conventions
    assert "does not update its running statistics" in report.conventions
    assert "evaluation" in report.passed_checks


def test_an_impostor_is_told_by_its_names_alone():
    report = check_norm_layer(foreign.Deviation)
    assert not report.conforms
    assert "running update" not in report.skipped


def test_a_registered_layer_is_read_by_its_registration():
    class Odd(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.g, self.b = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
            self.register_buffer("mu", torch.zeros(channels))
            self.register_buffer("sigma2", torch.ones(channels))

        def forward(self, x):
            return nn.functional.batch_norm(x, self.mu, self.sigma2, self.g, self.b, self.training, 0.1, 1e-5)

    assert "the layer stores no statistics" in check_norm_layer(Odd).skipped.values()
    names = {"weight": "g", "bias": "b", "mean": "mu", "var": "sigma2"}
    normkit.register_norm(Odd, eps=1e-5, momentum=0.1, **names)
    report = check_norm_layer(Odd)
    assert "the layer stores no statistics" not in report.skipped.values()
    assert {"training output", "running update", "gradients"} <= set(report.passed_checks)
