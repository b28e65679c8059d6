"""Root mean square normalization as a function."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.dispatch import Activation
from ..kernels.plain.channels import activate
from . import checks, ordinary, shapes
from .nested import is_nested, normalize_rows
from .overrides import is_exporting, overridable
from .rows import fits, fits_trailing, is_everyday, normalize_trailing, run

__all__ = ["rms_norm"]

_EPS32, _EPS64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps


@overridable
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    activation: Activation | None = None,
    caller: nn.Module | None = None,
) -> Tensor:
    """Divide the last dimensions by their root mean square.

    ``y = x / sqrt(mean(x^2) + eps) * weight``, then ``activation(y)`` where it is given

    x and y are ``(*, *normalized_shape)``; weight is ``normalized_shape``.

    Conventions:
        Axes averaged: the last ``len(normalized_shape)``.
        eps is added to the mean square; its unit is that of the input squared. None is the spacing at one of the type
        torch computes in: float64's for float64, float32's for all others.
        Accumulation: float32 lanes over at most 2048 squares, merged in float64 in an order that the shape alone
            decides; float64 throughout for float64 input.

    Args:
        input: float16, bfloat16, float32 or float64. An empty tensor passes, and a nested one whose samples differ
            in size before the last dimensions only.
        normalized_shape: the sizes of the last dimensions.
        weight: ``normalized_shape`` or None for 1. Of the type of the input, or float32 with half precision input;
            of another floating type it is rounded to that first, for torch takes any with any here.
        eps: not negative, or None.
        activation: "relu", "relu6", "leaky_relu" (slope 0.01) or "silu", applied last in the same pass over memory.
        caller: the layer that errors should name.

    Returns:
        y, in the type of the input.

    Raises:
        ShapeError: the input does not end in ``normalized_shape``, or weight has another shape.
        DtypeError: integers, complex numbers, a sparse tensor, or a weight on another device.
        ArgumentError: eps out of range, or an unknown activation.
        BackendError: inside `normkit.use_backend`, where the named implementation cannot serve this call.

    Example:
        >>> rms_norm(torch.tensor([2.0, -2.0, 2.0, 2.0]), (4,))
        tensor([ 1., -1.,  1.,  1.])

    References:
        Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, arXiv:1910.07467, equation (4).
    """
    unset = eps is None
    if eps is None:
        eps = _EPS64 if isinstance(input, Tensor) and input.dtype is torch.float64 else _EPS32
    served = ordinary.trailing_norm(input, normalized_shape, weight, None, eps, False, activation)
    if served is not None:
        return served
    if is_everyday(input, eps, activation):
        size = tuple(normalized_shape)
        if fits_trailing(input, size) and fits(weight, size, input.dtype):
            return run(input, weight, None, None, len(size), eps, False, activation)
    if is_nested(input):
        settings = (normalized_shape, weight, None if unset else eps)
        each = partial(rms_norm, activation=activation, caller=caller)
        return normalize_rows(lambda part: each(part, *settings), input, len(normalized_shape), caller)
    checks.check_input(input, caller)
    shape = shapes.check_trailing(input, normalized_shape, caller)
    if isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype is not input.dtype:
        weight = weight.to(torch.float32 if input.dtype in checks.HALF else input.dtype)
    shapes.check_elementwise("weight", weight, shape, input, caller)
    checks.check_eps(eps, caller=caller)
    checks.check_activation(activation, caller)
    if is_exporting():
        return activate(F.rms_norm(input, list(shape), weight, None if unset else eps), activation)
    return normalize_trailing(input, weight, None, len(shape), eps, activation, centre=False)
