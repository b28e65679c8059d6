"""A model's state is kept and put back bit for bit."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from normkit.anatomy import Snapshot, fingerprint, preserved
from normkit.anatomy.fingerprints import same_bits


def train_a_little(net):
    net.train()
    net(torch.randn(4, 3, 8, 8)).square().sum().backward()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.step()


def replace_a_buffer(net):
    net.bn.running_mean = torch.ones(5)


def drop_a_buffer(net):
    net.bn.register_buffer("running_var", None)


def add_state(net):
    net.bn.register_buffer("extra", torch.ones(2))
    net.bn.note = "new"


def change_settings(net):
    net.bn.momentum, net.bn.eps, net.bn.track_running_stats = 0.5, 1.0, False


def freeze_affine(net):
    net.bn.weight.requires_grad_(False)


def set_grad(net):
    net.bn.weight.grad = torch.ones(5)


def add_hooks(net):
    net.bn.register_forward_hook(lambda module, args, output: output)
    net.bn.weight.register_hook(lambda grad: grad)


def change_structure(net):
    net.group = nn.Identity()
    del net.again
    net.head.append(nn.ReLU())


def change_type(net):
    net.half()


def swap_data(net):
    net.bn.weight.data = torch.full((5,), 3.0)


def change_class(net):
    net.bn.__class__ = nn.BatchNorm1d


def poison(net):
    net.bn.running_var.fill_(float("nan"))


def draw_random_numbers(net):
    torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002


CHANGES = [
    train_a_little,
    replace_a_buffer,
    drop_a_buffer,
    add_state,
    change_settings,
    freeze_affine,
    set_grad,
    add_hooks,
    change_structure,
    change_type,
    swap_data,
    change_class,
    poison,
    draw_random_numbers,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_change_is_seen_and_undone(net, change):
    before = fingerprint(net)
    with preserved(net):
        change(net)
        assert fingerprint(net) != before
    assert fingerprint(net) == before


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_change_is_undone_when_an_exception_comes(net, change):
    before = fingerprint(net)
    with pytest.raises(KeyError), preserved(net):  # noqa: PT012
        change(net)
        raise KeyError
    assert fingerprint(net) == before


def test_gradients_that_were_there_are_put_back(net):
    net(torch.randn(4, 3, 8, 8)).square().sum().backward()
    before = fingerprint(net)
    grad = net.conv.weight.grad
    with preserved(net):
        net.zero_grad(set_to_none=True)
        train_a_little(net)
    assert fingerprint(net) == before
    assert net.conv.weight.grad is grad


def test_lazy_layers_are_lazy_again():
    model = nn.Sequential(nn.LazyConv2d(3, 1), nn.LazyBatchNorm2d())
    before = fingerprint(model)
    with preserved(model):
        model(torch.randn(2, 4, 3, 3))
        assert fingerprint(model) != before
    assert fingerprint(model) == before
    assert model(torch.randn(2, 5, 3, 3)).shape == (2, 3, 3, 3)


def test_pending_backward_survives_a_restore_of_what_did_not_change(net):
    loss = net.eval()(torch.randn(2, 3, 8, 8)).sum()
    with preserved(net):
        net(torch.randn(2, 3, 8, 8))
    loss.backward()
    assert net.conv.weight.grad is not None


def test_optimizer_still_holds_the_parameters(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with preserved(net):
        net.half()
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in net.parameters()}


def test_snapshot_restores_more_than_once(net):
    state, before = Snapshot(net), fingerprint(net)
    for change in (train_a_little, poison):
        change(net)
        state.restore()
        assert fingerprint(net) == before


def test_same_bits_knows_nan_and_signed_zero():
    assert same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert same_bits(torch.tensor(True), torch.tensor(True))
