"""A training that was broken off goes on inside: the same epochs, the same weights, the same bytes."""

import dataclasses
import os

import pytest
import torch
from torch import nn

from normkit.errors import NormkitError
from normkit.lab import checkpoints, grid, training
from normkit.lab.checkpoints import keeping
from normkit.lab.claim import Request, plan
from normkit.lab.claims import get_claim
from normkit.lab.data import load
from normkit.lab.networks import LeNet5
from normkit.lab.training import TrainingSettings, seeded, train, with_seed
from small_fashion_mnist import write_small_fashion_mnist

SETTINGS = {
    "adam": TrainingSettings(epochs=3, batch_size=32, optimizer="adam", learning_rate=0.002),
    "momentum": TrainingSettings(epochs=3, batch_size=32, optimizer="sgd", learning_rate=0.01, momentum=0.9),
    "sgd": TrainingSettings(epochs=3, batch_size=32, optimizer="sgd", learning_rate=0.01),
}


class Noisy(nn.Module):
    """A network that hangs on everything there is to keep: weights, buffers, two sources of noise, a counter."""

    def __init__(self):
        super().__init__()
        self.network = LeNet5("batch")
        self.dropout = nn.Dropout(0.3)
        self.noise = torch.Generator().manual_seed(5)
        self.calls = 0

    def forward(self, images):
        if self.training:
            self.calls += 1
            images = images + self.calls * 0.01 * torch.randn(images.shape, generator=self.noise)
        return self.network(self.dropout(images))


class Broken(Exception):
    """Stands for a kill: the generator is left where it is."""


@pytest.fixture(autouse=True)
def every_epoch_is_kept(monkeypatch):
    monkeypatch.setattr(checkpoints, "SHORTEST_EPOCH", 0.0)


@pytest.fixture
def small(tmp_path):
    return load("fashion-mnist", write_small_fashion_mnist(tmp_path / "data"))


def trained(small, settings, folder, stop_after=None, build=Noisy, identity="a"):
    model = with_seed(build, 1)
    epochs = []
    with keeping(folder, identity), seeded(2):
        for epoch in train(model, small, settings, seed=3):
            # A claim that draws random numbers between epochs.
            epochs.append((epoch, torch.rand(1).item()))
            if epoch.epoch == stop_after:
                break
    return epochs, model.state_dict()


def passes(monkeypatch):
    """Count the passes over the training data."""
    counted = []
    original = training._pass
    monkeypatch.setattr(training, "_pass", lambda *given: counted.append(1) or original(*given))
    return counted


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_broken_training_goes_on_to_the_same_epochs_and_weights(small, tmp_path, monkeypatch, name, stop_after):
    whole, weights = trained(small, SETTINGS[name], None)
    trained(small, SETTINGS[name], tmp_path / "kept", stop_after)
    counted = passes(monkeypatch)
    again, same_weights = trained(small, SETTINGS[name], tmp_path / "kept")
    assert len(counted) == 3 - stop_after
    assert again == whole
    assert all(torch.equal(weights[key], same_weights[key]) for key in weights)


def test_kept_epochs_of_another_training_are_not_used(small, tmp_path, monkeypatch):
    trained(small, SETTINGS["adam"], tmp_path / "kept", 2)
    other = dataclasses.replace(SETTINGS["adam"], learning_rate=0.003)
    expected, _ = trained(small, other, None)
    counted = passes(monkeypatch)
    assert trained(small, other, tmp_path / "kept")[0] == expected
    assert len(counted) == 3
    trained(small, other, tmp_path / "kept", identity="other versions")
    assert len(counted) == 6


@pytest.mark.parametrize("name", ["epoch-1", "epoch-2", "optimizer"])
def test_damaged_or_missing_files_count_as_nothing_kept(small, tmp_path, monkeypatch, name):
    whole, _ = trained(small, SETTINGS["adam"], None)
    trained(small, SETTINGS["adam"], tmp_path / "kept", 2)
    path = tmp_path / "kept" / "training-0" / f"{name}.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    counted = passes(monkeypatch)
    assert trained(small, SETTINGS["adam"], tmp_path / "kept")[0] == whole
    assert len(counted) == 3


def test_full_disk_is_told_and_what_was_kept_stands(small, tmp_path, monkeypatch):
    whole, _ = trained(small, SETTINGS["adam"], None)
    trained(small, SETTINGS["adam"], tmp_path / "kept", 1)
    fsync = os.fsync

    def fail(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        trained(small, SETTINGS["adam"], tmp_path / "kept")
    monkeypatch.setattr(os, "fsync", fsync)
    counted = passes(monkeypatch)
    assert trained(small, SETTINGS["adam"], tmp_path / "kept")[0] == whole
    assert len(counted) == 2


def test_short_epochs_and_networks_with_hooks_are_not_kept(small, tmp_path, monkeypatch):
    def hooked():
        model = LeNet5("none")
        model.conv1.register_forward_hook(lambda *given: None)
        return model

    trained(small, SETTINGS["adam"], tmp_path / "hooked", build=hooked)
    monkeypatch.setattr(checkpoints, "SHORTEST_EPOCH", 1000.0)
    trained(small, SETTINGS["adam"], tmp_path / "short")
    assert not (tmp_path / "hooked").exists()
    assert not (tmp_path / "short").exists()


@pytest.mark.parametrize("stop_after", [2, 5])
def test_cell_of_a_run_goes_on_inside_to_the_same_bytes(tmp_path, monkeypatch, stop_after):
    data = write_small_fashion_mnist(tmp_path / "data")
    # Carries the steps before from epoch to epoch, and trains each side in the same cell.
    wanted = plan(get_claim("convergence"), Request(data="fashion-mnist", data_dir=data, seeds=1, epochs=3))

    def run(folder):
        grid.run([wanted], folder, jobs=1, data_dir=data, on_event=lambda event: None)

    run(tmp_path / "whole")
    counted, original = [], training._pass

    def breaking(*given):
        counted.append(1)
        if len(counted) == stop_after:
            raise NormkitError("broken off")
        return original(*given)

    monkeypatch.setattr(training, "_pass", breaking)
    with pytest.raises(NormkitError):
        run(tmp_path / "out")
    assert list((tmp_path / "out" / "checkpoints").iterdir())
    run(tmp_path / "out")
    # Of six epochs none was trained twice but the one that broke.
    assert len(counted) == 7
    whole = (tmp_path / "whole" / "results.jsonl").read_bytes()
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == whole
    assert not list((tmp_path / "out" / "checkpoints").iterdir())
