"""Accumulation leaves held statistics alone, and its own update is one that a ledger of writes expects."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normkit
from tolerances import assert_close

kinds = pytest.mark.parametrize("kind", ["statistics", "exact"])
norms = pytest.mark.parametrize("norm", [nn.BatchNorm1d, normkit.BatchNorm1d, normkit.SyncBatchNorm])


def network(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), norm(8), nn.Tanh(), nn.Linear(8, 3)).double()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 5, generator=generator).double(), torch.randint(3, (12,), generator=generator)


def micro(x, y):
    return list(zip(x.split((5, 3, 4)), y.split((5, 3, 4)), strict=True))


def plain(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@kinds
@norms
def test_held_statistics_do_not_move(norm, kind):
    def looks_twice(model, batch):
        with normkit.hold_statistics(model):
            aside = model(batch[0] + 1)
        return plain(model, batch) + (aside - model(batch[0])).pow(2).mean()

    model, (x, y) = network(norm), data()
    large = copy.deepcopy(model)
    looks_twice(large, (x, y)).backward()
    normkit.accumulate(model, micro(x, y), looks_twice, kind=kind)
    for (name, value), expected in zip(model.named_buffers(), large.buffers(), strict=True):
        assert_close(value, expected, dtype=torch.float64, what=name)
    if kind == "exact":
        assert_close(model[0].weight.grad, large[0].weight.grad, dtype=torch.float64)
    before = {name: value.clone() for name, value in model.named_buffers()}
    with normkit.hold_statistics(model):
        normkit.accumulate(model, micro(x, y), plain, kind=kind)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


@kinds
@norms
@pytest.mark.parametrize("counted", [True, False])
def test_a_watched_accumulation_updates_once_a_step(norm, counted, kind):
    model, (x, y) = network(norm), data()
    if not counted:
        model[1].num_batches_tracked = None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with normkit.watch(model) as ledger:
        for _ in range(3):
            optimizer.zero_grad()
            normkit.accumulate(model, micro(x, y), plain, kind=kind)
            optimizer.step()
        normkit.accumulate(model, micro(x, y), plain, kind=kind)
    assert not ledger.findings()
    assert ledger.layers["1"].writers == {"forward": 4}
    assert {write.values for write in ledger.writes} == {12}
    assert all("test_held.py" in write.place for write in ledger.writes)
    with normkit.watch(model) as ledger:
        model[1].running_mean.add_(1)
    assert [finding.check for finding in ledger.findings()] == ["update-count"]
