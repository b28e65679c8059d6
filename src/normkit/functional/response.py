"""Local response normalization as a function."""

import operator

from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ArgumentError, ShapeError
from ..kernels.plain.samples import wide
from . import checks
from .overrides import is_exporting, overridable

__all__ = ["check_response", "local_response_norm"]


@overridable
def local_response_norm(
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    *,
    caller: nn.Module | None = None,
) -> Tensor:
    """Divide every value by a power of the mean square of ``size`` neighbouring channels.

    ``y_c = x_c / (k + alpha / size * sum of x^2 over channels c - size // 2 to c + (size - 1) // 2) ** beta``

    x and y are ``(N, C, *)``.

    Conventions:
        The window holds the channel itself; an even window reaches one further down than up. Channels outside count as
        zero and the divisor stays ``size``. As in torch, and unlike the paper, alpha is divided by size.
        Accumulation: float64.

    Args:
        input: ``(N, C, *)`` with a spatial dimension, float16, bfloat16, float32 or float64. An empty batch passes.
        size: the number of channels in a window.
        alpha: the weight of the mean square, not negative.
        beta: the exponent.
        k: positive, so that silence is not divided by zero.
        caller: the layer that errors should name.

    Returns:
        y, in the type and memory format of the input.

    Raises:
        ShapeError: fewer than three dimensions.
        DtypeError: integers, complex numbers or a sparse tensor.
        ArgumentError: size, alpha or k out of range.

    Example:
        >>> import torch
        >>> local_response_norm(torch.tensor([[[3.0], [4.0]]]), 2, alpha=2.0, beta=1.0).flatten()
        tensor([0.3000, 0.1538])

    References:
        Krizhevsky, Sutskever and Hinton, ImageNet Classification with Deep Convolutional Neural Networks, 2012, 3.3.
    """
    checks.check_input(input, caller)
    check_response(size, alpha, beta, k, caller)
    if input.dim() < 3:
        got = f"(got {input.dim()} dimensions), shape {tuple(input.shape)}"
        checks.refuse(
            ShapeError, f"Expected 3D or higher dimensionality input {got}; for (N, C) pass input.unsqueeze(-1)", caller
        )
    if is_exporting():
        return F.local_response_norm(input, size, alpha, beta, k)
    if input.numel() == 0:
        return input.clone()
    x = input.to(wide(input))
    silence = [0] * (2 * (x.dim() - 2))
    padded = F.pad(x.square(), [*silence, size // 2, (size - 1) // 2])
    total = padded.narrow(1, 0, x.shape[1])
    for shift in range(1, size):
        total = total + padded.narrow(1, shift, x.shape[1])
    y = x * (k + alpha / size * total).pow(-beta)
    return y.to(input.dtype)


def check_response(size: int, alpha: float, beta: float, k: float, caller: nn.Module | None = None) -> None:
    """Refuse settings with which the divisor is not a positive number.

    Raises:
        ArgumentError: size below 1 or no integer, alpha negative, k not positive, or any of them not finite.
    """
    try:
        channels = operator.index(size)
    except TypeError:
        checks.refuse(ArgumentError, f"size must be an integer, got {type(size).__name__} {size!r}", caller)
    if channels < 1 or isinstance(size, bool):
        checks.refuse(ArgumentError, f"size must be at least 1, got {size}; 5 is the paper's", caller)
    for name, value, low in (("alpha", alpha, 0.0), ("beta", beta, -float("inf")), ("k", k, 0.0)):
        checks.check_number(name, value, {"alpha": 1e-4, "beta": 0.75, "k": 1.0}[name], caller)
        if not (low <= value < float("inf")) or (name == "k" and value == 0):
            allowed = {"alpha": "at least 0", "beta": "finite", "k": "positive"}[name]
            checks.refuse(ArgumentError, f"{name} must be {allowed}, got {value}", caller)
