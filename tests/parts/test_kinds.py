"""Layers beside plain batch normalization: served exactly, or refused with a reason and a way that works."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normkit
from normkit.errors import ArgumentError
from tolerances import assert_close

SPLIT = (5, 4, 3)


class Masked(nn.Module):
    """Sequences with padding through two masked norms."""

    def __init__(self, **settings):
        super().__init__()
        self.enter, self.leave = nn.Conv1d(3, 6, 1), nn.Conv1d(6, 4, 1)
        self.first, self.second = normkit.MaskedBatchNorm1d(6, **settings), normkit.MaskedBatchNorm1d(4, **settings)

    def forward(self, x, mask):
        return self.second(self.leave(self.first(self.enter(x), mask).relu()), mask)


def sequences():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 3, 5, generator=generator).double()
    lengths = torch.randint(6, (12,), generator=generator)
    lengths[5:9] = 0
    x[torch.arange(5) >= lengths[:, None, None].expand(-1, 3, 1)[:, :, 0, None]] = 99.0
    return x, torch.arange(5) < lengths[:, None]


def loss(model, batch):
    # The mean over the samples, padding being 0.
    return model(*batch).pow(3).sum((1, 2)).mean()


@pytest.mark.parametrize("settings", [{}, {"unbiased": False}, {"momentum": None}], ids=str)
def test_masked_norms_are_exact_whatever_padding_a_micro_batch_has(settings):
    model, (x, mask) = Masked(**settings).double(), sequences()
    large = copy.deepcopy(model)
    expected = loss(large, (x, mask))
    expected.backward()
    batches = list(zip(x.split(SPLIT), mask.split(SPLIT), strict=True))
    got = normkit.accumulate(model, batches, loss, kind="exact")
    assert_close(got, expected.detach(), dtype=torch.float64)
    for (name, value), other in zip(model.named_parameters(), large.parameters(), strict=True):
        assert_close(value.grad, other.grad, dtype=torch.float64, what=name)
    for (name, value), other in zip(model.named_buffers(), large.buffers(), strict=True):
        assert_close(value, other, dtype=torch.float64, what=name)


def test_statistics_of_masked_norms_are_pooled_by_their_valid_positions():
    model, (x, mask) = Masked().double(), sequences()
    large = copy.deepcopy(model)
    loss(large, (x, mask))
    normkit.accumulate(model, list(zip(x.split(SPLIT), mask.split(SPLIT), strict=True)), loss)
    for name, value in model.first.named_buffers():
        assert_close(value, large.first.get_buffer(name), dtype=torch.float64, what=name)
    # In evaluation as ever.
    model.first.eval()
    normkit.accumulate(model, [(x, mask)], loss, kind="exact")
    # Without a mask it is batch normalization.
    plain = nn.Sequential(nn.Conv1d(3, 6, 1), normkit.MaskedBatchNorm1d(6)).double()
    other = copy.deepcopy(plain)
    other(x)
    normkit.accumulate(plain, x.split(SPLIT), lambda model, x: model(x).pow(3).mean())
    assert_close(plain[1].running_var, other[1].running_var, dtype=torch.float64)


class Wide(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x.float()).type_as(x)


class Around(nn.Module):
    """The same, around a norm."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x):
        return self.norm(x.float()).type_as(x)


REFUSED = {
    "a subclass": (Wide, "is a batch norm with a forward of its own.*self.norm = nn.BatchNorm1d"),
    "instances": (lambda c: nn.InstanceNorm1d(c, track_running_stats=True), "samples.*track_running_stats=False"),
    "renorm": (normkit.BatchRenorm1d, "what it has stored.*a batch norm in its place"),
    "whitening": (normkit.WhiteningBatchNorm1d, "of channels together.*a batch norm in its place"),
}


@pytest.mark.parametrize("kind", ["statistics", "exact"])
@pytest.mark.parametrize(("norm", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_says_why_and_its_advice_works(norm, said, kind):
    def build(norm):
        return nn.Sequential(nn.Conv1d(3, 6, 1), norm(6), nn.Flatten(), nn.Linear(30, 3))

    x, batches = sequences()[0].float(), list(sequences()[0].float().split(SPLIT))
    cost = lambda model, x: F.softplus(model(x)).mean()  # noqa: E731
    model = build(norm)
    with pytest.raises(ArgumentError, match=f"accumulate: 1 .*{said}"):
        normkit.accumulate(model, batches, cost, kind=kind)
    advised = Around if norm is Wide else nn.BatchNorm1d if "in its place" in said else nn.InstanceNorm1d
    normkit.accumulate(build(advised), batches, cost, kind=kind)
    model[1].eval()
    normkit.accumulate(model, batches, cost, kind=kind)
    assert model(x).shape == (12, 3)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, normkit.BatchNorm1d])
def test_frozen_norms_are_taken_but_where_they_track(norm):
    x, model = sequences()[0].float(), nn.Sequential(nn.Conv1d(3, 6, 1), norm(6), nn.Flatten(), nn.Linear(30, 3))
    model(x)
    tracking, still = (normkit.freeze(copy.deepcopy(model), track=track).model.train() for track in (True, False))
    cost = lambda model, x: F.softplus(model(x)).mean()  # noqa: E731
    with pytest.raises(
        ArgumentError, match=r"frozen and goes on tracking; freeze it without track, or normkit\.unfreeze"
    ):
        normkit.accumulate(tracking, x.split(SPLIT), cost, kind="exact")
    normkit.accumulate(still, x.split(SPLIT), cost, kind="exact")
    normkit.unfreeze(tracking)
    normkit.accumulate(tracking, x.split(SPLIT), cost, kind="exact")
