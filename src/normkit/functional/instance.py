"""Instance normalization as a function."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..axes import channel_shape, position_axes
from ..errors import ArgumentError, ShapeError
from ..kernels import plain_rows
from . import checks, shapes
from .batch import batch_norm
from .overrides import is_exporting, overridable
from .rows import normalize

__all__ = ["instance_norm"]


@overridable
def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    caller: nn.Module | None = None,
) -> Tensor:
    """Normalize every channel of every sample over its positions.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``

    x and y are ``(N, C, *)``; mean and var are ``(N, C)``, or the running ones, ``(C,)``; weight and bias are ``(C,)``.

    Conventions:
        Axes averaged: positions only.
        eps is added to the variance; its unit is that of the input squared.
        Variance: divided by m to normalize, by m - 1 to be stored, m positions.
        Momentum: ``running = (1 - momentum) * running + momentum * mean over samples``.
        Accumulation: float64, every channel of every sample centred on its first value.

    Args:
        input: ``(N, C, *)`` with a spatial dimension, float16, bfloat16, float32 or float64. An empty batch passes.
        running_mean: ``(C,)``, updated with ``use_input_stats``, used without; None for neither.
        running_var: ``(C,)``, likewise.
        weight: ``(C,)`` or None for 1. Of the type of the input, or float32 with half precision input.
        bias: ``(C,)`` or None for 0, likewise.
        use_input_stats: normalize by the sample's own statistics; False takes the running ones.
        momentum: the weight of the new batch, from 0 to 1.
        eps: not negative.
        caller: the layer that errors should name.

    Returns:
        y, in the type and memory format of the input.

    Raises:
        ShapeError: fewer than three dimensions, one position, or a parameter of another size.
        DtypeError: integers, complex numbers, a sparse tensor, or a mix of types.
        ArgumentError: eps or momentum out of range, or running statistics missing.

    Whenever it raises, running_mean and running_var are as they were.

    Example:
        >>> instance_norm(torch.tensor([[[1.0, 3.0]], [[10.0, 30.0]]]), eps=1e-12)
        tensor([[[-1.,  1.]],
        <BLANKLINE>
                [[-1.,  1.]]])

    References:
        Ulyanov, Vedaldi and Lempitsky, Instance Normalization, 2016, arXiv:1607.08022, equation (2).
    """
    _check(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps, caller)
    if not use_input_stats:
        return batch_norm(input, running_mean, running_var, weight, bias, False, 0.0, eps, caller=caller)
    if is_exporting():
        return F.instance_norm(input, running_mean, running_var, weight, bias, True, momentum, eps)
    axes, broadcast = position_axes(input.dim()), channel_shape(input.dim(), input.shape[1])
    gamma, beta = (None if value is None else value.reshape(broadcast) for value in (weight, bias))
    y = normalize(input, gamma, beta, axes, eps)
    if running_mean is not None and running_var is not None and input.numel() > 0:
        _update(input, axes, running_mean, running_var, momentum)
    return y


@torch.no_grad()
def _update(x: Tensor, axes: tuple[int, ...], running_mean: Tensor, running_var: Tensor, momentum: float) -> None:
    count = x.numel() // (x.shape[0] * x.shape[1])
    for running, each in zip((running_mean, running_var), plain_rows.statistics(x, axes), strict=True):
        found = each.flatten(1).mean(0)
        if running is running_var:
            found = found * (count / (count - 1))
        running.copy_(running + (found - running) * momentum)


def _check(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    caller: nn.Module | None,
) -> None:
    checks.check_input(x, caller)
    if x.dim() < 3:
        checks.refuse(
            ShapeError,
            f"expected at least 3D input (got {x.dim()}D input), shape {tuple(x.shape)}: instance normalization "
            "averages positions; pass (N, C, L), or use layer_norm for (N, C)",
            caller,
        )
    checks.check_channels(x, x.shape[1], caller)
    named = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, value in named.items():
        checks.check_parameter(name, value, x, caller)
    checks.check_eps(eps, caller=caller)
    checks.check_momentum(momentum, caller)
    if (running_mean is None) != (running_var is None):
        missing = "running_mean" if running_mean is None else "running_var"
        checks.refuse(ArgumentError, f"{missing} is None and the other is not; pass both or neither", caller)
    if use_input_stats:
        shapes.check_positions(x, caller)
    elif running_mean is None:
        checks.refuse(ArgumentError, "use_input_stats=False needs running_mean and running_var, got None", caller)
