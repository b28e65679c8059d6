"""A finding about a healthy model is a bug: properly trained networks get no error and no warning."""

import pytest
import torch
from torch import nn

import normkit

from . import networks

CASES = [
    pytest.param(networks.convolutional, 32, 2, 0, id="convolutional-32-seed0"),
    pytest.param(networks.convolutional, 128, 5, 1, id="convolutional-128-seed1"),
    pytest.param(networks.dense, 16, 2, 0, id="dense-16-seed0"),
    pytest.param(networks.dense, 32, 4, 1, id="dense-32-seed1"),
    pytest.param(networks.dense, 128, 6, 2, id="dense-128-seed2"),
    pytest.param(networks.Residual, 64, 3, 2, id="residual-64-seed2"),
]


@pytest.mark.parametrize(("build", "batch_size", "epochs", "seed"), CASES)
def test_diagnose_is_silent_on_a_trained_network(build, batch_size, epochs, seed):
    torch.manual_seed(seed)
    model, batches = build(), networks.loader(batch_size)
    optimizer = networks.train(model, batches, epochs)
    assert networks.accuracy(model) > 0.9, "the network is not properly trained, so it proves nothing"

    for mode in (False, True):
        diagnosis = normkit.diagnose(model.train(mode), batches, optimizer=optimizer)
        assert diagnosis.healthy, str(diagnosis)
        assert diagnosis.samples >= 1000
        assert not diagnosis.notes


def test_diagnose_is_silent_on_a_new_model_in_training_mode():
    model = networks.Residual()
    diagnosis = normkit.diagnose(model, optimizer=torch.optim.AdamW(model.parameters()))
    assert diagnosis.healthy, str(diagnosis)


def test_diagnose_is_silent_on_a_backbone_held_in_evaluation_by_hand():
    batches = networks.loader(64)
    model = networks.convolutional()
    networks.train(model, batches, 3)
    model.train()
    for layer in model[:9]:
        layer.eval().requires_grad_(False)
    shifted = [(3 * images + 2, labels) for images, labels in batches]  # another data set

    found = normkit.diagnose(model, shifted).findings
    assert not [finding for finding in found if finding.layer in {"1", "4", "7"} and finding.severity != "info"]


def test_diagnose_is_silent_on_models_without_batch_statistics():
    model = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 32), nn.GroupNorm(4, 32))
    assert normkit.diagnose(model, torch.randn(64, 64)).healthy
