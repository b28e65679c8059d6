"""Normalization over any axes in plain torch operations: any device, type and layout, differentiable to every order.

Layer, RMS, group and instance normalization are this, each with its own view and axes. All arithmetic is float64; the
values that share statistics are first centred on one of their own, so that a large mean costs nothing and equal
values stay exactly equal.

Shapes: x, y, dy and dx are the view; statistics keep their axes with size one; weight and bias broadcast.
"""

import torch
from torch import Tensor

from .channels import gate, origin

__all__ = ["backward", "forward", "forward_groups", "pass_empty", "statistics", "wide"]


def wide(x: Tensor) -> torch.dtype:
    """Return the type to compute in: float64, which Apple's GPU does not have."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def statistics(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance over the axes, which stay with size one."""
    base = origin(x.detach(), axes).to(wide(x))
    distance = x.to(wide(x)) - base
    if x.dtype is torch.float64:
        # Over strided memory torch adds value by value, and loses digits that it keeps where it adds in pairs.
        distance = distance.contiguous()
    offset = distance.mean(axes, keepdim=True)
    return base + offset, (distance - offset).square().mean(axes, keepdim=True)


def _normalized(x: Tensor, axes: tuple[int, ...], eps: float, centre: bool) -> tuple[Tensor, Tensor]:
    """Return xhat and the reciprocal root: of the variance, or without centring of the mean square."""
    if centre:
        mean, spread = statistics(x, axes)
        distance = x.to(wide(x)) - mean
    else:
        distance = x.to(wide(x))
        spread = distance.square().mean(axes, keepdim=True)
    scale = (spread + eps).rsqrt()
    return distance * scale, scale


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, axes: tuple[int, ...], eps: float, centre: bool
) -> Tensor:
    """Return ``xhat * weight + bias``, rounded once, in the type and memory format of x."""
    y, _ = _normalized(x, axes, eps, centre)
    if weight is not None:
        y = y * weight.to(wide(x))
    if bias is not None:
        y = y + bias.to(wide(x))
    return y.to(x.dtype)


def forward_groups(x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> Tensor:
    """Return the same for groups of channels of ``(N, C, *)``, out of sums per channel and without a view of x.

    For graphs that torch.compile makes: behind a convolution, where a size is an expression, its CPU backend fails
    on reductions of the view that splits the channels.
    """
    shape, positions = (*x.shape[:2], *(1 for _ in x.shape[2:])), tuple(range(2, x.dim()))
    count = x.shape[1] // groups * (x[:1, :1].numel())

    def average(values: Tensor) -> Tensor:
        """Return the mean of the group that each channel is in."""
        sums = values.sum(positions) if positions else values
        mean = sums.reshape(-1, groups, shape[1] // groups).sum(-1, keepdim=True) / count
        return mean.expand(-1, -1, shape[1] // groups).reshape(shape)

    first = origin(x.detach(), positions).to(wide(x))
    first = first.reshape(-1, groups, shape[1] // groups)[:, :, :1]
    centred = x.to(wide(x)) - first.expand(-1, -1, shape[1] // groups).reshape(shape)
    centred = centred - average(centred)
    y = centred * (average(centred.square()) + eps).rsqrt()
    if weight is not None:
        y = y * weight.to(wide(x)).reshape(shape[1:])
    if bias is not None:
        y = y + bias.to(wide(x)).reshape(shape[1:])
    return y.to(x.dtype)


def pass_empty(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return what a view without values is normalized to: itself, with gradients of zero for weight and bias."""
    y = x.to(wide(x))
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    axes: tuple[int, ...],
    eps: float,
    centre: bool,
    activation: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return dx, dweight and dbias, differentiable in dy, x and weight, of what an activation may follow."""
    xhat, scale = _normalized(x, axes, eps, centre)
    given = dy.to(wide(x))
    if activation is not None:
        z = xhat if weight is None else xhat * weight.to(wide(x))
        given = gate(given, z if bias is None else z + bias.to(wide(x)), activation)
    dxhat = given if weight is None else given * weight.to(wide(x))
    inner = dxhat - xhat * (dxhat * xhat).mean(axes, keepdim=True)
    if centre:
        inner = inner - dxhat.mean(axes, keepdim=True)
    dweight = None if weight is None else (given * xhat).sum_to_size(weight.shape).to(weight.dtype)
    dbias = None if bias is None else given.sum_to_size(bias.shape).to(bias.dtype)
    return (inner * scale).to(x.dtype), dweight, dbias
