"""What each micro-batch counts for in the mean of all."""

import collections
import copy
import dataclasses
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normkit
from normkit.errors import ArgumentError
from tolerances import assert_close

SPLIT = (4, 1, 5, 3)
kinds = pytest.mark.parametrize("kind", ["statistics", "exact"])


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    y: torch.Tensor
    name: str = "a batch"


Pair = collections.namedtuple("Pair", "x y")
FORMS = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "named tuple": Pair,
    "dict": lambda x, y: {"x": x, "y": y, "temperature": torch.tensor(2.0), "name": "a batch"},
    "number first": lambda x, y: {"temperature": torch.tensor(2.0), "x": x, "y": y},
    "nested": lambda x, y: [{"x": x}, (y, None, 3)],
    "dataclass": Batch,
    "object": lambda x, y: types.SimpleNamespace(x=x, y=y, inner={"z": x}),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(13, 5, generator=generator).double(), torch.randint(3, (13,), generator=generator)


def pair(batch):
    if isinstance(batch, dict):
        return batch["x"], batch["y"]
    if hasattr(batch, "x"):
        return batch.x, batch.y
    return (batch[0]["x"], batch[1][0]) if isinstance(batch[0], dict) else batch


def loss(model, batch):
    x, y = pair(batch)
    return F.cross_entropy(model(x), y)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_batches_of_every_form_count_by_their_samples(form):
    model, (x, y) = network(), data()
    large = copy.deepcopy(model)
    expected = loss(large, (x, y))
    expected.backward()
    # A generator, which is read to its end first.
    batches = (form(*part) for part in zip(x.split(SPLIT), y.split(SPLIT), strict=True))
    got = normkit.accumulate(model, batches, loss, kind="exact")
    assert_close(got, expected.detach(), dtype=torch.float64)
    for value, other in zip(model.parameters(), large.parameters(), strict=True):
        assert_close(value.grad, other.grad, dtype=torch.float64)


@kinds
def test_where_lengths_differ_samples_says_it(kind):
    model, (x, y), weights = network(), data(), torch.tensor([0.5, 1.0, 2.0]).double()
    split = (4, 4, 5)

    def weighed(model, batch):
        weights, x, y = batch
        return (F.cross_entropy(model(x), y, weight=weights, reduction="none")).mean()

    batches = [(weights, *part) for part in zip(x.split(split), y.split(split), strict=True)]
    with pytest.raises(ArgumentError, match=r"batch\[0\] has 3, batch\[1\] has 4.*samples=lambda batch"):
        normkit.accumulate(model, batches, weighed, kind=kind)
    got = normkit.accumulate(model, batches, weighed, kind="exact", samples=lambda batch: len(batch[1]))
    assert_close(got, weighed(copy.deepcopy(model), (weights, x, y)).detach(), dtype=torch.float64)

    # A mean over tokens: each micro-batch counts by its own.
    keep = torch.rand(13, generator=torch.Generator().manual_seed(3)) < 0.5

    def kept_mean(model, batch):
        x, y, keep = batch
        return F.cross_entropy(model(x)[keep], y[keep])

    batches = list(zip(x.split(split), y.split(split), keep.split(split), strict=True))
    got = normkit.accumulate(model, batches, kept_mean, kind="exact", samples=lambda batch: int(batch[2].sum()))
    assert_close(got, kept_mean(copy.deepcopy(model), (x, y, keep)).detach(), dtype=torch.float64)


@kinds
@pytest.mark.parametrize("form", [list, lambda samples: {"samples": tuple(samples)}], ids=["list", "in a dict"])
def test_lists_of_samples_of_different_lengths_are_counted_by_samples_alone(kind, form):
    model, (x, y) = network(), data()

    def stacked(model, batch):
        x, y = zip(*(batch["samples"] if isinstance(batch, dict) else batch), strict=True)
        return F.cross_entropy(model(torch.stack(x)), torch.stack(y))

    every = list(zip(x, y, strict=True))
    batches = [form(every[:8]), form(every[8:])]
    with pytest.raises(ArgumentError, match=r"holds 8 in micro-batch 0 and 5 in micro-batch 1.*samples=lambda batch"):
        normkit.accumulate(model, batches, stacked, kind=kind)
    count = (lambda batch: len(batch["samples"])) if isinstance(batches[0], dict) else len
    got = normkit.accumulate(model, batches, stacked, kind="exact", samples=count)
    assert_close(got, stacked(copy.deepcopy(model), every).detach(), dtype=torch.float64)
    # Lists that hold no tensors are names, and say nothing.
    named = [{"x": x[:8], "y": y[:8], "names": ["a"] * 8}, {"x": x[8:], "y": y[8:], "names": ["b"] * 5}]
    normkit.accumulate(model, named, loss, kind=kind)


@kinds
def test_what_cannot_be_counted_is_refused(kind):
    model, (x, y) = network(), data()
    batches = [(x[:6], y[:6]), (x[6:], y[6:])]

    def check(batches, match, **settings):
        with pytest.raises(ArgumentError, match=match):
            normkit.accumulate(model, batches, loss, kind=kind, **settings)

    check((x, y), r"tensors of different kinds \(\(13, 5\) of torch.float64; \(13,\) of torch.int64\), which are one")
    check([torch.tensor(1.0)], "in which no tensor was found to count samples by")
    check([object()], "micro-batch 0 is a object, in which no tensor was found.*samples=lambda batch")
    check([batches[0], (x[:0], y[:0])], "micro-batch 1 holds no samples")
    check(batches, "samples=3; give a function", samples=3)
    check(batches, r"samples gave 2\.5 for micro-batch 0; it must give a whole number", samples=lambda batch: 2.5)
    check(batches, "samples gave -1 for micro-batch 0", samples=lambda batch: -1)
    check(batches, "micro-batch 0 holds no samples", samples=lambda batch: 0)
    assert all(parameter.grad is None for parameter in model.parameters())
