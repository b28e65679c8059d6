"""Normalization per channel in plain torch operations: any device, type and layout, differentiable to every order.

Not fast, but right: all arithmetic is float64, and every channel is first centred on its own first value. That
makes the variance immune to a large mean, keeps a constant channel exactly constant, and lets 1e30 through.

The four steps stand alone, because synchronised, ghost and masked normalization put something between them:

    statistics -> apply          forward
    reduce     -> apply_backward  backward

Shapes: x, y, dy, dx are (N, C, *); mean, var, rstd and every sum are (C,) float64. Algorithm and section are those of
Ioffe and Szegedy, 2015, arXiv:1502.03167.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ...axes import batch_axes, channel_shape, values_per_channel

__all__ = [
    "GATED_BY_OUTPUT",
    "activate",
    "apply",
    "apply_backward",
    "backward",
    "forward",
    "gate",
    "gradient_before",
    "inference_backward",
    "reduce",
    "statistics",
    "tangent",
]

# Activations whose slope the sign of their output decides.
GATED_BY_OUTPUT = ("relu", "relu6", "leaky_relu")


def _wide(x: Tensor) -> torch.dtype:
    # Apple's GPU has no float64.
    return torch.float32 if x.device.type == "mps" else torch.float64


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.to(_wide(x)).reshape(channel_shape(x.dim(), x.shape[1]))


def _centred(x: Tensor, mean: Tensor) -> Tensor:
    return x.to(_wide(x)) - _per_channel(mean, x)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance of each channel (Algorithm 1)."""
    axes = batch_axes(x.dim())
    first = x.detach()[0]
    while first.dim() > 1:
        first = first.select(-1, 0)
    first = first.to(_wide(x))
    distance = _centred(x, first)
    offset = distance.mean(axes)
    var = (distance - _per_channel(offset, x)).square().mean(axes)
    return first + offset, var


def apply(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return ``(x - mean) * rstd * weight + bias``, rounded once, in the type and memory format of x."""
    y = _centred(x, mean) * _per_channel(rstd, x)
    if weight is not None:
        y = y * _per_channel(weight, x)
    if bias is not None:
        y = y + _per_channel(bias, x)
    return y.to(x.dtype)


def reduce(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two sums of the backward: of dy, and of dy times the normalized x."""
    axes = batch_axes(x.dim())
    wide = dy.to(_wide(x))
    return wide.sum(axes), (wide * _centred(x, mean) * _per_channel(rstd, x)).sum(axes)


def apply_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, sums: tuple[Tensor, Tensor], count: int
) -> Tensor:
    """Return dx = weight * rstd * (dy - sum_dy / m - xhat * sum_dy_xhat / m), m values per channel (section 3)."""
    scale = rstd if weight is None else rstd * weight.to(_wide(x))
    xhat = _centred(x, mean) * _per_channel(rstd, x)
    inner = dy.to(_wide(x)) - _per_channel(sums[0] / count, x) - xhat * _per_channel(sums[1] / count, x)
    return (inner * _per_channel(scale, x)).to(x.dtype)


def activate(z: Tensor, activation: str | None) -> Tensor:
    """Apply an activation by its name in torch.nn.functional; None is the identity."""
    if activation is None:
        return z
    function: Callable[[Tensor], Tensor] = getattr(F, activation)
    return function(z)


def gate(dy: Tensor, z: Tensor, activation: str) -> Tensor:
    """Return dy times the slope of the activation at z, differentiable in dy, and in z where the slope bends."""
    if activation == "silu":
        sigmoid = torch.sigmoid(z)
        return dy * (sigmoid * (1 + z * (1 - sigmoid)))
    open_at = (z > 0) if activation != "relu6" else (z > 0) & (z < 6)
    closed = 0.01 if activation == "leaky_relu" else 0.0
    return torch.where(open_at | z.isnan(), dy, dy * closed)


def gradient_before(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    other: Tensor | None,
) -> Tensor:
    """Return the gradient before the activation.

    With a residual ``other`` is what else decides the slope: the output where its sign is enough, or the residual.
    """
    if activation is None:
        return dy
    if activation in GATED_BY_OUTPUT and other is not None:
        return gate(dy, other.detach(), activation)
    z = apply(x, mean, rstd, weight, bias)
    return gate(dy, z if other is None else z + other, activation)


def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, mean and variance of the training forward."""
    mean, var = statistics(x)
    return apply(x, mean, (var + eps).rsqrt(), weight, bias), mean, var


def backward(dy: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dweight and dbias of the training forward, differentiable in dy, x and weight.

    The statistics are computed again from x, so that autograd sees how they depend on it.
    """
    mean, var = statistics(x)
    rstd = (var + eps).rsqrt()
    sums = reduce(dy, x, mean, rstd)
    dx = apply_backward(dy, x, mean, rstd, weight, sums, values_per_channel(tuple(x.shape)))
    return dx, sums[1], sums[0]


def inference_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dweight and dbias where the statistics are constants."""
    sums = reduce(dy, x, mean, rstd)
    scale = rstd if weight is None else rstd * weight.to(_wide(x))
    return (dy.to(_wide(x)) * _per_channel(scale, x)).to(x.dtype), sums[1], sums[0]


def tangent(x: Tensor, dx: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normalized x of the training forward and its derivative along dx, both float64."""
    axes = batch_axes(x.dim())
    mean, var = statistics(x)
    rstd = _per_channel((var + eps).rsqrt(), x)
    xhat = _centred(x, mean) * rstd
    wide = dx.to(_wide(x))
    along = (wide * xhat).mean(axes, keepdim=True)
    return xhat, (wide - wide.mean(axes, keepdim=True) - xhat * along) * rstd
