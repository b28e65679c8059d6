"""Batch statistics of what is no layer of the model are not taken micro-batch by micro-batch in silence."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normkit
from normkit.errors import ArgumentError
from tolerances import assert_close

pytestmark = pytest.mark.usefixtures("turns")
SPLIT = (5, 4, 3)


def network(norm=nn.BatchNorm1d):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), norm(8), nn.Tanh(), nn.Linear(8, 3)).double()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 5, generator=generator).double(), torch.randn(12, 5, generator=generator).double()


FUNCTIONS = {
    "torch": lambda x: F.batch_norm(x, None, None, training=True),
    "torch's own": lambda x: torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False),
    "instances": lambda x: F.instance_norm(
        x[:, :, None].repeat(1, 1, 2), torch.zeros(5).double(), torch.ones(5).double()
    ),
    "ours": lambda x: normkit.functional.batch_norm(x, None, None, training=True),
    "ours, masked": lambda x: normkit.functional.masked_batch_norm(x, x[:, 0] < 9, None, None, training=True),
}
LAYERS = {
    "torch": nn.BatchNorm1d,
    "ours": normkit.BatchNorm1d,
    "synchronized": normkit.SyncBatchNorm,
    "renorm": normkit.BatchRenorm1d,
    "nothing kept": lambda channels: nn.BatchNorm1d(channels, track_running_stats=False).eval(),
    "instances": lambda channels: nn.Sequential(
        nn.Unflatten(1, (1, channels)), nn.InstanceNorm1d(1, track_running_stats=True), nn.Flatten()
    ),
}


def unchanged(model, loss, match):
    (x, z), originals = data(), (torch.batch_norm, torch.instance_norm, normkit.functional.batch_norm)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ArgumentError, match=match):
        normkit.accumulate(model, list(zip(x.split(SPLIT), z.split(SPLIT), strict=True)), loss, kind="exact")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (torch.batch_norm, torch.instance_norm, normkit.functional.batch_norm) == originals
    assert not torch.nn.modules.module._global_forward_pre_hooks


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_on_the_batchs_statistics_are_refused(function):
    said = "_norm is called as a function, on the statistics of the batch.*put a layer into the model"
    unchanged(
        network(),
        lambda model, batch: model(batch[0] + function(batch[1]).reshape(len(batch[0]), -1)[:, :5]).mean(),
        said,
    )


@pytest.mark.parametrize("norm", LAYERS.values(), ids=LAYERS)
def test_layers_of_another_model_are_refused(norm):
    other = nn.Sequential(nn.Linear(5, 5), norm(5)).double()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    said = r"is called in training mode and is no layer of the model.*nn\.ModuleList\(\[D, G\]\)"
    unchanged(network(), lambda model, batch: model(batch[0] + other(batch[1]).detach()).mean(), said)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_what_uses_stored_statistics_or_none_of_the_batch_is_taken():
    other = network(normkit.BatchNorm1d).eval()
    frozen = network()
    frozen(data()[0])
    frozen = normkit.freeze(frozen).model
    teacher = nn.Sequential(nn.InstanceNorm1d(5), network(nn.BatchNorm1d).eval()[:1]).double()

    def loss(model, batch):
        x, z = batch
        aside = other(z).pow(2).mean() + frozen(z).pow(2).mean() + F.instance_norm(z[:, :, None].repeat(1, 1, 2)).mean()
        own = F.batch_norm(x, torch.zeros(5).double(), torch.ones(5).double()) + normkit.functional.batch_norm(
            x, torch.zeros(5).double(), torch.ones(5).double()
        )
        return model(own).pow(2).mean() + aside + teacher[1](z).mean()

    model, (x, z) = network(), data()
    large = copy.deepcopy(model)
    loss(large, (x, z)).backward()
    normkit.accumulate(model, list(zip(x.split(SPLIT), z.split(SPLIT), strict=True)), loss, kind="exact")
    for value, expected in zip(model.parameters(), large.parameters(), strict=True):
        assert_close(value.grad, expected.grad, dtype=torch.float64)


def test_two_models_as_one_are_exact():
    generator = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)).double()
    pair = nn.ModuleList([network(), generator])

    def loss(models, batch):
        judge, maker = models
        return F.softplus(-judge(batch[0])).mean() + F.softplus(judge(maker(batch[1]).detach())).mean()

    (x, z), large = data(), copy.deepcopy(pair)
    loss(large, (x, z)).backward()
    normkit.accumulate(pair, list(zip(x.split(SPLIT), z.split(SPLIT), strict=True)), loss, kind="exact")
    for (name, value), expected in zip(pair.named_parameters(), large.parameters(), strict=True):
        assert (value.grad is None) == (expected.grad is None), name
        if value.grad is not None:
            assert_close(value.grad, expected.grad, dtype=torch.float64, what=name)
    for (name, value), expected in zip(pair.named_buffers(), large.buffers(), strict=True):
        assert_close(value, expected, dtype=torch.float64, what=name)
