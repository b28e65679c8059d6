"""The numbers of the CPU kernels, in every way they cut their work.

Each test says which kernel ran: nothing here is compared with torch operations that served the call instead.
"""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from normkit import reference
from normkit.functional import batch_norm
from normkit.kernels import cpu_channels
from tolerances import FORWARD_ULP, assert_close

from .shapes import WAYS, tensor

every_way = pytest.mark.parametrize("way", WAYS)


class Spy(list[tuple[str, torch.dtype, str | None, bool]]):
    """The kernels that ran: name, element type, activation, residual."""

    def names(self) -> set[str]:
        return {name for name, *_ in self}


@pytest.fixture
def ran(monkeypatch) -> Iterator[Spy]:
    """Note every kernel whose address is asked for."""
    spy, kernel = Spy(), cpu_channels._kernel

    def noted(*which):
        spy.append(which)
        return kernel(*which)

    monkeypatch.setattr(cpu_channels, "_kernel", noted)
    yield spy
    assert spy, "no kernel ran"


def ulps(y: Tensor, expected: np.ndarray) -> float:
    """The largest error of a float32 result, in units in the last place of max(1, |y|)."""
    unit = np.spacing(np.maximum(1, np.abs(expected)).astype(np.float32)).astype(np.float64)
    return float((np.abs(y.detach().double().numpy() - expected) / unit).max())


@every_way
def test_gradients_match_the_reference(way, ran):
    x = tensor(way).requires_grad_()
    channels = x.shape[1]
    weight, bias = torch.randn(channels, requires_grad=True), torch.randn(channels, requires_grad=True)
    y = batch_norm(x, None, None, weight, bias, True)
    dy = torch.randn_like(y)
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), dy)
    layout, fused = WAYS[way][1:]
    assert ran.names() & {f"{layout}.backward" if fused else f"{layout}.backward_partial"}
    step = reference.batch_norm(*(value.detach().double().numpy() for value in (x, weight, bias)))
    back = reference.batch_norm_backward(dy.double().numpy(), step)
    assert_close(dx, torch.from_numpy(back.dx), dtype=torch.float32, what="dx")
    assert_close(dweight, torch.from_numpy(back.dweight), dtype=torch.float32, what="dweight")
    assert_close(dbias, torch.from_numpy(back.dbias), dtype=torch.float32, what="dbias")


@every_way
@pytest.mark.parametrize("value", [7.0, 0.1, 1e10])
def test_constant_channel_gives_the_bias_exactly(way, value, ran):
    x = tensor(way)
    x[:, 1] = value
    bias = torch.randn(x.shape[1])
    y = batch_norm(x, None, None, None, bias, True)
    assert torch.equal(y[:, 1], bias[1].expand_as(y[:, 1]))


@every_way
@pytest.mark.parametrize("scale", [1e20, 1e30])
def test_huge_values_stay_finite(way, scale, ran):
    x = (tensor(way).double() * scale).float()
    y = batch_norm(x, None, None, training=True)
    assert torch.isfinite(y).all()
    assert ulps(y, reference.batch_norm(x.double().numpy()).output) <= FORWARD_ULP


@every_way
def test_nan_stays_in_its_channel(way, ran):
    x, dy = tensor(way), tensor(way)
    results = []
    for bad in (False, True):
        leaf = x.clone()
        if bad:
            leaf[-1, 1] = math.nan
        leaf.requires_grad_()
        mean, var = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
        y = batch_norm(leaf, mean, var, training=True)
        results.append((y.detach(), torch.autograd.grad(y, leaf, dy)[0], mean[None], var[None]))
    kept = [channel for channel in range(x.shape[1]) if channel != 1]
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(dirty[:, kept], clean[:, kept])
        assert dirty[:, 1].isnan().any()
