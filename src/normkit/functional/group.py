"""Group normalization as a function."""

from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.dispatch import Activation
from ..kernels.plain.channels import activate
from . import checks, ordinary, shapes
from .overrides import is_exporting, overridable
from .rows import fits, fits_groups, is_everyday, normalize_groups, run

__all__ = ["group_norm"]


@overridable
def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: Activation | None = None,
    caller: nn.Module | None = None,
) -> Tensor:
    """Normalize groups of neighbouring channels, each sample by itself.

    ``y = (x - mean) / sqrt(var + eps) * weight + bias``, then ``activation(y)`` where it is given

    x and y are ``(N, C, *)``; mean and var are ``(N, num_groups)``; weight and bias are ``(C,)``.

    Conventions:
        Axes averaged: the channels of a group and all positions.
        eps is added to the variance; its unit is that of the input squared.
        Variance: divided by the number of values; nothing is stored, training and prediction are the same.
        Accumulation: float32 lanes over at most 2048 values about one near their mean, merged in float64 in an order
            that shape and memory format decide; float64 throughout for float64 input.

    Args:
        input: ``(N, C, *)``, float16, bfloat16, float32 or float64. An empty batch passes.
        num_groups: a divisor of C.
        weight: ``(C,)`` or None for 1. Of the type of the input, or float32 with half precision input.
        bias: ``(C,)`` or None for 0, likewise.
        eps: not negative.
        activation: "relu", "relu6", "leaky_relu" (slope 0.01) or "silu", applied last in the same pass over memory.
        caller: the layer that errors should name.

    Returns:
        y, in the type and memory format of the input.

    Raises:
        ShapeError: fewer than two dimensions, channels that the groups do not divide, one value per group, or a
            parameter of another size.
        DtypeError: integers, complex numbers, a sparse tensor, or a mix of types.
        ArgumentError: num_groups or eps out of range, or an unknown activation.
        BackendError: inside `normkit.use_backend`, where the named implementation cannot serve this call.

    Example:
        >>> import torch
        >>> group_norm(torch.tensor([[1.0, 3.0, 10.0, 30.0]]), 2, eps=1e-12)
        tensor([[-1.,  1., -1.,  1.]])

    References:
        Wu and He, Group Normalization, 2018, arXiv:1803.08494, equations (1), (2) and (7).
    """
    served = ordinary.group_norm(input, num_groups, weight, bias, eps, activation)
    if served is not None:
        return served
    if is_everyday(input, eps, activation) and fits_groups(input, num_groups):
        size = input.shape[1:2]
        if fits(weight, size, input.dtype) and fits(bias, size, input.dtype):
            return run(input, weight, bias, num_groups, 0, eps, True, activation)
    checks.check_input(input, caller)
    shapes.check_group_input(input, num_groups, caller)
    checks.check_parameter("weight", weight, input, caller)
    checks.check_parameter("bias", bias, input, caller)
    checks.check_eps(eps, caller=caller)
    checks.check_activation(activation, caller)
    if is_exporting():
        return activate(F.group_norm(input, num_groups, weight, bias, eps), activation)
    return normalize_groups(input, weight, bias, num_groups, eps, activation)
