"""Root mean square normalization as a function."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..axes import trailing_axes
from . import checks, shapes
from .overrides import is_exporting, overridable
from .rows import normalize

__all__ = ["rms_norm"]


@overridable
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    caller: nn.Module | None = None,
) -> Tensor:
    """Divide the last dimensions by their root mean square.

    ``y = x / sqrt(mean(x^2) + eps) * weight``

    x and y are ``(*, *normalized_shape)``; weight is ``normalized_shape``.

    Conventions:
        Axes averaged: the last ``len(normalized_shape)``.
        eps is added to the mean square; its unit is that of the input squared. None is the spacing at one of the type
        torch computes in: float64's for float64, float32's for all others.
        Accumulation: float64.

    Args:
        input: float16, bfloat16, float32 or float64. An empty tensor passes.
        normalized_shape: the sizes of the last dimensions.
        weight: ``normalized_shape`` or None for 1. Of the type of the input, or float32 with half precision input.
        eps: not negative, or None.
        caller: the layer that errors should name.

    Returns:
        y, in the type of the input.

    Raises:
        ShapeError: the input does not end in ``normalized_shape``, or weight has another shape.
        DtypeError: integers, complex numbers, a sparse tensor, or a mix of types.
        ArgumentError: eps out of range.

    Example:
        >>> rms_norm(torch.tensor([2.0, -2.0, 2.0, 2.0]), (4,))
        tensor([ 1., -1.,  1.,  1.])

    References:
        Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, arXiv:1910.07467, equation (4).
    """
    checks.check_input(input, caller)
    shape = shapes.check_trailing(input, normalized_shape, caller)
    shapes.check_elementwise("weight", weight, shape, input, caller)
    if eps is not None:
        checks.check_eps(eps, caller=caller)
    if is_exporting():
        return F.rms_norm(input, list(shape), weight, eps)
    if eps is None:
        eps = torch.finfo(torch.float64 if input.dtype == torch.float64 else torch.float32).eps
    return normalize(input, weight, None, trailing_axes(input.dim(), len(shape)), eps, centre=False)
