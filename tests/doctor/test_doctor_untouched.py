"""``diagnose`` changes nothing: not on success, and not when something fails at any point of the model."""

import pytest
import torch
from torch import nn

import normkit
from normkit.anatomy import fingerprint

from . import networks


class FailsAfter(nn.Module):
    """Raises in the forward that follows so many others; the count is no state of the model."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.countdown = iter(range(calls))
        self.dropout = nn.Dropout(0.5)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        torch.rand(3)  # moves the random state
        if next(self.countdown, None) is None:
            raise RuntimeError("injected")
        return self.dropout(values)


def trained() -> nn.Sequential:
    model = networks.convolutional(4)
    model.train()
    images, labels = networks.digits()
    nn.functional.cross_entropy(model(images[:32]), labels[:32]).backward()  # leaves gradients
    model[1].register_forward_hook(lambda *_: None)
    model[4].eval()
    return model


def differences(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


@pytest.mark.parametrize("with_batches", [False, True])
def test_diagnose_leaves_the_model_bit_identical(with_batches):
    model, batches = trained(), networks.loader(64, 256)
    before = fingerprint(model)
    normkit.diagnose(model, batches if with_batches else None)
    assert not differences(before, fingerprint(model))


@pytest.mark.parametrize("place", range(16))
@pytest.mark.parametrize("calls", [0, 1, 6])
def test_diagnose_restores_the_model_when_a_forward_fails(place, calls):
    model = trained()
    model.insert(place, FailsAfter(calls))
    batches = networks.loader(32, 64)
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match="injected"):
        normkit.diagnose(model, batches)
    after = fingerprint(model)
    assert not differences(before, after)


def test_diagnose_restores_the_model_when_the_batches_fail():
    model = trained()

    def batches():
        yield networks.digits()[0][:32]
        raise OSError("the disk is gone")

    before = fingerprint(model)
    with pytest.raises(OSError, match="the disk is gone"):
        normkit.diagnose(model, batches())
    assert not differences(before, fingerprint(model))


@pytest.mark.parametrize("name", ["never-evaluates", "low-precision", "mixed"])
def test_diagnose_leaves_sick_models_as_they_are(name):
    patient = networks.patient(name)
    before = fingerprint(patient.model)
    normkit.diagnose(patient.model, patient.batches, call=patient.call)
    assert not differences(before, fingerprint(patient.model))


def test_diagnose_does_not_spoil_a_backward_that_is_under_way():
    model = networks.dense()
    images, labels = networks.digits()
    loss = nn.functional.cross_entropy(model(images[:32]), labels[:32])
    normkit.diagnose(model, networks.loader(64, 256))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
