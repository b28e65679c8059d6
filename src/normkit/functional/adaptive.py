"""Adaptive instance normalization as a function."""

from torch import Tensor, nn

from ..axes import position_axes
from ..errors import ShapeError
from ..kernels.plain import samples as plain_samples
from . import checks, shapes
from .overrides import overridable
from .rows import normalize

__all__ = ["adaptive_instance_norm"]


@overridable
def adaptive_instance_norm(
    input: Tensor, style: Tensor, eps: float = 1e-5, *, caller: nn.Module | None = None
) -> Tensor:
    """Give every channel of the input the mean and deviation of the style's channel.

    ``y = (x - mean_x) / sqrt(var_x + eps) * sqrt(var_s + eps) + mean_s``

    x and y are ``(N, C, *)``; the style is ``(N, C, *)`` with positions of its own; the statistics are ``(N, C)``.

    Conventions:
        Axes averaged: positions, of input and style each.
        eps is added to both variances; its unit is that of the input squared. The output has the style's mean, and
        the style's variance where the input's is well above eps; exactly with eps=0.
        Variance: divided by the number of positions; nothing is stored.
        Accumulation: float64.

    Args:
        input: ``(N, C, *)``, float16, bfloat16, float32 or float64.
        style: ``(N, C, *)`` of the same samples and channels, at least two positions.
        eps: not negative; with 0 a constant channel gives NaN.
        caller: the layer that errors should name.

    Returns:
        y, in the type and memory format of the input. Gradients flow to input and style.

    Raises:
        ShapeError: other samples or channels, or fewer than two positions.
        DtypeError: integers, complex numbers, a sparse tensor, or a mix of types.
        ArgumentError: eps out of range.

    Example:
        >>> import torch
        >>> content, style = torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[10.0, 30.0, 10.0, 30.0]]])
        >>> adaptive_instance_norm(content, style, eps=0.0)
        tensor([[[10., 30.]]])

    References:
        Huang and Belongie, Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization, 2017,
        arXiv:1703.06868, equation (8).
    """
    for name, x in (("input", input), ("style", style)):
        checks.check_input(x, caller)
        if x.dim() < 3:
            checks.refuse(
                ShapeError, f"{name} has shape {tuple(x.shape)}; positions are averaged: pass (N, C, *)", caller
            )
        shapes.check_positions(x, caller)
    if input.shape[:2] != style.shape[:2]:
        got = f"input {tuple(input.shape)} and style {tuple(style.shape)}"
        checks.refuse(ShapeError, f"{got} must agree in samples and channels; repeat the style with expand", caller)
    checks.check_match("style", style, input, caller)
    checks.check_eps(eps, caller=caller)
    mean, var = plain_samples.statistics(style, position_axes(style.dim()))
    each = (*input.shape[:2], *(1 for _ in position_axes(input.dim())))
    std = (var + eps).sqrt()
    return normalize(input, std.reshape(each), mean.reshape(each), position_axes(input.dim()), eps)
