"""BatchNormAct holds a batch norm: every operation reaches the part and leaves activation and residual alone."""

import pytest
import torch
from torch import nn

import normkit
from normkit import convert, fold, freeze, recalibrate, repair
from normkit.anatomy import fingerprint, norm_layers
from normkit.errors import SurgeryError

from .networks import randomize


class Block(nn.Module):
    def __init__(self, activation="relu"):
        super().__init__()
        self.conv1, self.act1 = nn.Conv2d(4, 4, 3, padding=1), normkit.BatchNormAct2d(4, activation=activation)
        self.conv2, self.act2 = nn.Conv2d(4, 4, 3, padding=1), normkit.BatchNormAct2d(4, activation=activation)

    def forward(self, x):
        return self.act2(self.conv2(self.act1(self.conv1(x))), x)


def relative(first, second):
    return ((first - second).abs().max() / first.abs().max()).item()


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu", None])
def test_fold_leaves_activation_and_residual_behind(activation):
    model, example = randomize(Block(activation)).eval(), torch.randn(2, 4, 9, 8)
    other = torch.randn(3, 4, 7, 7)
    before = fingerprint(model)
    record = fold(model, example)
    assert fingerprint(model) == before
    assert record.into == {"act1.norm": "conv1", "act2.norm": "conv2"}
    assert not norm_layers(record.model)
    assert relative(model(other), record.model(other)) <= 1e-5


def test_fold_refuses_a_fused_layer_whose_neighbour_cannot_take_it():
    model = randomize(nn.Sequential(nn.ReLU(), normkit.BatchNormAct2d(4), nn.Conv2d(4, 2, 1))).eval()
    with pytest.raises(SurgeryError, match="its own activation"):
        fold(model, torch.randn(2, 4, 5, 5))


def test_state_operations_reach_the_part():
    model, data = randomize(Block()), torch.randn(32, 4, 6, 6)
    recalibrate(model, data, layerwise=True)
    hidden = model.conv1(data).detach().double()
    assert torch.allclose(model.act1.norm.running_mean.double(), hidden.mean((0, 2, 3)), atol=1e-6)
    freeze(model, "act1")
    before = model.act1.norm.running_mean.clone()
    model.train()(data)
    assert torch.equal(model.act1.norm.running_mean, before)
    assert not torch.equal(model.act2.norm.running_mean, torch.zeros(4))


def test_repair_takes_channels_of_the_part_from_a_donor():
    model, donor = randomize(Block()), randomize(Block())
    model.act1.norm.running_var[1] = float("nan")
    repair(model, donor=donor)
    assert model.act1.norm.running_var[1] == donor.act1.norm.running_var[1]
    model.act1.norm.running_var[1] = float("nan")
    assert "act1.running_var" in model.state_dict()
    record = repair(model.state_dict(), donor=donor.state_dict())
    assert record.state["act1.running_var"][1] == donor.act1.norm.running_var[1]


def test_convert_swaps_the_part_and_keeps_the_activation():
    model, example = randomize(Block()).eval(), torch.randn(2, 4, 5, 5)
    record = convert(model, "torch", example)
    assert type(record.model.act1.norm) is nn.BatchNorm2d
    assert record.largest_change <= 1e-5
    assert (record.model(example) >= 0).all()
