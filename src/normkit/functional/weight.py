"""Normalizing weights instead of activations, as functions."""

from torch import Tensor

from ..errors import ShapeError
from ..kernels.plain.samples import wide
from . import checks
from .overrides import overridable
from .rows import normalize

__all__ = ["slice_axes", "weight_norm", "weight_standardization"]


@overridable
def weight_norm(v: Tensor, magnitude: Tensor, dim: int | None = 0) -> Tensor:
    """Write a weight as length times direction.

    ``w = magnitude * v / |v|``

    v and w have one shape; magnitude has size one in all its dimensions but ``dim``.

    Conventions:
        One Euclidean norm per slice along ``dim``, over all other dimensions; one over everything for ``dim=None``.
        No eps, as in the paper: a slice that is zero has no direction and gives NaN.
        Accumulation: float64.

    Args:
        v: the direction, before it is scaled to length one; float16, bfloat16, float32 or float64.
        magnitude: v's shape with size one in all dimensions but ``dim``; for ``dim=None`` a single value.
        dim: the dimension of the outputs, or None.

    Returns:
        w, in v's type.

    Raises:
        ShapeError: magnitude has another shape, or v has no dimension ``dim``.
        DtypeError: integers, complex numbers, a sparse tensor, or a mix of types.

    Example:
        >>> import torch
        >>> weight_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([[10.0]]))
        tensor([[6., 8.]])

    References:
        Salimans and Kingma, Weight Normalization, 2016, arXiv:1602.07868, equation (2).
    """
    checks.check_input(v)
    checks.check_input(magnitude)
    checks.check_match("magnitude", magnitude, v)
    axes = slice_axes(v, dim)
    expected = tuple(1 if axis in axes else size for axis, size in enumerate(v.shape))
    if tuple(magnitude.shape) != expected and not (dim is None and magnitude.numel() == 1):
        got = tuple(magnitude.shape)
        checks.refuse(ShapeError, f"magnitude has shape {got}; for v {tuple(v.shape)} pass {expected}", None)
    x = v.to(wide(v))
    norm = x.square().sum(axes, keepdim=True).sqrt()
    return (x / norm * magnitude.to(wide(v))).to(v.dtype)


def slice_axes(v: Tensor, dim: int | None) -> tuple[int, ...]:
    """Return the axes of one slice along ``dim``: all others.

    Raises:
        ShapeError: v has no dimension ``dim``.
    """
    if dim is not None and not -v.dim() <= dim < v.dim():
        allowed = f"from {-v.dim()} to {v.dim() - 1}"
        checks.refuse(ShapeError, f"v has shape {tuple(v.shape)} and no dimension {dim}; pass dim {allowed}", None)
    kept = None if dim is None else dim % v.dim()
    return tuple(axis for axis in range(v.dim()) if axis != kept)


@overridable
def weight_standardization(weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Give the weights of every output zero mean and unit variance.

    ``w = (weight - mean) / sqrt(var + eps)``

    Conventions:
        Axes averaged: all but the first.
        eps is added to the variance; its unit is that of the weight squared.
        Variance: divided by the number of weights of one output.
        Accumulation: float64.

    Args:
        weight: ``(C_out, C_in, *)``, float16, bfloat16, float32 or float64.
        eps: not negative.

    Returns:
        The standardized weight, in the weight's type.

    Raises:
        ShapeError: fewer than two dimensions, or one weight per output.
        DtypeError: integers, complex numbers or a sparse tensor.
        ArgumentError: eps out of range.

    Example:
        >>> import torch
        >>> weight_standardization(torch.tensor([[1.0, 3.0]]), eps=0.0)
        tensor([[-1.,  1.]])

    References:
        Qiao, Wang, Liu, Shen and Yuille, Micro-Batch Training with Batch-Channel Normalization and Weight
        Standardization, 2019, arXiv:1903.10520, equations (2) to (4). Sources differ on eps: here it is in the root.
    """
    checks.check_input(weight)
    checks.check_eps(eps)
    shape = tuple(weight.shape)
    if weight.dim() < 2:
        checks.refuse(ShapeError, f"weight has shape {shape}; pass (C_out, C_in, *)", None)
    if weight.numel() == shape[0] > 0:
        advice = "Leave this layer as it is"
        checks.refuse(ShapeError, f"weight {shape} has one value per output, which has no variance. {advice}", None)
    return normalize(weight, None, None, tuple(range(1, weight.dim())), eps)
