"""Statistics that are held still move in no forward, and are the model's own again at the end."""

import pytest
import torch
from torch import nn

import normkit
from normkit.anatomy import fingerprint
from normkit.errors import ArgumentError


class Own(nn.BatchNorm1d):
    """A layer whose forward assigns its statistics instead of writing into them."""

    def forward(self, input):
        self.running_mean = 0.9 * self.running_mean + 0.1 * input.detach().mean(0)
        return input - input.mean(0)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(3), normkit.BatchNorm1d(3), Own(3)], ids=lambda norm: type(norm).__name__
)
def test_hold_statistics_computes_as_in_training_and_writes_nothing(norm):
    values = torch.randn(7, 3)
    expected = norm(values)
    norm.running_mean.fill_(0.5)
    before = fingerprint(norm)
    with normkit.hold_statistics(norm):
        output = norm(values)
    assert torch.equal(output, expected)
    assert fingerprint(norm) == before


def test_hold_statistics_gives_the_buffers_back_after_an_exception():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(4, 1))
    values = torch.randn(7, 3)
    before = fingerprint(model)
    with normkit.hold_statistics(model), pytest.raises(RuntimeError, match="mat1 and mat2"):
        model(values)
    assert fingerprint(model) == before


def test_hold_statistics_of_some_layers_lets_the_others_move():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    with normkit.hold_statistics(model, "0"):
        model(torch.randn(7, 3))
    assert [int(layer.num_batches_tracked) for layer in model] == [0, 1]


def test_hold_statistics_refuses_a_pattern_that_takes_nothing():
    with (
        pytest.raises(ArgumentError, match="no normalization layer matches"),
        normkit.hold_statistics(nn.BatchNorm1d(3), "x"),
    ):
        pass
