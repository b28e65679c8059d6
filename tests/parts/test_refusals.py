"""What accumulate cannot work with, and what it says."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normkit
from normkit.errors import ArgumentError

kinds = pytest.mark.parametrize("kind", ["statistics", "exact"])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def batches(split=4):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(12, 5, generator=generator), torch.randint(3, (12,), generator=generator)
    return list(zip(x.split(split), y.split(split), strict=True))


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@kinds
def test_refusals_name_what_came_and_what_to_type(kind):
    def check(match, loss=loss, model=None, batches=batches()):  # noqa: B008
        model = network() if model is None else model
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ArgumentError, match=match):
            normkit.accumulate(model, batches, loss, kind=kind)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())
        assert not any("forward" in vars(module) for module in model.modules())

    own = r"lambda model, batch: .*\(model\(batch\[0\]\), batch\[1\]\)"
    check(rf"loss is torch's CrossEntropyLoss, which takes an output and a target; give {own}", nn.CrossEntropyLoss())
    check(rf"loss is torch's cross_entropy, which takes an output and a target; give {own}", F.cross_entropy)
    check("loss='ce' is no function", "ce")
    check(r"^accumulate: loss is a list, and no function; give", batches(), batches=None)
    check(r"loss takes \(model\), and is called as loss\(model, batch\)", lambda model: 0)
    check("no parameter of the model asks for one", model=network().requires_grad_(False))
    other = network().eval()
    check("loss reached no parameter of the model", lambda model, batch: loss(other, batch))
    inner = lambda model, batch: normkit.accumulate(model, [batch], loss, kind=kind)  # noqa: E731
    check("accumulate is at work on this model already", inner)


def test_a_single_sample_is_for_exact():
    data = batches((11, 1))
    with pytest.raises(ArgumentError, match=r'micro-batch 1 brings 1 \(BatchNorm1d\) one value per channel.*"exact"'):
        normkit.accumulate(network(), data, loss)
    normkit.accumulate(network(), data, loss, kind="exact")
    # Ranks beside it that bring more make it no single one.
    model = normkit.convert(network(), to="sync").model
    run = normkit.simulate(model, ranks=2)
    run.run(lambda model, parts: normkit.accumulate(model, parts, loss), [batches((11, 1)), batches((6, 6))])


def test_losses_of_methods_and_classes_are_called():
    class Task(nn.Module):
        def forward(self, model, batch):
            return loss(model, batch)

    class Trainer:
        def loss(self, model, batch, scale=1.0):
            return loss(model, batch) * scale

    for each in (Task(), Trainer().loss, lambda *given: loss(*given)):
        assert normkit.accumulate(network(), batches(), each).item() > 0


def test_a_frozen_model_may_have_something_else_to_learn():
    model, prompt = network().requires_grad_(False), nn.Parameter(torch.zeros(5))
    normkit.accumulate(model, batches(), lambda model, batch: loss(model, (batch[0] + prompt, batch[1])), kind="exact")
    assert prompt.grad.abs().max() > 0


def words(function):
    try:
        function()
    except normkit.errors.SyncError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("way", ["other kinds", "other numbers"])
def test_ranks_that_accumulate_otherwise_are_refused_on_every_rank(way):
    model = normkit.convert(network(), to="sync").model
    ranks = normkit.simulate(model, ranks=2)
    found = ["statistics", "exact"] if way == "other kinds" else ["statistics"] * 2
    data = [batches(4), batches(4 if way == "other kinds" else 6)]
    before = copy.deepcopy(model.state_dict())
    said = ranks.run(
        lambda model, kind, data: words(lambda: normkit.accumulate(model, data, loss, kind=kind)), found, data
    )
    assert all("under accumulate its kind" in each for each in said), said
    assert all(torch.equal(value, before[name]) for rank in ranks.models for name, value in rank.state_dict().items())
    # Exactly, ranks may have different numbers.
    if way == "other numbers":
        said = ranks.run(lambda model, data: words(lambda: normkit.accumulate(model, data, loss, kind="exact")), data)
        assert said == ["no error"] * 2


def test_arguments_in_another_order_are_told_in_one_line():
    model, data = network(), batches()
    for given, names in (
        ((model, loss, data), "batches and loss"),
        ((data, model, loss), "model and batches"),
        ((loss, model, data), "model, batches and loss"),
    ):
        with pytest.raises(ArgumentError) as told:
            normkit.accumulate(*given)
        assert str(told.value) == f"accumulate: {names} are swapped; call accumulate(model, batches, loss)"
