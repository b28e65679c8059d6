"""The judges are judged: each planted fault is found by one of them, and a right layer by none.

The faulty layer is a copy of the mathematics in plain torch operations, float64 inside, with one thing wrong at a time.
"""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normkit
from judges import JUDGES, Build


class _Step(torch.autograd.Function):
    """Normalization by given statistics; the backward goes through them where they are the batch's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor, training: bool, fault: str
    ) -> Tensor:
        wide, gamma, beta = x.double(), weight.double()[:, None, None], bias.double()[:, None, None]
        xhat = (wide - mean) * scale
        ctx.save_for_backward(x, gamma, mean, scale)
        ctx.training, ctx.fault = training, fault
        y = (xhat + beta) * gamma if fault == "bias added before weight" else xhat * gamma + beta
        y = y if fault == "output in float64" else y.to(x.dtype)
        return y.contiguous() if fault == "memory format lost" else y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, mean, scale = ctx.saved_tensors
        fault, axes = ctx.fault, (0, 2, 3)
        xhat, wide = (x.double() - mean) * scale, dy.double()
        count = x.numel() / x.shape[1] - (1 if fault == "gradient divided by m - 1" else 0)
        dxhat = wide if fault == "weight missing in the gradient" else wide * gamma
        dx = dxhat
        if ctx.training and fault != "statistics taken as constants":
            if fault != "mean gradient missing":
                dx = dx - dxhat.sum(axes, keepdim=True) / count
            if fault != "variance gradient missing":
                dx = dx - xhat * (dxhat * xhat).sum(axes, keepdim=True) / count
        dweight = (wide * (x.double() if fault == "weight gradient from x" else xhat)).sum(axes)
        dbias = wide.sum(axes) * (0 if fault == "bias gradient missing" else 1)
        return (dx * scale).to(x.dtype), dweight, dbias, None, None, None, None


class Copy(nn.BatchNorm2d):
    """A right batch norm, unless a fault is named."""

    def __init__(self, *args: Any, fault: str = "", **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.fault = fault

    def forward(self, x: Tensor) -> Tensor:
        fault = self.fault
        if self.training and x.numel() == x.shape[1]:
            if fault == "refused batch is counted":
                self.num_batches_tracked.add_(1)
            if fault != "one value per channel accepted":
                raise ValueError("Expected more than 1 value per channel when training")
        mean, var = self._batch_statistics(x)
        if self.training or fault == "statistics updated in evaluation":
            self._update(mean, var, x.numel() / x.shape[1])
        if (
            not self.training and fault != "batch statistics in evaluation"
        ) or fault == "stored statistics in training":
            mean, var = self.running_mean.double(), self.running_var.double()
        if (self.training or fault == "counter advanced in evaluation") and fault != "counter forgotten":
            self.num_batches_tracked.add_(1)
        if self.training and fault == "unbiased variance in the forward":
            count = x.numel() / x.shape[1]
            var = var * count / (count - 1)
        mean, var = (v if v.dim() > 1 else v[:, None, None] for v in (mean, var))
        weight, bias = self.weight, self.bias
        if fault == "weight applied before normalizing":
            x, weight = x * weight[:, None, None].to(x.dtype), torch.ones_like(weight)
        batch_statistics = self.training and fault != "stored statistics in training"
        return _Step.apply(x, weight, bias, mean, self._scale(var), batch_statistics, fault)

    def _batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach()
        if self.fault == "one-pass variance in float32" and x.dtype is torch.float32:
            mean = x.mean((0, 2, 3))
            return mean.double(), ((x * x).mean((0, 2, 3)) - mean * mean).clamp_min(0).double()
        if self.fault == "statistics in float32" and x.dtype is torch.float32:
            return x.mean((0, 2, 3)).double(), x.var((0, 2, 3), correction=0).double()
        wide = x.double()
        if self.fault == "statistics per sample":
            return wide.mean((1, 2, 3))[:, None, None, None], wide.var((1, 2, 3), correction=0)[:, None, None, None]
        if self.fault == "statistics over samples only":
            return wide.mean(0), wide.var(0, correction=0)
        first = wide[:1, :, :1, :1]
        offset = (wide - first).mean((0, 2, 3))
        return first.flatten() + offset, (wide - first - offset[:, None, None]).square().mean((0, 2, 3))

    def _scale(self, var: Tensor) -> Tensor:
        if self.fault == "eps outside the root":
            return 1 / (var.sqrt() + self.eps)
        if self.fault == "eps squared":
            return (var + self.eps**2).rsqrt()
        if self.fault == "eps forgotten":
            return (var + 1e-12).rsqrt()
        return (var + self.eps).rsqrt()

    def _update(self, mean: Tensor, var: Tensor, count: float) -> None:
        fault = self.fault
        if mean.dim() > 1:
            mean, var = (v.mean((-1, -2)) if v.shape[0] == 3 else v.flatten().mean().expand(3) for v in (mean, var))
        rate = self.momentum
        if rate is None:
            rate = 0.1 if fault == "momentum None taken as 0.1" else 1 / (self.num_batches_tracked.item() + 1)
        if fault == "momentum reversed":
            rate = 1 - rate
        stored = var if fault == "biased variance stored" or count == 1 else var * count / (count - 1)
        if fault == "standard deviation stored":
            stored = stored.sqrt()
        if fault != "running mean never updated":
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
        self.running_var.lerp_(stored.to(self.running_var.dtype), rate)


FAULTS = (
    "unbiased variance in the forward",
    "biased variance stored",
    "standard deviation stored",
    "eps outside the root",
    "eps squared",
    "eps forgotten",
    "momentum reversed",
    "momentum None taken as 0.1",
    "running mean never updated",
    "mean gradient missing",
    "variance gradient missing",
    "statistics taken as constants",
    "gradient divided by m - 1",
    "weight missing in the gradient",
    "weight gradient from x",
    "bias gradient missing",
    "bias added before weight",
    "weight applied before normalizing",
    "statistics updated in evaluation",
    "counter advanced in evaluation",
    "counter forgotten",
    "stored statistics in training",
    "batch statistics in evaluation",
    "statistics per sample",
    "statistics over samples only",
    "one-pass variance in float32",
    "statistics in float32",
    "output in float64",
    "memory format lost",
    "one value per channel accepted",
    "refused batch is counted",
)


def _objecting(build: Build) -> list[str]:
    """The judges that find something wrong. A layer that cannot even run is wrong too."""
    names = []
    for judge in JUDGES:
        try:
            judge(build)
        except (AssertionError, RuntimeError):
            names.append(judge.__name__)
    return names


@functools.cache
def _found(fault: str) -> list[str]:
    return _objecting(functools.partial(Copy, fault=fault))


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(fault):
    assert _found(fault), f"no judge sees: {fault}"


def test_right_copy_is_found_by_none():
    assert _found("") == []


@pytest.mark.parametrize("judge", JUDGES, ids=lambda judge: judge.__name__)
def test_our_layer_passes(judge):
    judge(normkit.BatchNorm2d)


@pytest.mark.parametrize("judge", JUDGES, ids=lambda judge: judge.__name__)
def test_every_judge_is_needed(judge):
    """Each finds a fault that hardly any other sees; one that finds nothing is no judge."""
    assert min((len(_found(fault)) for fault in FAULTS if judge.__name__ in _found(fault)), default=9) <= 2


def test_torchs_layer_is_found_by_the_judges_it_is_known_to_fail():
    assert _objecting(nn.BatchNorm2d) == ["survives_a_large_mean", "refuses_without_a_trace"]
