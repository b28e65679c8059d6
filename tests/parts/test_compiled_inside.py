"""Accumulation where torch.compile is at work inside the loss."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normkit
from tolerances import assert_close

# Of dynamo itself: it looks at the gradient of whatever a graph begins with, and tells of hooks around a module.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore:Using .torch.compile")


class _Inside(nn.Module):
    """A net that is compiled in its own forward, where no module tells of it."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), norm(8), nn.Tanh(), nn.Linear(8, 8), norm(8), nn.Linear(8, 2))

    @torch.compile(backend="eager")
    def forward(self, x):
        return self.net(x)


def _loss(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


def _check(model, loss):
    x, y = torch.randn(12, 6).double(), torch.arange(12) % 2
    large = copy.deepcopy(model)
    _loss(large, (x, y)).backward()
    micro = list(zip(x.split((4, 3, 5)), y.split((4, 3, 5)), strict=True))
    normkit.accumulate(model, micro, loss, kind="exact")
    for (name, one), other in zip(model.named_parameters(), large.parameters(), strict=True):
        assert_close(one.grad, other.grad, dtype=torch.float64, what=name)
    for (name, one), other in zip(model.named_buffers(), large.buffers(), strict=True):
        assert_close(one, other, dtype=torch.float64, what=name)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, normkit.BatchNorm1d], ids=["torch", "ours"])
def test_norms_in_a_compiled_forward_see_the_whole_batch_and_leave_no_compiler_behind(norm):
    torch.compiler.reset()
    _check(_Inside(norm).double(), _loss)
    plain = _Inside(norm).double().net
    _check(plain, _loss)
    torch.compiler.reset()


def test_a_compiled_loss_is_taken_and_so_is_a_compiled_module_without_norms():
    torch.compiler.reset()
    _check(_Inside(nn.BatchNorm1d).double().net, torch.compile(_loss, backend="eager"))
    net = _Inside(nn.BatchNorm1d).double().net
    net[3] = torch.compile(net[3], backend="eager")
    _check(net, _loss)
    torch.compiler.reset()
