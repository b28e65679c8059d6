"""Layer normalization as a function."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.dispatch import Activation
from ..kernels.plain.channels import activate
from . import checks, ordinary, shapes
from .nested import is_nested, normalize_rows
from .overrides import is_exporting, overridable
from .rows import fits, fits_trailing, is_everyday, normalize_trailing, run

__all__ = ["layer_norm"]


@overridable
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: Activation | None = None,
    caller: nn.Module | None = None,
) -> Tensor:
    """Normalize the last dimensions, each position of the first ones by itself.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, then ``activation(y)`` where it is given

    x and y are ``(*, *normalized_shape)``; mean and var belong to one position of the leading dimensions; weight and
    bias are ``normalized_shape``.

    Conventions:
        Axes averaged: the last ``len(normalized_shape)``.
        eps is added to the variance; its unit is that of the input squared.
        Variance: divided by the number of values; nothing is stored, training and prediction are the same.
        Accumulation: float32 lanes over at most 2048 values about one near their mean, merged in float64 in an order
            that the shape alone decides; float64 throughout for float64 input.

    Args:
        input: float16, bfloat16, float32 or float64. An empty tensor passes, and a nested one whose samples differ
            in size before the last dimensions only.
        normalized_shape: the sizes of the last dimensions.
        weight: ``normalized_shape`` or None for 1. Of the type of the input, or float32 with half precision input.
        bias: ``normalized_shape`` or None for 0, likewise.
        eps: not negative.
        activation: "relu", "relu6", "leaky_relu" (slope 0.01) or "silu", applied last in the same pass over memory.
        caller: the layer that errors should name.

    Returns:
        y, in the type of the input.

    Raises:
        ShapeError: the input does not end in ``normalized_shape``, or a parameter has another shape.
        DtypeError: integers, complex numbers, a sparse tensor, or a mix of types.
        ArgumentError: eps out of range, or an unknown activation.
        BackendError: inside `normkit.use_backend`, where the named implementation cannot serve this call.

    Example:
        >>> import torch
        >>> layer_norm(torch.tensor([[1.0, 3.0], [10.0, 30.0]]), (2,), eps=1e-12)
        tensor([[-1.,  1.],
                [-1.,  1.]])

    References:
        Ba, Kiros and Hinton, Layer Normalization, 2016, arXiv:1607.06450, equation (3).
    """
    served = ordinary.trailing_norm(input, normalized_shape, weight, bias, eps, True, activation)
    if served is not None:
        return served
    if is_everyday(input, eps, activation):
        size = tuple(normalized_shape)
        if fits_trailing(input, size) and fits(weight, size, input.dtype) and fits(bias, size, input.dtype):
            return run(input, weight, bias, None, len(size), eps, True, activation)
    if is_nested(input):
        settings = (normalized_shape, weight, bias, eps)
        each = partial(layer_norm, activation=activation, caller=caller)
        return normalize_rows(lambda part: each(part, *settings), input, len(normalized_shape), caller)
    checks.check_input(input, caller)
    shape = shapes.check_trailing(input, normalized_shape, caller)
    shapes.check_elementwise("weight", weight, shape, input, caller)
    shapes.check_elementwise("bias", bias, shape, input, caller)
    checks.check_eps(eps, caller=caller)
    checks.check_activation(activation, caller)
    if is_exporting():
        return activate(F.layer_norm(input, list(shape), weight, bias, eps), activation)
    return normalize_trailing(input, weight, bias, len(shape), eps, activation)
