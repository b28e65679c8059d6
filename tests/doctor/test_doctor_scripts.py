"""More mistakes, each by its script: found, cured by the calls that are named, and then gone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import normkit

Script = Callable[[], tuple[nn.Module, list[torch.Tensor]]]


def data(scale: float = 1.0, offset: float = 0.0, count: int = 2048) -> list[torch.Tensor]:
    """Batches of 64 vectors whose features differ in size."""
    return list((offset + scale * torch.randn(count, 6) * torch.linspace(0.5, 2, 6)).split(64))


def train(model: nn.Module, batches: list[torch.Tensor], *, rate: float = 0.02) -> nn.Module:
    """Learn the sum of the features, and leave the model in evaluation mode."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=rate)
    model.train()
    for _ in range(2):
        for batch in batches:
            optimizer.zero_grad()
            target = (batch - batch.mean()).sum(1, keepdim=True) / batch.std()
            functional.mse_loss(model(batch), target).backward()
            optimizer.step()
    return model.eval()


def network(**settings: Any) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8, **settings), nn.ReLU(), nn.Linear(8, 1))


def dropout_before_the_norm() -> tuple[nn.Module, list[torch.Tensor]]:
    batches = data(offset=3.0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    return train(model, batches), batches


def filters_pruned_to_zero() -> tuple[nn.Module, list[torch.Tensor]]:
    batches = data()
    model = train(network(), batches)
    with torch.no_grad():
        weight = model[0].weight
        weight[weight.norm(dim=1).argsort()[:2]] = 0.0
    return train(model, 2 * batches, rate=1e-6), batches


def raw_temperatures_in_thousandths_of_a_kelvin() -> tuple[nn.Module, list[torch.Tensor]]:
    batches = data(scale=20.0, offset=290_000.0)
    return train(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 1)), batches), batches


def layer_frozen_before_it_saw_data() -> tuple[nn.Module, list[torch.Tensor]]:
    batches, model = data(), network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for batch in batches:
        model.train()
        model[1].eval()  # "as one does when fine-tuning", but nothing was loaded
        optimizer.zero_grad()
        functional.mse_loss(model(batch), batch.sum(1, keepdim=True)).backward()
        optimizer.step()
    return model.eval(), batches


def momentum_of_zero() -> tuple[nn.Module, list[torch.Tensor]]:
    batches = data(scale=3.0, offset=1.0)
    return train(network(momentum=0.0), batches), batches


def statistics_lost_while_loading() -> tuple[nn.Module, list[torch.Tensor]]:
    batches = data(scale=3.0)
    state = train(network(), batches).state_dict()
    model = network()
    model.load_state_dict({name: value for name, value in state.items() if "running" not in name}, strict=False)
    return model.eval(), batches


def summary_printed_after_training() -> tuple[nn.Module, list[torch.Tensor]]:
    batches = data(scale=3.0, offset=5.0)
    model = train(network(), batches).train()
    with torch.no_grad():
        for _ in range(10):
            model(torch.rand(2, 6))  # what a summary of the layers' shapes does
    return model.eval(), batches


def as_many_groups_as_channels() -> tuple[nn.Module, list[torch.Tensor]]:
    batches = data()
    model = nn.Sequential(nn.Linear(6, 8), nn.GroupNorm(8, 8), nn.ReLU(), nn.Linear(8, 1))
    return train(model, batches), batches


# script: check, layer, a word of the likeliest cause, a word of the cure
SCRIPTS: dict[Script, tuple[str, str, str, str]] = {
    dropout_before_the_norm: ("optimizer", "2", "dropout stands before", "normkit.recalibrate"),
    filters_pruned_to_zero: ("dead-channel", "1", "pruned", "normkit.fold"),
    raw_temperatures_in_thousandths_of_a_kelvin: ("precision", "0", "large offset", "normkit.recalibrate"),
    layer_frozen_before_it_saw_data: ("freeze-leak", "1", "before it had seen data", "normkit.recalibrate"),
    momentum_of_zero: ("ema-window", "1", "typing error", "momentum = 0.1"),
    statistics_lost_while_loading: ("never-updated", "1", "without the buffers", "normkit.recalibrate"),
    summary_printed_after_training: ("drift", "1", "", "normkit.recalibrate"),
    as_many_groups_as_channels: ("effective-n", "1", "as many groups as channels", "num_groups = 1"),
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_mistake_is_found_and_cured_by_the_calls_that_are_named(script):
    check, layer, cause, cure = SCRIPTS[script]
    model, batches = script()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = normkit.diagnose(model, batches, optimizer=optimizer)
    (finding,) = before.of(check)
    assert finding.layer == layer, str(before)
    assert cause in finding.causes[0]
    assert cure in finding.remedy

    space = {"normkit": normkit, "model": model, "batches": batches, "example": batches[0], "loader": batches}
    severe = [finding for finding in before.findings if finding.severity != "info"]
    for remedy in dict.fromkeys(finding.remedy for finding in severe):
        exec(remedy, space)
    space["optimizer"] = torch.optim.SGD(space["model"].parameters(), lr=0.01)
    after = normkit.diagnose(space["model"], space["batches"], optimizer=space["optimizer"])
    # Where the only layer was folded away, nothing is left to be called healthy.
    assert after.healthy or not after.layers, str(after)
    assert not after.count("error") + after.count("warning"), str(after)
    assert [finding.proof for finding in severe if not eval(finding.proof, space)] == []


def test_dropout_that_the_statistics_do_not_hold_is_worth_knowing_and_no_warning():
    model, batches = dropout_before_the_norm()
    normkit.recalibrate(model, batches)
    diagnosis = normkit.diagnose(model, batches)
    assert not diagnosis.of("optimizer")
    assert [finding.severity for finding in diagnosis.findings if "dropout" in finding.summary] == ["info"]
