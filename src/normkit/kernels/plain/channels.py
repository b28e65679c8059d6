"""Normalization per channel in plain torch operations: any device, type and layout, differentiable to every order.

Not fast, but right: all arithmetic is float64, and every channel is first centred on a value of its own. That
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
from torch.autograd import forward_ad
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
    "middle_of",
    "moved",
    "origin",
    "pass_empty",
    "reduce",
    "statistics",
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
    base = origin(x.detach(), axes).to(_wide(x)).reshape(-1)
    distance = _centred(x, base)
    offset = distance.mean(axes)
    var = (distance - _per_channel(offset, x)).square().mean(axes)
    return base + offset, var


def origin(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Return a value of x for every mean over the axes, from which that is told: the middle one of three.

    The distances then keep all digits where the mean dwarfs the deviation, and where one value is far from all others.
    """
    first = second = third = x
    for axis in axes:
        # By an index that is a tensor: by a number, a graph for any size would be one for some sizes.
        middle = torch.full((1,), x.shape[axis] // 2, dtype=torch.int64, device=x.device)
        first, second = first.narrow(axis, 0, 1), second.index_select(axis, middle)
        third = third.narrow(axis, -1, 1)
    return middle_of(first, second, third)


def middle_of(first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """Return the middle one of three values, which no single value far out can be."""
    larger = torch.maximum(first, second)
    return torch.maximum(torch.minimum(first, second), torch.minimum(larger, third))


def apply(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return ``(x - mean) * rstd * weight + bias``, rounded once, in the type and memory format of x."""
    y = _centred(x, mean) * _per_channel(rstd, x)
    if weight is not None:
        y = y * _per_channel(weight, x)
    if bias is not None:
        y = y + _per_channel(bias, x)
    return y.to(x.dtype)


def pass_empty(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return what a tensor without values is normalized to: itself, with gradients of zero for weight and bias."""
    zero = torch.zeros(x.shape[1], dtype=_wide(x), device=x.device)
    return apply(x, zero, zero + 1, weight, bias)


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
    if activation == "silu" and forward_ad._current_level >= 0:
        # torch has no forward derivative of its backward of silu.
        return z * torch.sigmoid(z)
    function: Callable[[Tensor], Tensor] = getattr(F, activation)
    return function(z)


def gate(dy: Tensor, z: Tensor, activation: str) -> Tensor:
    """Return dy times the slope of the activation at z, differentiable in dy, and in z where the slope bends."""
    if activation == "silu":
        sigmoid = torch.sigmoid(z)
        return dy * (sigmoid * (1 + z * (1 - sigmoid)))
    open_at = (z > 0) if activation != "relu6" else (z > 0) & (z < 6)
    # Where z is a NaN as in torch: relu and relu6 let the gradient pass, leaky_relu does not.
    if activation == "leaky_relu":
        return torch.where(open_at, dy, dy * 0.01)
    return torch.where(open_at | z.isnan(), dy, dy * 0.0)


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


def moved(running: Tensor, batch: Tensor, momentum: float | Tensor) -> Tensor:
    """Return ``(1 - momentum) * running + momentum * batch`` in the wide type of the batch's, to be rounded once.

    Of ``running + (batch - running) * momentum`` little would be left where the batch's is far smaller. As in torch a
    running statistic that is not finite stays so, at momentum 1 too.
    """
    return running.to(batch.dtype) * (1 - momentum) + batch * momentum


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
